"""Samples that travel in one request: begun together, handed out one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from concurrent_dataloader.dataloader_mod.stages import Stages
from concurrent_dataloader.errors import StoreUnavailableError


class Together(NamedTuple):
    """What a fetcher takes for a position: several of them, for one request."""

    positions: list[Any]


class _Failed(NamedTuple):
    error: Exception


def make_fetch(stages: Stages) -> Callable[[Any], Any]:
    """Make the function that a fetcher calls in its threads; gives a list for `Together`."""
    if not stages.merges_requests:
        return stages.fetch

    def fetch_alone(position: Any) -> Any:
        try:
            return stages.fetch(position)
        except Exception as error:  # noqa: BLE001 - goes to its sample
            return _Failed(error)

    def fetch(request: Any) -> Any:
        if not isinstance(request, Together):
            return stages.fetch(request)
        try:
            return stages.fetch_many(request.positions)
        except StoreUnavailableError:
            raise
        except Exception:  # noqa: BLE001 - each says for itself whether it is to blame
            return list(map(fetch_alone, request.positions))

    return fetch


def make_fetch_async(stages: Stages) -> Callable[[Any], Any]:
    """Make the function that a fetcher awaits; as `make_fetch`."""
    if not stages.merges_requests:
        return stages.fetch_async

    async def fetch_alone(position: Any) -> Any:
        try:
            return await stages.fetch_async(position)
        except Exception as error:  # noqa: BLE001 - goes to its sample
            return _Failed(error)

    async def fetch(request: Any) -> Any:
        if not isinstance(request, Together):
            return await stages.fetch_async(request)
        try:
            return await stages.fetch_many_async(request.positions)
        except StoreUnavailableError:
            raise
        except Exception:  # noqa: BLE001 - each says for itself whether it is to blame
            return [await fetch_alone(position) for position in request.positions]

    return fetch


def begin(
    stages: Stages, positions: Sequence[Any], submit: Callable[[Any], Future[Any]]
) -> list[Future[Any]]:
    """Send samples on their way, those that may be together in one request.

    Returns:
        A future for each sample, in the order of ``positions``.
    """
    if not stages.merges_requests:
        return list(map(submit, positions))
    futures: dict[int, Future[Any]] = {}
    for group in stages.plan_requests(positions):
        if len(group) == 1:
            futures[group[0]] = submit(positions[group[0]])
            continue
        parts: list[Future[Any]] = [Future() for _ in group]
        futures |= zip(group, parts, strict=True)
        shared = submit(Together([positions[number] for number in group]))
        shared.add_done_callback(_Share(parts))
        for part in parts:
            part.add_done_callback(_Cancel(shared, parts))
    if len(futures) != len(positions):
        raise RuntimeError(
            f"plan_requests: got {len(futures)} of {len(positions)} positions, expected each once"
        )
    return [futures[number] for number in range(len(positions))]


class _Share:
    """Hands the result of a request to its samples."""

    def __init__(self, parts: list[Future[Any]]) -> None:
        self._parts = parts

    def __call__(self, shared: Future[Any]) -> None:
        if shared.cancelled():
            for part in self._parts:
                part.cancel()
            return
        error = shared.exception()
        fetched: Sequence[Any] = () if error is not None else shared.result()
        if error is None and len(fetched) != len(self._parts):
            error = RuntimeError(
                f"fetch_many: got {len(fetched)} samples, expected {len(self._parts)}"
            )
        if error is not None:
            fetched = [None] * len(self._parts)
        for part, value in zip(self._parts, fetched, strict=True):
            if not part.set_running_or_notify_cancel():
                continue
            if error is not None:
                part.set_exception(error)
            elif isinstance(value, _Failed):
                part.set_exception(value.error)
            else:
                part.set_result(value)


class _Cancel:
    """Gives up a request that has not begun once nobody wants any of its samples."""

    def __init__(self, shared: Future[Any], parts: list[Future[Any]]) -> None:
        self._shared = shared
        self._parts = parts

    def __call__(self, part: Future[Any]) -> None:
        if part.cancelled() and all(each.cancelled() for each in self._parts):
            self._shared.cancel()
