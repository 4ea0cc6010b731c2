"""The server as a process: it listens, says so, and ends with whoever started it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

from concurrent_dataloader.testing._connection import Connection
from concurrent_dataloader.testing._door import Door
from concurrent_dataloader.testing._server import Server, Settings

HOST: Final = "127.0.0.1"
_PARENT_CHECK_S: Final = 1.0


async def serve(
    settings: Settings,
    on_ready: Callable[[Server, int], None],
    *,
    parent_pid: int | None = None,
) -> None:
    """Serve on loopback until a signal says to stop.

    Args:
        settings: What to serve with.
        on_ready: Called once, with the server and its port, when it takes connections.
        parent_pid: Stop also when this process, our parent, is gone, or our standard input ends.

    Raises:
        OSError: The port is taken.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    if parent_pid is None:
        loop.add_signal_handler(signal.SIGINT, stopped.set)
    else:
        # Ctrl-C reaches the whole group; the parent needs the server for its own way out.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _stop_with_parent(loop, stopped, parent_pid)
    door = Door(HOST, settings.port, loop)
    try:
        server = Server(settings, loop, door)
        await door.open(lambda: Connection(server))
        try:
            on_ready(server, door.port)
            await stopped.wait()
        finally:
            for connection in list(server.connections):
                connection.drop()
    finally:
        door.close()


def _stop_with_parent(
    loop: asyncio.AbstractEventLoop, stopped: asyncio.Event, parent_pid: int
) -> None:
    stdin = sys.stdin.fileno()

    def read_stdin() -> None:
        if not os.read(stdin, 4096):
            loop.remove_reader(stdin)
            stopped.set()

    loop.add_reader(stdin, read_stdin)
    # The end of our input is not enough: a process that the parent forked holds the other end as
    # well.
    try:
        loop.add_reader(os.pidfd_open(parent_pid), stopped.set)
    except (AttributeError, OSError):

        def look() -> None:
            if os.getppid() != parent_pid:
                stopped.set()
            else:
                loop.call_later(_PARENT_CHECK_S, look)

        look()
    if os.getppid() != parent_pid:
        stopped.set()


def _say_ready(server: Server, port: int) -> None:
    sys.stdout.write(json.dumps({"port": port}) + "\n")
    sys.stdout.flush()
    sys.stdout.close()


def main() -> None:
    """Serve as the child of an `ObjectServer`, which sends the settings as a line of JSON."""
    told = json.loads(sys.stdin.buffer.readline())
    parent_pid = told.pop("parent_pid")
    try:
        asyncio.run(serve(Settings(**told), _say_ready, parent_pid=parent_pid))
    except OSError as error:
        sys.stdout.write(json.dumps({"error": error.strerror}) + "\n")


if __name__ == "__main__":
    main()
