"""How fast is the loader, against torch's?

Command: ``python -m benchmarking loader_epoch [--only 100ms ...]``

Held fixed: photographs of 110 kB, train transforms, shuffled in the same order, batch 64, two
workers, torch's prefetch_factor; one class of data set over different stores. Before a comparison
the first batches of its sides are compared bit for bit, and after it the positions of all that was
delivered.

Varied: where the bytes are, and the loader. ``5ms`` to ``200ms``: ours over a store with that
median latency (lognormal, sigma 0.3), against torch's over the same bytes in RAM. ``ram`` and
``local``: both over the same bytes in RAM, and in files in the page cache. ``plain``: as ``local``,
but with a data set that knows nothing of us and crops in the centre, since random transforms of
such a one draw in our threads. ``boto3``: ours at 100
ms against torch's loader that gets one object after the other by boto3. ``vanilla``: row 232, 130
ms, 4 workers, 16 fetchers, batch 256, whole epochs with the start of the workers in them, against
fetch_impl "vanilla". ``batch_pool``: row 71, at 100 ms, against ours with ``batch_pool=0``, which
is the ``torch_`` side of its figures.

The clock starts after four batches a worker (one for ``boto3``, which takes 8 s for it; none for
``vanilla``) and stops in mid-epoch.
The object server shares the cores with the loader; its CPU is a figure of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch

from benchmarking.effort import Effort
from benchmarking.measure import (
    NUM_WARM_UP_BATCHES,
    OpenLoader,
    Speed,
    check_same_batches,
    column,
    measure_epoch,
    measure_in_turns,
    measure_speed,
)
from benchmarking.results import Bar, Row, make_row
from benchmarking.statistics import Estimate, paired_ratio
from benchmarking.workload import (
    LATENCY_SIGMA,
    PlainImages,
    describe,
    images_of,
    local_store,
    our_loader,
    ram_store,
    read_photos,
    remote_store,
    serve,
    torch_loader,
)
from concurrent_dataloader.dataloader_mod.settings import FetchImpl
from concurrent_dataloader.testing import ObjectServer

_SCENARIO = "loader_epoch"
_IMPLS: tuple[FetchImpl, ...] = ("threaded", "asyncio")


def compare_with_ram(effort: Effort, *, latency_s: float, bound: float) -> list[Row]:
    """Compare ours over a slow store with torch's over RAM."""
    photos = read_photos(effort.num_images)
    with serve(photos, latency_s) as server:
        remote = images_of(photos, remote_store(server))
        loaders: dict[str, OpenLoader] = {
            "torch": functools.partial(torch_loader, images_of(photos, ram_store(photos)), effort),
            **{
                impl: functools.partial(our_loader, remote, effort, fetch_impl=impl)
                for impl in _IMPLS
            },
        }
        speeds = _measure_steady(loaders, effort, server)
    settings = describe(photos, effort, latency_median_s=latency_s, latency_sigma=LATENCY_SIGMA)
    return [
        make_row(
            _SCENARIO,
            f"{impl}, store at {latency_s * 1e3:g} ms, against torch over RAM",
            {**settings, "fetch_impl": impl, "num_warm_up_batches": NUM_WARM_UP_BATCHES},
            _figures(speeds[impl], speeds["torch"]),
            Bar(figure="ratio", bound=bound),
        )
        for impl in _IMPLS
    ]


def compare_on_same_store(effort: Effort, *, place: str, bound: float) -> list[Row]:
    """Compare both loaders over the same fast store."""
    photos = read_photos(effort.num_images)
    store = ram_store(photos) if place == "RAM" else local_store(photos)
    images = images_of(photos, store)
    loaders: dict[str, OpenLoader] = {
        "torch": functools.partial(torch_loader, images, effort),
        "threaded": functools.partial(our_loader, images, effort),
    }
    speeds = _measure_steady(loaders, effort, None)
    return [
        make_row(
            _SCENARIO,
            f"threaded, {place}, against torch over the same",
            describe(
                photos, effort, fetch_impl="threaded", num_warm_up_batches=NUM_WARM_UP_BATCHES
            ),
            _figures(speeds["threaded"], speeds["torch"]),
            Bar(figure="ratio", bound=bound),
        )
    ]


