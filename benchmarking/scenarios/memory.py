"""Does memory stay flat over epochs?

Command: ``python -m benchmarking memory [--only persistent fresh]``

Held fixed: 256 photographs of 110 kB in a store at 5 ms, train transforms, batch 32, two workers,
30 epochs (8 with ``--quick``), shuffled.

Varied: whether the workers persist.

After each epoch, with its last batch dropped, the memory of this process and its workers is read:
the resident pages of all, those that are shared divided among their users (``Pss``), so that
shared memory of batches counts once. The first three epochs are the warm-up; the growth is that of
the most that was seen after them, over what was there after the third. Open files are counted too,
since they are what keeps shared memory that nobody maps.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
from collections.abc import Callable

from torch.utils.data import RandomSampler

from benchmarking.effort import Effort
from benchmarking.processes import count_open_files, read_memory
from benchmarking.results import Bar, Row, make_row
from benchmarking.workload import NUM_WORKERS, images_of, read_photos, remote_store, serve
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader

_NUM_IMAGES = 256
_BATCH_SIZE = 32
_MIB = 2**20


def measure_epochs(effort: Effort, *, is_persistent: bool) -> list[Row]:
    """Run epochs of a small set and look at the memory after each."""
    num_epochs = 8 if effort.is_quick else 30
    photos = read_photos(min(_NUM_IMAGES, effort.num_images))
    resident_mib: list[float] = []
    num_open_files: list[float] = []
    with serve(photos, 0.005) as server:
        before = {child.pid for child in multiprocessing.active_children()}
        images = images_of(photos, remote_store(server))
        loader = DataLoader(
            images,
            batch_size=_BATCH_SIZE,
            sampler=RandomSampler(images),
            num_workers=NUM_WORKERS,
            persistent_workers=is_persistent,
        )
        for _ in range(num_epochs):
            num_images = sum(len(positions) for _, positions in loader)
            if num_images != len(photos.raw):
                raise RuntimeError(f"epoch: got {num_images} images, expected {len(photos.raw)}")
            gc.collect()
            workers = {child.pid for child in multiprocessing.active_children()} - before
            pids = [os.getpid(), *(pid for pid in workers if pid is not None)]
            resident_mib.append(sum(read_memory(pid).proportional_bytes for pid in pids) / _MIB)
            num_open_files.append(float(sum(map(count_open_files, pids))))
        del loader
    growth = max(resident_mib[3:]) / resident_mib[2] - 1.0
    return [
        make_row(
            "memory",
            f"{num_epochs} epochs of a small set, workers {'persist' if is_persistent else 'anew'}",
            {
                "num_images": len(photos.raw),
                "batch_size": _BATCH_SIZE,
                "num_workers": NUM_WORKERS,
                "persistent_workers": is_persistent,
                "num_epochs": num_epochs,
                "num_warm_up_epochs": 3,
                "latency_median_s": 0.005,
            },
            {
                "growth_share": growth,
                "resident_mib": resident_mib,
                "num_open_files": num_open_files,
            },
            Bar(figure="growth_share", bound=0.02, direction="at most"),
        )
    ]


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "persistent": functools.partial(measure_epochs, is_persistent=True),
    "fresh": functools.partial(measure_epochs, is_persistent=False),
}
BARS = tuple(CASES)
