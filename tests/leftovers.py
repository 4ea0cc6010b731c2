"""What a test leaves behind: processes, threads, descriptors, shared memory, temporary files."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable

import psutil

GRACE_S = 5.0
"""How long after its end anything may still be there (promise 5)."""

REPOSITORY = pathlib.Path(__file__).parents[1]

_MARK = "TEST_THAT_STARTED_THIS"

_SHARED_MEMORY = re.compile(r"/dev/shm/(\S+)")

# Helpers of Python's own, one of each for a process; they end with it.
_PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@contextlib.contextmanager
def nothing_left() -> Generator[None]:
    """Fail if this process holds more, `GRACE_S` after the block, than it did before.

    Temporary files are looked for in a folder that is there for the block alone, also for processes
    that start in it.
    """
    with tempfile.TemporaryDirectory() as folder, _temporary_folder(folder):
        gc.collect()
        before, shared_memory = _find_all(folder), list_shared_memory()
        yield
        gc.collect()
        _check_gone(lambda: _find_all(folder) - before | find_shared_memory(shared_memory))


@contextlib.contextmanager
def _temporary_folder(folder: str) -> Generator[None]:
    before, tempfile.tempdir = tempfile.tempdir, folder
    variable = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        tempfile.tempdir = before
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable


def _find_all(folder: str) -> set[str]:
    return {
        *_describe(psutil.Process().children(recursive=True)),
        *(f"thread {each.name}, {each.ident}" for each in threading.enumerate()),
        *_find_descriptors(),
        *_find_files(folder),
    }


def _describe(processes: Iterable[psutil.Process]) -> set[str]:
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            command = " ".join(process.cmdline())
            if not any(name in command for name in _PYTHONS_OWN):
                found.add(f"process {process.pid}, {process.status()}: {command}")
    return found


def _find_descriptors() -> set[str]:
    found: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(f"descriptor {name}: {os.readlink(f'/proc/self/fd/{name}')}")
    return found


def _find_our_tree() -> list[psutil.Process]:
    us = psutil.Process()
    return [us, *us.children(recursive=True)]


def list_shared_memory() -> set[str]:
    """List the names of all of the machine's."""
    return set(os.listdir("/dev/shm"))


def find_shared_memory(
    before: set[str], find_own: Callable[[], list[psutil.Process]] = _find_our_tree
) -> set[str]:
    """Find what has come since, but for what others have mapped, or made who still run."""
    names = list_shared_memory() - before
    if names:
        own = {process.pid for process in find_own()}
        for pid in set(psutil.pids()) - own:
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
                names -= set(_SHARED_MEMORY.findall(maps))
                names = {name for name in names if not name.startswith(f"torch_{pid}_")}
    return {f"shared memory {name}" for name in names}


def _find_files(folder: str | os.PathLike[str]) -> set[str]:
    # Not `rglob`, for which a folder that goes meanwhile is an error.
    return {
        f"file {os.path.join(parent, name)}"
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def stretch(seconds: float) -> float:
    """Lengthen a limit: on a busy machine, a process gets its share of the seconds only."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _check_gone(find_new: Callable[[], set[str]]) -> None:
    grace_s = stretch(GRACE_S)
    deadline = time.monotonic() + grace_s
    new = find_new()
    # What comes later is another's: shared memory is common to all processes of the machine.
    while new := new & find_new():
        assert time.monotonic() < deadline, f"left after {grace_s} s: {', '.join(sorted(new))}"
        time.sleep(0.02)


class Script:
    """A Python program in a session of its own, all of whose descendants can be found.

    Use it in a ``with`` statement, whose end kills what is left.
    """

    def __init__(self, code: str, *arguments: str, folder: pathlib.Path, **variables: str) -> None:
        """Start it.

        Args:
            code: The program.
            arguments: Its arguments.
            folder: An empty folder for its temporary files.
            variables: Of its environment.
        """
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self._shared_memory = list_shared_memory()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "TMPDIR": str(folder),
                _MARK: self._mark,
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._find_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()

    def read_line(self) -> str:
        """Wait for a line of its output."""
        assert self.process.stdout is not None, "it is a pipe"
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"it ended: {self.process.communicate()[1]}")
        return line.rstrip("\n")

    def finish(self, timeout_s: float = 60.0) -> tuple[str, str]:
        """Wait for its end, and give the rest of its output, and what it complained about."""
        return self.process.communicate(timeout=timeout_s)

    def check_nothing_left(self) -> None:
        """Fail if anything of it is there after `GRACE_S`."""
        _check_gone(
            lambda: {
                *_describe(self._find_processes()),
                *find_shared_memory(self._shared_memory, self._find_processes),
                *(file for file in _find_files(self.folder) if not self._is_pythons(file)),
            }
        )

    def _is_pythons(self, file: str) -> bool:
        """Tell Python's own folder for the socket of a fork server, left if its user was killed."""
        path = pathlib.Path(file.removeprefix("file "))
        folder = path if path.parent == self.folder else path.parent
        if self.process.poll() != -signal.SIGKILL or not folder.name.startswith("pymp-"):
            return False
        try:
            return len(os.listdir(folder)) == 1
        except FileNotFoundError:  # gone since it was found
            return False

    def _find_processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # ended meanwhile, or another user's
                if self._is_own(process):
                    found.append(process)
        return found

    def _is_own(self, process: psutil.Process) -> bool:
        # Not by parentage: orphans are what is looked for.
        return process.environ().get(_MARK) == self._mark