def compare_plain(effort: Effort) -> list[Row]:
    """Compare both loaders over a data set of the user's own: files, opened and decoded by it."""
    photos = read_photos(effort.num_images)
    files = PlainImages([photos.folder / key for key in photos.raw])
    loaders: dict[str, OpenLoader] = {
        "torch": functools.partial(torch_loader, files, effort),
        "threaded": functools.partial(our_loader, files, effort),
    }
    speeds = _measure_steady(loaders, effort, None)
    settings = describe(
        photos, effort, fetch_impl="threaded", num_warm_up_batches=NUM_WARM_UP_BATCHES
    )
    return [
        make_row(
            _SCENARIO,
            "threaded, plain data set of files in page cache, against torch over the same",
            {**settings, "transform": "Resize(256), CenterCrop(224), ToTensor, Normalize"},
            _figures(speeds["threaded"], speeds["torch"]),
            Bar(figure="ratio", bound=1.0),
        )
    ]


def compare_with_boto3(effort: Effort) -> list[Row]:
    """Compare ours with what most people do: one ``get_object`` after the other."""
    effort = dataclasses.replace(effort, repeats=min(effort.repeats, 3))
    photos = read_photos(effort.num_images)
    latency_s, num_warm_up_batches = 0.1, 1
    with serve(photos, latency_s) as server:
        loaders: dict[str, OpenLoader] = {
            "boto3": functools.partial(
                torch_loader, images_of(photos, remote_store(server, "boto3")), effort
            ),
            "threaded": functools.partial(
                our_loader, images_of(photos, remote_store(server)), effort
            ),
        }
        speeds = measure_in_turns(
            {
                name: _speed_of(open_loader, effort, server, num_warm_up_batches)
                for name, open_loader in loaders.items()
            },
            effort,
        )
    settings = describe(
        photos,
        effort,
        fetch_impl="threaded",
        latency_median_s=latency_s,
        latency_sigma=LATENCY_SIGMA,
        num_warm_up_batches=num_warm_up_batches,
    )
    return [
        make_row(
            _SCENARIO,
            "threaded, store at 100 ms, against torch with boto3 one by one",
            settings,
            _figures(speeds["threaded"], speeds["boto3"]),
            Bar(figure="ratio", bound=30.0),
        )
    ]


def compare_with_vanilla(effort: Effort) -> list[Row]:
    """Compare whole epochs, the right items asserted: row 232."""
    num_workers, num_fetch_workers, latency_s = 4, 16, 0.13
    effort = dataclasses.replace(
        effort, batch_size=4 * effort.batch_size, repeats=min(effort.repeats, 3)
    )
    num_images = num_workers * effort.batch_size
    photos = read_photos(max(num_images, effort.num_images))
    order = _draw_order(len(photos.raw), num_images)
    with serve(photos, latency_s) as server:
        remote = images_of(photos, remote_store(server))

        def run(fetch_impl: FetchImpl) -> Speed:
            loader = our_loader(
                remote,
                effort,
                fetch_impl=fetch_impl,
                num_workers=num_workers,
                num_fetch_workers=num_fetch_workers,
                sampler=order,
            )
            speed = measure_epoch(loader, server)
            if speed.positions != order:
                raise RuntimeError(
                    f"{fetch_impl}: got {len(speed.positions)} samples that are not those of the "
                    f"sampler, expected its {len(order)}, in its order"
                )
            return speed

        speeds = measure_in_turns(
            {"vanilla": lambda: run("vanilla"), "threaded": lambda: run("threaded")}, effort
        )
    settings = describe(
        photos,
        effort,
        fetch_impl="threaded",
        num_fetch_workers=num_fetch_workers,
        latency_median_s=latency_s,
        latency_sigma=LATENCY_SIGMA,
        num_warm_up_batches=0,
        num_epoch_images=num_images,
    )
    return [
        make_row(
            _SCENARIO,
            "threaded, 130 ms, 4 workers, 16 fetchers, batch 256, against vanilla (row 232)",
            {**settings, "num_workers": num_workers},
            _figures(speeds["threaded"], speeds["vanilla"]),
            Bar(figure="ratio", bound=9.0),
        )
    ]


