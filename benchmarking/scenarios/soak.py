"""Does anything pile up over many epochs with faults?

Command: ``python -m benchmarking soak [--only persistent fresh]``

Held fixed: 64 photographs of 110 kB in a store at 30 ms (lognormal, sigma 0.3), train transforms,
batch 8, two workers, 200 epochs (12 with ``--quick``), each shuffled anew; 5 % of the requests are
answered by 503, 2 % by a reset, 2 % by a body that is cut short, 1 % by another object's body. Each
sample is compared with the original, and each epoch holds each of them once.

Varied: whether the workers persist.

With the last batch of each epoch in hand, while its workers are there, are read, of this process
and of the workers: memory (heaps, stacks and shared memory, each shared page divided among those
that map it, so that shared memory of batches counts once; not the files of libraries, which others
map too), open files, and threads. The growth over the second half compares the lowest of the last
tenth of the epochs with the lowest of the tenth that ends in the middle: what leaks lifts the
lowest too, and what comes and goes does not.

Workers that are made anew begin with nothing, and have as many connections and threads as their
first samples happen to need, more in one epoch and fewer in the next; only this process can hold
more and more. Its figures (``main``) stand apart; where workers are made anew the bars are on them.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import RandomSampler

from benchmarking.checked import CheckedImages
from benchmarking.effort import Effort
from benchmarking.processes import count_open_files, read_memory
from benchmarking.progress import PROGRESS
from benchmarking.results import Bar, Row, make_row
from benchmarking.workload import (
    LATENCY_SIGMA,
    NUM_WORKERS,
    Photos,
    read_photos,
    remote_store,
    serve,
)
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.testing import Fault, ObjectServer

_NUM_IMAGES = 64
_BATCH_SIZE = 8
_LATENCY_S = 0.03
_MIB = 2**20
_FAULTS = (
    Fault("slow_down", rate=0.05),
    Fault("reset_before_body", rate=0.02),
    Fault("truncated_body", rate=0.02),
    Fault("foreign_body", rate=0.01),
)


class _Use(NamedTuple):
    """What this process and its workers have at one moment."""

    memory_mib: float
    main_memory_mib: float
    """Of this process alone."""
    num_open_files: int
    main_num_open_files: int
    num_threads: int
    main_num_threads: int


def measure_epochs(effort: Effort, *, is_persistent: bool) -> list[Row]:
    """Run epochs of a small set with faults and look at what is held after each."""
    num_epochs = 12 if effort.is_quick else 200
    photos = read_photos(min(_NUM_IMAGES, effort.num_images))
    with serve(photos, _LATENCY_S) as server:
        uses = _run_epochs(photos, server, num_epochs, is_persistent=is_persistent)
        num_faults = sum(server.counters().num_by_fault.values())
    memory_mib = [use.memory_mib for use in uses]
    main_memory_mib = [use.main_memory_mib for use in uses]
    num_open_files = [use.num_open_files for use in uses]
    main_num_open_files = [use.main_num_open_files for use in uses]
    num_threads = [use.num_threads for use in uses]
    main_num_threads = [use.main_num_threads for use in uses]
    settings = {
        "num_images": len(photos.raw),
        "batch_size": _BATCH_SIZE,
        "num_workers": NUM_WORKERS,
        "persistent_workers": is_persistent,
        "num_epochs": num_epochs,
        "num_faults": num_faults,
        "latency_median_s": _LATENCY_S,
        "latency_sigma": LATENCY_SIGMA,
        **{f"{fault.kind}_rate": fault.rate for fault in _FAULTS},
    }
    main = "" if is_persistent else "main_"
    who = f"{num_epochs} epochs with faults, workers {'persist' if is_persistent else 'anew'}"
    return [
        make_row(
            "soak",
            f"{who}: memory",
            settings,
            {
                "growth_share": grow(memory_mib) / _middle(memory_mib),
                "main_growth_share": grow(main_memory_mib) / _middle(main_memory_mib),
                "memory_mib": memory_mib,
                "main_memory_mib": main_memory_mib,
            },
            Bar(figure=f"{main}growth_share", bound=0.02, direction="at most"),
        ),
        make_row(
            "soak",
            f"{who}: open files",
            settings,
            {
                "num_more_open_files": grow(num_open_files),
                "num_more_main_open_files": grow(main_num_open_files),
                "num_open_files": num_open_files,
            },
            Bar(figure=f"num_more_{main}open_files", bound=0, direction="at most"),
        ),
        make_row(
            "soak",
            f"{who}: threads",
            settings,
            {
                "num_more_threads": grow(num_threads),
                "num_more_main_threads": grow(main_num_threads),
                "num_threads": num_threads,
            },
            Bar(figure=f"num_more_{main}threads", bound=0, direction="at most"),
        ),
    ]


def _run_epochs(
    photos: Photos, server: ObjectServer, num_epochs: int, *, is_persistent: bool
) -> list[_Use]:
    others = {child.pid for child in multiprocessing.active_children()}
    images = CheckedImages(photos, remote_store(server))
    loader = DataLoader(
        images,
        batch_size=_BATCH_SIZE,
        sampler=RandomSampler(images),
        num_workers=NUM_WORKERS,
        persistent_workers=is_persistent,
    )
    server.set_faults(_FAULTS)
    uses: list[_Use] = []
    for epoch in range(num_epochs):
        PROGRESS.report(f"epoch {epoch + 1} of {num_epochs}")
        torch.manual_seed(epoch)
        positions: list[int] = []
        batches = iter(loader)
        for _ in range(len(loader)):
            positions += next(batches)[1].tolist()
        gc.collect()
        workers = {child.pid for child in multiprocessing.active_children()} - others
        uses.append(_read_use([os.getpid(), *(pid for pid in workers if pid is not None)]))
        if next(batches, None) is not None or sorted(positions) != list(range(len(images))):
            raise RuntimeError(
                f"epoch {epoch}: got {len(positions)} samples and maybe more, expected each of "
                f"{len(images)} once"
            )
        del batches
    return uses


def _read_use(pids: Sequence[int]) -> _Use:
    """Read what processes have, this one first among them."""
    memory_mib = [read_memory(pid).own_bytes / _MIB for pid in pids]
    num_open_files = [count_open_files(pid) for pid in pids]
    num_threads = [len(list(pathlib.Path(f"/proc/{pid}/task").iterdir())) for pid in pids]
    return _Use(
        memory_mib=sum(memory_mib),
        main_memory_mib=memory_mib[0],
        num_open_files=sum(num_open_files),
        main_num_open_files=num_open_files[0],
        num_threads=sum(num_threads),
        main_num_threads=num_threads[0],
    )


def grow(values: Sequence[float]) -> float:
    """Compare the lowest of the last tenth with the lowest of the tenth that ends in the middle."""
    return min(values[-_tenth(values) :]) - _middle(values)


def _middle(values: Sequence[float]) -> float:
    half = len(values) // 2
    return min(values[half - _tenth(values) : half])


def _tenth(values: Sequence[float]) -> int:
    return max(1, len(values) // 10)


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "persistent": functools.partial(measure_epochs, is_persistent=True),
    "fresh": functools.partial(measure_epochs, is_persistent=False),
}
BARS = tuple(CASES)
