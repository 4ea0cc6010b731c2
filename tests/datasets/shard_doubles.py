"""Small sets of shards, and the index of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from concurrent_dataloader.formats.crc32c import crc32c
from concurrent_dataloader.formats.fields import find_payload_field
from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.shard_index import SampleCrcs, Shard, ShardIndex, ShardIndexBuilder

Samples = Sequence[tuple[str, Mapping[str, bytes]]]


def write_tar(samples: Samples) -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    for key, fields in samples:
        writer.write(key, fields)
    writer.close()
    return file.getvalue()


def pack_tars(
    shards: Mapping[str, Samples],
    *,
    classes: Sequence[str] | None = None,
    label_space: str | None = None,
    label_base: int = 0,
    labels: Mapping[str, int] | None = None,
    checked: bool = True,
) -> tuple[dict[str, bytes], ShardIndex]:
    """Write tars, and index them by where the writer says that members are.

    The index has the labels of ``cls`` members, less ``label_base``, or ``labels`` by key.
    """
    builder = ShardIndexBuilder("tar")
    bodies: dict[str, bytes] = {}
    for name, samples in shards.items():
        file = io.BytesIO()
        writer = TarWriter(file)
        written = [writer.write(key, fields) for key, fields in samples]
        writer.close()
        raw = bodies[name] = file.getvalue()
        for (key, fields), sample in zip(samples, written, strict=True):
            payload = find_payload_field(list(fields))
            assert payload is not None
            label = int(fields["cls"]) - label_base if "cls" in fields else None
            if labels is not None:
                label = labels.get(key)
            parts = sample.extent, sample.members[payload].data
            crcs = SampleCrcs(*(crc32c(raw[slice(*part)]) for part in parts))
            builder.add_sample(f"{key}.{payload}", *parts, label, crcs if checked else None)
        builder.add_shard(Shard(name, len(bodies[name])))
    return bodies, builder.build(classes, label_space)
