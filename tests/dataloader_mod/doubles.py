"""Datasets whose samples take a while, and show in which order random numbers were drawn."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from typing_extensions import Buffer

from concurrent_dataloader.datasets.contract import StagedDataset
from concurrent_dataloader.errors import KeyNotFoundError


def wait_of(position: int) -> float:
    """Milliseconds that differ from sample to sample, so that they complete out of order."""
    return 0.001 * (1 + position * 7919 % 13)


class StagedSquares(StagedDataset[int, tuple[torch.Tensor, int]]):
    """Samples of position squared plus three random numbers, and the position as the label."""

    def __init__(self, num_samples: int, num_floats: int = 3) -> None:
        self.num_samples = num_samples
        self.num_floats = num_floats

    def __len__(self) -> int:
        return self.num_samples

    def fetch(self, position: int) -> bytes:
        time.sleep(wait_of(position))
        return str(position).encode()

    async def fetch_async(self, position: int) -> bytes:
        await asyncio.sleep(wait_of(position))
        return str(position).encode()

    def decode(self, position: int, raw: Buffer) -> int:
        assert int(bytes(raw)) == position
        return position

    def apply_transform(self, decoded: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(self.num_floats) + random.random() + np.random.rand()
        return noise + decoded**2, decoded


class MergedSquares(StagedSquares):
    """As its parent; positions with the same tens travel in one request, which is counted."""

    def __init__(self, num_samples: int, missing: int | None = None) -> None:
        super().__init__(num_samples)
        self.missing = missing
        self.num_requests = multiprocessing.get_context("fork").Value("i", 0)

    def plan_requests(self, positions: Sequence[int]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for number, position in enumerate(positions):
            groups.setdefault(position // 10, []).append(number)
        return list(groups.values())

    def _count(self, position: int) -> None:
        with self.num_requests.get_lock():
            self.num_requests.value += 1
        if position == self.missing:
            raise KeyNotFoundError(f"no object {position}")

    def fetch(self, position: int) -> bytes:
        self._count(position)
        return super().fetch(position)

    async def fetch_async(self, position: int) -> bytes:
        self._count(position)
        return await super().fetch_async(position)

    def fetch_many(self, positions: Sequence[int]) -> list[bytes]:
        assert len({position // 10 for position in positions}) == 1
        self._count(self.missing if self.missing in positions else -1)  # pyright: ignore[reportArgumentType]
        time.sleep(wait_of(positions[0]))
        return [str(position).encode() for position in positions]

    async def fetch_many_async(self, positions: Sequence[int]) -> list[bytes]:
        return self.fetch_many(positions)


class ThreadOnlySquares(StagedSquares):
    """As its parent, without an asynchronous fetch of its own."""

    fetch_async: Any = StagedDataset.fetch_async


class PlainSquares(Dataset[tuple[torch.Tensor, int]]):
    """A plain dataset without random numbers, as users write them."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        time.sleep(wait_of(position))
        return torch.full((3,), float(position**2)), position


class BatchedSquares(PlainSquares):
    """A plain dataset that gives whole batches."""

    def __getitems__(self, positions: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[position] for position in positions]


class AwaitedSquares(PlainSquares):
    """A plain dataset that offers a coroutine; its blocking twin must not be used with asyncio."""

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        raise AssertionError("the blocking method was called")

    async def getitem_async(self, position: int) -> tuple[torch.Tensor, int]:
        await asyncio.sleep(wait_of(position))
        return torch.full((3,), float(position**2)), position


class Failing(StagedSquares):
    """Fails at one position, in one stage."""

    def __init__(self, num_samples: int, stage: str, position: int, error: Exception) -> None:
        super().__init__(num_samples)
        self.stage, self.position, self.error = stage, position, error

    def fetch(self, position: int) -> bytes:
        if (self.stage, self.position) == ("fetch", position):
            raise self.error
        return super().fetch(position)

    async def fetch_async(self, position: int) -> bytes:
        if (self.stage, self.position) == ("fetch", position):
            raise self.error
        return await super().fetch_async(position)

    def decode(self, position: int, raw: Buffer) -> int:
        if (self.stage, self.position) == ("decode", position):
            raise self.error
        return super().decode(position, raw)

    def apply_transform(self, decoded: int) -> tuple[torch.Tensor, int]:
        if (self.stage, self.position) == ("transform", decoded):
            raise self.error
        return super().apply_transform(decoded)


class Stalling(StagedSquares):
    """Never gets an answer for one position."""

    def __init__(self, num_samples: int, position: int) -> None:
        super().__init__(num_samples)
        self.position = position

    def fetch(self, position: int) -> bytes:
        if position == self.position:
            time.sleep(3600)
        return super().fetch(position)

    async def fetch_async(self, position: int) -> bytes:
        if position == self.position:
            await asyncio.sleep(3600)
        return await super().fetch_async(position)


class Counting(IterableDataset[torch.Tensor]):
    """An iterable dataset that splits itself over the workers, as torch's documentation shows."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        for position in range(start, self.num_samples, step):
            yield torch.full((3,), float(position)) + torch.rand(3)


def collate_to_dict(samples):
    """A collate function of the user's own, with odd things in its result."""
    images = torch.stack([image for image, _ in samples])
    return {
        "images": images,
        "turned": images.t(),
        "labels": [label for _, label in samples],
        "count": len(samples),
        "first": images[0],
    }
