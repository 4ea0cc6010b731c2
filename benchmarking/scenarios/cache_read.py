"""How fast is the disk cache, and does it hold when its processes are killed?

Command: ``python -m benchmarking cache_read [--only epoch crash]``

``epoch``. Held fixed: photographs of 110 kB, train transforms, shuffled in the same order, batch
64, two workers, our loader on both sides. Varied: the same photographs come from a store at 30 ms
through a disk cache that has them all, or from files in a folder of the same disk; both from the
page cache. Before the comparison the first batches of both are compared bit for bit, after it the
positions of all that came. The requests that the store got meanwhile are counted.

``crash``. Eight processes read one GB of objects of 1 to 220 kB through one cache of 100 MB, a few
keys far more often than others, a fifth of the reads by byte range. One of them is killed by
SIGKILL every 0.2 s in the mean, and another begins. Each knows what bytes it should get; the folder
is measured all the while. The objects are computed, so that nothing else takes time.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarking.cache_crash import Load, kill_readers
from benchmarking.effort import Effort
from benchmarking.measure import (
    NUM_WARM_UP_BATCHES,
    OpenLoader,
    Speed,
    check_same_batches,
    column,
    measure_in_turns,
    measure_speed,
)
from benchmarking.results import Bar, Row, make_row
from benchmarking.statistics import paired_ratio
from benchmarking.workload import (
    describe,
    images_of,
    local_store,
    our_loader,
    read_photos,
    remote_store,
    serve,
)
from concurrent_dataloader.stores.cache import DiskCache

_SCENARIO = "cache_read"
_LATENCY_S = 0.03
_NUM_FILLING_THREADS = 32
_QUICK_LOAD = Load(
    num_objects=400,
    mean_bytes=30_000,
    total_bytes=10 * 10**6,
    limit_bytes=10**6,
    kill_every_s=0.05,
    min_kills=3,
)


def compare_epochs(effort: Effort) -> list[Row]:
    """Compare an epoch out of the cache with one out of files."""
    photos = read_photos(effort.num_images)
    with (
        tempfile.TemporaryDirectory(dir=photos.folder.parent) as folder,
        serve(photos, _LATENCY_S) as server,
    ):
        store = remote_store(server, cache=DiskCache(folder))
        with ThreadPoolExecutor(_NUM_FILLING_THREADS) as threads:
            for _ in threads.map(store.get, photos.raw):
                pass
        num_first_gets = server.counters().num_gets
        loaders: dict[str, OpenLoader] = {
            "local": functools.partial(our_loader, images_of(photos, local_store(photos)), effort),
            "cached": functools.partial(our_loader, images_of(photos, store), effort),
        }
        server.reset_counters()
        check_same_batches(loaders, num_batches=4)
        speeds = measure_in_turns(
            {
                name: functools.partial(_measure_side, open_loader, effort)
                for name, open_loader in loaders.items()
            },
            effort,
        )
        num_gets = server.counters().num_gets
        store.close()
    cached, local = speeds["cached"], speeds["local"]
    settings = describe(
        photos,
        effort,
        fetch_impl="threaded",
        latency_median_s=_LATENCY_S,
        num_warm_up_batches=NUM_WARM_UP_BATCHES,
    )
    return [
        make_row(
            _SCENARIO,
            "second epoch out of the disk cache, against files in a folder",
            settings,
            {
                "ratio": paired_ratio(
                    column(cached, "images_per_s"), column(local, "images_per_s")
                ),
                "cached_images_per_s": column(cached, "images_per_s"),
                "local_images_per_s": column(local, "images_per_s"),
                "cached_client_cpu_ms_per_image": column(cached, "client_cpu_ms_per_image"),
                "local_client_cpu_ms_per_image": column(local, "client_cpu_ms_per_image"),
            },
            Bar(figure="ratio", bound=1.0),
        ),
        make_row(
            _SCENARIO,
            "requests of the second epoch and of those after it",
            settings,
            {"num_gets": [num_gets], "num_first_epoch_gets": [num_first_gets]},
            Bar(figure="num_gets", bound=0, direction="at most"),
        ),
    ]


def _measure_side(open_loader: OpenLoader, effort: Effort) -> Speed:
    return measure_speed(open_loader(), effort.seconds)


def kill_at_random(effort: Effort) -> list[Row]:
    """Kill processes that share a cache, and look for damage."""
    load = _QUICK_LOAD if effort.is_quick else Load()
    damages = []
    for seed in range(min(effort.repeats, 3)):
        with tempfile.TemporaryDirectory() as folder:
            damages.append(kill_readers(pathlib.Path(folder) / "cache", load, seed))
    settings = {**load._asdict(), "range_share": 0.2}
    return [
        make_row(
            _SCENARIO,
            "bytes above the limit, processes killed at random",
            settings,
            {
                "above_limit_bytes": [max(0, damage.max_over_bytes) for damage in damages],
                "read_bytes": [damage.read_bytes for damage in damages],
                "num_kills": [damage.num_kills for damage in damages],
                "elapsed_s": [damage.elapsed_s for damage in damages],
            },
            Bar(
                figure="above_limit_bytes",
                bound=load.num_processes * load.mean_bytes,
                direction="at most",
            ),
        ),
        make_row(
            _SCENARIO,
            "reads of wrong bytes, processes killed at random",
            settings,
            {
                "num_wrong": [damage.num_wrong for damage in damages],
                "left_over_bytes": [damage.left_bytes for damage in damages],
                "num_kills": [damage.num_kills for damage in damages],
            },
            Bar(figure="num_wrong", bound=0, direction="at most"),
        ),
    ]


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "epoch": compare_epochs,
    "crash": kill_at_random,
}
BARS = tuple(CASES)
