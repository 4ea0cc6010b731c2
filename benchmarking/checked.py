"""Whole epochs whose every sample is compared with the original, and whose requests are counted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from typing_extensions import Buffer, override

from benchmarking.effort import Effort
from benchmarking.measure import Loader, measure_epoch
from benchmarking.workload import Photos, PositionedImages, our_loader, train_transform
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores.base import Store
from concurrent_dataloader.testing import Fault, ObjectServer


class CheckedImages(PositionedImages):
    """Images whose raw bytes are compared with the originals', by hash, where they are decoded."""

    def __init__(self, photos: Photos, store: Store) -> None:
        super().__init__(Index.from_keys(photos.raw), store, transform=train_transform())
        self._digests = [_digest(raw) for raw in photos.raw.values()]

    @override
    def decode(self, position: int, raw: Buffer) -> Any:
        """Compare, then decode.

        Raises:
            RuntimeError: The bytes are not those of the object at ``position``.
        """
        if _digest(raw) != self._digests[position]:
            raise RuntimeError(
                f"{self._source(position)}: got {memoryview(raw).nbytes} bytes that are not the "
                "original's, expected the same; the store let a wrong body through"
            )
        return super().decode(position, raw)


def _digest(raw: Buffer) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()


class CheckedEpoch(NamedTuple):
    """What was delivered, all of it right, and what was asked of the server for it."""

    images_per_s: float
    positions: list[int]
    num_gets: int
    num_refused: int
    """Answers of 503."""
    num_faults: int
    """Requests that a fault hit."""

    @property
    def num_gets_per_sample(self) -> float:
        """GETs a sample, retries and hedges included."""
        return self.num_gets / len(self.positions)

    @property
    def extra_requests_share(self) -> float:
        """GETs beyond one a sample, as a share of the samples."""
        return self.num_gets_per_sample - 1.0

    @property
    def refused_share(self) -> float:
        """Share of the requests that the server refused."""
        return self.num_refused / self.num_gets


def draw_order(num_images: int, num_samples: int) -> list[int]:
    """Shuffle the set, again and again until there are enough samples; the same each time."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    while len(order) < num_samples:
        order += torch.randperm(num_images, generator=generator).tolist()
    return order[:num_samples]


def open_checked(
    photos: Photos,
    store: Store,
    effort: Effort,
    order: Sequence[int],
    num_fetch_workers: int | None = None,
) -> Loader:
    """Open our loader, with its defaults, over images that are checked."""
    images = CheckedImages(photos, store)
    return our_loader(images, effort, sampler=order, num_fetch_workers=num_fetch_workers)


def measure_checked(
    photos: Photos,
    store: Store,
    effort: Effort,
    order: list[int],
    server: ObjectServer,
    faults: Sequence[Fault] = (),
) -> CheckedEpoch:
    """Run an epoch in the given order, from ``iter()`` to the end, with faults or without.

    Raises:
        RuntimeError: A sample is wrong, missing, doubled or out of order.
    """
    server.set_faults(faults)
    server.reset_counters()
    speed = measure_epoch(open_checked(photos, store, effort, order), server)
    counters = server.counters()
    server.set_faults([])
    check_order(speed.positions, order)
    return CheckedEpoch(
        images_per_s=speed.images_per_s,
        positions=speed.positions,
        num_gets=counters.num_gets,
        num_refused=counters.num_by_status.get(503, 0),
        num_faults=sum(counters.num_by_fault.values()),
    )


def check_order(positions: Sequence[int], order: Sequence[int]) -> None:
    """Check that each sample was delivered once, in the sampler's order.

    Raises:
        RuntimeError: It was not.
    """
    if len(positions) != len(order):
        raise RuntimeError(f"epoch: got {len(positions)} samples, expected {len(order)}")
    for where, (got, expected) in enumerate(zip(positions, order, strict=True)):
        if got != expected:
            raise RuntimeError(
                f"epoch: got position {got} as sample {where}, expected {expected}, as the sampler "
                "has it"
            )
