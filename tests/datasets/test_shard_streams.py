"""The end of commands that write shards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from concurrent_dataloader.datasets._shard_streams import (
    PipedStream,
    ReadAhead,
    ShardBytes,
    end_command,
)
from concurrent_dataloader.errors import StoreError
from concurrent_dataloader.stores._memory import MemoryStore


@pytest.fixture
def ahead() -> Iterator[ReadAhead]:
    reader = ReadAhead(MemoryStore({}), [], part_bytes=1 << 10, max_parts=2, num_open=1)
    with contextlib.closing(reader):
        yield reader


def test_a_command_that_closes_its_output_and_lives_on_is_killed_and_named(
    ahead: ReadAhead, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    command = f"echo $$ > {pid_file}; echo some bytes; exec sleep 1000 >&-"
    source = ShardBytes(command, None, is_command=True)
    with (
        contextlib.closing(PipedStream(ahead, source, exit_timeout_s=0.1)) as stream,
        pytest.raises(StoreError, match=r"pipe:echo .*had not ended 0.1 s later.*killed"),
    ):
        stream.read_to_end()

    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_command_that_no_signal_ends_is_told_of() -> None:
    class Stuck:
        """A process in the state that `ps` calls D."""

        pid = ended_pid()

        def kill(self) -> None:
            """As the system does: note the signal, and go on waiting."""

        def wait(self, timeout: float) -> int:
            raise subprocess.TimeoutExpired("stuck", timeout)

    with pytest.warns(ResourceWarning, match=r"pipe:x: process \d+ was killed and is still there"):
        end_command(cast(Any, Stuck()), "pipe:x", timeout_s=0.0)


def ended_pid() -> int:
    """Give the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(60)
    return process.pid
