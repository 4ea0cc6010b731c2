"""Saying of a data set whether it is whole, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from PIL import Image

from concurrent_dataloader.formats.lmdb_record import (
    DatabaseMetadata,
    Record,
    pack_labels,
    pack_record,
)
from concurrent_dataloader.formats.lmdb_writer import LmdbWriter
from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.formats.tfrecord import (
    ImageExample,
    TFRecordWriter,
    serialize_image_example,
)
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.checksums import (
    FileFacts,
    compare_files,
    read_checksums,
    write_checksums,
)
from concurrent_dataloader.prepare.lmdb import write_lmdb
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata, SplitMetadata
from concurrent_dataloader.prepare.shard import write_shards
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.steps import encode_tensor
from concurrent_dataloader.prepare.validate import IMAGENET_TREES
from concurrent_dataloader.shard_index import Shard, ShardIndexBuilder
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.memory_source import MemorySource, make_samples

CLASSES = ("ant", "bee", "cat")

PIXELS = np.random.default_rng(0).integers(1, 255, (3, 16, 16), np.uint8)


def encode_image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_split(
    folder: Path, split: str, num_shards: int, *, first: int = 0, label_of: int | None = None
) -> SplitMetadata:
    """Write shards of four samples and their index; keys say the number of the sample."""
    builder = ShardIndexBuilder("tar")
    described: list[ShardMetadata] = []
    for number in range(num_shards):
        name = f"{split}-{number:06d}.tar"
        file = io.BytesIO()
        writer = TarWriter(file)
        for place in range(4):
            sample = first + 4 * number + place
            label = sample % 3 if label_of is None else label_of
            fields = {"jpg": encode_image(sample), "cls": str(label).encode()}
            found = writer.write(f"{CLASSES[sample % 3]}/{split}{sample}", fields)
            name_of_sample = f"{found.key}.jpg"
            builder.add_sample(name_of_sample, found.extent, found.members["jpg"].data, label)
        writer.close()
        md5 = hashlib.md5(file.getvalue()).hexdigest()
        (folder / name).write_bytes(file.getvalue())
        builder.add_shard(Shard(name, writer.size_bytes, md5))
        described.append(
            ShardMetadata(name=name, num_samples=4, size_bytes=writer.size_bytes, md5=md5)
        )
    builder.build(CLASSES, None).save(folder / f"{split}-index.npz")
    return SplitMetadata(num_samples=4 * num_shards, shards=tuple(described), classes=CLASSES)


def write_metadata(folder: Path, **splits: SplitMetadata) -> None:
    metadata = Metadata(splits=splits)
    dataclasses.replace(metadata, checksum=metadata.find_checksum()).save(folder / "metadata.json")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of train and one of val, with indexes and metadata."""
    folder = tmp_path / "shards"
    folder.mkdir()
    train = write_split(folder, "train", 3)
    write_metadata(folder, train=train, val=write_split(folder, "val", 1, first=100))
    return folder


@pytest.fixture
def older_set(tmp_path: Path) -> Path:
    """Shards as the older system writes them: no index, and one checksum of all files."""
    folder = tmp_path / "older"
    folder.mkdir()
    write_split(folder, "train", 3)
    write_split(folder, "validation", 1, first=100)
    for index in folder.glob("*.npz"):
        index.unlink()
    # The older system's own way, spelled out.
    digests = sorted(hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir())
    content = {
        "train_length": 12,
        "validation_length": 4,
        "format": "img",
        "shuffle": True,
        "train_transform_pipeline": [],
        "validation_transform_pipeline": [],
        "seed": 3,
        "image_quality": 95,
        "checksum": hashlib.md5("".join(digests).encode()).hexdigest(),
    }
    (folder / "metadata.json").write_text(json.dumps(content))
    return folder


def validate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    status = main(["validate", *map(str, arguments)])
    said = capsys.readouterr()
    if not said.out:
        assert status in (1, 2)
        return status, said.err.splitlines()
    assert status in (0, 1)
    lines = said.out.splitlines()
    assert ("OK" in lines[-1]) == (status == 0)
    assert ("corrupted" in lines[-1]) == (status == 1)
    return status, lines


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


# -- shards


