"""No two workers, ranks or epochs draw the same random augmentation, and a seed gives it again."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import imagenet
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader

Draws = tuple[float, float, float]


class Drawing(Dataset[Draws]):
    """Each item is what a random transform would draw, from the three global generators."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, position: int) -> Draws:
        return random.random(), float(np.random.random()), float(torch.rand(()))


def draws(seed: int, rank: int, epoch: int) -> list[Draws]:
    """What the items of an epoch of a rank draw, in 2 workers."""
    place = imagenet.Place(rank, 4, 1, torch.device("cpu"))
    imagenet.seed_epoch(seed, epoch, place)
    loader = DataLoader(Drawing(), batch_size=2, num_workers=2, collate_fn=list)
    return [item for batch in loader for item in batch]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_every_draw_of_every_worker_rank_and_epoch_is_another_one_and_comes_back() -> None:
    runs = {
        (rank, epoch): draws(7, rank, epoch) for rank, epoch in itertools.product(range(3), (0, 1))
    }

    for generator in range(3):
        found = [item[generator] for run in runs.values() for item in run]
        assert len(set(found)) == len(found) == 3 * 2 * 8
    assert draws(7, 1, 1) == runs[1, 1]
    assert draws(8, 1, 1) != runs[1, 1]
