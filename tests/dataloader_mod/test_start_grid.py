"""Workers read whatever starts them, whatever client reads, and whatever their parent did."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pathlib
import threading
from typing import Any

import pytest
import torch
import torch.utils.data

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import IndexedDataset
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores import open_store
from concurrent_dataloader.testing import ObjectServer
from tests.dataloader_mod.conftest import is_same, seed_all
from tests.stores.test_fork import run_in_child

CLIENTS = ["obstore", "boto3", "aiobotocore", "aiohttp", "http"]
METHODS = ["fork", "spawn", "forkserver"]
BODIES = {f"{number:02}": bytes([number]) * 2000 for number in range(14)}
BATCH_SIZE = 3


def to_noisy_tensor(raw: bytes) -> torch.Tensor:
    """Transform at random, so that the order of the draws counts."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) + torch.rand(2000)


@pytest.fixture
def credentials(object_server: ObjectServer, tmp_path: pathlib.Path) -> str:
    object_server.put_objects("bucket", BODIES)
    path = tmp_path / "credentials.json"
    path.write_text(
        json.dumps(
            {
                "access_key": object_server.access_key,
                "secret": object_server.secret_key,
                "endpoint_url": object_server.endpoint_url,
            }
        )
    )
    return str(path)


def open_bucket(client: Any, credentials: str, **settings: Any) -> IndexedDataset:
    store = open_store("s3://bucket", client=client, credentials=credentials, **settings)
    return IndexedDataset(
        Index.from_keys(sorted(BODIES)), store, decode=None, transform=to_noisy_tensor
    )


def read_epoch(loader_class: Any, dataset: Any, **settings: Any) -> list[Any]:
    seed_all(5)
    with_workers = {"num_workers": 2, "batch_size": BATCH_SIZE, "shuffle": True, **settings}
    loader = loader_class(dataset, **with_workers)
    batches = list(loader)
    if isinstance(loader, DataLoader):
        loader.close()
    return batches


@pytest.fixture
def expected(tmp_path: pathlib.Path) -> list[Any]:
    """What torch's loader makes of the same bytes in files."""
    for key, body in BODIES.items():
        (tmp_path / key).write_bytes(body)
    dataset = IndexedDataset(
        Index.from_keys(sorted(BODIES)),
        open_store(tmp_path),
        decode=None,
        transform=to_noisy_tensor,
    )
    return read_epoch(torch.utils.data.DataLoader, dataset)