def test_whole_shards_are_ok_and_status_0(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = validate(capsys, shards)

    assert status == 0
    assert lines[-1].startswith(f"{shards}: OK (4 files, 16 samples, ")


def test_g05_damage_is_named_with_its_file_and_status_1(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(shards / "train-000001.tar", 700)

    status, lines = validate(capsys, shards)

    assert status == 1
    assert lines[0].startswith("train-000001.tar: content: got MD5 ")
    assert lines[-1].startswith(f"{shards}: corrupted: 1 problems ")


def test_g05_swapped_files_are_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (shards / f"train-00000{n}.tar" for n in (0, 1, 9))
    a.rename(c)
    b.rename(a)
    c.rename(b)

    status, lines = validate(capsys, shards)

    assert status == 1
    assert lines[:2] == [
        "train-000000.tar: swapped: it holds the content of train-000001.tar",
        "train-000001.tar: swapped: it holds the content of train-000000.tar",
    ]


def test_g05_a_renamed_file_is_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "train-000002.tar").rename(shards / "train-000007.tar")

    status, lines = validate(capsys, shards)

    assert status == 1
    assert lines[0] == "train-000002.tar: renamed: its content lies in train-000007.tar"
    assert len(lines) == 2


def test_g05_the_content_of_another_shard_is_found(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(shards / "train-000000.tar", shards / "train-000001.tar")

    status, lines = validate(capsys, shards)

    assert status == 1
    assert lines[0] == "train-000001.tar: swapped: it holds the content of train-000000.tar"


def test_a_missing_and_a_short_shard_are_named(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "train-000000.tar").unlink()
    short = shards / "val-000000.tar"
    size = short.stat().st_size
    short.write_bytes(short.read_bytes()[:1500])

    status, lines = validate(capsys, shards)

    assert status == 1
    assert lines[0].startswith("train-000000.tar: missing: train-index.npz and others names it")
    assert lines[1] == f"val-000000.tar: size: got 1500 bytes, expected {size}"


def test_g03_a_set_is_ok_after_shards_were_distributed_in_it(
    older_set: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (older_set, shards):
        part = folder / "distributed" / "2-instances"
        part.mkdir(parents=True)
        shutil.copy(folder / "train-000002.tar", part / "train-000000.tar")

        assert validate(capsys, folder)[0] == 0


def test_g04_a_stale_shard_of_an_earlier_run_is_extra(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = io.BytesIO()
    TarWriter(stale).close()
    (shards / "train-000003.tar").write_bytes(stale.getvalue())

    status, lines = validate(capsys, shards)

    assert status == 1
    assert lines[0].startswith("train-000003.tar: extra: ")


def test_g04_metadata_of_an_earlier_run_does_not_pass(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = (shards / "metadata.json").read_bytes()
    for path in shards.iterdir():
        path.unlink()
    write_split(shards, "train", 2, first=500)
    (shards / "metadata.json").write_bytes(old)

    status, lines = validate(capsys, shards)

    assert status == 1
    text = "\n".join(lines)
    assert "train-index.npz: metadata: size or checksum of train-000000.tar is another" in text
    assert "train-000002.tar: missing" in text
    assert "val-000000.tar: missing" in text


def test_g07_files_that_look_like_shards_do_no_harm_and_gaps_are_named(
    shards: Path, older_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train-notes.txt", "train.log", "train-000001.tar.bak", ".train-000009.tar"):
        (shards / name).write_text("no shard")

    assert validate(capsys, shards)[0] == 0

    (older_set / "train-000001.tar").unlink()
    status, lines = validate(capsys, older_set)

    assert status == 1
    assert "train-000001.tar: missing: the numbers of its neighbours leave it out" in lines


def test_metadata_that_contradicts_the_index_is_found(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((shards / "metadata.json").read_bytes())
    content["splits"]["train"]["num_samples"] = 13
    content["splits"]["train"]["shards"][2]["num_samples"] = 5
    content["checksum"] = "0" * 32
    (shards / "metadata.json").write_text(json.dumps(content))

    status, lines = validate(capsys, shards)

    assert status == 1
    assert "metadata.json: metadata: got 12 samples of split 'train', expected 13" in lines
    assert any("got 4 samples of train-000002.tar" in line for line in lines)
    assert any(f"its checksum {'0' * 32} is not that of the shards" in line for line in lines)


def test_a_split_without_any_record_is_looked_at_beside_one_that_has_an_index(
    older_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "again").mkdir()
    write_split(tmp_path / "again", "train", 3)
    shutil.copy(tmp_path / "again" / "train-index.npz", older_set)

    assert validate(capsys, older_set)[0] == 0

    shard = older_set / "validation-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    status, lines = validate(capsys, older_set)

    assert status == 1
    assert lines[0].startswith("validation-000000.tar: content: ")


def test_an_index_that_is_none_is_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "train-index.npz").write_bytes(b"PK no index")

    status, lines = validate(capsys, shards)

    assert status == 1
    assert lines[0].startswith("train-index.npz: metadata: train-index.npz: no index of shards")


def test_row_156_the_older_checksum_is_verified(
    older_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(capsys, older_set)[0] == 0

    flip_byte(older_set / "train-000001.tar", 1700)
    status, lines = validate(capsys, older_set)

    assert status == 1
    assert lines[0].startswith("metadata.json: content: the checksum of all 4 files is ")
    assert "write the set anew" in lines[0]


def test_an_older_set_that_was_cut_short_says_where(
    older_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = older_set / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])

    status, lines = validate(capsys, older_set)

    assert status == 1
    assert any(
        line.startswith("train-000001.tar: content: train-000001.tar: cut short") for line in lines
    )


def test_shards_without_any_record_are_counted_and_duplicates_found(
    older_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (older_set / "metadata.json").unlink()
    packed = gzip.compress((older_set / "train-000001.tar").read_bytes())
    (older_set / "train-000001.tar").unlink()
    (older_set / "train-000001.tar.gz").write_bytes(packed)

    status, lines = validate(capsys, older_set)

    assert status == 0, lines
    assert "4 files, 16 samples" in lines[-1]

    shutil.copy(older_set / "train-000000.tar", older_set / "train-000001.tar")
    status, lines = validate(capsys, older_set)

    assert status == 1
    assert lines[0] == "train-000001.tar: duplicate: the same content as train-000000.tar"


def test_shards_without_samples_are_no_duplicates_of_each_other(
    older_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (older_set / "metadata.json").unlink()
    for number in (3, 4):
        write_tar(older_set / f"train-{number:06d}.tar", [])

    status, lines = validate(capsys, older_set)

    assert status == 0, lines
    assert "note: 2 shards hold no sample" in lines
    assert "6 files, 16 samples" in lines[-1]


def test_one_shard_alone_can_be_validated(
    older_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = validate(capsys, older_set / "train-000000.tar", "--deep")

    assert status == 0
    assert "1 files, 4 samples" in lines[-1]


def test_a_bucket_is_validated_like_a_folder(
    object_server: ObjectServer, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_payload(shards, "train-000001.tar", 5)
    object_server.put_folder("data", shards, prefix="set/")
    credentials = tmp_path / "credentials.json"
    credentials.write_text(
        json.dumps({"access_key": object_server.access_key, "secret": object_server.secret_key})
    )
    options = ["--credentials", credentials, "--endpoint-url", object_server.endpoint_url]

    status, lines = validate(capsys, "s3://data/set", "--deep", *options)

    assert status == 1
    assert lines[-2].startswith("train-000001.tar [")
    assert "train-000001.tar: content: got MD5 " in "\n".join(lines)
    assert validate(capsys, "s3://data/set/val-000000.tar", *options)[0] == 0


# -- deep


def test_row_157_a_deep_check_counts_the_classes(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = validate(capsys, shards, "--deep")

    assert status == 0
    assert lines[:6] == [
        "train class 0 (ant): 4 samples",
        "train class 1 (bee): 4 samples",
        "train class 2 (cat): 4 samples",
        "val class 0 (ant): 1 samples",
        "val class 1 (bee): 2 samples",
        "val class 2 (cat): 1 samples",
    ]
    assert "16 samples" in lines[-1]


def damage_payload(folder: Path, shard: str, position: int) -> tuple[int, int, str]:
    """Overwrite the image of a sample of train; gives its extent and key."""
    from concurrent_dataloader.shard_index import ShardIndex

    index = ShardIndex.load(folder / "train-index.npz")
    payload, extent = index.payload(position), index.extent(position)
    content = bytearray((folder / shard).read_bytes())
    content[payload.start : payload.stop] = bytes(payload.stop - payload.start)
    (folder / shard).write_bytes(content)
    return extent.start, extent.stop, index.names.key(position).removesuffix(".jpg")


def test_each_damaged_sample_is_named_with_shard_key_and_range_and_checked_again_alone(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = damage_payload(shards, "train-000000.tar", 1)
    second = damage_payload(shards, "train-000002.tar", 9)
    report, again = tmp_path / "bad.jsonl", tmp_path / "again.jsonl"

    status, lines = validate(capsys, shards, "--deep", "--report", report)

    assert status == 1
    for shard, (start, stop, key) in (("0", first), ("2", second)):
        place = f"train-00000{shard}.tar [{start}, {stop}) sample {key!r}: sample: "
        assert sum(line.startswith(place) for line in lines) == 1
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted((entry["key"], entry["range"], entry["sample"]) for entry in entries) == [
        ("train-000000.tar", [first[0], first[1]], first[2]),
        ("train-000002.tar", [second[0], second[1]], second[2]),
    ]
    assert all(entry["error"] for entry in entries)

    write_split(tmp_path, "train", 3)
    shutil.copy(tmp_path / "train-000002.tar", shards)
    status, lines = validate(capsys, shards, "--from", report, "--report", again)

    assert status == 1
    assert lines[0].startswith(f"train-000000.tar [{first[0]}, {first[1]}) sample {first[2]!r}")
    assert lines[1:] == [
        f"{shards}: corrupted: 1 problems (2 files, 2 samples, 0.0 MB of 10^6 bytes)"
    ]
    assert len(again.read_text().splitlines()) == 1

    shutil.copy(tmp_path / "train-000000.tar", shards)
    assert validate(capsys, shards, "--from", report)[0] == 0


def test_a_range_without_a_kind_is_that_of_an_image(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from concurrent_dataloader.shard_index import ShardIndex

    payload = ShardIndex.load(shards / "train-index.npz").payload(0)
    lines = [
        {"key": "train-000000.tar", "range": list(payload), "error": "x", "position": 7},
        {"key": "train-000000.tar", "range": [payload.start, payload.start + 100]},
        {"key": "gone.jpg", "range": None},
    ]
    report = tmp_path / "quarantine.jsonl"
    report.write_text("\n".join(map(json.dumps, lines)))

    status, said = validate(capsys, shards, "--from", report)

    assert status == 1
    assert [line.partition(":")[0] for line in said[:2]] == [
        f"train-000000.tar [{payload.start}, {payload.start + 100})",
        "gone.jpg",
    ] or [line.partition(":")[0] for line in said[:2]] == [
        "gone.jpg",
        f"train-000000.tar [{payload.start}, {payload.start + 100})",
    ]


@pytest.mark.parametrize("what", ["payload", "extent"])
@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_bytes_that_decode_and_are_others_are_found_by_the_checksums_of_their_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Any, what: str
) -> None:
    from concurrent_dataloader.shard_index import ShardIndex

    shards = tmp_path / "written"
    samples = {f"c{number % 2}/{number}.jpg": encode_image(number) for number in range(6)}
    write_shards(MemorySource(samples), shards, ShardSettings(kind=kind, max_count=3))
    index = ShardIndex.load(shards / "train-index.npz")
    path = shards / index.shard_of(4).name
    whole = path.read_bytes()
    at = index.payload(4).stop - 3  # not seen by decoders
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    deep, quarantine = tmp_path / "deep.jsonl", tmp_path / "quarantine.jsonl"
    byte_range = list(index.payload(4) if what == "payload" else index.extent(4))
    line = {"key": path.name, "range": byte_range, "sample": "x", "error": "y"}
    quarantine.write_text(json.dumps(line | {"kind": "bytes" if what == "payload" else kind}))

    assert validate(capsys, shards, "--deep", "--report", deep)[0] == 1
    assert len(deep.read_text().splitlines()) == 1
    for report in (deep, quarantine):
        status, said = validate(capsys, shards, "--from", report)
        assert status == 1
        assert "differ from the checksum of the index" in said[0] or "CRC" in said[0]

    path.write_bytes(whole)
    for report in (deep, quarantine):
        assert validate(capsys, shards, "--from", report)[0] == 0


def test_a_damaged_index_beside_the_shards_of_a_report_is_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.jsonl"
    report.write_text('{"key": "train-000000.tar", "range": [0, 512], "kind": "bytes"}')
    (shards / "train-index.npz").write_bytes(b"no index")

    status, said = validate(capsys, shards, "--from", report)

    assert status == 1
    assert "train-index.npz" in said[0]


def test_a_report_that_is_none_is_an_error(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "bad.jsonl"
    report.write_text('{"key": "a"}\n{"range": [1, 2]}\n')

    status, said = validate(capsys, shards, "--from", report)

    assert status == 1
    assert f"{report}, line 2: no bad sample (KeyError: 'key')" in said[0]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_of_a_report_that_names_no_sample_nothing_was_checked(
    content: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "bad.jsonl"
    report.write_text(content)

    status = main(["validate", str(shards), "--from", str(report)])

    said = capsys.readouterr().out
    assert status == 0, "a loader's quarantine file is empty when nothing failed"
    assert said.startswith(f"{shards}: nothing was checked: {report} names no sample; ")
    assert "OK" not in said


@pytest.mark.parametrize("flag", ["--report", "--write-checksums"])
@pytest.mark.parametrize(
    ("name", "message"), [("there", "a folder, expected"), ("no/such/file", "whose folder is not")]
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_read(
    flag: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()

    status, said = validate(capsys, tmp_path / "nowhere", flag, tmp_path / name)

    assert status == 2
    assert said[0].startswith(f"concurrent-dataloader: error: {flag}: got '{tmp_path / name}', ")
    assert message in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_damage_in_a_shard_does_not_hide_the_samples_behind_it(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_payload(shards, "train-000000.tar", 0)
    path = shards / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)  # the header of the first member
    path.write_bytes(content)
    short = shards / "train-000001.tar"
    short.write_bytes(short.read_bytes()[:7000])

    _, lines = validate(capsys, shards, "--deep")

    bad = [line for line in lines if ": sample: " in line]
    assert len([line for line in bad if line.startswith("train-000000.tar")]) == 1
    in_short = [line for line in bad if line.startswith("train-000001.tar")]
    assert 1 <= len(in_short) <= 3
    assert all("the shard ends at 7000, before the sample does" in line for line in in_short)


def test_classes_without_a_sample_are_noted(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = write_split(shards, "val", 1, label_of=2)
    content = Metadata.load(shards / "metadata.json")
    write_metadata(shards, train=content.splits["train"], val=val)

    status, lines = validate(capsys, shards, "--deep")

    assert status == 0
    assert "note: val: 2 of 3 classes have no sample" in lines


def test_g03_what_shard_and_distribute_write_is_ok_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        path = tmp_path / "tree" / CLASSES[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(number))
    folder = tmp_path / "packed"
    assert main(["shard", str(tmp_path / "tree"), str(folder), "--maxcount", "6"]) == 0
    capsys.readouterr()

    before = validate(capsys, folder, "--deep")
    assert main(["distribute", str(folder), "--instances", "3"]) == 0
    capsys.readouterr()

    assert before[0] == 0, before[1]
    assert len(list((folder / "distributed").rglob("*.tar"))) == 3
    assert validate(capsys, folder, "--deep") == before


def test_pixels_without_a_header_have_to_have_the_right_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "train-0.tar", [("0.rgb", bytes(48)), ("1.rgb", bytes(47))])
    split = SplitMetadata(num_samples=2, payload="raw", image_size=(4, 4))
    Metadata(splits={"train": split}).save(tmp_path / "metadata.json")

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 1
    assert "sample '1': sample: got 47 bytes of pixels, expected 48" in "\n".join(lines)


@pytest.mark.parametrize("field", ["rgb", "img"])
def test_pixels_of_the_recorded_size_are_looked_into_whatever_they_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    write_tar(tmp_path / "train-0.tar", [(f"{n}.{field}", bytes(48 - n)) for n in range(2)])
    split = SplitMetadata(num_samples=2, payload="raw", image_size=(4, 4))
    Metadata(splits={"train": split}).save(tmp_path / "metadata.json")

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 1
    said = "\n".join(lines)
    assert "sample '1': sample: got 47 bytes of pixels, expected 48" in said
    assert "sample '0'" not in said
    assert "not decoded" not in said
    report = tmp_path / "bad.jsonl"
    assert validate(capsys, tmp_path, "--deep", "--report", report)[0] == 1
    status, lines = validate(capsys, tmp_path, "--from", report)
    assert status == 1
    assert "got 47 bytes of pixels, expected 48" in "\n".join(lines)
    write_tar(tmp_path / "train-0.tar", [(f"{n}.{field}", bytes(48)) for n in range(2)])
    assert validate(capsys, tmp_path, "--from", report)[0] == 0


def test_pixels_that_an_older_system_calls_img_are_told_from_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [("0.img", bytes(256 * 256 * 3)), ("1.img", encode_image(1)), ("2.img", bytes(99))]
    write_tar(tmp_path / "train-0.tar", members)

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 1
    bad = [line for line in lines if "sample '" in line]
    assert len(bad) == 1
    assert "sample '2'" in bad[0]


def test_a_class_out_of_range_is_a_bad_sample(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metadata(shards, train=write_split(shards, "train", 1, label_of=3))
    for name in ("train-000001.tar", "train-000002.tar", "val-000000.tar", "val-index.npz"):
        (shards / name).unlink()

    status, lines = validate(capsys, shards, "--deep")

    assert status == 1
    assert sum("got class 3, expected 0 to 2" in line for line in lines) == 4
    assert validate(capsys, shards, "--deep", "--num-classes", 4)[0] == 0


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_keys_that_come_again_are_named_unless_they_are_numbers_of_another_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, other = encode_image(1), encode_image(2)
    write_tar(tmp_path / "train-0.tar", [("0.jpg", image), ("1.jpg", other)])
    write_tar(tmp_path / "val-0.tar", [("0.jpg", other)])

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 0
    assert "note: 1 keys stand in two splits, for different samples" in lines

    write_tar(tmp_path / "train-1.tar", [("0.jpg", encode_image(3))])
    write_tar(tmp_path / "val-1.tar", [("1.jpg", other)])
    status, lines = validate(capsys, tmp_path, "--deep", "--concurrency", 1)

    assert status == 1
    assert "train-1.tar: duplicate: key '0' stands in train-0.tar too" in lines
    assert "val-1.tar: duplicate: sample '1' stands in train-0.tar of split 'train' too" in lines


@pytest.mark.parametrize("form", ["shards with split", "shards without", "databases", "files"])
def test_the_same_sample_in_two_splits_is_a_duplicate_in_every_form(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, other = encode_image(1), encode_image(2)
    for split, second in (("train", encode_image(3)), ("val", other)):
        images = {"ant/0": image, "bee/1": second}
        if form == "databases":
            records = [(f"{key}.jpg", raw, n) for n, (key, raw) in enumerate(images.items())]
            write_records(tmp_path / f"ILSVRC-{split}.lmdb", records, split)
        elif form == "files":
            for key, raw in images.items():
                path = tmp_path / split / f"{key}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(raw)
        else:
            begin = f"{split}/" if form == "shards with split" else ""
            members = [(f"{begin}{key}.jpg", raw) for key, raw in images.items()]
            write_tar(tmp_path / f"{split}-0.tar", members)

    status, lines = validate(capsys, tmp_path, "--deep", "--concurrency", 1)

    assert status == 1
    (found,) = [line for line in lines if ": duplicate: " in line]
    assert f"sample 'ant/0{'' if form.startswith('shards') else '.jpg'}' stands in " in found
    assert "of split 'train' too" in found


def test_without_an_index_damage_ends_the_shard_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(
        tmp_path / "train-0.tar",
        [(f"{n}.{field}", content) for n in range(6) for field, content in sample_fields(n)],
    )
    flip_byte(tmp_path / "train-0.tar", 6 * 1024 + 300)
    content = (tmp_path / "train-0.tar").read_bytes()
    cut = content.index(b"3.jpg")
    (tmp_path / "train-0.tar").write_bytes(content[:cut] + b"\xff" * 512 + content[cut + 512 :])

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 1
    assert any("(samples behind it could not be read)" in line for line in lines)


def sample_fields(number: int) -> list[tuple[str, bytes]]:
    return [("cls", str(number % 3).encode()), ("jpg", encode_image(number))]


def save_tensor(pixels: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(torch.from_numpy(pixels), file, **how)
    return file.getvalue()


def test_row_157_tensors_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled = save_tensor(PIXELS, _use_new_zipfile_serialization=False)
    payloads = (save_tensor(PIXELS), encode_tensor(PIXELS), pickled)
    members = [(f"{number}.pth", payload) for number, payload in enumerate(payloads)]
    write_tar(tmp_path / "train-0.tar", members)

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 0
    assert not any("not decoded" in line for line in lines)


@pytest.mark.parametrize("encode", [save_tensor, encode_tensor])
def test_row_157_a_tensor_with_zeroed_bytes_is_found_without_index_and_metadata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encode: Callable[[np.ndarray], bytes]
) -> None:
    good, bad = encode(PIXELS), bytearray(encode(PIXELS[::-1].copy()))
    start = bad.index(PIXELS[2].tobytes())
    bad[start : start + 200] = bytes(200)
    write_tar(tmp_path / "train-0.tar", [("0.pth", good), ("1.pth", bytes(bad))])

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 1
    (found,) = (line for line in lines if ": sample: " in line)
    assert "sample '1': sample: pth: " in found
    assert "the tensor is damaged" in found


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"PK tensor", "expected a tensor that torch.save wrote"),
        (b"PK\3\4 tensor", "the tensor is damaged"),
        (encode_tensor(np.zeros((5, 4, 4), np.uint8)), "expected (3, H, W) or (1, H, W)"),
    ],
)
def test_row_157_what_the_loader_takes_for_no_tensor_is_a_bad_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], payload: bytes, said: str
) -> None:
    write_tar(tmp_path / "train-0.tar", [("0.pth", payload)])

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 1
    assert said in "\n".join(lines)


def test_other_payloads_are_not_decoded_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "train-0.tar", [("0.cls", b"1"), ("0.npy", b"an array")])

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 0
    assert "note: 1 samples hold no image file and no tensor: not decoded" in lines


@pytest.mark.parametrize("label", [b"", b"x", b"-1", b"1.5"])
def test_a_class_that_is_no_number_is_a_bad_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], label: bytes
) -> None:
    write_tar(tmp_path / "train-0.tar", [("0.cls", label), ("0.jpg", encode_image(0))])

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 1
    assert "expected a number from 0 on" in lines[0]


# -- TFRecord and LMDB


def write_tfrecords(path: Path, labels: Sequence[int]) -> list[tuple[int, int]]:
    extents: list[tuple[int, int]] = []
    with path.open("wb") as file:
        writer = TFRecordWriter(file)
        for number, label in enumerate(labels):
            example = ImageExample(encode_image(number), label, filename=f"{number}.JPEG")
            start, stop = writer.write(serialize_image_example(example, label_base=1))
            extents.append((start, stop))
    return extents


def test_tfrecords_are_checked_record_by_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train-00000-of-00001"
    extents = write_tfrecords(path, [0, 1, 2, 1])

    assert "1 files, 4 samples" in validate(capsys, tmp_path)[1][-1]

    flip_byte(path, extents[1][0] + 100)
    report = tmp_path / "r.jsonl"
    assert validate(capsys, tmp_path)[0] == 0, "payloads are not read without --deep"
    status, lines = validate(capsys, tmp_path, "--deep", "--num-classes", 3, "--report", report)

    assert status == 1
    start, stop = extents[1]
    assert f"{path.name} [{start}, {stop}) sample 'record 1': sample: " in lines[-2]
    assert "CRC of a record's payload" in lines[-2]
    assert lines[:3] == [
        "train class 0: 1 samples",
        "train class 1: 1 samples",
        "train class 2: 1 samples",
    ]
    write_tfrecords(path, [0, 1, 2, 1])
    assert validate(capsys, tmp_path, "--from", report)[0] == 0


@pytest.mark.parametrize("label_base", [0, 1])
def test_the_first_class_of_tfrecords_is_what_their_metadata_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], label_base: int
) -> None:
    path = tmp_path / "train-00000-of-00001"
    with path.open("wb") as file:
        writer = TFRecordWriter(file)
        for label in (0, 2):
            example = ImageExample(encode_image(label), label, filename=f"{label}.JPEG")
            writer.write(serialize_image_example(example, label_base=label_base))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    shard = ShardMetadata(name=path.name, num_samples=2, size_bytes=path.stat().st_size, md5=md5)
    split = SplitMetadata(
        num_samples=2, shards=(shard,), kind="tfrecord", label_base=label_base, classes=CLASSES
    )
    write_metadata(tmp_path, train=split)

    status, lines = validate(capsys, tmp_path, "--deep")

    assert status == 0, lines
    assert lines[:2] == ["train class 0 (ant): 1 samples", "train class 2 (cat): 1 samples"]
    other = validate(capsys, tmp_path, "--deep", "--label-base", 1 - label_base)
    assert other[0] == 1 or other[1][0] != lines[0]


def test_tfrecords_cut_short_are_found_without_reading_payloads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train-00000-of-00001"
    write_tfrecords(path, [0, 1])
    path.write_bytes(path.read_bytes()[:-3])

    status, lines = validate(capsys, tmp_path)

    assert status == 1
    assert "the file was cut short" in lines[0]


def write_database(path: Path, images: Sequence[bytes], labels: Sequence[int]) -> None:
    named = [f"{number}.jpg" for number in range(len(images))]
    write_records(path, list(zip(named, images, labels, strict=True)), "train")


def write_records(path: Path, records: Sequence[tuple[str, bytes, int]], split: str) -> None:
    metadata = DatabaseMetadata(len(records), "list", None, split, CLASSES, None, "plan", True)
    with LmdbWriter(path) as writer:
        for number, (name, image, label) in enumerate(records):
            writer.put_record(number, pack_record(Record(name, label, image)))
        writer.put_metadata(metadata, pack_labels([label for *_, label in records]))


def test_databases_are_checked_record_by_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ILSVRC-train.lmdb"
    images = [encode_image(number) for number in range(4)]
    write_database(path, [*images[:2], b"no image", images[3]], [0, 1, 2, 9])

    assert validate(capsys, path)[0] == 0

    report = tmp_path / "r.jsonl"
    status, lines = validate(capsys, tmp_path, "--deep", "--num-classes", 3, "--report", report)

    assert status == 1
    assert lines[-3].startswith("ILSVRC-train.lmdb sample '2': sample: ")
    assert lines[-2].startswith("ILSVRC-train.lmdb sample '3': sample: got class 9")
    path.unlink()
    write_database(path, images, [0, 1, 2, 0])
    assert validate(capsys, tmp_path, "--from", report, "--num-classes", 3)[0] == 0


def test_a_database_whose_run_has_not_ended_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lmdb(
            MemorySource(make_samples(8)),
            tmp_path / "ILSVRC-val.lmdb",
            split="val",
            order="list",
            commit_bytes=1,
            on_record=stop,
        )
    (tmp_path / ".labels.json.123-0123abcd.partial").touch()

    status, lines = validate(capsys, tmp_path)

    assert status == 1
    assert lines[0] == (
        ".ILSVRC-val.lmdb.partial: unfinished: a run that writes ILSVRC-val.lmdb has not ended;"
        " give its command again"
    )
    write_database(tmp_path / "ILSVRC-train.lmdb", [encode_image(0)], [0])
    assert validate(capsys, tmp_path)[1][:-1] == lines[:-1]


def test_databases_beside_shards_hide_none_of_the_two(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "db").mkdir()
    write_database(shards / "db" / "train.lmdb", [encode_image(n) for n in range(3)], [0, 1, 2])

    status, lines = validate(capsys, shards)

    assert status == 0
    assert "5 files, 19 samples" in lines[-1]
    assert "5 files, 19 samples" in validate(capsys, shards, "--deep")[1][-1]

    (shards / "train-000001.tar").unlink()
    assert validate(capsys, shards)[0] == 1


def test_files_that_were_not_looked_at_beside_databases_are_counted(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_database(tree / "train.lmdb", [encode_image(0)], [0])

    status, lines = validate(capsys, tree)

    assert status == 0
    assert "note: 6 image files beside databases: not looked at" in lines


def test_a_database_cut_short_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ILSVRC-train.lmdb"
    write_database(path, [encode_image(0)], [0])
    path.write_bytes(path.read_bytes()[:-4096])

    status, lines = validate(capsys, path)

    assert status == 1
    assert "cut short" in lines[0]


# -- trees of single files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for number in range(6):
        path = root / CLASSES[number % 3] / f"ü {number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(number))
    return root


def test_recorded_checksums_find_all_that_changed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "sums.md5"
    assert main(["validate", str(tree), "--write-checksums", str(recorded)]) == 0
    assert capsys.readouterr().out.startswith(f"{recorded}: MD5s of 6 files, all together ")
    assert validate(capsys, tree, "--checksums", recorded)[0] == 0

    flip_byte(tree / "ant" / "ü 0.jpg", 50)
    (tree / "ant" / "ü 3.jpg").rename(tree / "ant" / "new.jpg")
    (tree / "bee" / "ü 1.jpg").unlink()
    (tree / "bee" / "more.jpg").write_bytes(b"more")
    content = (tree / "cat" / "ü 2.jpg").read_bytes()
    (tree / "cat" / "ü 2.jpg").write_bytes((tree / "cat" / "ü 5.jpg").read_bytes())
    (tree / "cat" / "ü 5.jpg").write_bytes(content)
    status, lines = validate(capsys, tree, "--checksums", recorded)

    assert status == 1
    assert lines[0].startswith("ant/ü 0.jpg: content: got MD5 ")
    assert lines[1] == "ant/ü 3.jpg: renamed: its content lies in ant/new.jpg"
    assert lines[2] == f"bee/ü 1.jpg: missing: {recorded} names it"
    assert lines[3] == "cat/ü 2.jpg: swapped: it holds the content of cat/ü 5.jpg"
    assert lines[4] == "cat/ü 5.jpg: swapped: it holds the content of cat/ü 2.jpg"
    assert lines[5] == f"bee/more.jpg: extra: {recorded} does not name it"
    assert len(lines) == 7


def test_md5sum_reads_recorded_checksums(tree: Path, tmp_path: Path) -> None:
    (tree / "a\\b\nc").write_bytes(b"odd name")
    recorded = tree / "sums.md5"

    assert main(["validate", str(tree), "--write-checksums", str(recorded)]) == 0

    done = subprocess.run(
        ["md5sum", "--check", "--strict", str(recorded)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7
    written = tmp_path / "by-md5sum"
    with written.open("wb") as file:
        names = sorted(path for path in tree.rglob("*") if path.is_file() and path != recorded)
        relative = [path.relative_to(tree) for path in names]
        subprocess.run(["md5sum", *relative], cwd=tree, stdout=file, check=True)
    assert read_checksums(written) == read_checksums(recorded)
    assert main(["validate", str(tree), "--checksums", str(recorded)]) == 0


def test_an_index_says_which_files_are_missing_or_of_another_size(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["ant/ü 0.jpg", "bee/ü 1.jpg", "cat/gone.jpg"]
    sizes = [(tree / key).stat().st_size if (tree / key).exists() else 5 for key in keys]
    sizes[1] += 1
    index = tmp_path / "index.packed"
    Index.from_keys(keys, sizes).save_packed(index)

    status, lines = validate(capsys, tree, "--index", index)

    assert status == 1
    assert lines[0] == f"bee/ü 1.jpg: size: got {sizes[1] - 1} bytes, expected {sizes[1]}"
    assert lines[1] == f"cat/gone.jpg: missing: {index} names it"
    assert lines[2] == f"note: 4 files that {index} does not name"

    Index.from_keys(keys[:2]).save_json(tmp_path / "index.json")
    assert validate(capsys, tree, "--index", tmp_path / "index.json")[0] == 0


@pytest.mark.parametrize("by", ["index", "checksums", "deep"])
def test_a_link_to_nothing_is_missing_whatever_names_it(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    key = "ant/ü 0.jpg"
    index, recorded = tmp_path / "index.json", tmp_path / "recorded.md5"
    Index.from_folder(tree).save_json(index)
    assert main(["validate", str(tree), "--write-checksums", str(recorded)]) == 0
    arguments = {
        "index": ["--index", str(index)],
        "checksums": ["--checksums", str(recorded)],
        "deep": ["--deep"],
    }[by]
    (tree / key).unlink()
    (tree / key).symlink_to(tmp_path / "gone.jpg")
    (tree / "notes.txt").symlink_to(tmp_path / "gone.txt")

    status, lines = validate(capsys, tree, *arguments)

    assert status == 1
    assert [line for line in lines if line.startswith(f"{key}: missing: ")]
    assert not [line for line in lines if line.startswith("notes.txt")], "no data, and not named"


def test_a_deep_check_of_a_tree_decodes_and_classifies_each_file(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"ant": {"id": 0, "name": "a"}, "bee": {"id": 1, "name": "b"}}))
    (tree / "ant" / "ü 0.jpg").write_bytes(b"")
    report = tmp_path / "r.jsonl"

    status, lines = validate(capsys, tree, "--deep", "--report", report)

    assert status == 1
    assert lines[-3].startswith("ant/ü 0.jpg: sample: ")
    entry = json.loads(report.read_text())
    assert (entry["key"], entry["range"]) == ("ant/ü 0.jpg", None)

    (tree / "ant" / "ü 0.jpg").write_bytes(encode_image(9))
    assert validate(capsys, tree, "--from", report)[0] == 0
    status, lines = validate(capsys, tree, "--deep", "--classes", classes)

    assert status == 1
    assert lines[:2] == ["class 0 (a): 2 samples", "class 1 (b): 2 samples"]
    assert sum(line.startswith("cat/") for line in lines) == 2


def test_row_157_folders_are_the_classes_of_a_tree_without_a_classes_file(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tree / "ant", tmp_path / "root" / "train" / "ant")
    shutil.copytree(tree / "cat", tmp_path / "root" / "train" / "cat")
    shutil.copytree(tree / "cat", tmp_path / "root" / "val" / "cat")
    for path in (tmp_path / "root" / "val" / "cat").iterdir():
        path.rename(path.with_name(f"val {path.name}"))

    status, lines = validate(capsys, tmp_path / "root", "--deep")

    assert status == 0
    assert lines[:3] == [
        "train class 0 (ant): 2 samples",
        "train class 1 (cat): 2 samples",
        "val class 1 (cat): 2 samples",
    ]
    assert lines[-2] == "note: 2 samples hold the same bytes as another one"


def test_a_checksum_of_all_files_is_verified(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [path.read_bytes() for path in tree.rglob("*.jpg")]
    digests = sorted(hashlib.md5(content).hexdigest() for content in files)
    expected = hashlib.md5("".join(digests).encode()).hexdigest()

    assert validate(capsys, tree, "--checksum", expected.upper())[0] == 0

    (tree / "ant" / "ü 0.jpg").unlink()
    status, lines = validate(capsys, tree, "--checksum", expected)
    assert status == 1
    assert f"expected {expected}" in lines[0]


def test_imagenets_trees_are_compared_with_their_fixed_checksums(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "imagenet"
    shutil.copytree(tree, root / "train")
    shutil.copytree(tree, root / "val")

    status, lines = validate(capsys, root, "--imagenet")

    assert status == 1
    assert lines[0].startswith("train: content: the checksum of all 6 files is ")
    assert lines[0].endswith("expected 17aed9504492852ddcc2ac247413aa95")
    assert lines[1].endswith("expected 8d6a57a773cf3c3354c92155a5b1d5bd")
    assert len(IMAGENET_TREES) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing says what should be there; give --index, --checksums"),
        (["--imagenet"], "got no folder train, val or validation"),
        (["--index", "no.json"], "no.json: no such index file"),
        (["--checksums", "tree/ant/ü 0.jpg"], "line 1: got "),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_status_1(
    arguments: list[str],
    said: str,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tree.parent)

    status = main(["validate", "tree", *arguments])

    error = capsys.readouterr().err
    assert status == 1
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--imagenet"]])
def test_a_single_file_that_cannot_be_checked_is_named(
    flags: list[str],
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tree / "ant")

    status, said = validate(capsys, "ü 0.jpg", *flags)

    assert status == 1
    assert said[0].startswith("concurrent-dataloader: error: ü 0.jpg: ")


def test_a_checksum_of_a_single_file_names_it(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree / "ant")

    status, lines = validate(capsys, "ü 0.jpg", "--checksum", "0" * 32)

    assert status == 1
    assert lines[0].startswith("ü 0.jpg: content: ")


def test_in_a_log_each_shard_is_a_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", str(shards)])

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"reading {shards}: ")
    assert lines[0].endswith(".tar (1 of 4 shards)")


# -- the comparison itself


def test_a_file_without_a_recorded_size_or_md5_only_has_to_be_there() -> None:
    expected = {"a": FileFacts(), "b": FileFacts(1)}
    found = {"a": FileFacts(9, "x"), "b": FileFacts(1, "y")}

    assert compare_files(expected, found, by="test") == []


def test_of_two_files_with_the_same_content_one_may_be_renamed(tmp_path: Path) -> None:
    expected = {"a": FileFacts(1, "m"), "b": FileFacts(1, "m")}
    found = {"b": FileFacts(1, "m"), "c": FileFacts(1, "m"), "d": FileFacts(1, "m")}

    findings = [(f.where, f.problem) for f in compare_files(expected, found, by="test")]

    assert findings == [("a", "renamed"), ("d", "extra")]


def test_odd_names_survive_being_recorded(tmp_path: Path) -> None:
    files = {name: FileFacts(None, "0" * 32) for name in ("a b", "a\\nb", "a\nb", "\\", "ü\r")}

    write_checksums(tmp_path / "sums", files)

    assert read_checksums(tmp_path / "sums") == files


def test_a_set_whose_run_has_not_ended_is_not_ok(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / ".unfinished-val").mkdir()
    (shards / ".unfinished-val" / "plan.json").write_text("{}")

    status, lines = validate(capsys, shards)

    assert status == 1
    assert any("a run that writes split 'val' has not ended" in line for line in lines), lines


# -- sets with CRCs and without MD5s


@pytest.fixture
def checked_set(tmp_path: Path) -> Path:
    """Three shards of ten samples, as `shard` writes them."""
    folder = tmp_path / "checked"
    write_shards(MemorySource(make_samples(30)), folder, ShardSettings(max_count=10))
    return folder


def test_a_set_with_crcs_only_is_ok(checked_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = validate(capsys, checked_set)

    assert status == 0
    assert lines[-1].startswith(f"{checked_set}: OK (3 files, 30 samples, ")


def test_a_changed_byte_is_found_by_the_crc(
    checked_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checked_set / "train-000001.tar"
    expected = google_crc32c.value(path.read_bytes())
    flip_byte(path, 5000)

    status, lines = validate(capsys, checked_set)

    got = google_crc32c.value(path.read_bytes())
    assert status == 1
    assert lines[0] == f"{path.name}: content: got CRC-32C {got:08x}, expected {expected:08x}"


def test_renamed_and_swapped_shards_are_told_by_the_crc(
    checked_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (checked_set / f"train-00000{n}.tar" for n in range(3))
    c.rename(checked_set / "train-000007.tar")
    shutil.copy(a, b)

    _, lines = validate(capsys, checked_set)

    assert lines[:2] == [
        "train-000001.tar: swapped: it holds the content of train-000000.tar",
        "train-000002.tar: renamed: its content lies in train-000007.tar",
    ]
