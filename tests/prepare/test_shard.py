"""Shards: what is in them, the same bytes however they are written, and what ends a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from concurrent_dataloader.formats.tar import read_samples
from concurrent_dataloader.prepare.metadata import Metadata
from concurrent_dataloader.prepare.shard import ShardSettings, write_shards
from concurrent_dataloader.prepare.source import Box


class MemorySource:
    """A few samples in memory, whose classes are their folders."""

    def __init__(
        self,
        samples: Mapping[str, bytes],
        *,
        boxes: Mapping[str, Sequence[Box]] | None = None,
        has_sizes: bool = True,
    ) -> None:
        self.label_space = None
        self.classes = sorted({name.partition("/")[0] for name in samples})
        self._samples = sorted(samples.items())
        self._boxes = boxes or {}
        self._has_sizes = has_sizes
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, position: int) -> str:
        return self._samples[position][0]

    def label(self, position: int) -> int | None:
        return self.classes.index(self.name(position).partition("/")[0])

    def boxes(self, position: int) -> Sequence[Box]:
        return self._boxes.get(self.name(position), ())

    def size_bytes(self, position: int) -> int | None:
        return len(self._samples[position][1]) if self._has_sizes else None

    def read(self, position: int) -> bytes:
        self.num_reads += 1
        return self._samples[position][1]

    def close(self) -> None:
        pass


def make_samples(num_samples: int = 40) -> dict[str, bytes]:
    return {f"n{i % 3:02d}/{i:03d}.JPEG": bytes([i]) * (300 + 37 * i) for i in range(num_samples)}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_back(folder: Path, split: str = "train") -> list[tuple[str, dict[str, bytes]]]:
    split_metadata = Metadata.load(folder / "metadata.json").splits[split]
    return [
        (sample.key, sample.fields)
        for shard in split_metadata.shards or ()
        for sample in read_samples(io.BytesIO((folder / shard.name).read_bytes()), shard.name)
    ]


def test_every_sample_is_there_once_with_its_own_bytes_and_label(tmp_path: Path) -> None:
    samples = make_samples()

    write_shards(MemorySource(samples), tmp_path, ShardSettings(max_count=7))

    found = dict(read_back(tmp_path))
    assert len(found) == len(samples)
    for name, content in samples.items():
        assert found[name.removesuffix(".JPEG")] == {
            "jpeg": content,
            "cls": str(int(name[1:3])).encode(),
        }


def test_one_process_and_two_write_the_same_bytes(tmp_path: Path) -> None:
    source = MemorySource(make_samples())
    settings = ShardSettings(max_bytes=10_000)

    write_shards(source, tmp_path / "one", settings)
    write_shards(source, tmp_path / "two", settings, num_processes=2)

    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) > 5
