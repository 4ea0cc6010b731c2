"""Bytes by key: what a store can do, and the bridge between blocking and awaiting clients.

A client has one colour: it blocks (boto3, files), or it awaits (aiohttp, aiobotocore). A store has
both. `BlockingStore` gives the awaiting twin by threads, `AwaitingStore` the blocking one by an
event loop in a thread of its own. Whatever a client needs, connections, threads, a loop, belongs to
one process (`PerProcess`): a forked child opens its own and leaves its parent's alone.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

from typing_extensions import Buffer, override

from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._cancelling import CancellableCall
from concurrent_dataloader.stores._threads import AwaitableThreads

T = TypeVar("T")


class ObjectInfo(NamedTuple):
    """What a listing says of one object."""

    key: str
    size_bytes: int


@runtime_checkable
class Store(Protocol):
    """A flat namespace of objects, read by key.

    A store is a value: it pickles, compares by its settings, and opens its client on first use in
    each process, so that nothing of a parent's client lives on after a fork. `close` gives back the
    client of the calling process; a store that was closed opens a new one when it is used again. A
    store that is garbage is closed.

    These four methods are all that a storage of the user's own has to have; the data sets take it
    as it is.
    """

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read an object, or a part of it. Blocks. May be called from many threads at once.

        Args:
            key: Name of the object, without bucket and prefix.
            byte_range: Bytes to read; the whole object when None.

        Returns:
            Exactly the bytes asked for, read-only; may share memory with the client.

        Raises:
            KeyNotFoundError: There is no such object.
            AccessDeniedError: The store refuses these credentials.
            ByteRangeError: The object ends before ``byte_range.stop``.
            StoreUnavailableError: It failed; asking again may help. A store from `open_store` has
                then asked as often as its `RetryPolicy` allows.
            StoreError: It failed, and asking again does not help.
            ValueError: ``byte_range`` begins below 0, or ends before it begins.
        """
        ...

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does, without blocking the event loop. Any loop may call it."""
        ...

    def describe(self, key: str) -> str:
        """Name the object for a person, such as ``s3://bucket/prefix/key``; holds no secret."""
        ...

    def close(self) -> None:
        """Give back what this process has opened. May be called twice."""
        ...


@runtime_checkable
class SizedStore(Store, Protocol):
    """A store that tells an object's size without reading it."""

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size; raises as `Store.get` does."""
        ...


@runtime_checkable
class WritableStore(SizedStore, Protocol):
    """A store that can also be listed and written, which preparing a data set needs."""

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List the objects whose key begins with ``prefix``, sorted by key, page by page.

        Args:
            prefix: Begin of the keys, to the character: ``"a"`` finds ``a/1`` and ``ab`` alike.
            start_after: Leave out this key and those that sort before it.

        Yields:
            Each object as the store names it, "directory markers" (empty, ending in ``/``)
            included.
        """
        ...

    def put(self, key: str, body: Buffer) -> None:
        """Write an object whole; readers see the old one or the new one, never a part."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...


# Guards the opening of every per-process value. A fork may come while another thread holds it: the
# child gets a new one.
_opening = threading.RLock()

# What a parent opened and its forked child inherited. Kept for good: to free it would close,
# through descriptors that both processes share, what the parent still works with.
_inherited: list[object] = []


def _renew_lock() -> None:
    global _opening
    _opening = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class _Slot(Generic[T]):
    """Where a `PerProcess` keeps its value; apart from it, so that a finaliser may hold it."""

    __slots__ = ("opened",)

    def __init__(self) -> None:
        self.opened: tuple[int, T] | None = None


class PerProcess(Generic[T]):
    """A value for each process, opened at first use and closed with its owner."""

    def __init__(
        self,
        open_value: Callable[[], T],
        close_value: Callable[[T], None],
        drop_value: Callable[[T], None] | None = None,
    ) -> None:
        """Remember how to open and close; none may refer to the owner, else it stays.

        Args:
            open_value: Makes the value.
            close_value: Ends it; may wait.
            drop_value: Ends it when its owner was forgotten; must not wait, since the garbage
                collector calls it in any thread, whatever locks that holds. None: ``close_value``.
        """
        self._open_value = open_value
        self._slot: _Slot[T] = _Slot()
        self._finalizer = weakref.finalize(
            self, _end_slot, self._slot, close_value if drop_value is None else drop_value
        )
        self._close_value = close_value

    def get(self) -> T:
        """Give this process's value; opens it if need be, once, whatever the number of threads."""
        opened = self._slot.opened
        if opened is not None and opened[0] == os.getpid():
            return opened[1]
        with _opening:
            opened = self._slot.opened
            if opened is None or opened[0] != os.getpid():
                if opened is not None:
                    _inherited.append(opened[1])
                opened = (os.getpid(), self._open_value())
                self._slot.opened = opened
            return opened[1]

    def close(self) -> None:
        """Close this process's value, if it was opened."""
        with _opening:
            taken: _Slot[T] = _Slot()
            taken.opened, self._slot.opened = self._slot.opened, None
        _end_slot(taken, self._close_value)


