"""How fast a loader runs once it runs, at whose CPU, and whether two sides do the same work."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, RandomSampler

from benchmarking.effort import Effort
from benchmarking.processes import read_cpu_s
from benchmarking.progress import PROGRESS
from concurrent_dataloader.testing import ObjectServer

Loader = DataLoader[Any]
OpenLoader = Callable[[], Loader]
"""Makes a loader of batches ``(sample, positions)``; called once for each measurement."""

NUM_WARM_UP_BATCHES = 4
"""Batches a worker that are left out; torch sends two ahead, so the queue has been full."""

_ENDLESS = 10_000_000


class Speed(NamedTuple):
    """What one side did while the clock ran."""

    images_per_s: float
    client_cpu_ms_per_image: float
    """Of this process and its workers."""
    server_cpu_ms_per_image: float
    """Of the object server; 0 without one."""
    positions: list[int]
    """All that was delivered, the warm-up included, in order."""


class Measured(Protocol):
    """What a run says, at least."""

    @property
    def positions(self) -> list[int]:
        """All that was delivered, in order."""
        ...


M = TypeVar("M", bound=Measured)


def endless_sampler(dataset: Any, seed: int = 0) -> RandomSampler:
    """Shuffle the data set again and again; in the same order for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return RandomSampler(dataset, num_samples=_ENDLESS, generator=generator)


def measure_speed(
    loader: Loader,
    seconds: float,
    server: ObjectServer | None = None,
    num_warm_up_batches: int = NUM_WARM_UP_BATCHES,
) -> Speed:
    """Run a loader with an `endless_sampler` for a while, then leave it.

    The clock starts after the warm-up and stops while the loader still has work, so neither the
    start of the workers nor what they have fetched ahead counts for anybody.

    Args:
        loader: Delivers ``(sample, positions)``.
        seconds: How long the clock runs, at least; it stops when each worker has delivered the same
            number of batches.
        server: Where the bytes come from; its CPU is counted apart.
        num_warm_up_batches: Batches a worker that are left out.

    Raises:
        ValueError: It ended before.
    """
    torch.manual_seed(0)
    before = {child.pid for child in multiprocessing.active_children()}
    batches: Any = iter(loader)
    workers = {child.pid for child in multiprocessing.active_children()} - before
    client = [os.getpid(), *(pid for pid in workers if pid is not None)]
    positions: list[int] = []
    deliver_round = functools.partial(_deliver, batches, max(1, loader.num_workers), positions)
    for _ in range(num_warm_up_batches):
        deliver_round()
    client_before_s, server_before_s = read_cpu_s(client), read_server_cpu_s(server)
    begin_s = time.perf_counter()
    num_images = deliver_round()
    while time.perf_counter() - begin_s < seconds:
        num_images += deliver_round()
    elapsed_s = time.perf_counter() - begin_s
    client_s = read_cpu_s(client) - client_before_s
    server_s = read_server_cpu_s(server) - server_before_s
    del batches, deliver_round  # ends the workers
    return Speed(
        images_per_s=num_images / elapsed_s,
        client_cpu_ms_per_image=client_s / num_images * 1e3,
        server_cpu_ms_per_image=server_s / num_images * 1e3,
        positions=positions,
    )


def _deliver(batches: Iterator[Any], num_batches: int, positions: list[int]) -> int:
    """Take batches, note their positions, and count the images."""
    num_before = len(positions)
    for _ in range(num_batches):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"loader: ended after {len(positions)} images, expected more than are measured;"
                " give it an endless_sampler and a data set that is not empty"
            )
        positions.extend(batch[1].tolist())
    return len(positions) - num_before


def measure_epoch(loader: Loader, server: ObjectServer | None = None) -> Speed:
    """Run one epoch from ``iter()`` to the end: the start of the workers is part of it.

    The client's CPU is that of its workers and of this process in the meantime.

    Raises:
        ValueError: It delivered nothing.
    """
    torch.manual_seed(0)
    times_before, server_before_s = os.times(), read_server_cpu_s(server)
    begin_s = time.perf_counter()
    positions = [position for _, labels in loader for position in labels.tolist()]
    elapsed_s = time.perf_counter() - begin_s
    # Workers were waited for when the epoch ended, so that their CPU counts among the children's.
    client_s = sum(os.times()[:4]) - sum(times_before[:4])
    num_images = len(positions)
    if not num_images:
        raise ValueError("loader: delivered no image, expected one at least; is its set empty?")
    return Speed(
        images_per_s=num_images / elapsed_s,
        client_cpu_ms_per_image=client_s / num_images * 1e3,
        server_cpu_ms_per_image=(read_server_cpu_s(server) - server_before_s) / num_images * 1e3,
        positions=positions,
    )


def read_server_cpu_s(server: ObjectServer | None) -> float:
    """Read the CPU seconds that the server has used; 0 without one."""
    return 0.0 if server is None else server.counters().cpu_s


def measure_in_turns(sides: Mapping[str, Callable[[], M]], effort: Effort) -> dict[str, list[M]]:
    """Measure all sides, then all again in the opposite order, and so on: neighbours are pairs.

    Raises:
        RuntimeError: Two sides delivered different samples, or in a different order.
    """
    speeds: dict[str, list[M]] = {name: [] for name in sides}
    for repeat in range(effort.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            PROGRESS.report(f"run {repeat + 1} of {effort.repeats}: {name}")
            speeds[name].append(sides[name]())
    check_same_positions({name: [s.positions for s in runs] for name, runs in speeds.items()})
    return speeds


def check_same_positions(delivered: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Compare what the sides delivered, as far as the shorter one got.

    Raises:
        RuntimeError: They differ, and a comparison of different work is none.
    """
    runs = [(name, positions) for name, many in delivered.items() for positions in many]
    first_name, first = runs[0]
    for name, positions in runs[1:]:
        for where, (mine, other) in enumerate(zip(positions, first, strict=False)):
            if mine != other:
                raise RuntimeError(
                    f"{name}: got position {mine} as sample {where}, expected {other} as in "
                    f"{first_name}; the sides are not comparable"
                )


def check_same_batches(sides: Mapping[str, OpenLoader], num_batches: int) -> None:
    """Compare the first batches of all sides, bit for bit, random transforms included.

    Raises:
        RuntimeError: They differ.
    """
    taken = {name: _take(open_loader, num_batches) for name, open_loader in sides.items()}
    first_name, first = next(iter(taken.items()))
    for name, batches in taken.items():
        for number, (batch, other) in enumerate(zip(batches, first, strict=True)):
            if not all(torch.equal(mine, its) for mine, its in zip(batch, other, strict=True)):
                raise RuntimeError(
                    f"{name}: batch {number} differs from that of {first_name}, expected the same "
                    "bits; the sides are not comparable"
                )


def _take(open_loader: OpenLoader, num_batches: int) -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    taken: list[list[torch.Tensor]] = []
    batches: Iterable[Any] = open_loader()
    for batch in batches:
        # A copy, so that the check does not change how the loader uses its memory.
        taken.append([part.clone() for part in batch])
        if len(taken) == num_batches:
            break
    return taken


def column(speeds: Iterable[Measured], name: str) -> list[float]:
    """Pick one figure out of many runs."""
    values = [float(getattr(speed, name)) for speed in speeds]
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name}: got {values}, expected finite values")
    return values
