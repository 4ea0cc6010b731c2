"""Files that are whole or not there."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from concurrent_dataloader.errors import KeyNotFoundError, StoreUnavailableError
from concurrent_dataloader.files import fetch_file_if_missing, write_whole


class CountingStore:
    """Holds objects by key and counts what it was asked."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.asked: list[str] = []

    def get(self, key: str) -> bytes:
        self.asked.append(key)
        if key not in self.objects:
            raise KeyNotFoundError(f"memory://b/{key}: no such object")
        return self.objects[key]


def test_pieces_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"

    write_whole(path, [b"one ", memoryview(b"two"), bytearray(b"!")])

    assert path.read_bytes() == b"one two!"


def test_a_piece_that_cannot_be_made_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"half of the new"
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError, match="the source ended"):
        write_whole(path, pieces())

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_fetched_once(tmp_path: Path) -> None:
    store = CountingStore({"indexes/train.json": b"[]"})
    path = tmp_path / "cache" / "train.json"

    for _ in range(3):
        assert fetch_file_if_missing(str(path), store, "/indexes/train.json") == path

    assert path.read_bytes() == b"[]"
    assert store.asked == ["indexes/train.json"]


def test_a_file_that_is_there_is_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("mine")
    store = CountingStore({"train.json": b"theirs"})

    fetch_file_if_missing(path, store, "train.json")

    assert path.read_text() == "mine"
    assert store.asked == []


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyNotFoundError, match="no such object"):
        fetch_file_if_missing(tmp_path / "train.json", CountingStore({}), "train.json")

    assert list(tmp_path.iterdir()) == []


class EndingStore(CountingStore):
    """Gives half of an object, and then an error that also is an OSError."""

    def pieces(self) -> Iterator[bytes]:
        yield b"half"
        raise StoreUnavailableError("s3://b/a: no answer in 5 attempts; is the store up?")


def test_an_error_of_what_makes_the_pieces_arrives_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        write_whole(tmp_path / "file", EndingStore({}).pieces())

    assert str(caught.value) == "s3://b/a: no answer in 5 attempts; is the store up?"
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_folder_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(OSError, match="check the folder and its rights") as caught:
        write_whole(tmp_path / "file" / "inner", [b"1"])
    assert caught.value.filename == str(tmp_path / "file" / "inner")


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    target, link, loose = tmp_path / "data" / "real.json", tmp_path / "link", tmp_path / "loose"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    loose.symlink_to(tmp_path / "later" / "new.json")

    write_whole(link, [b"new"])
    write_whole(loose, [b"first"])

    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert loose.is_symlink()
    assert (tmp_path / "later" / "new.json").read_bytes() == b"first"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "data",
        "later",
        "link",
        "loose",
        "new.json",
        "real.json",
    ]


def test_a_pipe_gets_the_pieces_and_stays_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(path, [b"one ", b"two"])
        assert os.read(reader, 100) == b"one two"
    finally:
        os.close(reader)

    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to_and_stays_a_device(tmp_path: Path) -> None:
    path = tmp_path / "full"
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7))
        open(path, "rb").close()
    except PermissionError:
        pytest.skip("only root makes devices")

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, [b"one"])

    assert caught.value.filename == str(path)
    assert path.is_char_device()
    assert list(tmp_path.iterdir()) == [path]


def test_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))

        with pytest.raises(OSError, match="a disk or a socket, expected a file") as caught:
            write_whole(path, [b"one"])

    assert caught.value.filename == str(path)
    assert path.is_socket()


@pytest.mark.parametrize("is_file", [False, True])
def test_this_process_s_output_is_gone_on_with(tmp_path: Path, is_file: bool) -> None:
    code = (
        "from pathlib import Path; from concurrent_dataloader.files import write_whole;"
        "print('before'); write_whole(Path('/dev/stdout'), [b'content ']); print('after')"
    )
    output = tmp_path / "output"
    with output.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=file if is_file else subprocess.PIPE, check=True
        )

    content = output.read_bytes() if is_file else done.stdout
    assert content == b"before\ncontent after\n"