def is_in_ci(method: str, client: str, has_read: bool, is_persistent: bool) -> bool:
    """Choose all of fork; of the others, whose workers import torch, two or one for each client."""
    number = CLIENTS.index(client)
    if method == "forkserver":
        return has_read ^ is_persistent == number % 2
    return method == "fork" or (has_read, is_persistent) == (number % 2 == 1, number // 2 % 2 == 1)


def cells() -> list[Any]:
    """Give all 60, of which CI runs 35, and ``-m grid`` the others.

    What CI runs holds each pair of method and client, of method and whether the parent has read,
    and each three of client, read and persistent (`test_each_pair_of_words_is_in_ci`).
    """
    found: list[Any] = []
    for cell in itertools.product(METHODS, (False, True), CLIENTS, (False, True)):
        method, has_read, client, is_persistent = cell
        marks = () if method == "fork" else (pytest.mark.slow,)
        if not is_in_ci(method, client, has_read, is_persistent):
            marks = (pytest.mark.grid,)
        found.append(pytest.param(*cell, marks=marks))
    return found


def test_each_pair_of_words_is_in_ci() -> None:
    all_cells = {cell.values for cell in cells()}
    in_ci = {cell.values for cell in cells() if pytest.mark.grid not in cell.marks}

    assert len(all_cells) == 60
    for which in [(0, 2), (0, 1), (0, 3), (2, 1, 3)]:

        def words_of(some: set[Any], which: tuple[int, ...] = which) -> set[Any]:
            return {tuple(cell[each] for each in which) for cell in some}

        assert words_of(in_ci) == words_of(all_cells)


@pytest.mark.parametrize(("method", "has_read", "client", "is_persistent"), cells())
def test_an_epoch_is_that_of_torch(
    method: str,
    has_read: bool,
    client: str,
    is_persistent: bool,
    credentials: str,
    expected: list[Any],
) -> None:
    multiprocessing.set_forkserver_preload(["tests.dataloader_mod.test_start_grid"])
    dataset = open_bucket(client, credentials)
    if has_read:
        assert bytes(dataset.fetch(3)) == BODIES["03"]

    batches = read_epoch(
        DataLoader,
        dataset,
        multiprocessing_context=method,
        persistent_workers=is_persistent,
        fetch_impl="asyncio" if client in ("aiobotocore", "aiohttp") else "threaded",
    )

    assert is_same(batches, expected)
    assert bytes(dataset.fetch(4)) == BODIES["04"], "a worker broke its parent's connections"


def read_after_obstore(credentials: str) -> list[int]:
    """Use obstore for certain in this process, then read by forked workers."""
    dataset = open_bucket("obstore", credentials, fork_safe=False)
    dataset.fetch(0)
    return [len(batch) for batch, _ in read_epoch(DataLoader, dataset)]


@pytest.mark.slow
def test_workers_forked_from_a_process_that_used_obstore_read(credentials: str) -> None:
    # In a process of its own, which obstore is spoilt for.
    told = run_in_child("spawn", _in_a_process_that_may_fork, credentials)

    assert told == [3, 3, 3, 3, 2]


def _in_a_process_that_may_fork(credentials: str) -> list[int]:
    # multiprocessing's own children could not have been started by a daemon; this one is none.
    return read_after_obstore(credentials)


@pytest.mark.parametrize("client", ["obstore", "aiohttp"])
def test_a_loader_in_a_thread_gives_the_same(
    client: str, credentials: str, expected: list[Any]
) -> None:
    batches: list[Any] = []

    def train() -> None:
        batches.extend(read_epoch(DataLoader, open_bucket(client, credentials)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)

    assert is_same(batches, expected)


def test_two_loaders_at_once_give_each_its_own(credentials: str, expected: list[Any]) -> None:
    loaders: list[DataLoader[Any]] = []
    for client in ("obstore", "boto3"):
        dataset = open_bucket(client, credentials)
        loaders.append(DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=2))

    pairs = list(zip(*loaders, strict=True))

    assert len(pairs) == len(expected)
    for left, right in pairs:
        # Other seeds, hence other noise, which is below 1.
        assert torch.equal(left[0].floor(), right[0].floor())


def read_in_child(arguments: tuple[str, int]) -> Any:
    credentials, num_workers = arguments
    try:
        return len(
            read_epoch(DataLoader, open_bucket("obstore", credentials), num_workers=num_workers)
        )
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _read_in_daemon(arguments: tuple[str, int], sender: Any) -> None:
    sender.send(read_in_child(arguments))


@pytest.mark.parametrize(("num_workers", "told"), [(0, 5), (2, "not allowed to have children")])
def test_a_daemonic_process_reads_by_itself_and_is_told_that_it_may_have_no_workers(
    num_workers: int, told: Any, credentials: str
) -> None:
    context: Any = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_read_in_daemon, args=((credentials, num_workers), sender), daemon=True
    )
    child.start()
    sender.close()

    assert receiver.poll(60)
    answer = receiver.recv()
    child.join(30)

    assert child.exitcode == 0
    assert answer == told if num_workers == 0 else told in answer


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("client", ["obstore", "aiohttp"])
def test_a_child_forked_in_an_epoch_reads_one_of_its_own(
    client: str, num_workers: int, credentials: str
) -> None:
    dataset = open_bucket(client, credentials)
    loader = DataLoader(
        dataset, batch_size=BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    iterator = iter(loader)
    next(iterator)

    pid = os.fork()
    if pid == 0:  # pragma: no cover: another process
        status = 1
        try:
            mine = DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=2)
            status = 0 if len(list(mine)) == 5 else 2
        finally:
            os._exit(status)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(list(iterator)) == 4, "the child broke its parent's epoch"
    loader.close()
