"""Does an epoch outlive its store?

Command: ``python -m benchmarking outage [--only refused reset unavailable dead]``

Held fixed: photographs of 110 kB in a store at 30 ms (lognormal, sigma 0.3), train transforms,
shuffled, batch 64, two workers, all settings of ours at their defaults but for the deadline of
``dead`` (and ``num_fetch_workers=8`` with ``--quick``, so that less is fetched ahead). An epoch is
so long that the second half is not there before the store goes down. The raw bytes of each sample
are compared with the original's, and what was delivered with the sampler's order: nothing missing,
nothing twice.

Varied: how the store is down once half of the epoch has been delivered. For 20 s (1 s with
``--quick``), and then back with its objects: ``refused`` refuses connections, ``reset`` resets each
that brings a request, ``unavailable`` answers 503. Figures: how long after the store's return the
next batch came, and the requests that came while it was down (those that were refused reach nobody
who could count them). ``dead``: the same for good, and a store that takes requests and never
answers; with a deadline of 10 s (1 s with ``--quick``) for a request. The figure is the time from
the store's death to the error in the training loop, whose text must name the object, the attempts
and the time they took. The bar is the deadline and a second for the error's way.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarking.checked import check_order, draw_order, open_checked
from benchmarking.effort import Effort
from benchmarking.measure import Loader
from benchmarking.progress import PROGRESS
from benchmarking.results import Bar, Row, Setting, make_row
from benchmarking.workload import (
    BUCKET,
    LATENCY_SIGMA,
    NUM_WORKERS,
    Photos,
    describe,
    read_photos,
    remote_store,
    serve,
)
from concurrent_dataloader.dataloader_mod.settings import (
    DEFAULT_NUM_FETCH_WORKERS,
    choose_batch_pool,
)
from concurrent_dataloader.errors import StoreUnavailableError
from concurrent_dataloader.stores.base import Store
from concurrent_dataloader.testing import Fault, ObjectServer, OutageKind

_SCENARIO = "outage"
_LATENCY_S = 0.03
_QUICK_NUM_FETCH_WORKERS = 8
_NUM_SAMPLES_PER_AHEAD = 2.5
"""Samples of an epoch for each that may be on its way: half of them is more than these."""
_WAY_S = 1.0


class _Outlived(NamedTuple):
    positions: list[int]
    recovery_s: float
    num_requests: int


def measure_outage(effort: Effort, *, kind: OutageKind) -> list[Row]:
    """Run an epoch whose store is down in its middle."""
    duration_s = 1.0 if effort.is_quick else 20.0
    photos = read_photos(effort.num_images)
    order = _draw_order(photos, effort)
    with serve(photos, _LATENCY_S) as server:
        outlived = _outlive(photos, effort, order, server, kind, duration_s)
    check_order(outlived.positions, order)
    figures: dict[str, float] = {
        "delivered_share": len(outlived.positions) / len(order),
        "recovery_s": outlived.recovery_s,
    }
    if kind != "refused":
        figures["num_requests_while_down"] = outlived.num_requests
    return [
        make_row(
            _SCENARIO,
            f"store down for {duration_s:g} s in the middle of an epoch, {kind}",
            _describe(photos, effort, order, outage=kind, outage_s=duration_s),
            figures,
            Bar(figure="delivered_share", bound=1.0),
        )
    ]


def _outlive(
    photos: Photos,
    effort: Effort,
    order: list[int],
    server: ObjectServer,
    kind: OutageKind,
    duration_s: float,
) -> _Outlived:
    positions: list[int] = []
    back_s: float | None = None
    recovered_s: float | None = None
    for _, labels in _open_loader(photos, remote_store(server), effort, order):
        now_s = time.perf_counter()
        positions += labels.tolist()
        if back_s is None and len(positions) >= len(order) // 2:
            server.set_outage(kind, duration_s=duration_s)
            back_s = time.perf_counter() + duration_s
        elif back_s is not None and recovered_s is None and now_s >= back_s:
            recovered_s = now_s
        PROGRESS.report(f"{kind}: {len(positions)} of {len(order)} samples")
    if back_s is None or recovered_s is None:
        raise RuntimeError(
            f"{kind}: got no batch after the store's return, expected some; what was fetched ahead "
            "was enough for the epoch, give more images"
        )
    num_requests = server.counters().num_by_fault.get("outage", 0)
    return _Outlived(positions, recovered_s - back_s, num_requests)


def measure_death(effort: Effort) -> list[Row]:
    """Take the store away for good, and see when and how the training loop hears of it."""
    deadline_s = 1.0 if effort.is_quick else 10.0
    photos = read_photos(effort.num_images)
    order = _draw_order(photos, effort)
    rows: list[Row] = []
    for name, kill in _DEATHS.items():
        PROGRESS.report(f"dead, {name}")
        with serve(photos, _LATENCY_S) as server:
            until_error_s, num_attempts = _die(photos, effort, order, server, kill, deadline_s)
        rows.append(
            make_row(
                _SCENARIO,
                f"store down for good, {name}, deadline {deadline_s:g} s",
                _describe(photos, effort, order, outage=name, deadline_s=deadline_s),
                {"until_error_s": until_error_s, "num_attempts": num_attempts},
                Bar(figure="until_error_s", bound=deadline_s + _WAY_S, direction="at most"),
            )
        )
    return rows


def _die(
    photos: Photos,
    effort: Effort,
    order: list[int],
    server: ObjectServer,
    kill: Callable[[ObjectServer], None],
    deadline_s: float,
) -> tuple[float, int]:
    """Give the seconds from the store's death to the error, and the attempts that it tells of."""
    store = remote_store(server, deadline_s=deadline_s)
    loader = _open_loader(photos, store, effort, order)
    num_samples, dead_s = 0, None
    try:
        for _, labels in loader:
            num_samples += len(labels)
            if dead_s is None and num_samples >= len(order) // 2:
                dead_s = time.perf_counter()
                kill(server)
    except StoreUnavailableError as error:
        if dead_s is None:
            raise
        return time.perf_counter() - dead_s, _read_num_attempts(str(error))
    raise RuntimeError(
        f"dead store: got all {num_samples} samples, expected an error; what was fetched ahead was "
        "enough for the epoch, give more images"
    )


