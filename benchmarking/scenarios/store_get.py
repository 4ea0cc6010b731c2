"""How fast do bytes come, and what does a fetched object cost in CPU?

Command: ``python -m benchmarking store_get [--only loader cpu clients awaits]``

Held fixed: objects of 110 kB at 100 ms, signed requests, 64 in flight.

Varied: ``loader``: our loader without decoding, one worker, 64 fetchers, against 64 / latency,
once with constant latency (the bar) and once lognormal with sigma 0.3, where the mean latency is
1.046 medians. ``cpu``: our loader of images over the store and over RAM in pairs; the difference
of the CPU an image, of this process and its workers, is what fetching costs. ``clients``: the
store alone, no loader, one process, by each client, with threads and with asyncio; the process is
spawned for each measurement. ``awaits``: the same with bare obstore, blocking, blocking in a loop
of each thread so that it could be cancelled, awaited in threads as our store does it, and by its
own awaitables.

The clock starts when the first 128 objects are there (for ``cpu``: after four batches a worker).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from benchmarking.bare_obstore import AwaitedObstore, BareObstore, LoopedObstore, Place
from benchmarking.drive import NUM_IN_FLIGHT, Rate, drive_asyncio, drive_threads
from benchmarking.effort import Effort
from benchmarking.measure import Speed, column, measure_in_turns, measure_speed
from benchmarking.processes import run_in_process
from benchmarking.results import Bar, Row, make_row
from benchmarking.statistics import estimate
from benchmarking.workload import (
    BUCKET,
    LATENCY_SIGMA,
    Photos,
    RawBytes,
    describe,
    images_of,
    our_loader,
    ram_store,
    read_photos,
    remote_store,
    serve,
)
from concurrent_dataloader.dataloader_mod.settings import FetchImpl
from concurrent_dataloader.stores import Client, Store

_SCENARIO = "store_get"
_LATENCY_S = 0.1
_IMPLS: tuple[FetchImpl, ...] = ("threaded", "asyncio")
_CLIENTS: tuple[Client, ...] = ("obstore", "http", "boto3", "aiobotocore", "aiohttp")


def measure_loader(effort: Effort) -> list[Row]:
    """Measure how near the loader comes to what 64 requests in flight can give."""
    photos = read_photos(effort.num_images)
    rows: list[Row] = []
    for sigma in (0.0, LATENCY_SIGMA):
        with serve(photos, _LATENCY_S, sigma) as server:
            raw = RawBytes(list(photos.raw), remote_store(server))
            speeds = [
                measure_speed(
                    our_loader(raw, effort, num_workers=1, num_fetch_workers=NUM_IN_FLIGHT),
                    effort.seconds,
                    server,
                )
                for _ in range(effort.repeats)
            ]
        rates = column(speeds, "images_per_s")
        ceiling_per_s = NUM_IN_FLIGHT / (_LATENCY_S * math.exp(sigma**2 / 2))
        rows.append(
            make_row(
                _SCENARIO,
                "loader, bytes only, 100 ms, one worker, 64 in flight, against 64 / latency"
                + (", lognormal, mean latency" if sigma else ""),
                {
                    **describe(photos, effort, fetch_impl="threaded"),
                    "transform": "none",
                    "num_workers": 1,
                    "num_fetch_workers": NUM_IN_FLIGHT,
                    "latency_median_s": _LATENCY_S,
                    "latency_sigma": sigma,
                },
                {
                    "ratio": [rate / ceiling_per_s for rate in rates],
                    "requests_per_s": rates,
                    "ceiling_requests_per_s": ceiling_per_s,
                    "client_cpu_ms_per_request": column(speeds, "client_cpu_ms_per_image"),
                    "server_cpu_ms_per_request": column(speeds, "server_cpu_ms_per_image"),
                },
                None if sigma else Bar(figure="ratio", bound=0.9),
            )
        )
    return rows


def measure_cpu(effort: Effort) -> list[Row]:
    """Measure the CPU of a fetched object beyond that of the same image from RAM."""
    photos = read_photos(effort.num_images)
    rows: list[Row] = []
    for impl in _IMPLS:
        with serve(photos, _LATENCY_S) as server:
            stores = {"RAM": ram_store(photos), "store": remote_store(server)}
            speeds = measure_in_turns(
                {
                    place: functools.partial(
                        _measure_images, images_of(photos, store), effort, impl
                    )
                    for place, store in stores.items()
                },
                effort,
            )
        store_ms, ram_ms = (
            column(speeds[place], "client_cpu_ms_per_image") for place in ("store", "RAM")
        )
        rows.append(
            make_row(
                _SCENARIO,
                f"CPU of one fetched object beyond decode and transform, {impl}",
                describe(
                    photos,
                    effort,
                    fetch_impl=impl,
                    latency_median_s=_LATENCY_S,
                    latency_sigma=LATENCY_SIGMA,
                ),
                {
                    "fetch_cpu_ms_per_image": [
                        remote - ram for remote, ram in zip(store_ms, ram_ms, strict=True)
                    ],
                    "store_client_cpu_ms_per_image": store_ms,
                    "ram_client_cpu_ms_per_image": ram_ms,
                },
                Bar(figure="fetch_cpu_ms_per_image", bound=0.35, direction="at most"),
            )
        )
    return rows


def _measure_images(images: object, effort: Effort, impl: FetchImpl) -> Speed:
    return measure_speed(our_loader(images, effort, fetch_impl=impl), effort.seconds)


def compare_clients(effort: Effort) -> list[Row]:
    """Compare the clients without a loader."""
    photos = read_photos(effort.num_images)
    rows: list[Row] = []
    with serve(photos, _LATENCY_S) as server:
        for client in _CLIENTS:
            for name, drive in (("threads", drive_threads), ("asyncio", drive_asyncio)):
                store = remote_store(server, client)
                rows.append(_drive(f"{client}, {name}", client, drive, store, photos, effort))
    return rows


def compare_awaits(effort: Effort) -> list[Row]:
    """Compare what obstore costs blocking, awaited in threads, and by its own awaitables."""
    photos = read_photos(effort.num_images)
    with serve(photos, _LATENCY_S) as server:
        place = Place(
            server.endpoint_url, BUCKET, server.region, server.access_key, server.secret_key
        )
        bare, awaited, looped = BareObstore(place), AwaitedObstore(place), LoopedObstore(place)
        return [
            _drive(f"bare obstore, {name}", "obstore", drive, store, photos, effort)
            for name, drive, store in (
                ("blocking", drive_threads, bare),
                ("blocking, its awaitables in a loop of each thread", drive_threads, looped),
                ("awaited in threads", drive_asyncio, bare),
                ("its awaitables", drive_asyncio, awaited),
            )
        ]


def _drive(
    case: str,
    client: Client,
    drive: Callable[[Store, list[str], float], Rate],
    store: Store,
    photos: Photos,
    effort: Effort,
) -> Row:
    # A process each: all its CPU is the client's.
    rates = [
        run_in_process(drive, store, list(photos.raw), effort.seconds)
        for _ in range(effort.repeats)
    ]
    return make_row(
        _SCENARIO,
        f"{case}, 100 ms, 64 in flight",
        {
            "client": client,
            "driver": "threads" if drive is drive_threads else "asyncio",
            "bucket": BUCKET,
            "num_in_flight": NUM_IN_FLIGHT,
            "mean_object_bytes": round(photos.mean_bytes),
            "latency_median_s": _LATENCY_S,
            "latency_sigma": LATENCY_SIGMA,
            "repeats": effort.repeats,
            "seconds": effort.seconds,
        },
        {
            "requests_per_s": estimate([rate.requests_per_s for rate in rates]),
            "client_cpu_ms_per_request": estimate([rate.cpu_ms_per_request for rate in rates]),
        },
    )


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "loader": measure_loader,
    "cpu": measure_cpu,
    "clients": compare_clients,
    "awaits": compare_awaits,
}
BARS = ("loader", "cpu")
