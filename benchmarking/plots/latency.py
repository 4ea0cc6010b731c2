"""Images a second against latency, ours over a store and torch's over RAM.

Command: ``python -m benchmarking.plots.latency runs/results.jsonl [--output latency.png]``; reads
the rows of the scenario ``loader_epoch``, and of each case the last row.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarking.plots._figure import MEMORY, OURS, TORCH, finish_axes, open_figure, save
from benchmarking.results import Row, read_rows
from benchmarking.statistics import Estimate

_STYLES = {"threaded": ("o", "-", OURS), "asyncio": ("s", "--", "#3fa34d")}


def draw_latency(rows: Sequence[Row], path: pathlib.Path) -> pathlib.Path:
    """Draw the figure.

    Raises:
        ValueError: There is no row of ours over a store.
    """
    latest = {row.case: row for row in rows if row.scenario == "loader_epoch"}
    over_store = [row for row in latest.values() if "against torch over RAM" in row.case]
    if not over_store:
        raise ValueError(
            f"rows: got {len(rows)} without one of a store at some latency, expected some; run "
            "`python -m benchmarking loader_epoch`"
        )
    figure = open_figure(7.0, 4.6)
    axes = figure.subplots()
    for impl, (marker, line, colour) in _STYLES.items():
        mine = sorted(
            (row for row in over_store if row.settings["fetch_impl"] == impl), key=_latency_ms
        )
        if mine:
            _plot(axes, mine, "ours_images_per_s", f"ours, {impl}", marker, line, colour)
    reference = sorted(
        (row for row in over_store if row.settings["fetch_impl"] == "threaded"), key=_latency_ms
    )
    _plot(axes, reference, "torch_images_per_s", "torch's, bytes in RAM", "", ":", MEMORY)
    by_boto3 = [row for row in latest.values() if "boto3" in row.case]
    if by_boto3:
        _plot(axes, by_boto3, "torch_images_per_s", "torch's with boto3", "v", "", TORCH)
    axes.set_xscale("log")
    ticks = sorted({_latency_ms(row) for row in over_store + by_boto3})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("median latency of the store, ms (lognormal, sigma 0.3; log scale)")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="best", bbox_to_anchor=(0.0, 0.15, 1.0, 0.6))
    finish_axes(axes)
    return save(figure, _caption(over_store), path)


def _plot(
    axes: Any, rows: Sequence[Row], name: str, label: str, marker: str, line: str, colour: str
) -> None:
    figures: list[Estimate] = [row.figures[name] for row in rows]
    axes.errorbar(
        [_latency_ms(row) for row in rows],
        [figure.median for figure in figures],
        yerr=[
            [figure.median - figure.low for figure in figures],
            [figure.high - figure.median for figure in figures],
        ],
        label=label,
        marker=marker,
        linestyle=line,
        color=colour,
        capsize=3,
    )


def _latency_ms(row: Row) -> float:
    return float(row.settings["latency_median_s"] or 0.0) * 1e3


def _caption(rows: Sequence[Row]) -> str:
    worst = min(rows, key=lambda row: row.figures["ratio"].median)
    ratio = worst.figures["ratio"].median
    claim = (
        "Latency costs nothing: over a store, ours is at least as fast as torch's over RAM."
        if ratio >= 1
        else f"Over a store, ours reaches {ratio:.2f} of torch's over RAM or more."
    )
    environment = worst.environment
    return (
        f"{claim} Lowest median of paired ratios {ratio:.2f}, at {_latency_ms(worst):g} ms. "
        f"{worst.settings['num_workers']} workers on {environment.machine['num_cores']} cores, "
        f"batch {worst.settings['batch_size']}, JPEGs of "
        f"{float(worst.settings['mean_image_bytes'] or 0) / 1e3:.0f} kB; medians of "
        f"{worst.settings['repeats']} runs with intervals. "
        f"Commit {environment.commit}, {environment.date[:10]}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read rows and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=pathlib.Path, help="results of loader_epoch, JSON lines")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/latency.png"))
    given = parser.parse_args(arguments)
    print(draw_latency(read_rows(given.rows), given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
