"""How long does the first batch take?

Command: ``python -m benchmarking first_batch``

Held fixed: photographs of 110 kB at 100 ms (lognormal, sigma 0.3), train transforms, batch 64, two
workers, started anew for each measurement.

Measured in turns, each from ``iter()`` to the first batch: ours over the store; torch's over the
same bytes in RAM, which is the start of the workers and one batch's decode; and torch's over
samples that are empty tensors, which is the start of the workers alone. The bar: ours takes no
longer than the second and two median latencies.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch.utils.data import TensorDataset

from benchmarking.effort import Effort
from benchmarking.measure import Loader, OpenLoader
from benchmarking.results import Bar, Row, make_row
from benchmarking.workload import (
    LATENCY_SIGMA,
    describe,
    images_of,
    our_loader,
    ram_store,
    read_photos,
    remote_store,
    serve,
    torch_loader,
)

_LATENCY_S = 0.1


def measure_first_batch(effort: Effort) -> list[Row]:
    """Compare with what cannot be avoided."""
    photos = read_photos(effort.num_images)
    with serve(photos, _LATENCY_S) as server:
        remote = images_of(photos, remote_store(server))
        nothing = TensorDataset(torch.zeros(len(photos.raw)))
        sides: dict[str, OpenLoader] = {
            "start": functools.partial(torch_loader, nothing, effort),
            "RAM": functools.partial(torch_loader, images_of(photos, ram_store(photos)), effort),
            "threaded": functools.partial(our_loader, remote, effort),
            "asyncio": functools.partial(our_loader, remote, effort, fetch_impl="asyncio"),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(2 * effort.repeats):
            for name, open_loader in sides.items():
                times[name].append(_wait_s(open_loader()))
    bounds_s = [ram_s + 2 * _LATENCY_S for ram_s in times["RAM"]]
    return [
        make_row(
            "first_batch",
            f"{impl}, against worker start + one batch's decode + 2 x 100 ms",
            describe(
                photos,
                effort,
                fetch_impl=impl,
                latency_median_s=_LATENCY_S,
                latency_sigma=LATENCY_SIGMA,
            ),
            {
                "ratio": [
                    ours_s / bound_s for ours_s, bound_s in zip(times[impl], bounds_s, strict=True)
                ],
                "first_batch_s": times[impl],
                "worker_start_s": times["start"],
                "worker_start_and_decode_s": times["RAM"],
            },
            Bar(figure="ratio", bound=1.0, direction="at most"),
        )
        for impl in ("threaded", "asyncio")
    ]


def _wait_s(loader: Loader) -> float:
    begin_s = time.perf_counter()
    batches = iter(loader)
    next(batches)
    elapsed_s = time.perf_counter() - begin_s
    del batches
    return elapsed_s


CASES: dict[str, Callable[[Effort], list[Row]]] = {"100ms": measure_first_batch}
BARS = tuple(CASES)
