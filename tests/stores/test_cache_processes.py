"""One cache folder for many processes, some of which die; and disks that give no room."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Buffer, override

from benchmarking.cache_crash import Load, kill_readers
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import IndexedDataset
from concurrent_dataloader.index import Index
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Credentials, DiskCache, Store, open_store
from concurrent_dataloader.stores._cache_folder import remove_begun
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.cache import CachedStore, DiskCacheCounts
from concurrent_dataloader.testing import ObjectServer
from tests.stores.test_fork import run_in_child

_FORK = multiprocessing.get_context("fork")
_TIMEOUT_S = 30.0
IMAGES = {f"{number}.jpg": b"%d" % number * 500 for number in range(40)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def remote(server: ObjectServer, **settings: Any) -> Store:
    return open_store(
        "s3://data",
        endpoint_url=server.endpoint_url,
        credentials=Credentials(server.access_key, server.secret_key),
        **settings,
    )


# -- every object once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start_method", "fetch_impl"),
    [
        ("fork", "threaded"),
        ("fork", "asyncio"),
        pytest.param("spawn", "threaded", marks=pytest.mark.grid),
    ],
)
def test_the_second_epoch_makes_no_request(
    object_server: ObjectServer, folder: Path, start_method: str, fetch_impl: Any
) -> None:
    object_server.put_objects("data", IMAGES)
    dataset = IndexedDataset(
        Index.from_keys(IMAGES),
        remote(object_server, cache=folder),
        decode=bytes,
        missing_label=None,
    )
    loader = DataLoader(
        dataset,
        batch_size=4,
        shuffle=True,
        num_workers=2,
        multiprocessing_context=start_method,
        fetch_impl=fetch_impl,
        collate_fn=list,
    )

    for epoch in range(2):
        assert sorted(raw for batch in loader for raw in batch) == sorted(IMAGES.values())
        assert object_server.counters().num_requests == (len(IMAGES) if epoch == 0 else 0)
        object_server.reset_counters()


def read_all(arguments: tuple[Store, Any]) -> tuple[list[bytes], Any]:
    store, barrier = arguments
    barrier.wait(_TIMEOUT_S)
    return [bytes(store.get(key)) for key in IMAGES], getattr(store, "counts", None)


def test_processes_that_want_the_same_objects_make_one_request_for_each(
    object_server: ObjectServer, folder: Path
) -> None:
    object_server.put_objects("data", IMAGES)
    object_server.set_latency(median_s=0.02)
    store = remote(object_server, client="http", cache=folder)
    barrier = _FORK.Barrier(4)
    results: list[Any] = []

    threads = [
        threading.Thread(
            target=lambda: results.append(run_in_child("fork", read_all, (store, barrier)))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [bodies for bodies, _ in results] == [list(IMAGES.values())] * 4
    assert set(object_server.counters(by_key=True).num_gets_by_key.values()) == {1}
    assert sum(counts.num_misses for _, counts in results) == len(IMAGES)


# -- killed in the middle


class StuckStore(MemoryStore):
    """Says that it was asked, and never answers."""

    def __init__(self, sender: Connection) -> None:
        super().__init__(name="data")
        self._sender = sender

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self._sender.send(os.getpid())
        threading.Event().wait()
        raise AssertionError("nobody sets it")


@contextlib.contextmanager
def stuck_in_download(
    folder: Path, target: Callable[[Path, Connection], None]
) -> Generator[tuple[Any, Connection]]:
    receiver, sender = _FORK.Pipe()
    process = _FORK.Process(target=target, args=(folder, sender))
    process.start()
    try:
        assert receiver.poll(_TIMEOUT_S)
        receiver.recv()
        yield process, receiver
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()
        sender.close()


def begin(folder: Path, sender: Connection) -> None:
    CachedStore(StuckStore(sender), DiskCache(folder)).get("a")


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not come to that"
        threading.Event().wait(0.002)


def test_who_waits_for_a_process_that_is_killed_fetches_itself(folder: Path) -> None:
    store = CachedStore(MemoryStore({"a": b"body"}, "data"), DiskCache(folder))
    got: list[Buffer] = []

    with stuck_in_download(folder, begin) as (process, _):
        thread = threading.Thread(target=lambda: got.append(store.get("a")))
        thread.start()
        wait_until(lambda: store.counts.num_waits == 1)
        assert not got
        process.kill()
        thread.join(_TIMEOUT_S)

    assert got == [b"body"]
    assert store.counts.num_kept == 1


def fork_then_begin(folder: Path, sender: Connection) -> None:
    asked, answer = _FORK.Pipe()
    thread = threading.Thread(target=begin, args=(folder, answer), daemon=True)
    thread.start()
    asked.recv()
    # Forked while the thread has its lock; lives on when its parent is killed.
    child = _FORK.Process(target=live_on, args=(sender,))
    child.start()
    child.join()


def live_on(sender: Connection) -> None:
    sender.send(os.getpid())
    sender.recv()


def test_a_child_of_the_killed_process_does_not_keep_its_lock(folder: Path) -> None:
    store = CachedStore(MemoryStore({"a": b"body"}, "data"), DiskCache(folder))

    with stuck_in_download(folder, fork_then_begin) as (process, connection):
        process.kill()
        process.join()
        assert store.get("a") == b"body"
        connection.send("done")

    assert store.counts == DiskCacheCounts(num_misses=1, num_kept=1)


def test_what_a_killed_process_left_is_removed_when_the_folder_is_opened(folder: Path) -> None:
    with stuck_in_download(folder, begin):
        [left] = folder.glob("objects-v1/partial/*")
        with left.open("wb") as file:
            file.truncate(10**6)
    assert left.stat().st_size == 10**6

    CachedStore(MemoryStore({"b": b"body"}, "data"), DiskCache(folder)).get("b")

    assert not list(folder.glob("objects-v1/partial/*"))


def begin_in_a_thread(folder: Path, sender: Connection) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        threading.Thread(target=begin, args=(folder, sender), daemon=True).start()
        threading.Event().wait()


def test_a_process_that_ends_in_the_middle_of_a_download_leaves_no_file(folder: Path) -> None:
    with stuck_in_download(folder, begin_in_a_thread) as (process, _):
        assert len(list(folder.glob("objects-v1/partial/*"))) == 1

        os.kill(process.pid, signal.SIGINT)
        process.join(_TIMEOUT_S)

        assert process.exitcode == 0
        assert not list(folder.glob("objects-v1/partial/*"))


class SlowStore(MemoryStore):
    """Says that it was asked, and answers when it is told to."""

    def __init__(self, sender: Connection, may_answer: threading.Event) -> None:
        super().__init__(name="data")
        self._sender = sender
        self._may_answer = may_answer

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self._sender.send(os.getpid())
        assert self._may_answer.wait(_TIMEOUT_S)
        return b"body"


def end_before_the_answer(folder: Path, sender: Connection) -> None:
    asked, answer = _FORK.Pipe()
    may_answer = threading.Event()
    got: list[Buffer] = []
    store = CachedStore(SlowStore(answer, may_answer), DiskCache(folder))
    thread = threading.Thread(target=lambda: got.append(store.get("a")), daemon=True)
    thread.start()
    asked.recv()
    remove_begun()
    may_answer.set()
    thread.join(_TIMEOUT_S)
    got.append(store.get("another"))
    sender.send((got, store.counts, [path.name for path in folder.rglob("*") if path.is_file()]))


def test_what_is_answered_while_a_process_ends_is_given_and_not_kept(folder: Path) -> None:
    receiver, sender = _FORK.Pipe()
    process = _FORK.Process(target=end_before_the_answer, args=(folder, sender))
    process.start()
    assert receiver.poll(_TIMEOUT_S)
    got, counts, files = receiver.recv()
    process.join(_TIMEOUT_S)
    process.close()

    assert got == [b"body", b"body"]
    assert counts == DiskCacheCounts(num_misses=2)
    assert files == ["ledger"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_points_nothing_is_wrong_and_the_limit_holds(
    folder: Path, seed: int
) -> None:
    load = Load(
        num_objects=400,
        mean_bytes=30_000,
        total_bytes=20 * 10**6,
        limit_bytes=2 * 10**6,
        kill_every_s=0.05,
        min_kills=10,
        max_s=90,
    )

    damage = kill_readers(folder, load, seed)

    assert damage.num_kills >= 10
    assert damage.num_wrong == 0
    assert damage.max_over_bytes <= 0
    assert damage.left_bytes == 0


# -- no room


def read_with_file_limit(folder: Path) -> tuple[list[bytes], DiskCacheCounts, list[str]]:
    """Read where no file may grow beyond 64 KiB, which fails as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    return read_and_listen(folder)


