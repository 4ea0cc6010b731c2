"""Small sets of shards, and the index of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from concurrent_dataloader.formats.fields import find_payload_field
from concurrent_dataloader.formats.tar import TarWriter
from concurrent_dataloader.shard_index import Shard, ShardIndex, ShardIndexBuilder

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
) -> tuple[dict[str, bytes], ShardIndex]:
    """Write tars, and index them by where the writer says that members are."""
    builder = ShardIndexBuilder("tar")
    bodies: dict[str, bytes] = {}
    for name, samples in shards.items():
        file = io.BytesIO()
        writer = TarWriter(file)
        for key, fields in samples:
            written = writer.write(key, fields)
            payload = find_payload_field(list(fields))
            assert payload is not None
            label = int(fields["cls"]) - label_base if "cls" in fields else None
            data = written.members[payload].data
            builder.add_sample(f"{key}.{payload}", written.extent, data, label)
        writer.close()
        bodies[name] = file.getvalue()
        builder.add_shard(Shard(name, len(bodies[name])))
    return bodies, builder.build(classes, label_space)
