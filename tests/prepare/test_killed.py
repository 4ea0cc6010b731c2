"""Commands that are killed in the middle: nothing half, nobody left, and the next run finishes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.stores import open_writable_store
from tests.prepare.shard_sets import make_samples, write_set

NUM_SHARDS = 60
"""So many files are written that a command is far from its end when the first ones are there."""

COMMANDS = {
    "map": ["set", "new", "--function", "identity_of_killed:same"],
    "reshard": ["set", "new", "--maxcount", "1", "--seed", "1"],
    "distribute": ["new", "-n", str(NUM_SHARDS)],
    "folders": ["set", "new", "--split", "train", "--concurrency", "2"],
}


PARALLEL = ("map", "reshard")
"""What is killed with two processes, and finished by one: bytes are the same."""


def command(verb: str, num_processes: int) -> list[str]:
    processes = ["--processes", str(num_processes)] if verb in PARALLEL else []
    return [verb, *COMMANDS[verb], *processes]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of shards, and a module with a function."""
    folder = tmp_path_factory.mktemp("killed")
    samples = make_samples(2 * NUM_SHARDS)
    shards = [samples[at : at + 2] for at in range(0, len(samples), 2)]
    write_set(open_writable_store(folder / "set"), shards)
    (folder / "identity_of_killed.py").write_text("def same(key, fields):\n    return fields\n")
    return folder


@pytest.fixture
def work(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(shared)
    monkeypatch.chdir(shared)
    return shared


def prepare(verb: str) -> None:
    """Make the folder that the command writes to what it was before."""
    shutil.rmtree("new", ignore_errors=True)
    if verb == "distribute":
        shutil.copytree("set", "new")


def write_whole(verb: str, folder: Path) -> dict[str, str]:
    """Give what an undisturbed run writes; once for all signals."""
    if not (folder / verb).exists():
        prepare(verb)
        assert main(command(verb, 1)) == 0
        (folder / "new").rename(folder / verb)
    return contents(folder / verb)


def contents(folder: Path) -> dict[str, str]:
    """MD5 of each file that has its final name."""
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts)
    }


def count(folder: Path) -> int:
    """Number of files with a final name in the folder that is written."""
    return sum(name[0] != "." for *_, names in os.walk(folder / "new") for name in names)


def wait_for_files(folder: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 60
    while count(folder) < number:
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_command_that_is_killed_leaves_nothing_half_and_is_finished_by_the_next(
    work: Path, verb: str, how: signal.Signals
) -> None:
    whole = write_whole(verb, work)
    prepare(verb)
    num_before = count(work)
    program = [sys.executable, "-m", "concurrent_dataloader.prepare", *command(verb, 2)]

    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_for_files(work, num_before + 3, process)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, how)
        said = process.communicate(timeout=60)[1].decode()

    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    # A process that was just being started says so itself when its parent is killed.
    assert "Traceback" not in said or how != signal.SIGINT
    left = contents(work / "new")
    assert len(left) < len(whole)
    assert left.items() <= whole.items()
    assert not left.keys() & {"metadata.json", "train-index.npz"} or verb == "distribute"
    assert not any(name.endswith("-manifest.json") for name in left)
    assert main(command(verb, 1)) == 0
    assert contents(work / "new") == whole
