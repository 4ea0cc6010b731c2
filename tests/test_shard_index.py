"""The index of byte ranges: written, read back, limited, and refused where it is damaged."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import SampleCrcs, Shard, ShardIndex, ShardIndexBuilder


def build(num_shards: int = 3, num_samples: int = 4) -> ShardIndex:
    builder = ShardIndexBuilder("tar")
    for shard in range(num_shards):
        for sample in range(num_samples):
            start = 2048 * sample
            builder.add_sample(
                f"ä{shard}/{sample}.jpg",
                ByteRange(start, start + 2048),
                ByteRange(start + 512, start + 600 + sample),
                sample % 2,
            )
        builder.add_shard(Shard(f"train-{shard:06d}.tar", 2048 * num_samples + 1024, "0" * 32))
    return builder.build(["cat", "dog"], "sorted_wnid")


def test_an_index_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    index = build()
    index.save(tmp_path / "train.npz")

    for twin in (ShardIndex.load(tmp_path / "train.npz"), pickle.loads(pickle.dumps(index))):
        assert twin.shards == index.shards
        assert list(twin.names.keys()) == list(index.names.keys())
        assert (twin.kind, twin.classes, twin.label_space) == ("tar", ("cat", "dog"), "sorted_wnid")
        for position in range(len(index)):
            assert twin.shard_of(position).name == f"train-{position // 4:06d}.tar"
            assert twin.payload(position) == index.payload(position)
            assert twin.extent(position) == index.extent(position)
        assert twin.labels is not None
        assert index.labels is not None
        assert np.array_equal(twin.labels, index.labels)


def build_checked(last: SampleCrcs | None) -> ShardIndex:
    builder = ShardIndexBuilder("tar")
    place = ByteRange(0, 1024)
    builder.add_sample("a.jpg", place, place, None, SampleCrcs(0xFFFFFFFF, 0))
    builder.add_sample("b.jpg", place, place, None, last)
    builder.add_shard(Shard("a.tar", 2048, crc32c="00000000"))
    return builder.build()


def test_checksums_of_samples_are_read_back_and_follow_a_selection() -> None:
    index = build_checked(SampleCrcs(7, 8))

    twin = ShardIndex.from_bytes(index.to_bytes(), "t").select([1, 0])

    assert [twin.sample_crcs(0), twin.sample_crcs(1)] == [(7, 8), (0xFFFFFFFF, 0)]
    assert (twin.extent_crc(0), twin.payload_crc(0)) == (7, 8)
    assert twin.shards[0].crc32c == "00000000"


def test_a_checksum_that_is_not_known_is_none() -> None:
    index = build_checked(None)

    assert [index.sample_crcs(0), index.sample_crcs(1)] == [(0xFFFFFFFF, 0), None]
    assert (index.extent_crc(1), index.payload_crc(1)) == (None, None)
    # Written are those of all samples or none: an unsigned number has no place for "not known".
    assert ShardIndex.from_bytes(index.to_bytes(), "t").sample_crcs(0) is None


def test_the_same_index_gives_the_same_bytes() -> None:
    assert build().to_bytes() == build().to_bytes()


def test_a_limit_keeps_the_head_or_a_seeded_sample() -> None:
    index = build()

    assert list(index.limit(3).names.keys()) == ["ä0/0.jpg", "ä0/1.jpg", "ä0/2.jpg"]
    sample = index.limit(5, sample_seed=1)
    assert len(sample) == 5
    for position in range(5):
        key = sample.names.key(position)
        assert sample.shard_of(position).name == f"train-{int(key[1]):06d}.tar"
        assert sample.payload(position).stop == index.payload(int(key[1]) * 4 + int(key[3])).stop
    assert index.limit(None) is index


def test_samples_without_labels_have_none() -> None:
    builder = ShardIndexBuilder("tar")
    builder.add_sample("a.jpg", ByteRange(0, 1024), ByteRange(512, 700), None)
    builder.add_shard(Shard("a.tar", 2048))

    assert builder.build().labels is None


def test_what_is_no_index_of_shards_is_refused(tmp_path: Path) -> None:
    raw = build().to_bytes()
    arbitrary = io.BytesIO()
    np.savez(arbitrary, x=np.arange(3))
    objects = io.BytesIO()
    np.savez(objects, allow_pickle=True, header=np.array([{"a": 1}], object))

    for bad in (b"", b"[]", raw[:-40], raw[:200], arbitrary.getvalue(), objects.getvalue()):
        with pytest.raises(IndexFormatError, match=r"^train\.npz: "):
            ShardIndex.from_bytes(bad, "train.npz")
    with pytest.raises(FileNotFoundError, match="concurrent-dataloader index"):
        ShardIndex.load(tmp_path / "none.npz")


def test_a_label_that_is_too_large_is_refused_with_its_sample() -> None:
    builder, place = ShardIndexBuilder("tar"), ByteRange(0, 1024)
    builder.add_sample("a.jpg", place, place, 2**31 - 1)

    with pytest.raises(
        IndexFormatError, match=r"b\.jpg: got label 2147483648, expected 2147483647"
    ):
        builder.add_sample("b.jpg", place, place, 2**31)

    builder.add_shard(Shard("s.tar", 1024))
    labels = builder.build().labels
    assert labels is not None
    assert labels.tolist() == [2**31 - 1]