def _end_slot(slot: _Slot[T], close_value: Callable[[T], None]) -> None:
    # Without the lock: as a finaliser this may run in a thread that the lock's holder waits for.
    opened, slot.opened = slot.opened, None
    if opened is None:
        return
    if opened[0] != os.getpid():
        _inherited.append(opened[1])
        return
    close_value(opened[1])


class ValueObject:
    """Pickled, compared and shown by the arguments of its constructor, and by nothing else."""

    def _arguments(self) -> tuple[Any, ...]:
        """Give the constructor's positional arguments; none of them shows a secret in its repr."""
        raise NotImplementedError

    @override
    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._arguments() == other._arguments()

    @override
    def __hash__(self) -> int:
        return hash((type(self), self._arguments()))

    @override
    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), self._arguments()

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._arguments()))})"


class BlockingStore(ValueObject, abc.ABC):
    """A store whose client blocks; threads of its own make it awaitable."""

    def __init__(self, max_connections: int) -> None:
        self._threads = PerProcess(
            partial(AwaitableThreads, max_connections), AwaitableThreads.stop
        )

    @abc.abstractmethod
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""

    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get` does, in a thread.

        Cancelled, it goes on there until its time is up, unless the client can be ended.
        """
        call = CancellableCall()
        try:
            return await self._threads.get().run(call.run, self.get, key, byte_range)
        except asyncio.CancelledError:
            call.cancel()
            raise

    def close(self) -> None:
        """Give back what this process has opened."""
        self._threads.close()


class AwaitingStore(ValueObject, abc.ABC):
    """A store whose client awaits; an event loop in a thread of its own makes it block."""

    def __init__(self) -> None:
        self._loop_thread = PerProcess(LoopThread, LoopThread.stop, LoopThread.begin_to_stop)

    @abc.abstractmethod
    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get_async` says."""

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `get_async` does, in the store's own event loop, and wait for it."""
        return self.run_awaited(self.get_async(key, byte_range))

    def run_awaited(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the store's own event loop, and wait for what it returns or raises."""
        return self._loop_thread.get().run(coroutine)

    def close(self) -> None:
        """Stop the store's own event loop, which closes its client with it."""
        self._loop_thread.close()


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="store-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for what it returns or raises."""
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError:  # the loop was closed meanwhile
            coroutine.close()
            raise
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what runs, close what the loop's clients hold, and end the thread."""
        self.begin_to_stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def begin_to_stop(self) -> None:
        """Do as `stop` does, without waiting for it."""
        with contextlib.suppress(RuntimeError):  # closed already
            self.loop.call_soon_threadsafe(self.loop.stop)


class PerLoop(Generic[T]):
    """A value for each event loop, opened in it at first use and closed when the loop shuts down.

    A client's connections belong to the loop in which they were made. Closing rides on
    ``loop.shutdown_asyncgens``, which ``asyncio.run`` and `LoopThread` call. Touched only inside
    the loops; each has its own entry, and dictionary operations are atomic.
    """

    def __init__(self, open_value: Callable[[], contextlib.AbstractAsyncContextManager[T]]) -> None:
        self._open_value = open_value
        self._opening: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[T]] = (
            weakref.WeakKeyDictionary()
        )

    async def get(self) -> T:
        """Give the running loop's value; opens it if need be, once for all its tasks."""
        loop = asyncio.get_running_loop()
        task = self._opening.get(loop)
        if task is not None and task.done() and (task.cancelled() or task.exception() is not None):
            task = None
        if task is None:
            task = loop.create_task(self._open())
            self._opening[loop] = task
        # A shield, since the first to come may be cancelled while others wait for the same value.
        return await asyncio.shield(task)

    async def _open(self) -> T:
        keeper = self._keep()
        value = await anext(keeper)
        _keepers[asyncio.get_running_loop()] = [
            *_keepers.get(asyncio.get_running_loop(), []),
            keeper,
        ]
        return value

    async def _keep(self) -> AsyncGenerator[T, None]:
        async with self._open_value() as value:
            yield value


# Keeps the generators alive until their loop shuts them down.
_keepers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[object]] = (
    weakref.WeakKeyDictionary()
)
