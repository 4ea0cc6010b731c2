import os
import pathlib
import time
from collections.abc import Callable

import pytest

from benchmarking.drive import Rate, drive_asyncio, drive_threads
from benchmarking.processes import (
    Memory,
    count_open_files,
    read_cpu_s,
    read_memory,
    run_in_process,
)
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.base import Store

Drive = Callable[[Store, list[str], float], Rate]


def test_cpu_seconds_are_those_of_the_clock_of_the_process() -> None:
    before_s, own_before_s = read_cpu_s([os.getpid()]), time.process_time()
    while time.process_time() - own_before_s < 0.2:
        pass

    spent_s = read_cpu_s([os.getpid()]) - before_s
    assert spent_s == pytest.approx(time.process_time() - own_before_s, abs=0.03)


def test_cpu_seconds_of_no_process_are_none() -> None:
    assert read_cpu_s([]) == 0


def read_memory_before_and_after_writing() -> tuple[Memory, Memory]:
    before = read_memory(os.getpid())
    block = bytearray(64 * 2**20)
    block[::4096] = b"\1" * len(block[::4096])
    return before, read_memory(os.getpid())


def test_private_memory_grows_by_what_is_written() -> None:
    # In a process of its own: in this one other tests' children come and go, and share its pages.
    before, after = run_in_process(read_memory_before_and_after_writing)

    assert after.private_bytes - before.private_bytes > 60 * 2**20
    assert 60 * 2**20 < after.own_bytes - before.own_bytes < 68 * 2**20
    assert after.resident_bytes >= after.proportional_bytes


def test_an_open_file_is_counted(tmp_path: pathlib.Path) -> None:
    before = count_open_files(os.getpid())

    with (tmp_path / "file").open("w"):
        assert count_open_files(os.getpid()) == before + 1


def test_a_function_runs_in_another_process() -> None:
    assert run_in_process(os.getpid) != os.getpid()


def test_a_process_that_fails_is_an_error_and_no_wait(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="listdir: its process ended with exit status 1"):
        run_in_process(os.listdir, "/no/such/folder")

    assert "FileNotFoundError" in capfd.readouterr().err


@pytest.mark.parametrize("drive", [drive_threads, drive_asyncio])
def test_a_store_is_driven_for_the_given_time(drive: Drive) -> None:
    rate = drive(MemoryStore({"a": b"1", "b": b"2"}), ["a", "b"], 0.05)

    assert rate.requests_per_s > 100
    assert rate.cpu_ms_per_request > 0
