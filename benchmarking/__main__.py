"""``python -m benchmarking SCENARIO``: measure, print a table, keep the rows.

``list`` prints the scenarios with their questions and cases; ``bars`` runs every case that has a
bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from benchmarking import scenarios
from benchmarking.effort import QUICK, Effort
from benchmarking.progress import PROGRESS
from benchmarking.results import Row, append_rows, markdown_table, print_rows
from concurrent_dataloader import core_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        The exit status: 0, or 1 if a bar was missed by more than noise. A wrong call exits with 2.
    """
    if arguments is None:  # a process of its own
        core_files.forbid()
    given = _parse(arguments)
    if given.scenario == "list":
        _print_list()
        return 0
    names = scenarios.NAMES if given.scenario == "bars" else (given.scenario,)
    effort = _read_effort(given)
    rows: list[Row] = []
    for name in names:
        for case in _choose_cases(name, given):
            rows += _run_case(name, case, effort, given.output)
    if given.scenario == "bars":
        table = given.output.with_suffix(".md")
        table.write_text(markdown_table(rows) + "\n", encoding="utf-8")
        print(f"\ntable: {table}")
        print_rows(rows)
    print(f"rows: {given.output}")
    return 1 if any(row.verdict == "NOT REACHED" for row in rows) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarking", description=__doc__)
    parser.add_argument("scenario", choices=["list", "bars", *scenarios.NAMES])
    parser.add_argument("--repeats", type=int, help="pairs of a comparison")
    parser.add_argument("--seconds", type=float, help="measured time of each side of a pair")
    parser.add_argument("--images", type=int, help="size of the data set")
    parser.add_argument("--quick", action="store_true", help="minutes less, and no verdict")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases of the scenario")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/results.jsonl"))
    parser.set_defaults(parser=parser)
    return parser.parse_args(arguments)


def _read_effort(given: argparse.Namespace) -> Effort:
    chosen = {
        "repeats": given.repeats,
        "seconds": given.seconds,
        "num_images": given.images,
    }
    base = QUICK if given.quick else Effort()
    return dataclasses.replace(base, **{k: v for k, v in chosen.items() if v is not None})


def _choose_cases(name: str, given: argparse.Namespace) -> list[str]:
    scenario = scenarios.open_scenario(name)
    if given.only is None:
        return list(scenario.bars if given.scenario == "bars" else scenario.cases)
    unknown = [case for case in given.only if case not in scenario.cases]
    if unknown and given.scenario != "bars":
        given.parser.error(
            f"--only: got {unknown[0]!r}, expected a case of {name}: {', '.join(scenario.cases)}"
        )
    return [case for case in given.only if case in scenario.cases]


def _run_case(name: str, case: str, effort: Effort, output: pathlib.Path) -> list[Row]:
    """Run one case; its rows are kept at once, so that what fails later loses nothing."""
    print(f"\n== {name} {case}", flush=True)
    begin_s = time.perf_counter()
    try:
        rows = scenarios.open_scenario(name).cases[case](effort)
    finally:
        PROGRESS.clear()
    append_rows(output, rows)
    print_rows(rows)
    print(f"took {time.perf_counter() - begin_s:.0f} s", flush=True)
    return rows


def _print_list() -> None:
    for name in scenarios.NAMES:
        scenario = scenarios.open_scenario(name)
        print(f"{name}: {scenario.question}")
        for case in scenario.cases:
            print(f"    {case}{'  (has a bar)' if case in scenario.bars else ''}")


if __name__ == "__main__":
    sys.exit(main())
