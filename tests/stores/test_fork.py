"""A parent reads, then starts a worker that reads: no client may hang there (promise 6)."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import pathlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from concurrent_dataloader.stores import Store, _obstore, open_store
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.leftovers import stretch
from tests.stores.conftest import CLIENTS

_TIMEOUT_S = 30.0

Context = (
    multiprocessing.context.ForkContext
    | multiprocessing.context.SpawnContext
    | multiprocessing.context.ForkServerContext
)


def get_context(method: str) -> Context:
    context: Any = multiprocessing.get_context(method)
    return context


def run_in_child(method: str, work: Callable[[Any], Any], argument: Any) -> Any:
    """Give what ``work(argument)`` returns in a child process, or fail when it hangs."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = get_context(method).Process(target=_work_and_send, args=(work, argument, sender))
    child.start()
    sender.close()
    try:
        # Short of what pytest gives a test, whose end would not say which child it was.
        timeout_s = min(stretch(_TIMEOUT_S), 100.0)
        assert receiver.poll(timeout_s), f"the child ({method}) gave nothing in {timeout_s} s"
        return receiver.recv()
    finally:
        receiver.close()
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()
        child.close()


def _work_and_send(work: Callable[[Any], Any], argument: Any, sender: Connection) -> None:
    try:
        sender.send(work(argument))
    except Exception as error:  # noqa: BLE001 (the end of a process; the test gets it)
        sender.send(error)


def read_ten(store: Store) -> bytes:
    return bytes(store.get("ten"))


def read_ten_and_tell_client(store: Any) -> tuple[bytes, bool]:
    """Read by a store over obstore; tell whether obstore did it."""
    return bytes(store.get("ten")), _obstore._used_by_pid == os.getpid()


@pytest.fixture(autouse=True)
def _objects(object_server: ObjectServer) -> None:
    object_server.put_objects("bucket", {"ten": b"0123456789"})


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_reads_after_its_parent_has_read(
    client: Any, method: str, credentials_file: pathlib.Path
) -> None:
    store = open_store("s3://bucket", client=client, credentials=credentials_file)
    assert read_ten(store) == b"0123456789"

    assert run_in_child(method, read_ten, store) == b"0123456789"

    assert read_ten(store) == b"0123456789", "the child broke its parent's connections"
    store.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_use_obstore_though_the_parent_has_read(
    method: str, credentials_file: pathlib.Path
) -> None:
    store = open_store("s3://bucket", credentials=credentials_file)
    read_ten(store)

    assert run_in_child(method, read_ten_and_tell_client, store) == (b"0123456789", True)
    assert _obstore._used_by_pid is None, "the main process has called obstore"


def fork_after_use(path: str) -> list[Any]:
    """Use obstore for certain, then fork; in a process of its own, which obstore is spoilt for."""
    store = open_store("s3://bucket", credentials=path, fork_safe=False)
    own = read_ten_and_tell_client(store)
    child = run_in_child("fork", read_ten_and_tell_client, store)
    fresh = run_in_child("fork", open_and_read, path)
    return [own, child, fresh, read_ten(store)]


def open_and_read(path: str) -> tuple[bytes, bool]:
    return read_ten_and_tell_client(open_store("s3://bucket", credentials=path, fork_safe=False))


def test_a_child_forked_after_obstore_was_used_takes_another_client(
    credentials_file: pathlib.Path,
) -> None:
    ten = b"0123456789"

    told = run_in_child("spawn", fork_after_use, str(credentials_file))

    assert told == [(ten, True), (ten, False), (ten, False), ten]


def test_a_process_forked_by_hand_reads_too(credentials_file: pathlib.Path) -> None:
    store = open_store("s3://bucket", credentials=credentials_file)
    read_ten(store)

    pid = os.fork()
    if pid == 0:  # pragma: no cover: another process
        os._exit(0 if read_ten(store) == b"0123456789" else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
