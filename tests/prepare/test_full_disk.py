"""A disk that is full while a command writes: told as that, nothing half, and mended by room."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import Buffer, override

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.distribute import distribute
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import open_writable_store
from concurrent_dataloader.stores._local import LocalStore
from tests.prepare.shard_sets import write_set

ROOM_BYTES = 100_000


@contextlib.contextmanager
def full_disk() -> Generator[None]:
    """No file grows beyond `ROOM_BYTES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set whose second and third shard do not fit, and a tree of which two images do not.

    The second one is larger than what is gathered before the disk is asked.
    """
    noise = np.random.default_rng(0)
    samples = [(f"n1/{i}", {"cls": b"0", "jpg": noise.bytes(30_000)}) for i in range(22)]
    shards = [samples[:2], samples[2:13], samples[13:]]
    write_set(open_writable_store(tmp_path / "set"), shards)
    for number, size in enumerate((20_000, 150_000, 30_000, 160_000)):
        path = tmp_path / f"images/{'ab'[number % 2]}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise.bytes(size))
    (tmp_path / "identity_of_full_disk.py").write_text(
        "def same(key, fields):\n    return fields\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """MD5 of each file, but for what belongs to an unfinished run."""
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".unfinished-")
    }


COMMANDS = {
    "map": ("new/train-000001.tar", ["set", "new", "--function", "identity_of_full_disk:same"]),
    "reshard": ("new/train-000000.tar", ["set", "new", "--shards", "2"]),
    "distribute": ("new/distributed/2-instances/train-000000.tar", ["new", "-n", "2"]),
    "copy": ("new/train-000001.tar", ["set", "new"]),
    "folders": ("new/b/1.jpg", ["images", "new"]),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_full_disk_is_named_with_its_file_and_the_next_run_finishes(
    work: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    culprit, arguments = COMMANDS[verb]
    command = [verb, *arguments, *(["--processes", "1"] if verb == "map" else [])]
    if verb == "distribute":
        shutil.copytree("set", "new")
    assert main(command) == 0
    whole = contents(work / "new")
    shutil.rmtree("new")
    if verb == "distribute":
        shutil.copytree("set", "new")
    capsys.readouterr()

    with full_disk():
        status = main(command)

    said = capsys.readouterr().err
    assert status == 1
    assert culprit in said
    assert "File too large" in said
    assert "make room" in said or verb in ("copy", "folders")
    assert "function" not in said
    left = contents(work / "new") if (work / "new").exists() else {}
    assert left.items() <= whole.items()
    assert not any(name.endswith((".partial", "manifest.json")) for name in left)
    assert main(command) == 0
    assert contents(work / "new") == whole


class GoneStore(LocalStore):
    """Its shards are removed once their index was read."""

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        if byte_range is not None:
            raise KeyNotFoundError(f"{key}: gone")
        return super().get(key)


def test_what_cannot_be_read_is_not_taken_for_a_full_disk(work: Path) -> None:
    with pytest.raises(KeyNotFoundError, match=r"^train-000002\.tar: gone$"):
        distribute(str(work / "set"), 2, open_root=lambda location: GoneStore(location))
