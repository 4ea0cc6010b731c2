"""What processes cost in CPU time and memory, read from ``/proc``; work in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Memory(NamedTuple):
    """Memory of one process, as the kernel counts it."""

    resident_bytes: int
    """Pages that are in memory, shared ones in full."""
    proportional_bytes: int
    """The same, with each shared page divided by the number of processes that map it."""
    private_bytes: int
    """Pages that no other process maps."""
    own_bytes: int
    """The proportional ones without files: heaps, stacks and shared memory. Other programs that
    come and go, and map the same libraries, do not change it."""


def read_cpu_s(pids: Iterable[int]) -> float:
    """Add up the CPU seconds, user and system, that the processes have used in all threads.

    The kernel counts in ticks of 10 ms: look at differences over seconds.
    """
    ticks = 0
    for pid in pids:
        # The second field is the program's name in brackets, and may hold blanks.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def read_memory(pid: int) -> Memory:
    """Read the memory of one process of this user."""
    kib: dict[str, int] = {}
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        kib[name] = int(rest.split()[0])
    return Memory(
        resident_bytes=kib["Rss"] * 1024,
        proportional_bytes=kib["Pss"] * 1024,
        private_bytes=(kib["Private_Clean"] + kib["Private_Dirty"]) * 1024,
        own_bytes=(kib["Pss_Anon"] + kib["Pss_Shmem"]) * 1024,
    )


def count_open_files(pid: int) -> int:
    """Count the file descriptors of a process; they keep shared memory that nobody maps."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def run_in_process(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function in a process that is spawned for it, and wait for what it returns.

    The process has nothing of this one's: no client, no thread, no CPU that was used before.

    Raises:
        RuntimeError: The process ended without a result; its traceback is on standard error.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    # Arguments go with the process, not through a queue: only then may they hold credentials.
    process = spawn.Process(target=_send_result, args=(sender, work, args, kwargs))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"{work.__name__}: its process ended with exit status {process.exitcode}, expected a "
            "result; see its traceback above"
        ) from error
    finally:
        receiver.close()
        process.join()
        process.close()


def _send_result(
    sender: Connection, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with sender:
        sender.send(work(*args, **kwargs))
