"""A loader that nobody refers to goes at once, and its workers with it: no ring of references."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch.utils.data

from concurrent_dataloader import DataLoader


class Positions(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, position: int) -> int:
        return position


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


@pytest.mark.parametrize("dataset", [Positions(), Stream()], ids=["map", "iterable"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_loader_goes_without_the_garbage_collector(
    dataset: Any, num_workers: int, is_whole: bool
) -> None:
    loader = DataLoader(
        dataset, batch_size=2, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    iterator = iter(loader)
    next(iterator)
    if is_whole:
        list(iterator)
    gc.collect()
    gc.disable()
    try:
        ends = [weakref.ref(loader), weakref.ref(iterator)]
        del loader, iterator

        assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()
