"""What does one sample cost, by stage?

Command: ``python -m benchmarking dataset_item``

Held fixed: photographs of 110 kB, train transforms, one process, one thread, batches of 64.

Measured: CPU of this process for each stage, over the same samples one stage after the other:
fetch from RAM, decode, transform, and collate into fresh memory as torch's loader does without
workers. The first batch is left out. No bar: it says where the time of `loader_epoch` goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import default_collate

from benchmarking.effort import Effort
from benchmarking.results import Row, make_row
from benchmarking.workload import describe, images_of, ram_store, read_photos


def measure_stages(effort: Effort) -> list[Row]:
    """Measure each stage of the samples' way, without a loader."""
    photos = read_photos(effort.num_images)
    images = images_of(photos, ram_store(photos))
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stages_ms: dict[str, list[float]] = {
        stage: [] for stage in ("fetch", "decode", "transform", "collate")
    }
    try:
        for repeat in range(effort.repeats + 1):
            positions = [
                (repeat * effort.batch_size + at) % len(photos.raw)
                for at in range(effort.batch_size)
            ]
            spent_ms = _measure_batch(images, positions)
            for stage, cpu_ms in spent_ms.items() if repeat else ():
                stages_ms[stage].append(cpu_ms / len(positions))
    finally:
        torch.set_num_threads(num_threads)
    return [
        make_row(
            "dataset_item",
            "one sample from RAM, one core",
            {**describe(photos, effort), "num_workers": 0, "num_warm_up_batches": 1},
            {f"{stage}_cpu_ms_per_image": values for stage, values in stages_ms.items()},
        )
    ]


def _measure_batch(images: Any, positions: list[int]) -> dict[str, float]:
    spent_ms: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begin_s = time.process_time()
        result = work()
        spent_ms[stage] = (time.process_time() - begin_s) * 1e3
        return result

    raw = timed("fetch", lambda: [images.fetch(position) for position in positions])
    decoded = timed("decode", lambda: list(map(images.decode, positions, raw)))
    samples = timed("transform", lambda: list(map(images.apply_transform, decoded)))
    timed("collate", lambda: default_collate(samples))
    return spent_ms


CASES: dict[str, Callable[[Effort], list[Row]]] = {"ram": measure_stages}
BARS: tuple[str, ...] = ()
