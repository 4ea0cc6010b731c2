"""Shards for tests: written by ours, or byte for byte as other writers lay them out."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.shard_index import Shard, ShardIndexBuilder


def write_shards(
    folder: Path,
    counts: Sequence[int],
    *,
    split: str = "train",
    max_bytes: int = 3000,
    with_index: bool = True,
) -> Path:
    """Write shards of so many samples; the class of a sample is its number, its image any bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    builder = ShardIndexBuilder("tar")
    number = 0
    for shard, count in enumerate(counts):
        file = io.BytesIO()
        writer = TarWriter(file)
        for _ in range(count):
            key = f"n{number % 3}/{number:05d}"
            content = rng.bytes(int(rng.integers(1, max_bytes)))
            where = writer.write(key, {"jpg": content, "cls": b"%d" % number})
            builder.add_sample(f"{key}.jpg", where.extent, where.members["jpg"].data, number)
            number += 1
        name = f"{split}-{shard:06d}.tar"
        writer.close()
        md5 = hashlib.md5(file.getvalue()).hexdigest()
        (folder / name).write_bytes(file.getvalue())
        builder.add_shard(Shard(name, len(file.getvalue()), md5))
    if with_index:
        builder.build().save(folder / f"{split}-index.npz")
    return folder


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """Give a tar as the standard library writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()
