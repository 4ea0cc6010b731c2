"""Packing an index ahead of time."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.index import packed_path
from concurrent_dataloader.prepare.pack import pack_index


@pytest.fixture
def json_path(tmp_path: Path) -> Path:
    path = tmp_path / "index.json"
    path.write_text(json.dumps(["a.jpg", "b.jpg"]))
    return path


def test_a_small_index_is_packed_too(json_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(json_path.parent)

    index = pack_index("index.json")

    assert index.packed_file == packed_path(json_path)
    assert list(index.keys()) == ["a.jpg", "b.jpg"]


def test_packed_keys_that_are_damaged_are_packed_again(json_path: Path) -> None:
    pack_index(json_path)
    packed = packed_path(json_path)
    packed.write_bytes(packed.read_bytes().replace(b"b.jpg", b"c.jpg"))

    assert list(pack_index(json_path).keys()) == ["a.jpg", "b.jpg"]


def test_a_folder_that_cannot_be_written_to_is_an_error(json_path: Path) -> None:
    packed_path(json_path).mkdir()

    with pytest.raises(PermissionError, match=r"index\.json\.packed: cannot be written"):
        pack_index(json_path)


def test_a_full_disk_leaves_no_packed_index_and_is_an_error(tmp_path: Path) -> None:
    json_path = tmp_path / "index.json"
    json_path.write_text(json.dumps([f"{i:07d}.jpg" for i in range(5000)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(PermissionError, match="make room"):
            pack_index(json_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    assert len(pack_index(json_path)) == 5000


def test_a_packed_index_is_not_packed_again(json_path: Path) -> None:
    pack_index(json_path)

    with pytest.raises(IndexFormatError, match="is packed already"):
        pack_index(packed_path(json_path))
