"""obstore with nothing around it, blocking and awaited in two ways each. Imports no torch."""

from __future__ import annotations

import asyncio
import threading
import weakref
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import obstore
import obstore.store
from typing_extensions import Buffer, override

from benchmarking.drive import NUM_IN_FLIGHT
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import BlockingStore, ObjectInfo, PerProcess


class Place(NamedTuple):
    """A bucket, and how to get in."""

    endpoint_url: str
    bucket: str
    region: str
    access_key: str
    secret_key: str


class BareObstore(BlockingStore):
    """Reads whole objects; checks, repeats and translates nothing. Awaited reads run in threads."""

    def __init__(self, place: Place) -> None:
        super().__init__(NUM_IN_FLIGHT)
        self._place = place
        self._client = PerProcess(partial(_open_client, place), _drop)

    @override
    def _arguments(self) -> tuple[Place]:
        return (self._place,)

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return f"s3://{self._place.bucket}/{key}"

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size."""
        return ObjectInfo(key, obstore.head(self._client.get(), key)["size"])

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read a whole object."""
        assert byte_range is None, "this store reads whole objects"
        return obstore.get(self._client.get(), key).buffer()

    @override
    def close(self) -> None:
        """Give back what this process has opened."""
        super().close()
        self._client.close()


class AwaitedObstore(BareObstore):
    """The same, with obstore's own awaitables."""

    @override
    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read a whole object: one awaitable for the headers, one for the body."""
        assert byte_range is None, "this store reads whole objects"
        result = await obstore.get_async(self._client.get(), key)
        return await result.buffer_async()


class LoopedObstore(AwaitedObstore):
    """Blocking reads by obstore's awaitables, which can be cancelled: a loop for each thread."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._local = threading.local()

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read a whole object in this thread's loop."""
        loop: asyncio.AbstractEventLoop | None = getattr(self._local, "loop", None)
        if loop is None:
            loop = self._local.loop = asyncio.new_event_loop()
            weakref.finalize(threading.current_thread(), loop.close)
        return loop.run_until_complete(self.get_async(key, byte_range))


def _open_client(place: Place) -> obstore.store.S3Store:
    return obstore.store.S3Store(
        place.bucket,
        config={
            "endpoint": place.endpoint_url,
            "region": place.region,
            "access_key_id": place.access_key,
            "secret_access_key": place.secret_key,
            "virtual_hosted_style_request": False,
        },
        client_options={
            "allow_http": True,
            "http1_only": True,
            "timeout": timedelta(seconds=30),
            "pool_max_idle_per_host": str(NUM_IN_FLIGHT),
        },
        retry_config={"max_retries": 0},
    )


def _drop(client: obstore.store.S3Store) -> None:
    del client  # dropping the last reference closes its connections
