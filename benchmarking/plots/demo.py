"""The demo's comparison of loaders, and its training.

Command: ``python -m benchmarking.plots.demo runs/demo``; reads ``results.jsonl`` and
``training/log.jsonl`` of that folder, and writes ``demo.png`` into it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarking.plots._figure import MEMORY, OURS, TORCH, finish_axes, open_figure, save
from benchmarking.results import Row, read_rows

_BARS = (
    ("torch_images_per_s", "torch's DataLoader,\nfrom the bucket", TORCH),
    ("ours_images_per_s", "ours,\nfrom the same bucket", OURS),
    ("ram_images_per_s", "torch's DataLoader,\nsame bytes in RAM", MEMORY),
)


class Epoch(NamedTuple):
    """What the trainer logged of one epoch."""

    train_acc1: float
    val_acc1: float
    wait_share: float
    """Of the training time, spent waiting for data."""
    images_per_s: float


def read_epochs(log: pathlib.Path) -> list[Epoch]:
    """Read the epochs of the trainer's log, in order."""
    epochs: list[Epoch] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        record: dict[str, Any] = json.loads(line)
        if record["kind"] == "epoch":
            train, val = record["train"], record["val"]
            epochs.append(
                Epoch(
                    train_acc1=train["acc1"],
                    val_acc1=val["acc1"],
                    wait_share=train["wait_s"] / train["time_s"],
                    images_per_s=train["num_images"] / train["time_s"],
                )
            )
    return epochs


def draw_demo(row: Row, epochs: Sequence[Epoch], path: pathlib.Path) -> pathlib.Path:
    """Draw both panels: images a second by loader, accuracy by epoch."""
    figure = open_figure(10.0, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1.0])
    shown = [(row.figures[name].median, label, colour) for name, label, colour in _BARS]
    bars = left.barh(
        [label for _, label, _ in shown],
        [rate for rate, _, _ in shown],
        color=[colour for _, _, colour in shown],
    )
    left.bar_label(bars, fmt="%.0f", padding=4)
    left.invert_yaxis()
    left.margins(x=0.12)
    left.set_xlabel("images/s")
    left.set_title(f"a store with {_latency_ms(row):g} ms latency", fontsize=10)
    numbers = range(1, len(epochs) + 1)
    right.plot(numbers, [e.val_acc1 for e in epochs], "o-", color=OURS, label="val")
    right.plot(numbers, [e.train_acc1 for e in epochs], "--", color=MEMORY, label="train")
    right.axhline(100 / int(row.settings["num_classes"] or 1), color=TORCH, linewidth=1, ls=":")
    right.annotate(
        "chance", (max(numbers, default=1), 100 / int(row.settings["num_classes"] or 1)),
        xytext=(0, -10), textcoords="offset points", ha="right", fontsize=8, color=TORCH,
    )  # fmt: skip
    right.set_xlabel("epoch")
    right.set_xticks(list(numbers))
    right.set_ylabel("accuracy, %")
    right.set_ylim(0, 100)
    right.set_title("ResNet-18 trained from that store with ours", fontsize=10)
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        finish_axes(axes)
    return save(figure, _caption(row, epochs), path)


def _latency_ms(row: Row) -> float:
    return float(row.settings["latency_median_s"] or 0.0) * 1e3


def _caption(row: Row, epochs: Sequence[Epoch]) -> str:
    # Of the bars, so that a reader can divide them; the row's "ram_ratio" is a median of few pairs.
    torch_per_s, ours_per_s, ram_per_s = (row.figures[name].median for name, _, _ in _BARS)
    ratio, ram_ratio = ours_per_s / torch_per_s, ours_per_s / ram_per_s
    waited = sum(epoch.wait_share for epoch in epochs) / max(1, len(epochs))
    return (
        f"From a store with {_latency_ms(row):g} ms latency, ours is {ratio:.0f} times as fast as "
        f"torch's DataLoader, {ram_ratio:.2f} times as fast as torch's over the same bytes in RAM, "
        f"and delivers the same batches, bit for bit. Training waited for data for "
        f"{100 * waited:.0f} % of its time. {row.settings['num_workers']} workers on "
        f"{row.environment.machine['num_cores']} cores, batch {row.settings['batch_size']}; "
        f"{row.environment.date[:10]}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read what the demo left, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="output of the demo")
    folder: pathlib.Path = parser.parse_args(arguments).folder
    row = read_rows(folder / "results.jsonl")[-1]
    print(draw_demo(row, read_epochs(folder / "training" / "log.jsonl"), folder / "demo.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
