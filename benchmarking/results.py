"""One row = settings, figures, machine, versions, commit, date; JSON lines out and in.

Tables for people come from the same rows. Each figure's name ends with its unit.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from benchmarking.statistics import Estimate, estimate

Setting = str | int | float | bool | None

# The suffix of a figure's name, and what is printed for it. Longest first: `_per_s` before `_s`.
_UNITS = {
    "images_per_s": "images/s",
    "requests_per_s": "requests/s",
    "mbit_per_s": "Mbit/s (10^6 bit)",
    "_cpu_ms_per_image": "ms CPU/image",
    "_cpu_ms_per_request": "ms CPU/request",
    "_share": "of 1",
    "ratio": "x",
    "_mib": "MiB",
    "_bytes": "bytes",
    "_ms": "ms",
    "_s": "s",
}
_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "obstore",
    "boto3",
    "aiobotocore",
    "aiohttp",
)


def unit_of(figure: str) -> str:
    """Read the unit off a figure's name.

    Raises:
        ValueError: The name ends in no unit that is known here.
    """
    if figure.startswith("num_"):
        return "count"
    for suffix, unit in _UNITS.items():
        if figure.endswith(suffix):
            return unit
    raise ValueError(
        f"figure {figure!r}: its name ends in no unit, expected one of "
        f"{', '.join(_UNITS)} or a name that begins with 'num_'; add the unit to the name"
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """What a figure's median has to reach."""

    figure: str
    """Name of a figure of the same row."""
    bound: float
    direction: Literal["at least", "at most"] = "at least"

    def is_reached_by(self, value: float) -> bool:
        """Tell whether a value satisfies the bar."""
        return value >= self.bound if self.direction == "at least" else value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.direction == "at least" else "≤"
        unit = unit_of(self.figure)
        return f"{sign} {self.bound:g}" if unit == "x" else f"{sign} {self.bound:g} {unit}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where and when a row was measured, and with what."""

    machine: Mapping[str, Setting]
    versions: Mapping[str, str]
    commit: str
    """Of this repository; ``+changes`` when files differed from it, ``unknown`` outside of one."""
    date: str
    """ISO 8601, UTC."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One result: everything that is needed to have it again, and what was found.

    Raises:
        ValueError: A figure's name has no unit, or the bar's figure is not in the row.
    """

    scenario: str
    case: str
    """What sets this row apart within its scenario, in words."""
    settings: Mapping[str, Setting]
    figures: Mapping[str, Estimate]
    """By name; the unit ends the name."""
    environment: Environment
    bar: Bar | None = None

    def __post_init__(self) -> None:
        for figure in self.figures:
            unit_of(figure)
        if self.bar is not None and self.bar.figure not in self.figures:
            raise ValueError(
                f"bar: got the figure {self.bar.figure!r}, expected one of {sorted(self.figures)}"
            )

    @property
    def verdict(self) -> str:
        """Whether the median reaches the bar, and the whole interval agrees; "" without a bar."""
        if self.bar is None:
            return ""
        figure = self.figures[self.bar.figure]
        ends = [self.bar.is_reached_by(end) for end in (figure.low, figure.high)]
        if self.bar.is_reached_by(figure.median):
            return "reached" if all(ends) else "reached, within noise"
        return "not reached, within noise" if any(ends) else "NOT REACHED"


def make_row(
    scenario: str,
    case: str,
    settings: Mapping[str, Setting],
    figures: Mapping[str, Estimate | Sequence[float] | float],
    bar: Bar | None = None,
) -> Row:
    """Make a row of this process, machine and moment."""
    estimates = {
        name: figure if isinstance(figure, Estimate) else estimate(figure)
        for name, figure in figures.items()
    }
    return Row(
        scenario=scenario,
        case=case,
        settings=dict(settings),
        figures=estimates,
        environment=read_environment(),
        bar=bar,
    )


def read_environment() -> Environment:
    """Describe this machine and this moment. Holds no user, host name, address, or secret."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine: dict[str, Setting] = {
        **_read_machine(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
    }
    return Environment(machine=machine, versions=_read_versions(), commit=_read_commit(), date=date)


@functools.cache
def _read_machine() -> dict[str, Setting]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _read_cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def _read_cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _read_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@functools.cache
def _read_commit() -> str:
    folder = pathlib.Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD").strip()
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changes.strip() else commit


def _git(folder: pathlib.Path, *arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=10
    )
    return answer.stdout


def to_json(row: Row) -> str:
    """Write a row as one line of JSON, with each figure's values, to be judged anew."""
    document = dataclasses.asdict(row)
    document["figures"] = {
        name: {
            "values": list(figure.values),
            "median": figure.median,
            "low": figure.low,
            "high": figure.high,
            "unit": unit_of(name),
        }
        for name, figure in row.figures.items()
    }
    document["verdict"] = row.verdict
    return json.dumps(document)


def from_json(line: str) -> Row:
    """Read what `to_json` wrote.

    Raises:
        ValueError: The line is no row.
    """
    try:
        document: dict[str, Any] = json.loads(line)
        return Row(
            scenario=document["scenario"],
            case=document["case"],
            settings=document["settings"],
            figures={n: estimate(f["values"]) for n, f in document["figures"].items()},
            environment=Environment(**document["environment"]),
            bar=None if document["bar"] is None else Bar(**document["bar"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results: the line {line[:60]!r} is no row ({error!r}), expected JSON of a row"
        ) from error


def append_rows(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Add rows to a file of JSON lines; makes the file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read_rows(path: pathlib.Path) -> list[Row]:
    """Read a file of JSON lines, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [from_json(line) for line in lines if line.strip()]


def format_estimate(figure: Estimate) -> str:
    """Write ``median [low, high]``, or the value if there is but one; three digits that count."""
    shown = _format(figure.median, figure.median)
    if len(figure.values) == 1:
        return shown
    return f"{shown} [{_format(figure.low, figure.median)}, {_format(figure.high, figure.median)}]"


def _format(value: float, scale: float) -> str:
    digits = 2 if scale == 0 else min(6, max(0, 2 - math.floor(math.log10(abs(scale)))))
    return f"{value:.{digits}f}"


def markdown_table(rows: Sequence[Row]) -> str:
    """Draw the rows as a table: what was compared, the figure, the bar, the verdict.

    A row with a bar shows the figure of the bar; the others follow in one cell.
    """
    lines = [
        "| scenario | case | median [interval] | bar | verdict | other figures |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = row.bar.figure if row.bar is not None else next(iter(row.figures))
        others = "; ".join(
            f"{name} {format_estimate(figure)}"
            for name, figure in row.figures.items()
            if name != first
        )
        unit = unit_of(first)
        shown = f"{first} {format_estimate(row.figures[first])}" + (
            "" if unit in ("x", "count") else f" {unit}"
        )
        bar = "" if row.bar is None else str(row.bar)
        lines.append(
            f"| {row.scenario} | {row.case} | {shown} | {bar} | {row.verdict} | {others} |"
        )
    return "\n".join(lines)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table, and under it where and when it was measured."""
    print(markdown_table(rows))
    if rows:
        where = rows[-1].environment
        machine = ", ".join(f"{name} {value}" for name, value in where.machine.items())
        versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
        print(f"\n{machine}\n{versions}\ncommit {where.commit}, {where.date}")
    sys.stdout.flush()
