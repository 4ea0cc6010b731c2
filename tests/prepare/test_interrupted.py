"""Commands over a store that are stopped while an answer is missing; the next run finishes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.stores import open_writable_store
from concurrent_dataloader.testing import Fault, ObjectServer
from tests.prepare.shard_sets import make_samples, write_set
from tests.prepare.source_files import encode_image, write_tree

PHOTOS = {
    f"train/{'ab'[number % 2]}/{number:02d}.png": encode_image(number) for number in range(20)
}
NUM_SHARDS = 6
STALL = "stalled_headers"


class Case(NamedTuple):
    """A command, and which requests are never answered while it runs."""

    command: list[str]
    stalled: Fault
    num_answered: int
    """Requests that are answered before the command is stopped."""


SHARD = Fault(STALL, key_pattern=r"train-000001\.tar")
PHOTO = Fault(STALL, key_pattern=r"07\.png", methods=("GET", "PUT"))

CASES = {
    "index of objects": Case(
        ["index", "s3://photos/train", "--output", "out/index.json"],
        Fault(STALL, hits_listings=True),
        0,
    ),
    "index of shards": Case(
        ["index", "s3://sets", "--output", "out/train-index.npz"], SHARD, NUM_SHARDS - 1
    ),
    "lmdb": Case(["lmdb", "s3://photos", "out", "--order", "list"], PHOTO, 5),
    "validate": Case(["validate", "s3://sets"], SHARD, NUM_SHARDS - 1),
    "validate that records": Case(
        ["validate", "s3://photos", "--write-checksums", "out/md5"], PHOTO, len(PHOTOS) - 1
    ),
}

COPIES = {
    "from a bucket": ["copy", "s3://photos", "out"],
    "to a bucket": ["copy", "photos", "s3://out"],
}


@pytest.fixture
def server(
    object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ObjectServer:
    """Photos in one bucket, a set of shards in another, to be found by the environment."""
    monkeypatch.chdir(tmp_path)
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    samples = make_samples(2 * NUM_SHARDS)
    shards = [samples[at : at + 2] for at in range(0, len(samples), 2)]
    write_set(open_writable_store(tmp_path / "set"), shards)
    object_server.put_folder("sets", "set")
    object_server.put_objects("photos", PHOTOS)
    return object_server


def contents(place: Path | str) -> dict[str, bytes]:
    """What has its final name, in a folder or a bucket."""
    with contextlib.closing(open_writable_store(place)) as store:
        return {info.key: bytes(memoryview(store.get(info.key))) for info in store.list()}


def stop_in_the_middle(
    server: ObjectServer,
    command: list[str],
    stalled: Fault,
    how: signal.Signals,
    is_far_enough: Callable[[], bool],
) -> tuple[int, str]:
    """Stop a command while it waits for an answer; gives its status, and what it said."""
    server.set_faults([stalled])
    server.reset_counters()
    program = [sys.executable, "-m", "concurrent_dataloader.prepare", *command]
    deadline_s = time.monotonic() + 60
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (STALL in server.counters().num_by_fault and is_far_enough()):
                assert process.poll() is None, "it ended before"
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            process.send_signal(how)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    server.set_faults([])
    return process.returncode, said


@pytest.mark.parametrize(
    "name",
    [
        name if number < 3 else pytest.param(name, marks=pytest.mark.grid)
        for number, name in enumerate(CASES)
    ],
)
def test_ctrl_c_ends_a_command_that_waits_for_a_store_and_leaves_no_final_name(
    server: ObjectServer, tmp_path: Path, name: str
) -> None:
    command, stalled, num_answered = CASES[name]

    def is_far_enough() -> bool:
        return sum(server.counters().num_by_status.values()) >= num_answered

    out = tmp_path / "out"
    out.mkdir()
    assert main(command) == 0
    whole = contents(out)
    assert len(whole) == (name != "validate")
    for path in out.iterdir():
        path.unlink()

    status, said = stop_in_the_middle(server, command, stalled, signal.SIGINT, is_far_enough)

    assert status == 130
    *progress, last = said.splitlines()
    assert last.startswith("concurrent-dataloader: interrupted")
    assert "Traceback" not in "".join(progress)
    assert not contents(out)
    assert main(command) == 0
    assert contents(out) == whole


@pytest.mark.parametrize(
    "name",
    [
        name if number < 1 else pytest.param(name, marks=pytest.mark.grid)
        for number, name in enumerate(COPIES)
    ],
)
def test_a_copy_that_is_killed_has_whole_objects_only_and_is_finished_by_the_next(
    server: ObjectServer, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "photos", PHOTOS)
    server.create_bucket("out")
    command = COPIES[name]
    target = command[-1]

    status, _ = stop_in_the_middle(
        server, command, PHOTO, signal.SIGKILL, lambda: len(contents(target)) > len(PHOTOS) / 2
    )

    assert status == -signal.SIGKILL
    begun = contents(target)
    assert len(begun) < len(PHOTOS)
    assert begun.items() <= PHOTOS.items()
    assert main(command) == 0
    assert contents(target) == PHOTOS
    assert f", {len(begun)} there already, 0 failed" in capsys.readouterr().out


def test_ctrl_c_while_libraries_are_imported_is_one_line() -> None:
    code = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "concurrent_dataloader.prepare.shard":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["concurrent-dataloader", "shard", "photos", "out"]
runpy.run_module("concurrent_dataloader.prepare", run_name="__main__", alter_sys=True)
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 130
    assert done.stderr == "concurrent-dataloader: interrupted\n"
