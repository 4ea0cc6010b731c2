"""One connection: requests in, answers out in their order; latency, bandwidth and faults.

```text
bytes -> _advance -> _begin -latency-> _answer -> _send -all in one call to the kernel-> _finish
            |                                       |                                      |  |
            +- a body: collected first              +-> _pump, piece by piece -------------+  |
            ^                                                                                 |
            +------------- the next request, if it is here already ---------------------------+
```

Everything runs in the loop's thread. A request has one timer at most, and no task.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, Protocol, cast

from concurrent_dataloader.testing._answer import Answer
from concurrent_dataloader.testing._objects import FileBody
from concurrent_dataloader.testing._request import (
    MAX_HEAD_BYTES,
    BodyReader,
    MalformedRequestError,
    Request,
)
from concurrent_dataloader.testing.behaviour import Fault, Pacer

_PIECE_BYTES: Final = 256 << 10
_MAX_PENDING_BYTES: Final = 1 << 20
_PAUSE_BEFORE_RESET_S: Final = 0.02
_LINGER_ZERO: Final = struct.pack("ii", 1, 0)
_TLS_HANDSHAKE: Final = b"\x16"  # RFC 8446, 5.1: the content type of its first record
_REFUSED: Final = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Host(Protocol):
    """What a connection asks of its server."""

    loop: asyncio.AbstractEventLoop
    buffer: memoryview
    """Where all connections receive; its bytes are taken out before another one receives."""
    connections: set[Connection]
    total_pacer: Pacer | None
    bytes_per_s_per_connection: float | None

    def opened(self, connection: Connection) -> None:
        """Count a connection."""
        ...

    def closed(self, connection: Connection) -> None:
        """Count a connection no more."""
        ...

    def begin(self, request: Request) -> float:
        """Count a request, and give the seconds that it has to wait."""
        ...

    def end(self, request: Request, num_body_bytes: int) -> None:
        """Count a request as answered, or as given up."""
        ...

    def answer(self, request: Request, *, after_stall: bool) -> tuple[Answer | None, Fault | None]:
        """Answer a request, and say how to spoil the answer; some faults leave no answer at all."""
        ...

    def common_lines(self) -> bytes:
        """Give the lines that end the head of each answer."""
        ...


class Connection(asyncio.BufferedProtocol):
    """The server's end of one connection."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._fd = -1
        self._pending = b""
        self._reader: BodyReader | None = None
        self._request: Request | None = None
        """The request that is being answered; those behind it wait in ``_pending``."""
        self._timer: asyncio.TimerHandle | None = None
        self._pieces: Iterator[bytes | memoryview] | None = None
        self._num_sent_bytes = 0
        self._pacer: Pacer | None = None
        self._is_advancing = False
        self._is_paused = False
        self._is_full = False

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a new connection."""
        self._transport = cast(asyncio.Transport, transport)
        self._fd = transport.get_extra_info("socket").fileno()
        self._transport.set_write_buffer_limits(high=_PIECE_BYTES)
        self._host.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what is under way; the client has gone, or we have."""
        self._fd = -1
        self._give_up()
        self._host.closed(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend the server's one buffer."""
        return self._host.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes out of the buffer."""
        data = bytes(self._host.buffer[:nbytes])
        self._pending = self._pending + data if self._pending else data
        if self._request is None:
            self._advance()
        elif len(self._pending) > _MAX_PENDING_BYTES:
            self._is_paused = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """Stop sending; the client reads more slowly than we send."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Go on sending."""
        self._is_full = False
        if self._pieces is not None and self._timer is None:
            self._pump()

    # Requests

    def _advance(self) -> None:
        """Take the requests that are here, one after the other, up to one that takes time."""
        self._is_advancing = True
        try:
            while self._pending and self._request is None and self._fd >= 0:
                if self._reader is None and not self._take_head():
                    break
                if self._reader is not None:
                    rest = self._reader.feed(self._pending)
                    self._pending = rest or b""
                    if rest is None:
                        break
                    request, self._reader = self._reader.request, None
                    self._begin(request)
        except MalformedRequestError:
            self._transport.write(_REFUSED)
            self._transport.close()
            self._fd = -1
        finally:
            self._is_advancing = False

    def _take_head(self) -> bool:
        """Take a request's head, and begin it if that is all; False if the head is not whole."""
        pending = self._pending
        end = pending.find(b"\r\n\r\n")
        if end < 0:
            if pending[:1] == _TLS_HANDSHAKE:  # has no end that could be waited for
                raise MalformedRequestError("head: got TLS, expected plain HTTP")
            if len(pending) > MAX_HEAD_BYTES:
                raise MalformedRequestError(f"head: got over {MAX_HEAD_BYTES} bytes")
            return False
        request = Request(pending[:end])
        self._pending = pending[end + 4 :]
        if not BodyReader.is_needed(request):
            self._begin(request)
            return True
        self._reader = BodyReader(request)
        if request.headers.get(b"expect", b"").lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _begin(self, request: Request) -> None:
        self._request = request
        self._num_sent_bytes = 0
        wait_s = self._host.begin(request)
        if wait_s > 0:
            self._timer = self._host.loop.call_later(wait_s, self._answer)
        else:
            self._answer()

    def _answer(self, *, after_stall: bool = False) -> None:
        self._timer = None
        request = self._request
        if request is None or self._fd < 0:
            return
        answer, fault = self._host.answer(request, after_stall=after_stall)
        if answer is None:
            if fault is not None and fault.kind == "reset_before_headers":
                self._reset()
            elif fault is not None and fault.stall_s is not None:
                go_on = functools.partial(self._answer, after_stall=True)
                self._timer = self._host.loop.call_later(fault.stall_s, go_on)
        elif fault is not None:
            self._send_spoilt(answer, fault)
        else:
            self._send(answer)

    def _finish(self) -> None:
        """End a request whose answer is with the kernel or with the transport, whole."""
        request, self._request = self._request, None
        if request is None:
            return
        self._host.end(request, self._num_sent_bytes)
        if request.is_last:
            self._fd = -1
            self._transport.close()
            return
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        if self._pending and not self._is_advancing:
            self._advance()

    # Answers

    def _send(self, answer: Answer) -> None:
        host = self._host
        body = answer.body
        if (
            isinstance(body, FileBody)
            or host.total_pacer is not None
            or host.bytes_per_s_per_connection is not None
            or self._transport.get_write_buffer_size()
        ):
            self._send_in_pieces(answer, answer.stop)
            return
        # The one place that goes round the transport: a small answer is one call, and never copied.
        size = answer.stop - answer.start
        view = body if size == len(body) else memoryview(body)[answer.start : answer.stop]
        lines = host.common_lines()
        num_head_bytes = len(answer.head) + len(lines)
        try:
            num_sent = os.writev(self._fd, (answer.head, lines, view))
        except (BlockingIOError, InterruptedError):
            num_sent = 0
        except OSError:
            self._transport.abort()
            return
        if num_sent == num_head_bytes + size:
            self._num_sent_bytes = size
            self._finish()
            return
        if num_sent < num_head_bytes:
            self._transport.write((answer.head + lines)[num_sent:])
            num_sent = num_head_bytes
        self._num_sent_bytes = num_sent - num_head_bytes
        self._pieces = _cut(answer, answer.start + self._num_sent_bytes, answer.stop)
        self._pump()

    def _send_in_pieces(self, answer: Answer, stop: int) -> None:
        rate = self._host.bytes_per_s_per_connection
        self._pacer = None if rate is None else Pacer(rate)
        self._transport.write(answer.head + self._host.common_lines())
        is_paced = self._pacer is not None or self._host.total_pacer is not None
        piece_bytes = _PIECE_BYTES // 16 if is_paced else _PIECE_BYTES
        self._pieces = _cut(answer, answer.start, stop, piece_bytes)
        self._pump()

    def _pump(self) -> None:
        """Hand pieces to the transport until it is full, the pace is reached, or the body ends."""
        self._timer = None
        while self._pieces is not None and not self._is_full and not self._transport.is_closing():
            piece = next(self._pieces, None)
            if piece is None:
                self._pieces = None
                self._finish()
                return
            wait_s = self._reserve(len(piece))
            if wait_s > 0:
                self._timer = self._host.loop.call_later(wait_s, self._pump_one, piece)
                return
            self._num_sent_bytes += len(piece)
            self._transport.write(piece)

    def _pump_one(self, piece: bytes | memoryview) -> None:
        self._num_sent_bytes += len(piece)
        self._transport.write(piece)
        self._pump()

    def _reserve(self, num_bytes: int) -> float:
        now_s = self._host.loop.time()
        at_s = now_s
        for pacer in (self._pacer, self._host.total_pacer):
            if pacer is not None:
                at_s = max(at_s, pacer.reserve(num_bytes, now_s))
        return at_s - now_s

    # Faults

    def _send_spoilt(self, answer: Answer, fault: Fault) -> None:
        loop = self._host.loop
        half = answer.start + (answer.stop - answer.start) // 2
        head = answer.head + self._host.common_lines()
        if fault.kind == "reset_before_body":
            self._transport.write(head)
            self._timer = loop.call_later(_PAUSE_BEFORE_RESET_S, self._reset)
            return
        sent = b"".join(_cut(answer, answer.start, half))
        self._num_sent_bytes = len(sent)
        self._transport.write(head + sent)
        if fault.kind == "reset_inside_body":
            self._timer = loop.call_later(_PAUSE_BEFORE_RESET_S, self._reset)
        elif fault.kind == "truncated_body":
            self._transport.close()
        elif fault.kind == "stalled_body" and fault.stall_s is not None:
            self._pieces = _cut(answer, half, answer.stop)
            self._is_full = False
            self._timer = loop.call_later(fault.stall_s, self._pump)

    def _reset(self) -> None:
        """Close with a reset in place of an end, as a server that dies does."""
        if self._fd >= 0:
            # A twin of the descriptor, since the loop's own socket need not let itself be set.
            with socket.socket(fileno=os.dup(self._fd)) as twin:
                twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._transport.abort()

    def drop(self, *, only_if_busy: bool = False) -> None:
        """Close at once, but for the connection that is being asked to by a request of control."""
        request = self._request
        if request is None:
            if not only_if_busy:
                self._transport.abort()
        elif not request.is_control:
            self._give_up()
            self._transport.abort()

    def _give_up(self) -> None:
        """End the request under way, if there is one, as it is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pieces = None
        request, self._request = self._request, None
        if request is not None:
            self._host.end(request, self._num_sent_bytes)


def _cut(
    answer: Answer, start: int, stop: int, piece_bytes: int = _PIECE_BYTES
) -> Iterator[bytes | memoryview]:
    """Cut a part of a body into pieces; a file is read piece by piece."""
    body = answer.body
    for begin in range(start, stop, piece_bytes):
        end = min(begin + piece_bytes, stop)
        yield body.read(begin, end) if isinstance(body, FileBody) else memoryview(body)[begin:end]
