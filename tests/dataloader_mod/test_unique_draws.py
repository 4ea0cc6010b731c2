"""No two workers, ranks or epochs draw the same random augmentation, and a seed gives it again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import imagenet
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import IndexedDataset, StreamedShards
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores._memory import MemoryStore

Draws = tuple[float, float, float]

OBJECTS = {f"{number}.jpg": b"" for number in range(8)}


def draw(raw: bytes) -> Draws:
    """A transform that gives what it draws from the three global generators."""
    return random.random(), float(np.random.random()), float(torch.rand((), dtype=torch.float64))


def open_objects(rank: int) -> Any:
    del rank  # each reads all of them
    return IndexedDataset(
        Index.from_keys(OBJECTS),
        MemoryStore(OBJECTS),
        decode=bytes,
        transform=draw,
    )


def open_stream(rank: int) -> Any:
    return StreamedShards(
        "fake:24",
        decode=bytes,
        transform=draw,
        shuffle=True,
        shuffle_buffer=4,
        rank=rank,
        world_size=3,
    )


def draws(open_dataset: Callable[[int], Any], seed: int, rank: int, epoch: int) -> list[Draws]:
    """What the 8 samples of an epoch of a rank draw, in 2 workers."""
    imagenet.seed_epoch(seed, epoch, imagenet.Place(rank, 4, 1, torch.device("cpu")))
    dataset = open_dataset(rank)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    imagenet.set_epoch(loader, epoch)
    return [drawn for batch in loader for drawn, _ in batch]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("open_dataset", [open_objects, open_stream])
def test_every_draw_of_every_worker_rank_and_epoch_is_another_one_and_comes_back(
    open_dataset: Callable[[int], Any],
) -> None:
    runs = {
        (rank, epoch): draws(open_dataset, 7, rank, epoch)
        for rank, epoch in itertools.product(range(3), (0, 1))
    }

    for generator in range(3):
        found = [item[generator] for run in runs.values() for item in run]
        assert len(set(found)) == len(found) == 3 * 2 * 8
    assert draws(open_dataset, 7, 1, 1) == runs[1, 1]
    assert draws(open_dataset, 8, 1, 1) != runs[1, 1]
