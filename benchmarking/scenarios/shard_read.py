"""How fast are samples of tar shards read, in a stream and at random?

Command: ``python -m benchmarking shard_read [--only stream webdataset random requests]``

Held fixed: photographs of 110 kB in eight tar shards without compression, with an index of byte
ranges, on the object server at 100 ms (lognormal, sigma 0.3); train transforms, batch 64, two
workers. ``cls`` is the position of a sample, so that a batch says what is in it.

Varied: ``stream``: our stream of shards, shuffled with its defaults, against torch's loader over
the same photographs in RAM. ``webdataset``: the same stream against the webdataset package over the
same shards and server, by presigned addresses, which it reads by curl. Both sides run whole epochs,
with the start of the workers in them. ``random``: our loader over byte ranges of the shards,
globally shuffled, against the same, and against torch's loader, from RAM. ``requests``: GETs a
sample of such epochs, globally shuffled and in order.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

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
from benchmarking.statistics import paired_ratio
from benchmarking.workload import (
    BUCKET,
    LATENCY_SIGMA,
    NUM_WORKERS,
    Photos,
    describe,
    images_of,
    our_loader,
    ram_store,
    read_photos,
    remote_store,
    torch_loader,
    train_transform,
)
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import ShardDataset, StreamedShards
from concurrent_dataloader.formats.tar import SampleMembers
from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.shard_index import SampleCrcs, Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.testing import ObjectServer

_SCENARIO = "shard_read"
_LATENCY_S = 0.1
_NUM_SHARDS = 8


class Packed(NamedTuple):
    """The photographs in shards."""

    shards: dict[str, bytes]
    ranges: ShardIndex


def pack_photos(photos: Photos) -> Packed:
    """Write the photographs into shards, in order; ``cls`` is the position."""
    builder = ShardIndexBuilder("tar")
    shards: dict[str, bytes] = {}
    raw = list(photos.raw.values())
    size = -(-len(raw) // _NUM_SHARDS)
    for begin in range(0, len(raw), size):
        file = io.BytesIO()
        writer = TarWriter(file)
        written: list[SampleMembers] = []
        for position in range(begin, min(begin + size, len(raw))):
            fields = {"cls": b"%d" % position, "jpg": raw[position]}
            written.append(writer.write(f"{position:07d}", fields))
        checksums = writer.close()
        extent_crcs = checksums.samples.tolist()
        for place, sample in enumerate(written):
            image = sample.members["jpg"]
            assert image.crc32c is not None, "the writer has seen it"
            crcs = SampleCrcs(extent_crcs[place], image.crc32c)
            builder.add_sample(image.name, sample.extent, image.data, begin + place, crcs)
        name = f"train-{len(shards):06d}.tar"
        shards[name] = file.getvalue()
        builder.add_shard(Shard(name, len(shards[name]), crc32c=checksums.tar))
    return Packed(shards, builder.build())


@contextlib.contextmanager
def serve_shards(packed: Packed) -> Generator[ObjectServer]:
    """Serve the shards and their index from a process of its own, with lognormal latency."""
    with ObjectServer() as server:
        server.put_objects(BUCKET, {**packed.shards, "train-index.npz": packed.ranges.to_bytes()})
        server.set_latency(median_s=_LATENCY_S, sigma=LATENCY_SIGMA)
        yield server


def compare_stream(effort: Effort, *, other: str, bound: float) -> list[Row]:
    """Compare epochs of our stream with those of torch over RAM, or of the webdataset package."""
    photos = read_photos(effort.num_images)
    packed = pack_photos(photos)
    num_images = len(photos.raw)
    with serve_shards(packed) as server:
        sides: dict[str, Callable[[], Speed]] = {
            "ours": lambda: _run(_stream_loader(packed, server, effort), num_images, server),
        }
        if other == "torch over RAM":
            images = images_of(photos, ram_store(photos))
            sampler = functools.partial(torch.utils.data.RandomSampler, images)
            sides[other] = lambda: _run(
                torch_loader(images, effort, sampler=sampler()), num_images, None
            )
        else:
            sides[other] = lambda: _run(
                _webdataset_loader(packed, server, effort), num_images, server
            )
        speeds = measure_in_turns(sides, effort)
    ours, theirs = speeds["ours"], speeds[other]
    return [
        make_row(
            _SCENARIO,
            f"stream of shards at 100 ms, against {other}",
            _describe(photos, effort, order="shuffled", num_warm_up_batches=0),
            {
                "ratio": paired_ratio(column(ours, "images_per_s"), column(theirs, "images_per_s")),
                "ours_images_per_s": column(ours, "images_per_s"),
                "theirs_images_per_s": column(theirs, "images_per_s"),
                "ours_client_cpu_ms_per_image": column(ours, "client_cpu_ms_per_image"),
                "theirs_client_cpu_ms_per_image": column(theirs, "client_cpu_ms_per_image"),
            },
            Bar(figure="ratio", bound=bound),
        )
    ]


def compare_random(effort: Effort) -> list[Row]:
    """Compare random access by byte ranges over the server with the same over RAM."""
    photos = read_photos(effort.num_images)
    packed = pack_photos(photos)
    with serve_shards(packed) as server:
        stores: dict[str, Any] = {
            "RAM": MemoryStore(packed.shards),
            "store": remote_store(server),
        }
        loaders: dict[str, OpenLoader] = {
            name: functools.partial(our_loader, _random_access(packed, store), effort)
            for name, store in stores.items()
        }
        loaders["torch"] = functools.partial(
            torch_loader, _random_access(packed, stores["RAM"]), effort
        )
        check_same_batches(loaders, num_batches=4)
        speeds = measure_in_turns(
            {
                name: functools.partial(_measure_steadily, open_loader, effort, server)
                for name, open_loader in loaders.items()
            },
            effort,
        )
    ours = speeds["store"]
    return [
        make_row(
            _SCENARIO,
            f"random access by byte range at 100 ms, against {who} from RAM",
            _describe(photos, effort, num_warm_up_batches=NUM_WARM_UP_BATCHES),
            {
                "ratio": paired_ratio(column(ours, "images_per_s"), column(theirs, "images_per_s")),
                "store_images_per_s": column(ours, "images_per_s"),
                "ram_images_per_s": column(theirs, "images_per_s"),
                "store_client_cpu_ms_per_image": column(ours, "client_cpu_ms_per_image"),
                "ram_client_cpu_ms_per_image": column(theirs, "client_cpu_ms_per_image"),
            },
            Bar(figure="ratio", bound=0.95),
        )
        for who, theirs in (("the same", speeds["RAM"]), ("torch's loader", speeds["torch"]))
    ]


def count_requests(effort: Effort) -> list[Row]:
    """Count GETs a sample, of an epoch in each order."""
    photos = read_photos(effort.num_images)
    packed = pack_photos(photos)
    rows: list[Row] = []
    with serve_shards(packed) as server:
        images = _random_access(packed, remote_store(server))
        for is_shuffled, bound in ((True, 1.02), (False, 0.3)):
            before = server.counters().num_gets
            loader = DataLoader(
                images, effort.batch_size, shuffle=is_shuffled, num_workers=NUM_WORKERS
            )
            num_images = sum(len(labels) for _, labels in loader)
            rows.append(
                make_row(
                    _SCENARIO,
                    f"GETs a sample, {'globally shuffled' if is_shuffled else 'in order'}",
                    _describe(photos, effort, order="shuffled" if is_shuffled else "in order"),
                    {"num_gets_per_sample": (server.counters().num_gets - before) / num_images},
                    Bar(figure="num_gets_per_sample", bound=bound, direction="at most"),
                )
            )
    return rows


def _random_access(packed: Packed, store: Any) -> ShardDataset:
    return ShardDataset(packed.ranges, store, transform=train_transform())


def _measure_steadily(open_loader: OpenLoader, effort: Effort, server: ObjectServer) -> Speed:
    return measure_speed(open_loader(), effort.seconds, server)


def _run(loader: Any, num_images: int, server: ObjectServer | None) -> Speed:
    """Run an epoch; its order is the loader's own, so only what it holds is compared."""
    speed = measure_epoch(loader, server)
    if sorted(speed.positions) != list(range(num_images)):
        raise RuntimeError(
            f"got {len(speed.positions)} samples, expected each of {num_images} once; the sides are"
            " not comparable"
        )
    return speed._replace(positions=[])


