"""Does the loader choose well how many requests are in flight?

Command: ``python -m benchmarking in_flight [--only 30ms limited ...]``

Held fixed: objects of 110 kB, shuffled in the same order, batch 64, two workers.

Varied: ``5ms`` to ``200ms``: a store with that median latency (lognormal, sigma 0.3), read by our
loader with its defaults, against the best of fixed ``num_fetch_workers`` (8, 16, 32, 64, 128, 256
per worker). A sweep finds it, by the higher median; pairs of runs of their own compare it with the
defaults, since the best of six that are equal is the luckiest one in the runs that found it. Once
for photographs with train transforms, where decoding is the bound as soon as enough is in flight,
and once for objects that are not decoded, where the store and its server's core are. The clock
starts after eight batches a worker, in which the number can settle, and stops in mid-epoch.

``limited``: a store that refuses by 503 SlowDown what goes beyond 200 requests a second, of which
20 may come at once; whole epochs of photographs, from ``iter()`` to the end, each sample compared
with the original. Its ratio is what was delivered, over 200 a second.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

from benchmarking.checked import draw_order, measure_checked
from benchmarking.effort import Effort
from benchmarking.measure import Speed, column, measure_in_turns, measure_speed
from benchmarking.results import Bar, Row, Setting, make_row
from benchmarking.statistics import paired_ratio
from benchmarking.workload import (
    LATENCY_SIGMA,
    RawBytes,
    describe,
    images_of,
    our_loader,
    read_photos,
    remote_store,
    serve,
)

_SCENARIO = "in_flight"
_FIXED = (8, 16, 32, 64, 128, 256)
_NUM_WARM_UP_BATCHES = 8
_NUM_SWEEPS = 2
_MAX_REPEATS = 3
_LIMIT_PER_S = 200.0
_LIMIT_BURST = 20.0


def compare_with_fixed(effort: Effort, *, latency_s: float) -> list[Row]:
    """Compare the number that the loader chooses with the best of fixed ones."""
    photos = read_photos(effort.num_images)
    settings = describe(
        photos,
        effort,
        num_sweeps=_NUM_SWEEPS,
        latency_median_s=latency_s,
        latency_sigma=LATENCY_SIGMA,
        num_warm_up_batches=_NUM_WARM_UP_BATCHES,
    )
    where = f"at {latency_s * 1e3:g} ms, num_fetch_workers chosen, against the best fixed"
    with serve(photos, latency_s) as server:
        store = remote_store(server)
        raw = RawBytes(list(photos.raw), store)
        return [
            _compare(f"photographs {where}", settings, images_of(photos, store), effort),
            _compare(f"raw objects {where}", {**settings, "transform": None}, raw, effort),
        ]


def _compare(case: str, settings: dict[str, Setting], samples: Any, effort: Effort) -> Row:
    fixed = {
        f"fixed_{number}": functools.partial(_measure, samples, effort, number) for number in _FIXED
    }
    sweep = measure_in_turns(fixed, dataclasses.replace(effort, repeats=_NUM_SWEEPS))
    swept = {name: column(each, "images_per_s") for name, each in sweep.items()}
    best = max(_FIXED, key=lambda number: statistics.median(swept[f"fixed_{number}"]))
    sides = {
        "chosen": functools.partial(_measure, samples, effort, None),
        "best": fixed[f"fixed_{best}"],
    }
    runs = measure_in_turns(sides, effort)
    speeds = {name: column(each, "images_per_s") for name, each in runs.items()}
    return make_row(
        _SCENARIO,
        case,
        settings,
        {
            "ratio": paired_ratio(speeds["chosen"], speeds["best"]),
            "num_fetch_workers_of_best": best,
            **{f"{name}_images_per_s": values for name, values in (speeds | swept).items()},
            **{
                f"{side}_client_cpu_ms_per_image": column(each, "client_cpu_ms_per_image")
                for side, each in runs.items()
            },
        },
        Bar(figure="ratio", bound=0.9),
    )


def _measure(samples: Any, effort: Effort, num_fetch_workers: int | None) -> Speed:
    loader = our_loader(samples, effort, num_fetch_workers=num_fetch_workers)
    return measure_speed(loader, effort.seconds, num_warm_up_batches=_NUM_WARM_UP_BATCHES)


def measure_limited(effort: Effort) -> list[Row]:
    """Measure what comes from a store that limits requests, and what it had to refuse."""
    effort = dataclasses.replace(effort, repeats=min(effort.repeats, _MAX_REPEATS))
    photos = read_photos(effort.num_images)
    order = draw_order(len(photos.raw), len(photos.raw))
    with serve(photos, 0.03) as server:
        store = remote_store(server)
        server.set_rate_limit(_LIMIT_PER_S, burst=_LIMIT_BURST)
        sides = {
            "limited": functools.partial(measure_checked, photos, store, effort, order, server)
        }
        runs = measure_in_turns(sides, effort)["limited"]
    settings = describe(
        photos,
        effort,
        latency_median_s=0.03,
        latency_sigma=LATENCY_SIGMA,
        limit_requests_per_s=_LIMIT_PER_S,
        limit_burst=_LIMIT_BURST,
        num_warm_up_batches=0,
    )
    return [
        make_row(
            _SCENARIO,
            "store limited to 200 requests a second: delivered, over 200 a second",
            settings,
            {
                "ratio": [run.images_per_s / _LIMIT_PER_S for run in runs],
                "images_per_s": column(runs, "images_per_s"),
                "refused_share": column(runs, "refused_share"),
                "num_gets_per_sample": column(runs, "num_gets_per_sample"),
            },
            Bar(figure="ratio", bound=0.9),
        )
    ]


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    **{
        f"{latency_s * 1e3:g}ms": functools.partial(compare_with_fixed, latency_s=latency_s)
        for latency_s in (0.005, 0.03, 0.1, 0.2)
    },
    "limited": measure_limited,
}
BARS = tuple(CASES)
