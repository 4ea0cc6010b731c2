"""The object server, as whoever starts it sees it.

It listens on loopback only, keeps its objects in RAM (or serves a folder), and is **no production
server**: nothing is stored durably, and nobody has looked for ways to misuse it.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import pathlib
import secrets
import select
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, cast, get_args

from concurrent_dataloader.testing._objects import CHECKSUM_ALGORITHMS
from concurrent_dataloader.testing.behaviour import Fault, Latency, OutageKind
from concurrent_dataloader.testing.counters import Counters

_HOST: Final = "127.0.0.1"
_CONTROL_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 5.0
_BATCH_BYTES: Final = 32 << 20
_PACKAGE_FOLDER: Final = pathlib.Path(__file__).resolve().parents[2]


class FolderSummary(NamedTuple):
    """What `ObjectServer.put_folder` has stored."""

    num_objects: int
    num_bytes: int


class ObjectServer:
    """An S3 server in a process of its own, with latency, faults and counters.

    Use it in a ``with`` statement, or call `start` and `close`. The process is spawned, not forked,
    and ends with the one that started it, however that ends. Methods block until the server has
    done what they say, and may be called from any thread, and from processes forked after `start`;
    only the process that started the server stops it.

    Args:
        port: Port to listen on; 0: a free one.
        access_key: Access key of the one user, who may do everything.
        secret_key: The secret that requests are to be signed with.
        session_token: If given, requests have to carry it as well.
        region: Region that requests are to be signed for.
        latency: How long requests wait; see `set_latency`.
        faults: What goes wrong; see `set_faults`.
        seed: Seeds the draws of latency and of faults, apart from each other.
        start_timeout_s: Longest time that the start may take.

    Raises:
        ValueError: The port is none.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        access_key: str = "test-access-key",
        secret_key: str = "test-secret-key",
        session_token: str | None = None,
        region: str = "us-east-1",
        latency: Latency | None = None,
        faults: Sequence[Fault] = (),
        seed: int = 0,
        start_timeout_s: float = 30.0,
    ) -> None:
        if not 0 <= port < 65536:
            raise ValueError(f"port: got {port!r}, expected 0 to 65535")
        self._wanted_port = port
        self.access_key = access_key
        self.secret_key = secret_key
        self.session_token = session_token
        self.region = region
        self._latency = latency or Latency()
        self._faults = tuple(faults)
        self._seed = seed
        self._start_timeout_s = start_timeout_s
        self._control_token = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Self] | None = None
        self._port: int | None = None
        self._owner_pid = 0

    def __repr__(self) -> str:
        where = "stopped" if self._port is None else self.endpoint_url
        return f"<{type(self).__name__} {where}>"

    # Life

    def start(self) -> Self:
        """Start the server, and wait until it takes connections.

        Raises:
            RuntimeError: It is running, or does not come up.
            OSError: The port is taken.
        """
        if self._process is not None:
            raise RuntimeError(f"object server: it runs, at {self.endpoint_url}; close it first")
        environment = os.environ.copy()
        paths = [str(_PACKAGE_FOLDER), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        process = subprocess.Popen(
            [sys.executable, "-m", "concurrent_dataloader.testing._process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._process = process
        self._owner_pid = os.getpid()
        self._finalizer = weakref.finalize(self, _stop_forgotten, process, os.getpid())
        try:
            self._port = self._tell_settings(process)
            if self._latency != Latency():
                self._tell("set_latency", dataclasses.asdict(self._latency))
            if self._faults:
                self.set_faults(self._faults)
        except BaseException:
            self.close()
            raise
        return self

    def _tell_settings(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        settings = {
            "port": self._wanted_port,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
            "session_token": self.session_token,
            "region": self.region,
            "seed": self._seed,
            "control_token": self._control_token,
            "parent_pid": os.getpid(),
        }
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        with process.stdout as stdout:
            if not select.select([stdout], [], [], self._start_timeout_s)[0]:
                raise RuntimeError(
                    f"object server: no answer from its process in {self._start_timeout_s} s;"
                    " give a longer start_timeout_s"
                )
            line = stdout.readline()
        if not line:
            raise RuntimeError(
                f"object server: its process ended with status {process.wait()} before it was"
                " ready; its standard error says why"
            )
        told = json.loads(line)
        if "error" in told:
            raise OSError(f"object server: {told['error']}")
        return int(told["port"])

    def close(self) -> None:
        """Stop the server; its objects are gone. May be called twice.

        In a process that was forked from the one that started it, the server runs on.
        """
        process, self._process = self._process, None
        if process is None:
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        self._port = None
        if os.getpid() == self._owner_pid:
            _stop(process)

    def __enter__(self) -> Self:
        if self._process is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Where it is

    @property
    def port(self) -> int:
        """Port that it listens on.

        Raises:
            RuntimeError: It does not run.
        """
        if self._port is None:
            raise RuntimeError("object server: it does not run; call start(), or use it in a with")
        return self._port

    @property
    def endpoint_url(self) -> str:
        """Where it listens, such as ``http://127.0.0.1:40001``."""
        return f"http://{_HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process."""
        if self._process is None:
            raise RuntimeError("object server: it does not run; call start(), or use it in a with")
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """Give the variables by which clients find the server and its keys."""
        variables = {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ALLOW_HTTP": "true",
        }
        if self.session_token is not None:
            variables["AWS_SESSION_TOKEN"] = self.session_token
        return variables

    # Objects

    def create_bucket(self, bucket: str, *, public: bool = False) -> None:
        """Make a bucket; with ``public``, anybody may read it, without a signature."""
        self._tell("create_bucket", {"bucket": bucket, "public": public})

    def put_objects(
        self,
        bucket: str,
        objects: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
        *,
        checksum: str | None = None,
        in_parts: bool = False,
    ) -> int:
        """Store many objects at once, past latency and faults; makes the bucket if there is none.

        Args:
            bucket: Where to store them.
            objects: Bodies by key; may be lazy, and larger than memory allows to hold twice.
            checksum: Store a checksum with each, which clients get that ask for it; one of
                ``crc32``, ``crc32c``, ``crc64nvme``, ``sha1``, ``sha256``.
            in_parts: Give them the ETags of objects that were uploaded in parts, which are no MD5s.
                The checksums are of whole objects.

        Returns:
            How many were stored.

        Raises:
            ValueError: The checksum is not known.
        """
        if checksum is not None and checksum not in CHECKSUM_ALGORITHMS:
            known = ", ".join(map(repr, CHECKSUM_ALGORITHMS))
            raise ValueError(f"checksum: got {checksum!r}, expected None or one of {known}")
        pairs = (
            cast(Mapping[str, bytes], objects).items() if isinstance(objects, Mapping) else objects
        )
        entries: list[tuple[str, int]] = []
        bodies: list[bytes] = []
        num_bytes = num_stored = 0

        def send() -> None:
            arguments = {
                "bucket": bucket,
                "checksum": checksum,
                "in_parts": in_parts,
                "objects": entries,
            }
            self._tell("put_objects", arguments, bodies)

        for key, body in pairs:
            entries.append((key, len(body)))
            bodies.append(body)
            num_bytes += len(body)
            num_stored += 1
            if num_bytes >= _BATCH_BYTES or len(entries) >= 100_000:
                send()
                entries, bodies, num_bytes = [], [], 0
        send()
        return num_stored

    def put_folder(
        self,
        bucket: str,
        folder: str | os.PathLike[str],
        *,
        prefix: str = "",
        in_memory: bool = True,
    ) -> FolderSummary:
        """Store the files of a folder, and of those in it, by their path below it.

        With ``in_memory`` false the files stay where they are and are read at each GET, for sets
        larger than RAM; they must then not be changed.

        Raises:
            NotADirectoryError: There is no such folder.
        """
        path = pathlib.Path(folder).resolve()
        if not path.is_dir():
            raise NotADirectoryError(f"folder: got {str(path)!r}, expected a folder that is there")
        arguments = {"bucket": bucket, "folder": str(path), "prefix": prefix}
        told = self._tell("put_folder", {**arguments, "in_memory": in_memory})
        return FolderSummary(told["num_objects"], told["num_bytes"])

    # Behaviour

    def set_latency(
        self, median_s: float = 0.0, *, sigma: float = 0.0, spread_s: float = 0.0
    ) -> None:
        """Let each request wait before its answer begins, as `Latency` says; none by default."""
        latency = Latency(median_s=median_s, sigma=sigma, spread_s=spread_s)
        self._tell("set_latency", dataclasses.asdict(latency))

    def set_bandwidth(
        self,
        *,
        connection_bytes_per_s: float | None = None,
        total_bytes_per_s: float | None = None,
    ) -> None:
        """Send bodies no faster than this, on each connection and on all together."""
        arguments = {
            "connection_bytes_per_s": connection_bytes_per_s,
            "total_bytes_per_s": total_bytes_per_s,
        }
        for name, value in arguments.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value!r}, expected None or more than 0")
        self._tell("set_bandwidth", arguments)

    def set_rate_limit(self, requests_per_s: float | None, *, burst: float = 1.0) -> None:
        """Answer 503 SlowDown to requests beyond this rate; ``burst`` of them may come at once."""
        if requests_per_s is not None and not requests_per_s > 0:
            raise ValueError(
                f"requests_per_s: got {requests_per_s!r}, expected None or more than 0"
            )
        self._tell("set_rate_limit", {"requests_per_s": requests_per_s, "burst": burst})

    def set_faults(self, faults: Sequence[Fault]) -> None:
        """Replace the faults; attempts and hits are counted from nothing."""
        self._tell("set_faults", {"faults": [dataclasses.asdict(fault) for fault in faults]})

    def set_outage(self, kind: OutageKind | None, *, duration_s: float | None = None) -> None:
        """Be down from now on, whatever the faults; None: be up again.

        ``refused`` drops all connections and refuses new ones; nobody can talk to the server then,
        not even this object. ``reset`` drops them, and resets each that brings a request;
        ``unavailable`` answers each request by 503. The requests of these two are counted as the
        fault ``outage``.

        Args:
            kind: How the server is down.
            duration_s: It is up again by itself after so many seconds; None: when told. Needed for
                ``refused``; for one that is refused for good, close the server.

        Raises:
            ValueError: The kind is none, or the duration is not above 0 or missing.
        """
        if kind is not None and kind not in get_args(OutageKind):
            kinds = ", ".join(map(repr, get_args(OutageKind)))
            raise ValueError(f"kind: got {kind!r}, expected None or one of {kinds}")
        if duration_s is not None and not duration_s > 0:
            raise ValueError(f"duration_s: got {duration_s!r}, expected None or more than 0")
        if kind == "refused" and duration_s is None:
            raise ValueError(
                "duration_s: got None for 'refused', expected seconds, since nothing can be told to"
                " a server that takes no connections; to be down for good, close it"
            )
        self._tell("set_outage", {"kind": kind, "duration_s": duration_s})

    def add_credential(
        self,
        access_key: str,
        secret_key: str,
        *,
        session_token: str | None = None,
        expires_at_s: float | None = None,
    ) -> None:
        """Let requests be signed with another secret, or change that of an access key.

        From ``expires_at_s`` (seconds since 1970) on, the answer is 400 ExpiredToken.
        """
        self._tell(
            "add_credential",
            {
                "access_key": access_key,
                "secret_key": secret_key,
                "session_token": session_token,
                "expires_at_s": expires_at_s,
            },
        )

    def expire_session_tokens(self) -> None:
        """Let all session tokens expire now."""
        self._tell("expire_session_tokens", {})

    def drop_connections(self) -> None:
        """Close all connections at once, whatever they are doing."""
        self._tell("drop_connections", {})

    def restore(self) -> None:
        """Return to the state of the first moment, without buckets.

        Only the first user is left, without latency, bounds and faults, and draws begin with the
        seed again. Requests under way are dropped, idle connections stay.
        """
        self._tell("restore", {})

    # Counters

    def counters(self, *, by_key: bool = False) -> Counters:
        """Give what the server did since it was started, or since `reset_counters`.

        Args:
            by_key: Give the GETs of each key as well.
        """
        told = self._tell("counters", {"by_key": by_key})
        told["num_by_status"] = {int(status): n for status, n in told["num_by_status"].items()}
        return Counters(**told)

    def reset_counters(self) -> None:
        """Count from nothing."""
        self._tell("reset_counters", {})

    def _tell(self, verb: str, arguments: dict[str, Any], bodies: Sequence[bytes] = ()) -> Any:
        """Send one request of control, and give what it answers."""
        line = json.dumps(arguments).encode() + b"\n"
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=_CONTROL_TIMEOUT_S)
        try:
            num_bytes = len(line) + sum(map(len, bodies))
            connection.request(
                "POST",
                f"/-/{verb}",
                iter([line, *bodies]),
                {"Content-Length": str(num_bytes), "x-control-token": self._control_token},
            )
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        told = json.loads(answer)
        if response.status != 200:
            raise RuntimeError(f"object server: {verb}: {told['error']}: {told['words']}")
        return told


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _stop_forgotten(process: subprocess.Popen[bytes], owner_pid: int) -> None:
    """Stop a server whose owner was collected without closing it; nothing in a forked child."""
    if os.getpid() != owner_pid or process.poll() is not None:
        return
    _stop(process)
    warnings.warn(
        f"object server of process {process.pid} was not closed; use it in a with statement",
        ResourceWarning,
        stacklevel=1,
    )
