"""A loader that nobody refers to goes at once, and its workers with it: no ring of references."""

from __future__ import annotations

import gc
import subprocess
import sys
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


PROGRAM = """
import errno, gc, os, threading

num_closed_twice = 0
real_close = os.close

def close(file):
    global num_closed_twice
    try:
        real_close(file)
    except OSError as error:
        num_closed_twice += error.errno == errno.EBADF
        raise

os.close = close  # before multiprocessing takes it

import torch
from concurrent_dataloader import DataLoader

threading.excepthook = lambda _: None  # of threads that send by what is closed
data = torch.utils.data.TensorDataset(torch.arange(4))

def leave_in_a_cycle():
    cycle = [iter(DataLoader(data, 4, num_workers=2))]
    # The second worker has been sent nothing, so no thread holds its queue's connections. Those
    # that a variable holds at a collection come before those that a list holds in the next one.
    queue = cycle[0]._index_queues[1]
    reader, writer = queue._reader, queue._writer
    del queue
    gc.collect()
    cycle.append(cycle)

gc.disable()
for _ in range(3):
    leave_in_a_cycle()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("QueueFeeder"):
            thread.join()
print(num_closed_twice)
"""


@pytest.mark.slow
def test_an_iterator_that_the_garbage_collector_finds_closes_each_file_once() -> None:
    """Closed again, its number may be another's by then: of a file of the user's own."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=90, check=False
    )

    assert (process.stdout, process.stderr) == ("0\n", "")
