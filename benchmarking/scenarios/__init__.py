"""One question a file. Each has ``CASES``, functions from an `Effort` to rows, and ``BARS``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarking.effort import Effort
from benchmarking.results import Row

Case = Callable[[Effort], list[Row]]

NAMES = (
    "loader_epoch",
    "store_get",
    "first_batch",
    "shard_read",
    "shard_write",
    "lmdb_read",
    "cache_read",
    "index_load",
    "memory",
    "dataset_item",
    "faults",
    "in_flight",
    "outage",
    "soak",
    "server",
)


class Scenario(NamedTuple):
    """A question, and the ways to ask it."""

    question: str
    cases: Mapping[str, Case]
    bars: tuple[str, ...]
    """Names of the cases whose rows have a bar."""


def open_scenario(name: str) -> Scenario:
    """Import a scenario; torch and the clients are imported no earlier.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"scenario: got {name!r}, expected one of {', '.join(NAMES)}")
    module = importlib.import_module(f"benchmarking.scenarios.{name}")
    question = (module.__doc__ or "").partition("\n")[0]
    return Scenario(question, module.CASES, module.BARS)