def _read_num_attempts(said: str) -> int:
    """Take the attempts out of an error's text, and check that it says what it has to."""
    attempts = re.search(r"(\d+) attempts? in [\d.]+ s", said)
    if attempts is None or f"s3://{BUCKET}/" not in said:
        raise RuntimeError(
            f"dead store: got the error {said[-300:]!r}, expected the object, the attempts and the "
            "seconds they took"
        )
    return int(attempts[1])


def _close(server: ObjectServer) -> None:
    server.close()


def _be_unavailable(server: ObjectServer) -> None:
    server.set_outage("unavailable")


def _be_silent(server: ObjectServer) -> None:
    server.set_faults([Fault("stalled_headers")])


_DEATHS: dict[str, Callable[[ObjectServer], None]] = {
    "refused": _close,
    "unavailable": _be_unavailable,
    "silent": _be_silent,
}


def _choose_num_fetch_workers(effort: Effort) -> int | None:
    return _QUICK_NUM_FETCH_WORKERS if effort.is_quick else None


def _open_loader(photos: Photos, store: Store, effort: Effort, order: list[int]) -> Loader:
    number = _choose_num_fetch_workers(effort)
    return open_checked(photos, store, effort, order, num_fetch_workers=number)


def _draw_order(photos: Photos, effort: Effort) -> list[int]:
    number = _choose_num_fetch_workers(effort) or DEFAULT_NUM_FETCH_WORKERS
    # What was begun, what is assembled, and what torch lets be finished.
    num_batches = choose_batch_pool(number, effort.batch_size) + 1 + 2
    num_ahead = NUM_WORKERS * num_batches * effort.batch_size
    num_samples = max(len(photos.raw), round(_NUM_SAMPLES_PER_AHEAD * num_ahead))
    return draw_order(len(photos.raw), num_samples)


def _describe(
    photos: Photos, effort: Effort, order: list[int], **more: Setting
) -> dict[str, Setting]:
    settings = describe(
        photos,
        effort,
        latency_median_s=_LATENCY_S,
        latency_sigma=LATENCY_SIGMA,
        num_epoch_images=len(order),
        num_fetch_workers=_choose_num_fetch_workers(effort),
        **more,
    )
    return {**settings, "repeats": 1, "seconds": None}


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "refused": functools.partial(measure_outage, kind="refused"),
    "reset": functools.partial(measure_outage, kind="reset"),
    "unavailable": functools.partial(measure_outage, kind="unavailable"),
    "dead": measure_death,
}
BARS = tuple(CASES)
