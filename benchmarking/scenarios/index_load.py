"""What does an index of a million keys cost?

Command: ``python -m benchmarking index_load [--only load growth]``

Held fixed: 1,000,000 keys (20,000 with ``--quick``) like those of ImageNet, packed.

Varied: ``load``: the time to load the packed form, in this process, from the page cache, by its
own name and by that of the JSON that it was packed from. ``growth``: the private memory of the
workers of our loader after each has delivered two batches, and at the end of a shuffled epoch over
all keys, whose samples are the keys' lengths; beside it the same for torch's loader over a Python
list of the keys, whose pages are copied as reference counts change.
"""

from __future__ import annotations

import functools
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.data
from typing_extensions import Buffer

from benchmarking.effort import Effort
from benchmarking.processes import read_memory
from benchmarking.results import Bar, Row, Setting, make_row
from benchmarking.workload import NUM_WORKERS
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets.contract import StagedDataset
from concurrent_dataloader.index import Index

_SCENARIO = "index_load"
_BATCH_SIZE = 1000
_MIB = 2**20


class KeyLengths(StagedDataset[int, int]):
    """Samples that need nothing but the index: how long a key is."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __len__(self) -> int:
        """Count the keys."""
        return len(self._index)

    def fetch(self, position: int) -> Buffer:
        """Look the key up."""
        return self._index.key(position).encode()

    def decode(self, position: int, raw: Buffer) -> int:
        """Measure it."""
        return memoryview(raw).nbytes

    def apply_transform(self, decoded: int) -> int:
        """Change nothing."""
        return decoded


class ListedKeyLengths(torch.utils.data.Dataset[int]):
    """The same over a Python list."""

    def __init__(self, keys: list[str]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        """Count the keys."""
        return len(self._keys)

    def __getitem__(self, position: int) -> int:
        """Measure the key."""
        return len(self._keys[position].encode())


def measure_load(effort: Effort) -> list[Row]:
    """Measure how long the packed form takes to load, to the first key."""
    with tempfile.TemporaryDirectory() as folder:
        keys = _make_keys(effort)
        packed = _save(keys, pathlib.Path(folder))
        index_json = pathlib.Path(folder) / "train.json"
        Index.from_keys(keys).save_json(index_json)
        Index.load(index_json, pack_above_keys=0)  # packs it, once, beside the JSON
        packed_s = [_load_s(packed, keys[-1]) for _ in range(2 * effort.repeats)]
        by_json_s = [_load_s(index_json, keys[-1]) for _ in range(2 * effort.repeats)]
    return [
        make_row(
            _SCENARIO,
            f"load of {len(keys):,} packed keys",
            _settings(effort, keys),
            {"load_s": packed_s, "by_name_of_json_load_s": by_json_s},
            Bar(figure="load_s", bound=0.2, direction="at most"),
        )
    ]


def _load_s(path: pathlib.Path, last_key: str) -> float:
    """Time a load up to the look-up of a key."""
    begin_s = time.perf_counter()
    index = Index.load(path, pack_above_keys=0)
    last = index.key(len(index) - 1)
    elapsed_s = time.perf_counter() - begin_s
    if last != last_key:
        raise RuntimeError(f"{path.name}: got the last key {last!r}, expected {last_key!r}")
    return elapsed_s


def measure_growth(effort: Effort) -> list[Row]:
    """Measure what a worker's private memory gains over an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        keys = _make_keys(effort)
        num_bytes = sum(len(key.encode()) for key in keys)
        index = Index.load(_save(keys, pathlib.Path(folder)))
        ours = _measure_growth_mib(
            functools.partial(DataLoader, KeyLengths(index)), num_bytes, effort
        )
        listed = _measure_growth_mib(
            functools.partial(torch.utils.data.DataLoader, ListedKeyLengths(keys)),
            num_bytes,
            effort,
        )
    return [
        make_row(
            _SCENARIO,
            f"growth of a worker's private memory over an epoch of {len(keys):,} keys",
            _settings(effort, keys),
            {"growth_mib": ours, "python_list_growth_mib": listed},
            # 10 MB, as the bar is written, in MiB.
            Bar(figure="growth_mib", bound=round(10e6 / _MIB, 2), direction="at most"),
        )
    ]


def _measure_growth_mib(
    open_loader: Callable[..., Any], num_bytes: int, effort: Effort
) -> list[float]:
    """Run an epoch; the growth of each worker, one value a worker and repeat."""
    growth: list[float] = []
    for _ in range(1 if effort.is_quick else 2):
        before_start = {child.pid for child in multiprocessing.active_children()}
        loader = open_loader(
            batch_size=_BATCH_SIZE,
            shuffle=True,
            num_workers=NUM_WORKERS,
            persistent_workers=True,
        )
        num_seen = 0
        before: dict[int, int] = {}
        for number, batch in enumerate(loader):
            num_seen += int(batch.sum())
            if number == 2 * NUM_WORKERS - 1:
                workers = {child.pid for child in multiprocessing.active_children()} - before_start
                before = {pid: read_memory(pid).private_bytes for pid in workers if pid is not None}
        growth += [(read_memory(pid).private_bytes - at) / _MIB for pid, at in before.items()]
        del loader
        if num_seen != num_bytes:
            raise RuntimeError(f"epoch: got {num_seen} bytes of keys, expected {num_bytes}")
    return growth


def _make_keys(effort: Effort) -> list[str]:
    num_keys = 20_000 if effort.is_quick else 1_000_000
    return [
        f"train/n{number % 1000:08d}/n{number % 1000:08d}_{number:07d}.JPEG"
        for number in range(num_keys)
    ]


def _save(keys: list[str], folder: pathlib.Path) -> pathlib.Path:
    path = folder / "index.packed"
    Index.from_keys(keys).save_packed(path)
    return path


def _settings(effort: Effort, keys: list[str]) -> dict[str, Setting]:
    return {
        "num_keys": len(keys),
        "batch_size": _BATCH_SIZE,
        "num_workers": NUM_WORKERS,
        "repeats": effort.repeats,
    }


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "load": measure_load,
    "growth": measure_growth,
}
BARS = tuple(CASES)