def compare_with_no_pool(effort: Effort) -> list[Row]:
    """Compare looking ahead over batches with fetching one batch at a time: row 71."""
    photos = read_photos(effort.num_images)
    with serve(photos, 0.1) as server:
        remote = images_of(photos, remote_store(server))
        loaders: dict[str, OpenLoader] = {
            "without": functools.partial(our_loader, remote, effort, batch_pool=0),
            "with": functools.partial(our_loader, remote, effort),
        }
        speeds = _measure_steady(loaders, effort, server)
    settings = describe(
        photos,
        effort,
        fetch_impl="threaded",
        latency_median_s=0.1,
        latency_sigma=LATENCY_SIGMA,
        num_warm_up_batches=NUM_WARM_UP_BATCHES,
    )
    return [
        make_row(
            _SCENARIO,
            "threaded, 100 ms, batch_pool chosen against batch_pool=0 (row 71)",
            settings,
            _figures(speeds["with"], speeds["without"]),
            Bar(figure="ratio", bound=1.0),
        )
    ]


def _measure_steady(
    loaders: Mapping[str, OpenLoader], effort: Effort, server: ObjectServer | None
) -> dict[str, list[Speed]]:
    check_same_batches(loaders, num_batches=4)
    sides = {
        name: _speed_of(open_loader, effort, server, NUM_WARM_UP_BATCHES)
        for name, open_loader in loaders.items()
    }
    return measure_in_turns(sides, effort)


def _speed_of(
    open_loader: OpenLoader, effort: Effort, server: ObjectServer | None, num_warm_up_batches: int
) -> Callable[[], Speed]:
    return lambda: measure_speed(open_loader(), effort.seconds, server, num_warm_up_batches)


def _figures(ours: list[Speed], theirs: list[Speed]) -> dict[str, Estimate | list[float]]:
    """Figures of a comparison; ``torch_`` is the other side, also where its client is boto3."""
    return {
        "ratio": paired_ratio(column(ours, "images_per_s"), column(theirs, "images_per_s")),
        "ours_images_per_s": column(ours, "images_per_s"),
        "torch_images_per_s": column(theirs, "images_per_s"),
        "ours_client_cpu_ms_per_image": column(ours, "client_cpu_ms_per_image"),
        "torch_client_cpu_ms_per_image": column(theirs, "client_cpu_ms_per_image"),
        "server_cpu_ms_per_image": column(ours, "server_cpu_ms_per_image"),
    }


def _draw_order(num_images: int, num_drawn: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(num_images, generator=generator)[:num_drawn].tolist()


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "5ms": functools.partial(compare_with_ram, latency_s=0.005, bound=1.0),
    "30ms": functools.partial(compare_with_ram, latency_s=0.03, bound=1.0),
    "100ms": functools.partial(compare_with_ram, latency_s=0.1, bound=1.0),
    "200ms": functools.partial(compare_with_ram, latency_s=0.2, bound=0.95),
    "ram": functools.partial(compare_on_same_store, place="RAM", bound=1.1),
    "local": functools.partial(compare_on_same_store, place="files in page cache", bound=1.05),
    "plain": compare_plain,
    "boto3": compare_with_boto3,
    "vanilla": compare_with_vanilla,
    "batch_pool": compare_with_no_pool,
}
BARS = tuple(CASES)
