"""Shards and members beyond 2 and 8 GiB, in files that are mostly holes."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from concurrent_dataloader.datasets import open_dataset, open_shards
from concurrent_dataloader.formats.tar import BLOCK_BYTES, SampleMembers, read_members
from concurrent_dataloader.formats.tar_writer import TarWriter, encode_header
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.shard_index import Shard, ShardIndexBuilder
from tests.datasets.conftest import IMAGES

SAMPLES = {
    "cat/1": IMAGES["cat/1.jpg"],
    "cat/2": IMAGES["Dog/5.jpg"],
    "cat/3": IMAGES["Dog/10.jpg"],
}


def write_with_hole(path: Path, num_bytes: int) -> list[SampleMembers]:
    """Write a member of zeros, which takes no room on the disk, and samples behind it."""
    with path.open("wb") as file:
        header = encode_header("zeros/0.bin", num_bytes)
        file.write(header)
        file.seek(len(header) + num_bytes + -num_bytes % BLOCK_BYTES)
        writer = TarWriter(file)
        writer.size_bytes = file.tell()
        written = [writer.write(key, {"jpg": raw, "cls": b"0"}) for key, raw in SAMPLES.items()]
        writer.close()
    if path.stat().st_blocks * 512 > 1 << 24:
        path.unlink()
        pytest.skip("this file system has no sparse files")
    return written


@pytest.mark.parametrize("num_bytes", [(8 << 30) - 1, 8 << 30, (9 << 30) + 5])
def test_pythons_tarfile_reads_our_headers_of_members_around_8_gib(
    tmp_path: Path, num_bytes: int
) -> None:
    path = tmp_path / "t.tar"
    written = write_with_hole(path, num_bytes)

    with tarfile.open(path) as tar:
        sizes = {info.name: info.size for info in tar}
        starts = {info.name: info.offset_data for info in tar}
        names = {f"{key}.jpg" for key in SAMPLES}
        contents = {name: tar.extractfile(name).read() for name in names}  # pyright: ignore[reportOptionalMemberAccess]: files

    assert sizes["zeros/0.bin"] == num_bytes
    assert contents == {f"{key}.jpg": raw for key, raw in SAMPLES.items()}
    with path.open("rb") as file:
        members = list(read_members(file, "t.tar"))
    assert {member.name: member.data.start for member in members} == starts
    assert members[1].start == written[0].extent.start > num_bytes
    assert members[-1].stop + 2 * BLOCK_BYTES == path.stat().st_size


def test_samples_behind_2_gib_of_a_shard_are_read_by_their_ranges(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    written = write_with_hole(path, (2 << 30) + 12345)
    builder = ShardIndexBuilder("tar")
    for sample in written:
        name = f"{sample.key}.jpg"
        builder.add_sample(name, sample.extent, sample.members["jpg"].data, 0)
    builder.add_shard(Shard(path.name, path.stat().st_size))
    builder.build(["cat"]).save(tmp_path / "train-index.npz")

    dataset = open_dataset(tmp_path, decode=None, with_metadata=True)

    found = [dataset[position] for position in range(3)]
    assert [bytes(raw) for raw, _, _ in found] == list(SAMPLES.values())
    assert all(metadata.start > 1 << 31 for _, _, metadata in found)
    raws = dataset.fetch_many(range(3))  # in one request
    assert [bytes(raw) for raw in raws] == list(SAMPLES.values())


def test_an_index_of_a_shard_above_2_gib_is_made_from_its_headers(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    written = write_with_hole(path, (2 << 30) + 12345)
    index = tmp_path / "train-index.npz"

    assert main(["index", str(path), "--output", str(index)]) == 0

    dataset = open_shards(tmp_path, decode=None)
    places = {dataset.key(n): dataset.locate_sample(n) for n in range(len(dataset))}
    for sample in written:
        place = places[f"{sample.key}.jpg"]
        assert place is not None
        assert place.byte_range == sample.members["jpg"].data
    assert os.path.getsize(index) < 1 << 20
