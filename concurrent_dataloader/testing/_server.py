"""The server: buckets, who may use them, behaviour and counters."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import random
import time
from typing import Any, Final

from concurrent_dataloader.testing._answer import Answer, answer_with_error, http_date
from concurrent_dataloader.testing._connection import Connection
from concurrent_dataloader.testing._control import Control
from concurrent_dataloader.testing._door import Door
from concurrent_dataloader.testing._objects import Buckets, StoredObject
from concurrent_dataloader.testing._operations import Operations
from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import Request
from concurrent_dataloader.testing._signature import Authenticator, Credential
from concurrent_dataloader.testing._streaming import decode_streaming_body
from concurrent_dataloader.testing.behaviour import (
    Fault,
    FaultPlan,
    Latency,
    OutageKind,
    Pacer,
)
from concurrent_dataloader.testing.counters import Counters

_RECEIVE_BYTES: Final = 256 << 10
_VIRTUAL_HOST: Final = b".localhost"
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a server is started with."""

    port: int = 0
    access_key: str = "test-access-key"
    secret_key: str = dataclasses.field(default="test-secret-key", repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)
    region: str = "us-east-1"
    seed: int = 0
    control_token: str = dataclasses.field(default="", repr=False)


class Server:
    """All of the server's state; touched only in the thread of its loop."""

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop, door: Door) -> None:
        self.settings = settings
        self.loop = loop
        self._door = door
        self._outage: OutageKind | None = None
        self._outage_end: asyncio.TimerHandle | None = None
        self.buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self.connections: set[Connection] = set()
        self.buckets = Buckets()
        self._operations = Operations(self.buckets, settings.region)
        self.authenticator = Authenticator(settings.region)
        self.control = Control(self, settings.control_token)
        self._lines = b""
        self._lines_second = 0
        self._num_answers = 0
        self._methods: dict[bytes, int] = collections.Counter()
        self._statuses: dict[int, int] = collections.Counter()
        self._errors: dict[str, int] = collections.Counter()
        self._faults: dict[str, int] = collections.Counter()
        self._gets: dict[str, int] = {}
        self._counters = Counters()
        self.restore()

    def restore(self) -> None:
        """Return to what the server was when it was started, without objects."""
        self.buckets.by_name.clear()
        self.authenticator.remove_all()
        settings = self.settings
        self.authenticator.add(
            Credential(settings.access_key, settings.secret_key, settings.session_token)
        )
        self._latency_rng = random.Random(settings.seed)
        self._fault_rng = random.Random(settings.seed + 1)
        self.latency: Latency | None = None
        self.total_pacer: Pacer | None = None
        self.bytes_per_s_per_connection: float | None = None
        self.rate_limit: Pacer | None = None
        self.plan: FaultPlan | None = None
        self.set_outage(None, None)
        for connection in list(self.connections):
            connection.drop(only_if_busy=True)
        self.reset_counters()

    def set_faults(self, faults: list[Fault]) -> None:
        """Replace the faults; attempts are counted from nothing."""
        self.plan = FaultPlan(faults, self._fault_rng) if faults else None

    def set_outage(self, kind: OutageKind | None, duration_s: float | None) -> None:
        """Be down from now on, for a while or until told otherwise; None: be up."""
        if self._outage_end is not None:
            self._outage_end.cancel()
            self._outage_end = None
        was, self._outage = self._outage, kind
        if kind == "refused":
            self._door.shut()
        elif was == "refused":
            self._door.reopen()
        if kind in ("refused", "reset"):
            for connection in list(self.connections):
                connection.drop()
        if kind is not None and duration_s is not None:
            self._outage_end = self.loop.call_later(duration_s, self.set_outage, None, None)

    # What a connection asks

    def opened(self, connection: Connection) -> None:
        """Count a connection."""
        self.connections.add(connection)
        counters = self._counters
        counters.num_connections_opened += 1
        counters.max_connections = max(counters.max_connections, len(self.connections))

    def closed(self, connection: Connection) -> None:
        """Count a connection no more."""
        self.connections.discard(connection)

    def begin(self, request: Request) -> float:
        """Count a request, and draw its latency."""
        if request.is_control:
            return 0.0
        counters = self._counters
        counters.num_in_flight += 1
        if counters.num_in_flight > counters.max_in_flight:
            counters.max_in_flight = counters.num_in_flight
        self._methods[request.method] += 1
        counters.body_bytes_received += len(request.body)
        return 0.0 if self.latency is None else self.latency.draw_s(self._latency_rng)

    def end(self, request: Request, num_body_bytes: int) -> None:
        """Count a request as answered, or as given up."""
        if request.is_control:
            return
        counters = self._counters
        counters.num_in_flight -= 1
        counters.body_bytes_sent += num_body_bytes

    def common_lines(self) -> bytes:
        """Give the date, a request's number and the empty line."""
        second = int(time.time())
        if second != self._lines_second:
            self._lines_second = second
            date = http_date(second).encode()
            self._lines = b"Date: %b\r\nServer: object-server\r\nx-amz-request-id: " % date
        self._num_answers += 1
        return self._lines + b"%016X\r\n\r\n" % self._num_answers

    def answer(self, request: Request, *, after_stall: bool) -> tuple[Answer | None, Fault | None]:
        """Answer a request, and say what fault the connection is to do to the answer."""
        if request.is_control:
            return self.control.answer(request), None
        bucket, key = _split_path(request)
        fault = None
        try:
            if not after_stall:
                fault = self._count_by_key(request, bucket, key)
            if fault is not None and fault.kind in _SILENT_FAULTS:
                return None, fault
            answer = self._answer_s3(request, bucket, key, fault)
        except S3Error as error:
            self._errors[error.code] += 1
            is_head = request.method == b"HEAD"
            answer, fault = answer_with_error(error, request.plain_path, is_head=is_head), None
        except Exception:
            # A fault of ours: the client is told, and the traceback goes to our standard error.
            _LOGGER.exception("%s %s", request.method.decode(), request.plain_path)
            answer, fault = answer_with_error(S3Error("InternalError"), request.plain_path), None
        self._statuses[answer.status] += 1
        return answer, None if fault is None or fault.kind in _BODY_FAULTS else fault

    def _answer_s3(self, request: Request, bucket: str, key: str, fault: Fault | None) -> Answer:
        if self.rate_limit is not None and not self.rate_limit.try_take(self.loop.time()):
            raise S3Error("SlowDown")
        seed = self.authenticator.check(request)
        if seed is None and not self._is_open_to_all(request, bucket, key):
            raise S3Error("AccessDenied")
        if fault is not None and fault.kind in _ERROR_FAULTS:
            raise S3Error(_ERROR_FAULTS[fault.kind])
        if request.body:
            decode_streaming_body(request, seed)
        answer = self._operations.answer(request, bucket, key)
        if fault is not None and fault.kind in _BODY_FAULTS:
            return self._with_other_body(answer, fault, bucket, key)
        return answer

    def _count_by_key(self, request: Request, bucket: str, key: str) -> Fault | None:
        if key and request.method == b"GET":
            name = f"{bucket}/{key}"
            self._gets[name] = self._gets.get(name, 0) + 1
        if self._outage is not None:
            self._faults["outage"] += 1
            return _OUTAGE_FAULTS[self._outage]
        if self.plan is None:
            return None
        method = request.method.decode()
        if key:
            fault = self.plan.pick(method, key)
        else:
            fault = self.plan.pick(method, request.query.get("prefix", ""), is_listing=True)
        if fault is not None:
            self._faults[fault.kind] += 1
        return fault

    def _with_other_body(self, answer: Answer, fault: Fault, bucket: str, key: str) -> Answer:
        """Give an answer no body, or another object's, or its own inverted if there is none."""
        if fault.kind == "empty_body":
            return _with_body(answer, b"")
        found = self.buckets.find(bucket)
        other = found.other_object(key)
        if other is not None:
            body = _read_body(other)
        else:
            body = bytes(byte ^ 0xFF for byte in _read_body(found.objects[key]))
        num_bytes = answer.stop - answer.start
        return _with_body(answer, body[:num_bytes] if answer.status == 206 else body)

    def _is_open_to_all(self, request: Request, bucket: str, key: str) -> bool:
        if request.method not in (b"GET", b"HEAD"):
            return False
        found = self.buckets.by_name.get(bucket)
        if found is None or found.is_public:
            return found is not None
        stored = found.objects.get(key)
        return found.is_listed if not key else stored is not None and stored.is_public

    # Counters

    def counters(self, *, by_key: bool) -> dict[str, Any]:
        """Give the counters as JSON has them."""
        counters = dataclasses.replace(
            self._counters,
            num_by_method={method.decode(): n for method, n in self._methods.items()},
            num_by_status=dict(self._statuses),
            num_by_error=dict(self._errors),
            num_by_fault=dict(self._faults),
            num_gets_by_key=dict(self._gets) if by_key else {},
            num_connections=len(self.connections),
            cpu_s=time.process_time() - self._cpu_from_s,
        )
        return dataclasses.asdict(counters)

    def reset_counters(self) -> None:
        """Count from nothing; what is open and in flight stays counted."""
        for counter in (self._methods, self._statuses, self._errors, self._faults, self._gets):
            counter.clear()
        num_in_flight = self._counters.num_in_flight
        self._counters = Counters(
            num_in_flight=num_in_flight,
            max_in_flight=num_in_flight,
            max_connections=len(self.connections),
        )
        self._cpu_from_s = time.process_time()


