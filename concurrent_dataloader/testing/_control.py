"""Control from outside: what the one who started the server may tell it while it runs."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from concurrent_dataloader.testing._answer import Answer, answer_with, answer_with_error
from concurrent_dataloader.testing._objects import (
    compute_checksum,
    etag_of_parts,
    make_file_object,
    make_object,
)
from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import CONTROL_PREFIX, Request
from concurrent_dataloader.testing._signature import Credential
from concurrent_dataloader.testing.behaviour import Fault, Latency, Pacer

if TYPE_CHECKING:
    from concurrent_dataloader.testing._server import Server

_NO_BODIES: Final = memoryview(b"")
CONTROL_TOKEN: Final = b"x-control-token"
_LOGGER = logging.getLogger(__name__)


class Control:
    """What the one who started the server may tell it, by requests that carry a secret token."""

    def __init__(self, server: Server, token: str) -> None:
        self._server = server
        self._token = token.encode()
        self._verbs: dict[str, Callable[[dict[str, Any], memoryview], object]] = {
            "counters": lambda a, _: server.counters(by_key=a["by_key"]),
            "reset_counters": lambda a, _: server.reset_counters(),
            "restore": lambda a, _: server.restore(),
            "create_bucket": self._create_bucket,
            "put_objects": self._put_objects,
            "put_folder": self._put_folder,
            "set_latency": self._set_latency,
            "set_bandwidth": self._set_bandwidth,
            "set_rate_limit": self._set_rate_limit,
            "set_faults": lambda a, _: server.set_faults(
                [Fault(**_tuples(f)) for f in a["faults"]]
            ),
            "set_outage": lambda a, _: server.set_outage(a["kind"], a["duration_s"]),
            "add_credential": lambda a, _: server.authenticator.add(Credential(**a)),
            "expire_session_tokens": lambda a, _: server.authenticator.expire_session_tokens(),
            "drop_connections": self._drop_connections,
        }

    def tell(self, verb: str, arguments: dict[str, Any], bodies: memoryview = _NO_BODIES) -> Any:
        """Do one thing; arguments are as `ObjectServer` sends them."""
        return self._verbs[verb](arguments, bodies)

    def answer(self, request: Request) -> Answer:
        """Do what is told; the body is a line of JSON, then bytes that belong to it."""
        token = request.headers.get(CONTROL_TOKEN, b"")
        if not self._token or not hmac.compare_digest(token, self._token):
            return answer_with_error(S3Error("AccessDenied"), request.plain_path)
        verb = request.plain_path[len(CONTROL_PREFIX) :]
        end = request.body.find(b"\n")
        try:
            arguments = json.loads(request.body[:end])
            result = self.tell(verb, arguments, memoryview(request.body)[end + 1 :])
        except Exception as error:
            # It goes to the caller, who raises it.
            _LOGGER.debug("control %s", verb, exc_info=True)
            told = {"error": type(error).__name__, "words": str(error)}
            return answer_with(400, json.dumps(told).encode(), content_type="application/json")
        return answer_with(200, json.dumps(result).encode(), content_type="application/json")

    def _create_bucket(self, arguments: dict[str, Any], _: memoryview) -> None:
        bucket = self._server.buckets.create(arguments["bucket"])
        bucket.is_public = arguments["public"]

    def _put_objects(self, arguments: dict[str, Any], bodies: memoryview) -> None:
        bucket = self._server.buckets.create(arguments["bucket"])
        algorithm = arguments["checksum"]
        start = 0
        for key, num_bytes in arguments["objects"]:
            body = bytes(bodies[start : start + num_bytes])
            start += num_bytes
            checksums = {algorithm: compute_checksum(algorithm, body)} if algorithm else {}
            md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
            etag = etag_of_parts([md5]) if arguments["in_parts"] else md5
            bucket.add(make_object(key, body, checksums=checksums, etag=etag))

    def _put_folder(self, arguments: dict[str, Any], _: memoryview) -> dict[str, int]:
        bucket = self._server.buckets.create(arguments["bucket"])
        folder = pathlib.Path(arguments["folder"])
        num_objects = num_bytes = 0
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            key = arguments["prefix"] + path.relative_to(folder).as_posix()
            if arguments["in_memory"]:
                stored = make_object(key, path.read_bytes())
            else:
                stored = make_file_object(key, path)
            bucket.add(stored)
            num_objects += 1
            num_bytes += stored.size_bytes
        return {"num_objects": num_objects, "num_bytes": num_bytes}

    def _set_latency(self, arguments: dict[str, Any], _: memoryview) -> None:
        latency = Latency(**arguments)
        self._server.latency = None if latency == Latency() else latency

    def _set_bandwidth(self, arguments: dict[str, Any], _: memoryview) -> None:
        total = arguments["total_bytes_per_s"]
        self._server.total_pacer = None if total is None else Pacer(total)
        self._server.bytes_per_s_per_connection = arguments["connection_bytes_per_s"]

    def _set_rate_limit(self, arguments: dict[str, Any], _: memoryview) -> None:
        rate = arguments["requests_per_s"]
        self._server.rate_limit = None if rate is None else Pacer(rate, burst=arguments["burst"])

    def _drop_connections(self, arguments: dict[str, Any], _: memoryview) -> None:
        for connection in list(self._server.connections):
            connection.drop()


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Turn lists, as JSON has them, into the tuples that they were."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