def read_and_listen(folder: Path) -> tuple[list[bytes], DiskCacheCounts, list[str]]:
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("concurrent_dataloader").addHandler(handler)
    objects = {"small": b"s" * 1000, "large": b"l" * 200_000, "other": b"o" * 200_000}
    store = CachedStore(MemoryStore(objects), DiskCache(folder))
    order = ["small", "large", "other", "small", "large"]
    bodies = [bytes(store.get(key)) for key in order]
    assert bodies == [objects[key] for key in order]
    return bodies, store.counts, warnings


def test_a_file_that_cannot_be_written_costs_requests_and_one_warning(folder: Path) -> None:
    _, counts, [warning] = run_in_child("fork", read_with_file_limit, folder)

    assert counts == DiskCacheCounts(num_hits=1, num_misses=4, num_kept=1, num_not_kept=1)
    assert "File too large; check the space" in warning
    assert not list(folder.glob("objects-v1/partial/*"))


def run_mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def mounted(folder: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    folder.mkdir()
    run_mount("-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_requests_and_one_warning(mounted: Path) -> None:
    _, counts, [warning] = run_in_child("fork", read_and_listen, mounted)

    assert counts == DiskCacheCounts(num_hits=1, num_misses=4, num_kept=1, num_not_kept=1)
    assert "No space left on device; check the space" in warning
    assert not list(mounted.glob("objects-v1/partial/*"))


def test_a_folder_that_is_read_only_is_read(mounted: Path) -> None:
    objects = {"small": b"s" * 1000}
    CachedStore(MemoryStore(objects), DiskCache(mounted)).get("small")
    run_mount("-o", "remount,ro", str(mounted))

    _, counts, [warning] = run_in_child("fork", read_and_listen, mounted)

    assert counts == DiskCacheCounts(num_hits=2, num_misses=3)
    assert "Read-only file system" in warning


def test_a_folder_that_is_removed_in_the_middle_costs_requests(folder: Path) -> None:
    store = CachedStore(MemoryStore({"a": b"1", "b": b"2"}), DiskCache(folder))
    store.get("a")
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()

    assert [store.get(key) for key in ("a", "b", "a")] == [b"1", b"2", b"1"]
    assert store.counts.num_misses == 4
