"""Trees of files and TFRecords in a bucket: what is wrong with them is named as in a folder."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.testing import ObjectServer
from tests.prepare import test_validate
from tests.prepare.test_validate import encode_image, flip_byte, validate, write_tfrecords

tree = test_validate.tree

Put = Callable[[Path], str]


@pytest.fixture
def put(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Put a folder as it is now into the bucket, under a prefix of its own; gives its URL."""
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    numbers = itertools.count()

    def put_folder(folder: Path) -> str:
        prefix = f"set{next(numbers)}"
        object_server.put_folder("data", folder, prefix=f"{prefix}/")
        return f"s3://data/{prefix}"

    return put_folder


def test_recorded_checksums_find_all_that_changed_in_a_bucket(
    tree: Path, put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "sums.md5"
    assert main(["validate", put(tree), "--write-checksums", str(recorded)]) == 0
    capsys.readouterr()
    assert sorted(recorded.read_text().splitlines()) == sorted(
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}"
        for path in tree.rglob("*.jpg")
    )
    assert validate(capsys, put(tree), "--checksums", recorded)[0] == 0
    flip_byte(tree / "ant" / "ü 0.jpg", 50)
    (tree / "ant" / "ü 3.jpg").rename(tree / "ant" / "new.jpg")
    (tree / "bee" / "ü 1.jpg").unlink()
    (tree / "bee" / "more.jpg").write_bytes(b"more")

    status, lines = validate(capsys, put(tree), "--checksums", recorded)

    assert status == 1
    assert lines[0].startswith("ant/ü 0.jpg: content: got MD5 ")
    assert lines[1:4] == [
        "ant/ü 3.jpg: renamed: its content lies in ant/new.jpg",
        f"bee/ü 1.jpg: missing: {recorded} names it",
        f"bee/more.jpg: extra: {recorded} does not name it",
    ]
    assert lines[4].startswith("s3://data/set2: corrupted: 4 problems (")


def test_an_index_finds_files_of_a_bucket_that_are_missing_or_of_another_size(
    tree: Path, put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index.packed"
    keys = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.jpg"))
    sizes = [(tree / key).stat().st_size for key in keys]
    Index.from_keys(keys, sizes).save_packed(index)
    assert validate(capsys, put(tree), "--index", index)[0] == 0
    (tree / keys[2]).unlink()
    (tree / keys[4]).write_bytes(b"short")

    status, lines = validate(capsys, put(tree), "--index", index)

    assert status == 1
    assert sorted(lines[:-1]) == sorted(
        [
            f"{keys[2]}: missing: {index} names it",
            f"{keys[4]}: size: got 5 bytes, expected {sizes[4]}",
        ]
    )


def test_a_deep_check_finds_the_files_of_a_bucket_that_do_not_decode(
    tree: Path, put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(capsys, put(tree), "--deep")[0] == 0
    (tree / "ant" / "ü 0.jpg").write_bytes(b"")
    (tree / "cat" / "ü 5.jpg").write_bytes(encode_image(5)[:200])
    report = tmp_path / "r.jsonl"

    url = put(tree)
    status, lines = validate(capsys, url, "--deep", "--report", report)

    assert status == 1
    assert lines[:3] == [
        "class 0 (ant): 1 samples",
        "class 1 (bee): 2 samples",
        "class 2 (cat): 1 samples",
    ]
    bad = {line.partition(": sample: ")[0] for line in lines if ": sample: " in line}
    assert bad == {"ant/ü 0.jpg", "cat/ü 5.jpg"}
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    assert {entry["key"] for entry in entries} == bad
    assert validate(capsys, url, "--from", report)[0] == 1
    (tree / "ant" / "ü 0.jpg").write_bytes(encode_image(0))
    (tree / "cat" / "ü 5.jpg").write_bytes(encode_image(5))
    assert validate(capsys, put(tree), "--from", report)[0] == 0


def test_damaged_records_in_a_bucket_are_named_and_checked_again_alone(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = tmp_path / "records", tmp_path / "r.jsonl"
    folder.mkdir()
    path = folder / "train-00000-of-00001"
    extents = write_tfrecords(path, [0, 1, 2, 1])
    status, lines = validate(capsys, put(folder), "--deep")
    assert (status, lines[-1].partition(" samples")[0]) == (0, "s3://data/set0: OK (1 files, 4")
    flip_byte(path, extents[1][0] + 100)

    url = put(folder)
    status, lines = validate(capsys, url, "--deep", "--num-classes", 2, "--report", report)

    assert status == 1
    start, stop = extents[1]
    assert lines[2].startswith(f"{path.name} [{start}, {stop}) sample 'record 1': sample: ")
    assert "CRC of a record's payload" in lines[2]
    start, stop = extents[2]
    assert lines[3].startswith(f"{path.name} [{start}, {stop}) sample 'record 2': sample: ")
    assert "got 3, expected 1 to 2" in lines[3]
    assert lines[4].startswith(f"{url}: corrupted: 2 problems (")
    assert len(report.read_text().splitlines()) == 2
    assert validate(capsys, url, "--from", report)[0] == 1
    write_tfrecords(path, [0, 1, 2, 1])
    assert validate(capsys, put(folder), "--from", report)[0] == 0


def test_records_in_a_bucket_that_were_cut_short_are_found(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    for number in range(2):
        write_tfrecords(folder / f"train-0000{number}-of-00002", [0, number])
    assert validate(capsys, put(folder))[0] == 0
    short = folder / "train-00001-of-00002"
    short.write_bytes(short.read_bytes()[:-3])

    status, lines = validate(capsys, put(folder))

    assert status == 1
    assert lines[0].startswith("train-00001-of-00002: content: ")
    assert "the file was cut short" in lines[0]
    assert lines[1].startswith("s3://data/set1: corrupted: 1 problems (")