def _stream_loader(packed: Packed, server: ObjectServer, effort: Effort) -> Any:
    stream = StreamedShards(
        list(packed.shards),
        store=remote_store(server),
        index=packed.ranges,
        shuffle=True,
        batch_size=effort.batch_size,
        transform=train_transform(),
    )
    return DataLoader(stream, effort.batch_size, num_workers=NUM_WORKERS)


def _webdataset_loader(packed: Packed, server: ObjectServer, effort: Effort) -> Any:
    import boto3
    import webdataset
    from botocore.config import Config

    client = boto3.client(
        "s3",
        config=Config(signature_version="s3v4"),
        endpoint_url=server.endpoint_url,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    addresses = [
        client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": name})
        for name in packed.shards
    ]
    package: Any = webdataset  # it has no types
    pipeline = package.WebDataset(addresses, shardshuffle=100, seed=0, empty_check=False)
    samples = pipeline.shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    images = samples.map_tuple(train_transform(), int).batched(effort.batch_size)
    return torch.utils.data.DataLoader(images, batch_size=None, num_workers=NUM_WORKERS)


def _describe(photos: Photos, effort: Effort, **more: Any) -> dict[str, Any]:
    return describe(
        photos,
        effort,
        num_shards=_NUM_SHARDS,
        latency_median_s=_LATENCY_S,
        latency_sigma=LATENCY_SIGMA,
        **more,
    )


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "stream": functools.partial(compare_stream, other="torch over RAM", bound=1.0),
    "webdataset": functools.partial(compare_stream, other="webdataset", bound=1.4),
    "random": compare_random,
    "requests": count_requests,
}
BARS = tuple(CASES)
