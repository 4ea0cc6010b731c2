"""Small sets of tar shards, written with Python's tarfile, an oracle beside our own writer."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from concurrent_dataloader.formats.crc32c import crc32c
from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata, SplitMetadata
from concurrent_dataloader.prepare.shard_set import describe_sample, index_name, parse_label
from concurrent_dataloader.shard_index import SampleCrcs, Shard, ShardIndexBuilder
from concurrent_dataloader.stores import WritableStore

Samples = Sequence[tuple[str, Mapping[str, bytes]]]


def make_samples(count: int, first: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    """Samples of different sizes; pixels 10 and 100 are among their bytes (G-01)."""
    return [
        (
            f"n{number % 3}/img {number:05d}",
            {
                "cls": b"%d" % (number % 3),
                "jpg": bytes([10, 100, number % 256]) * (1 + 37 * (number % 40)),
            },
        )
        for number in range(first, first + count)
    ]


def write_set(
    store: WritableStore, shards: Sequence[Samples], split: str = "train", *, indexed: bool = True
) -> None:
    """Write shards, and unless told not to their index and metadata."""
    builder = ShardIndexBuilder("tar")
    described: list[ShardMetadata] = []
    for number, samples in enumerate(shards):
        file = io.BytesIO()
        writer = TarWriter(file)
        written = [(writer.write(key, fields), fields) for key, fields in samples]
        writer.close()
        raw = file.getvalue()
        for sample, fields in written:
            label = parse_label(fields["cls"]) if "cls" in fields else None
            found = describe_sample(sample, label)
            crcs = SampleCrcs(
                *(crc32c(raw[slice(*part)]) for part in (found.extent, found.payload))
            )
            builder.add_sample(*found._replace(crcs=crcs))
        md5, crc = hashlib.md5(raw).hexdigest(), f"{crc32c(raw):08x}"
        name = f"{split}-{number:06d}.tar"
        builder.add_shard(Shard(name, len(raw), md5, crc))
        described.append(
            ShardMetadata(
                name=name, num_samples=len(samples), size_bytes=len(raw), md5=md5, crc32c=crc
            )
        )
        store.put(name, file.getvalue())
    if indexed:
        classes = ("a", "b", "c")
        store.put(index_name(split), builder.build(classes).to_bytes())
        split_metadata = SplitMetadata(
            num_samples=sum(map(len, shards)), shards=tuple(described), classes=classes
        )
        metadata = Metadata(splits={}).with_split(split, split_metadata)
        store.put("metadata.json", metadata.to_bytes())


def members(raw: bytes) -> list[tuple[str, bytes]]:
    """Name and content of each member, read by Python's tarfile."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # pyright: ignore[reportOptionalMemberAccess]


def flat(samples: Samples) -> list[tuple[str, bytes]]:
    """What `members` gives for these samples."""
    return [
        (f"{key}.{field}", content)
        for key, fields in samples
        for field, content in sorted(fields.items())
    ]


def digests(folder: Path) -> dict[str, str]:
    """MD5 of each file directly in a folder."""
    return {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def flip_byte(path: Path, place: int) -> None:
    """Change a byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def strip_crcs(path: Path) -> None:
    """Make an index as it was before samples had checksums."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    del arrays["crc32c"]
    np.savez(path, **arrays)