_BODY_FAULTS: Final = ("empty_body", "foreign_body")
_SILENT_FAULTS: Final = ("stalled_headers", "reset_before_headers")
_ERROR_FAULTS: Final = {
    "internal_error": "InternalError",
    "slow_down": "SlowDown",
    "service_unavailable": "ServiceUnavailable",
    "expired_token": "ExpiredToken",
}
_OUTAGE_FAULTS: Final[dict[OutageKind, Fault]] = {
    # What was under way when the door was shut is dropped, but for what is answered just now.
    "refused": Fault("reset_before_headers"),
    "reset": Fault("reset_before_headers"),
    "unavailable": Fault("service_unavailable"),
}


def _split_path(request: Request) -> tuple[str, str]:
    """Give bucket and key, by path, or by host where it is ``bucket.localhost``."""
    host = request.headers.get(b"host", b"").partition(b":")[0]
    if host.endswith(_VIRTUAL_HOST):
        return host.removesuffix(_VIRTUAL_HOST).decode(), request.plain_path[1:]
    bucket, _, key = request.plain_path[1:].partition("/")
    return bucket, key


def _with_body(answer: Answer, body: bytes) -> Answer:
    """Give an answer another body, and the length that goes with it."""
    lines = answer.head.split(b"\r\n")
    length = b"Content-Length: %d" % len(body)
    lines = [length if line.startswith(b"Content-Length:") else line for line in lines]
    return Answer(answer.status, b"\r\n".join(lines), body, 0, len(body))


def _read_body(stored: StoredObject) -> bytes:
    body = stored.body
    return body if isinstance(body, bytes) else body.read(0, stored.size_bytes)
