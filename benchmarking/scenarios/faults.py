"""What do faults of the store cost?

Command: ``python -m benchmarking faults [--only mixed stalls]``

Held fixed: photographs of 110 kB in a store at 30 ms (lognormal, sigma 0.3), train transforms,
shuffled in the same order, batch 64, two workers, all settings of ours at their defaults. An epoch
is two passes over the set, measured from ``iter()`` to the end, the start of the workers in it. The
raw bytes of each sample are compared with the original's by hash, in the worker, on both sides, and
what was delivered with the sampler's order; a difference ends the run with an error.

Varied: ``mixed``: 5 % of the requests are answered by 503 SlowDown, 2 % by a connection reset
(half of them before the body, half inside it), 2 % by a body that is cut short, 1 % by the body of
another object. ``stalls``: 1 % of the requests get their answer 2 s late; with hedged requests, the
default, and once without. Each is compared in pairs with the same epoch over the same store without
faults. Requests are counted by the server: those beyond one a sample are retries and hedges.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from benchmarking.checked import draw_order, measure_checked
from benchmarking.effort import Effort
from benchmarking.measure import column, measure_in_turns
from benchmarking.results import Bar, Row, Setting, make_row
from benchmarking.statistics import paired_ratio
from benchmarking.workload import (
    LATENCY_SIGMA,
    Photos,
    describe,
    read_photos,
    remote_store,
    serve,
)
from concurrent_dataloader.testing import Fault

_SCENARIO = "faults"
_LATENCY_S = 0.03
_NUM_PASSES = 2
_MIXED = (
    Fault("slow_down", rate=0.05),
    Fault("reset_before_body", rate=0.01),
    Fault("reset_inside_body", rate=0.01),
    Fault("truncated_body", rate=0.02),
    Fault("foreign_body", rate=0.01),
)
_STALLS = (Fault("stalled_headers", rate=0.01, stall_s=2.0),)


def compare_mixed(effort: Effort) -> list[Row]:
    """Compare epochs with many kinds of faults with epochs without any."""
    photos = read_photos(effort.num_images)
    order = draw_order(len(photos.raw), _NUM_PASSES * len(photos.raw))
    with serve(photos, _LATENCY_S) as server:
        store = remote_store(server)
        run = functools.partial(measure_checked, photos, store, effort, order, server)
        runs = measure_in_turns({"clean": run, "faulty": lambda: run(_MIXED)}, effort)
    clean, faulty = runs["clean"], runs["faulty"]
    return [
        make_row(
            _SCENARIO,
            "5 % 503, 2 % resets, 2 % cut short, 1 % another's body, against the same without",
            _describe(photos, effort, _MIXED),
            {
                "ratio": paired_ratio(
                    column(faulty, "images_per_s"), column(clean, "images_per_s")
                ),
                "clean_images_per_s": column(clean, "images_per_s"),
                "faulty_images_per_s": column(faulty, "images_per_s"),
                "num_gets_per_sample": column(faulty, "num_gets_per_sample"),
                "clean_extra_requests_share": column(clean, "extra_requests_share"),
                "num_faults": column(faulty, "num_faults"),
                "num_retries": [run.num_gets - float(len(order)) for run in faulty],
            },
            Bar(figure="ratio", bound=0.8),
        )
    ]


def compare_stalls(effort: Effort) -> list[Row]:
    """Compare epochs in which requests stall with epochs without, with and without hedging."""
    photos = read_photos(effort.num_images)
    order = draw_order(len(photos.raw), _NUM_PASSES * len(photos.raw))
    with serve(photos, _LATENCY_S) as server:
        hedged = functools.partial(
            measure_checked, photos, remote_store(server), effort, order, server
        )
        unhedged = functools.partial(
            measure_checked, photos, remote_store(server, hedge=None), effort, order, server
        )
        runs = measure_in_turns({"clean": hedged, "stalled": lambda: hedged(_STALLS)}, effort)
        # Once is enough for what it is there to show, and takes as long as all the others.
        once = measure_in_turns(
            {"clean, unhedged": unhedged, "stalled, unhedged": lambda: unhedged(_STALLS)},
            dataclasses.replace(effort, repeats=1),
        )
    clean, stalled = runs["clean"], runs["stalled"]
    settings = _describe(photos, effort, _STALLS)
    return [
        make_row(
            _SCENARIO,
            "1 % of requests stall 2 s, hedged, against the same without stalls",
            settings,
            {
                "ratio": paired_ratio(
                    column(stalled, "images_per_s"), column(clean, "images_per_s")
                ),
                "clean_images_per_s": column(clean, "images_per_s"),
                "stalled_images_per_s": column(stalled, "images_per_s"),
                "unhedged_ratio": paired_ratio(
                    column(once["stalled, unhedged"], "images_per_s"),
                    column(once["clean, unhedged"], "images_per_s"),
                ),
                "num_faults": column(stalled, "num_faults"),
            },
            Bar(figure="ratio", bound=0.8),
        ),
        make_row(
            _SCENARIO,
            "1 % of requests stall 2 s, hedged: requests beyond one a sample",
            settings,
            {
                "extra_requests_share": column(stalled, "extra_requests_share"),
                "clean_extra_requests_share": column(clean, "extra_requests_share"),
            },
            Bar(figure="extra_requests_share", bound=0.02, direction="at most"),
        ),
    ]


def _describe(photos: Photos, effort: Effort, faults: tuple[Fault, ...]) -> dict[str, Setting]:
    settings = describe(
        photos,
        effort,
        latency_median_s=_LATENCY_S,
        latency_sigma=LATENCY_SIGMA,
        num_epoch_images=_NUM_PASSES * len(photos.raw),
        num_warm_up_batches=0,
        **{f"{fault.kind}_rate": fault.rate for fault in faults},
    )
    del settings["seconds"]  # whole epochs, whatever they take
    return settings


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "mixed": compare_mixed,
    "stalls": compare_stalls,
}
BARS = tuple(CASES)
