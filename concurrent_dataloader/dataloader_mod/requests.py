"""Samples that travel in one request: begun together, handed out one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from concurrent_dataloader.dataloader_mod.stages import Stages
from concurrent_dataloader.errors import StoreUnavailableError


class Together(NamedTuple):
    """What a fetcher takes for a position: several of them, for one request."""

    positions: list[Any]


class _Failed(NamedTuple):
    error: BaseException


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
    stages: Stages, batches: Sequence[Sequence[Any]], submit: Callable[[Any], Future[Any]]
) -> list[list[Future[Any]]]:
    """Send samples on their way, those that may be together in one request.

    Raises nothing that a position or the dataset is to blame for: that is in the futures, so that
    it comes in the turn of its sample, and other batches go on.

    Returns:
        A future for each position of each batch.
    """
    if not stages.merges_requests:
        return [list(map(submit, positions)) for positions in batches]
    together = [position for positions in batches for position in positions]
    try:
        groups = _plan(stages, together)
    except Exception as error:  # noqa: BLE001 - goes to the samples that are to blame
        if len(batches) > 1:
            return [begin(stages, [positions], submit)[0] for positions in batches]
        return [_begin_alone(stages, together, submit, error)]
    futures = iter(_begin_groups(together, groups, submit))
    return [list(itertools.islice(futures, len(positions))) for positions in batches]


def _plan(stages: Stages, positions: Sequence[Any]) -> list[list[int]]:
    groups = stages.plan_requests(positions)
    planned = sorted(itertools.chain.from_iterable(groups))
    if planned != list(range(len(positions))):
        raise RuntimeError(
            f"plan_requests: got {len(set(planned))} of {len(positions)} positions in "
            f"{len(planned)} places, expected each once"
        )
    return groups


def _begin_alone(
    stages: Stages,
    positions: Sequence[Any],
    submit: Callable[[Any], Future[Any]],
    error: Exception,
) -> list[Future[Any]]:
    """Begin what can be planned by itself; the rest fails, or all where that tells none apart."""
    failures: dict[int, Exception] = {}
    for number, position in enumerate(positions):
        try:
            _plan(stages, [position])
        except Exception as own:  # noqa: BLE001 - goes to its sample
            failures[number] = own
    if len(failures) in (0, len(positions)):
        failures = dict.fromkeys(range(len(positions)), error)
    return [
        _fail(failures[number]) if number in failures else submit(position)
        for number, position in enumerate(positions)
    ]


def _fail(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def _begin_groups(
    positions: Sequence[Any], groups: list[list[int]], submit: Callable[[Any], Future[Any]]
) -> list[Future[Any]]:
    futures: dict[int, Future[Any]] = {}
    for group in groups:
        if len(group) == 1:
            futures[group[0]] = submit(positions[group[0]])
            continue
        parts: list[Future[Any]] = [Future() for _ in group]
        futures |= zip(group, parts, strict=True)
        shared = submit(Together([positions[number] for number in group]))
        shared.add_done_callback(_Share(parts))
        for part in parts:
            part.add_done_callback(_Cancel(shared, parts))
    return [futures[number] for number in range(len(positions))]


class _Share:
    """Hands the result of a request to its samples.

    A future drops what its callbacks raise, and the samples would be waited for without end: so
    nothing of the dataset's is called here unguarded.
    """

    def __init__(self, parts: list[Future[Any]]) -> None:
        self._parts = parts

    def __call__(self, shared: Future[Any]) -> None:
        if shared.cancelled():
            for part in self._parts:
                part.cancel()
            return
        for part, value in zip(self._parts, self._take(shared), strict=True):
            if not part.set_running_or_notify_cancel():
                continue
            if isinstance(value, _Failed):
                part.set_exception(value.error)
            else:
                part.set_result(value)

    def _take(self, shared: Future[Any]) -> list[Any]:
        try:
            fetched = list(shared.result())
            if len(fetched) != len(self._parts):
                raise RuntimeError(
                    f"fetch_many: got {len(fetched)} samples, expected {len(self._parts)}"
                )
        except BaseException as error:  # noqa: BLE001 - goes to all the samples
            return [_Failed(error)] * len(self._parts)
        return fetched


class _Cancel:
    """Gives up a request that has not begun once nobody wants any of its samples."""

    def __init__(self, shared: Future[Any], parts: list[Future[Any]]) -> None:
        self._shared = shared
        self._parts = parts

    def __call__(self, part: Future[Any]) -> None:
        if part.cancelled() and all(each.cancelled() for each in self._parts):
            self._shared.cancel()
