import multiprocessing
from typing import Any

import pytest

from benchmarking.seek_bound_disk import PAGE_BYTES, SeekBoundDisk


@pytest.fixture
def disk() -> SeekBoundDisk:
    return SeekBoundDisk(100 * PAGE_BYTES, seek_s=0.0)


def read(disk: SeekBoundDisk, *pages: tuple[int, int]) -> int:
    before = disk.num_seeks
    for first, last in pages:
        disk.read(first * PAGE_BYTES, last * PAGE_BYTES)
    return disk.num_seeks - before


def test_reading_on_moves_no_head(disk: SeekBoundDisk) -> None:
    assert read(disk, (0, 10), (10, 11), (11, 90)) == 0


def test_a_jump_in_either_direction_is_a_seek(disk: SeekBoundDisk) -> None:
    assert read(disk, (50, 60), (20, 30), (31, 40)) == 3


def test_what_was_read_costs_nothing_until_it_is_forgotten(disk: SeekBoundDisk) -> None:
    read(disk, (50, 60))

    assert read(disk, (55, 60), (50, 51)) == 0
    disk.forget()
    assert read(disk, (50, 51)) == 1


def test_only_what_is_missing_is_read(disk: SeekBoundDisk) -> None:
    read(disk, (10, 20), (30, 40))

    assert read(disk, (5, 45)) == 3  # before, between and after


def test_bytes_are_read_by_pages(disk: SeekBoundDisk) -> None:
    disk.read(PAGE_BYTES + 5, PAGE_BYTES + 6)

    assert read(disk, (1, 2)) == 0


def _read_far(disk: SeekBoundDisk) -> None:
    disk.read(70 * PAGE_BYTES, 71 * PAGE_BYTES)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_processes_share_the_head(disk: SeekBoundDisk) -> None:
    context: Any = multiprocessing.get_context("fork")
    child = context.Process(target=_read_far, args=(disk,))
    child.start()
    child.join(30)

    assert child.exitcode == 0
    assert disk.num_seeks == 1
    assert read(disk, (71, 72)) == 0
    assert read(disk, (70, 71)) == 0


def test_a_seek_takes_its_time() -> None:
    from time import perf_counter

    disk = SeekBoundDisk(100 * PAGE_BYTES, seek_s=0.01)

    begin_s = perf_counter()
    read(disk, (50, 60), (20, 30))

    assert perf_counter() - begin_s >= 0.02
