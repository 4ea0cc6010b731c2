"""A store used in a worker process, seen from the test's process.

obstore is called in worker processes only, so this is where it is tested; and a test process
that had called it would make all later tests that fork take another client.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from multiprocessing.managers import BaseManager
from typing import Any

from typing_extensions import Buffer

from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import ObjectInfo, open_store
from concurrent_dataloader.stores._obstore import is_usable


class WorkerSide:
    """Opens and uses the store, in the worker."""

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        assert is_usable(fork_safe=True), "this is a worker, so obstore may be used"
        self._store: Any = open_store(url, **settings)

    def call(self, method: str, *arguments: Any) -> Any:
        result = getattr(self._store, method)(*arguments)
        if method == "get":
            return bytes(result)
        return list(result) if method == "list" else result

    def fetch_async(self, keys: list[str], byte_range: ByteRange | None) -> list[bytes]:
        async def fetch_all() -> list[bytes]:
            bodies = await asyncio.gather(*(self._store.get_async(key, byte_range) for key in keys))
            return [bytes(body) for body in bodies]

        return asyncio.run(fetch_all())


class WorkerManager(BaseManager):
    """A spawned process that serves each thread of this one by a thread of its own."""


WorkerManager.register("WorkerSide", WorkerSide)


def start_worker() -> WorkerManager:
    """Start a worker process; the caller shuts it down."""
    manager = WorkerManager(ctx=multiprocessing.get_context("spawn"))
    manager.start()
    return manager


class StoreInWorker:
    """The store as the test sees it."""

    def __init__(self, manager: Any, url: str, settings: dict[str, Any]) -> None:
        self._worker = manager.WorkerSide(url, settings)

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        return self._worker.call("get", key, byte_range)

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        [body] = await asyncio.to_thread(self._worker.fetch_async, [key], byte_range)
        return body

    def head(self, key: str) -> ObjectInfo:
        return self._worker.call("head", key)

    def describe(self, key: str) -> str:
        return self._worker.call("describe", key)

    def close(self) -> None:
        self._worker.call("close")

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        assert not start_after, "not needed here: listing is boto3's, and tested with it"
        return iter(self._worker.call("list", prefix))

    def put(self, key: str, body: Buffer) -> None:
        self._worker.call("put", key, bytes(body))

    def delete(self, key: str) -> None:
        self._worker.call("delete", key)
