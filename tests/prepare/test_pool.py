"""Work shared between processes: all of it done once, errors told, and no process left."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.prepare.pool import open_pool


def square(shared: int, item: int) -> int:
    return shared + item * item


def tell_process(shared: object, item: int) -> int:
    return os.getpid()


def meet(fifo: str, item: int) -> int:
    """Return only once another process has come here with the other item."""
    os.close(os.open(fifo, os.O_RDONLY if item else os.O_WRONLY))
    return os.getpid()


def fail(error: type[Exception], item: int) -> None:
    raise error(f"item {item}")


def die(shared: object, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class OddError(Exception):
    """Cannot be built from one string."""

    def __init__(self, one: str, two: str = "") -> None:
        super().__init__(one, two)
        self.lock = open(os.devnull)  # noqa: SIM115 - does not pickle

    def __del__(self) -> None:
        self.lock.close()


class Stubborn:
    def __reduce__(self) -> Any:
        return fail, (ShardFormatError, 5)


def children() -> set[psutil.Process]:
    """Give the processes that were spawned; the resource tracker stays for the next pool."""
    own = psutil.Process().children(recursive=True)
    return {child for child in own if "spawn_main" in " ".join(child.cmdline())}


@pytest.fixture
def before() -> set[psutil.Process]:
    """Give those of fixtures that other tests of the session have used."""
    return children()


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("works_here", [False, True])
def test_each_item_is_worked_on_once_whoever_does_it(
    num_processes: int, works_here: bool, before: set[psutil.Process]
) -> None:
    with open_pool(100, num_processes, works_here=works_here) as pool:
        first = sorted(pool.run(square, range(20)))
        second = sorted(pool.run(square, [3]))
        third = sorted(pool.run(square, []))

    assert first == [100 + item * item for item in range(20)]
    assert (second, third) == ([109], [])
    assert children() == before


def test_this_process_works_while_the_other_one_starts() -> None:
    with open_pool(None, 2) as pool:
        assert next(pool.run(tell_process, range(3))) == os.getpid()


def test_two_processes_work_at_the_same_time(tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)

    with open_pool(fifo, 2) as pool:
        processes = set(pool.run(meet, [0, 1]))

    assert os.getpid() in processes
    assert len(processes) == 2


def test_no_function_of_a_user_runs_here_if_that_is_said() -> None:
    with open_pool(None, 2, works_here=False) as pool:
        assert os.getpid() not in set(pool.run(tell_process, range(6)))


@pytest.mark.parametrize("works_here", [False, True])
def test_an_error_arrives_with_its_type_and_no_process_is_left(
    works_here: bool, before: set[psutil.Process]
) -> None:
    with (
        pytest.raises(ShardFormatError, match=r"^item 0"),
        open_pool(ShardFormatError, 2, works_here=works_here) as pool,
    ):
        list(pool.run(fail, [0, 0, 0]))

    assert children() == before


def test_an_error_of_another_process_tells_where_it_came_from() -> None:
    with (
        pytest.raises(ShardFormatError) as raised,
        open_pool(ShardFormatError, 2, works_here=False) as pool,
    ):
        list(pool.run(fail, [0]))

    assert "in fail" in raised.value.__notes__[0]


def test_an_error_that_does_not_pickle_arrives_by_its_words() -> None:
    with (
        pytest.raises(RuntimeError, match=r"OddError: .*item 0"),
        open_pool(OddError, 2, works_here=False) as pool,
    ):
        list(pool.run(fail, [0]))


def test_a_process_that_is_killed_is_named(before: set[psutil.Process]) -> None:
    with (
        pytest.raises(ChildProcessError, match="a process of --processes ended before its work"),
        open_pool(None, 2, works_here=False) as pool,
    ):
        list(pool.run(die, [0, 0, 0]))

    assert children() == before


def test_what_cannot_be_received_is_told() -> None:
    with (
        pytest.raises(ShardFormatError, match="item 5"),
        open_pool(Stubborn(), 2, works_here=False) as pool,
    ):
        list(pool.run(tell_process, [0]))


def test_processes_that_have_not_started_are_not_waited_for(before: set[psutil.Process]) -> None:
    with open_pool(1, 4) as pool:
        assert list(pool.run(square, [2])) == [5]

    assert children() == before


def test_what_was_opened_here_is_given_back() -> None:
    closed: list[list[int]] = []

    with open_pool([1], 1, closed.append) as pool:
        assert list(pool.run(lambda shared, item: shared[0] + item, [2])) == [3]

    assert closed == [[1]]


def test_less_than_one_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^processes: got 0, expected 1"), open_pool(1, 0):
        pass


def test_no_more_processes_are_started_than_there_are_items() -> None:
    with open_pool(0, 50) as pool:
        assert sorted(pool.run(square, range(3))) == [0, 1, 4]

        assert sum(thread.name == "pool" for thread in threading.enumerate()) == 2
