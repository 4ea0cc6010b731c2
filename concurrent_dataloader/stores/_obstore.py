"""Objects of an S3-compatible store, by obstore, with a guard: its runtime does not survive a fork.

obstore runs on native threads that start with the first request. A child forked after that has the
runtime's state but not its threads, and its first request waits for ever, whatever store object it
uses. So:

- a process that inherited a runtime in use never calls it, but the standard library's client;
- the main process uses that client from the start, so that a sample read there (``dataset[0]``)
  leaves obstore to the workers forked afterwards. ``fork_safe=False`` lifts this for programs that
  never fork.

A blocking read of obstore cannot be ended either: one that nobody waits for any more goes on. Where
such reads go on for long, those that may come to that are made by that client too, which can end
them at the store.

obstore shows no checksum headers either. Where ETags are no MD5s, whole objects are read by that
client, if the store has headers for them that can be compared.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
import obstore.store
from obstore.exceptions import BaseError
from typing_extensions import Buffer, override

from concurrent_dataloader.errors import (
    BodyMismatchError,
    CredentialsError,
    ExpiredCredentialsError,
    LoaderError,
    StoreError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._answers import (
    broken_connection,
    check_whole_body,
    error_for_status,
    parse_s3_error,
    range_error,
    short_body_error,
    timeout_error,
)
from concurrent_dataloader.stores._cancelling import Leftovers, current_call
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores._http import HttpStore
from concurrent_dataloader.stores.address import ClientOptions, S3Address, check_byte_range
from concurrent_dataloader.stores.base import BlockingStore, ObjectInfo, PerProcess
from concurrent_dataloader.stores.credentials import Credentials, CredentialsSource

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import S3Credential, S3Store

_CREDENTIALS_LAST = timedelta(minutes=5)
"""What obstore is told of credentials that may change. It asks again when they last less than that,
at most ten times a second; the source knows when they are really to be renewed."""

_PATIENCE_S = 2.0
"""Longest wait for the answer that another thread has asked for."""

_PROVIDER = re.compile(r"External AWS credential provider: (?:[\w.]+\.)?(\w+): (.*)")
"""What obstore says of an error that `_provide` raised."""

_STATUS = re.compile(r"non-2xx status code: (\d{3})")

# obstore refuses these, or sends another key than it was given.
_ODD_KEY = re.compile(r"^/|/$|//|(^|/)\.\.?(/|$)|[\x00-\x1f\x7f]")

_used_by_pid: int | None = None


def is_usable(fork_safe: bool) -> bool:
    """Decide whether this process may call obstore.

    Args:
        fork_safe: Whether the main process leaves it to its workers.
    """
    if _used_by_pid is not None and _used_by_pid != os.getpid():
        return False
    return not (fork_safe and multiprocessing.parent_process() is None)


class ObstoreStore(BlockingStore):
    """Reads by obstore where that is safe, and by the standard library where it is not.

    Awaited reads are blocking ones in threads: obstore's own awaitables wake the loop twice for an
    object, for its headers and for its body (what each costs: ``benchmarking store_get awaits``).
    """

    def __init__(self, address: S3Address, options: ClientOptions, fork_safe: bool = True) -> None:
        super().__init__(options.max_connections)
        self._address = address
        self._options = options
        self._fork_safe = fork_safe
        self._checksums = Checksums(options.verify)
        self._client = PerProcess(partial(_open_client, address, options, fork_safe), _drop)
        self._plain = HttpStore(address, options, self._checksums)
        self._leftovers = Leftovers()
        self._question = threading.Lock()
        self._was_asked = False

    @override
    def _arguments(self) -> tuple[S3Address, ClientOptions, bool]:
        return self._address, self._options, self._fork_safe

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._address.describe(key)

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size; rare, so always by the standard library's client."""
        return self._plain.head(key)

    @override
    def close(self) -> None:
        """Give back what this process has opened."""
        super().close()
        self._client.close()
        self._plain.close()

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""
        client = self._client.get()
        if client is None or _ODD_KEY.search(key):
            return self._plain.get(key, byte_range)
        if byte_range is None and self._checksums.needs_headers:
            return self._plain.get(key)
        call = current_call()
        if call is None:
            return self._get(client, key, byte_range)
        if self._leftovers.last_long:
            return self._plain.get(key, byte_range)
        call.go_on_for(self._leftovers)
        try:
            return self._get(client, key, byte_range)
        finally:
            call.go_on_for(None)
            self._leftovers.end(call)

    def _get(self, client: S3Store, key: str, byte_range: ByteRange | None) -> Buffer:
        object_key = self._address.object_key(key)
        try:
            if byte_range is None:
                result = obstore.get(client, object_key)
            elif check_byte_range(byte_range) == 0:
                return b""
            else:
                result = obstore.get(client, object_key, options={"range": byte_range})
            body = result.buffer()
        except (BaseError, OSError) as error:
            raise self._translate(error, key) from error
        return self._check(key, byte_range, result, body)

    def _check(
        self, key: str, byte_range: ByteRange | None, result: GetResult, body: Any
    ) -> Buffer:
        got_bytes = len(body)
        if byte_range is None:
            start, stop = result.range
            if stop - start != got_bytes:
                raise short_body_error(self._address, key, got_bytes, stop - start)
            etag = result.meta["e_tag"]
            if got_bytes == 0:
                check_whole_body(self._address, key, 0, None, etag)
            ask = partial(self._plain.ask_header, key)
            if not self._checksums.check_etag(self._address, key, etag, body, ask):
                return self._check_by_headers(key, body)
        elif got_bytes != byte_range.stop - byte_range.start:
            size_bytes = result.meta["size"]
            if size_bytes < byte_range.stop:
                raise range_error(self._address, key, byte_range, size_bytes)
            raise short_body_error(
                self._address, key, got_bytes, byte_range.stop - byte_range.start
            )
        return body

    def _check_by_headers(self, key: str, body: Buffer) -> Buffer:
        """Read an object again whose ETag is no MD5, unless the store is known to send no headers.

        One read finds out for this process; those that end meanwhile wait for it. Where the store
        sends them, the few that had begun are read again, and later ones by that client at once.
        """
        if self._is_unknown():
            is_mine = self._question.acquire(timeout=_PATIENCE_S)
            try:
                if self._is_unknown():
                    body = self._plain.get(key)
                    self._was_asked = True
                    return body
            finally:
                if is_mine:
                    self._question.release()
        return self._plain.get(key) if self._checksums.needs_headers else body

    def _is_unknown(self) -> bool:
        return not (self._was_asked or self._checksums.needs_headers)

    def _translate(self, error: Exception, key: str) -> LoaderError:
        where, endpoint = self.describe(key), self._address.endpoint_url
        text = str(error)
        provider = _PROVIDER.search(text)
        if provider is not None:
            is_expired = provider[1] == ExpiredCredentialsError.__name__
            return (ExpiredCredentialsError if is_expired else CredentialsError)(provider[2])
        status = _STATUS.search(text)
        if status is not None:
            code, message = parse_s3_error(text)
            return error_for_status(self._address, key, int(status[1]), code, message)
        if "kind: Timeout" in text:
            return timeout_error(self._address, key, self._options)
        reason = text.partition("\n")[0]
        if "IncompleteBody" in text:
            return BodyMismatchError(f"{where}: the body from {endpoint} was cut short: {reason}")
        if "kind: " in text or isinstance(error, OSError):
            return broken_connection(self._address, key, reason, text)
        return StoreError(f"{where}: obstore could not ask {endpoint}: {reason}")


def _open_client(address: S3Address, options: ClientOptions, fork_safe: bool) -> S3Store | None:
    """Make this process's client, or None where obstore must not be called."""
    global _used_by_pid
    if not is_usable(fork_safe):
        return None
    source = address.credentials
    if source is not None:
        source.resolve()  # says in our words, here, that there are none
    client_options: dict[str, Any] = {
        "allow_http": address.origin.scheme == "http",
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "read_timeout": timedelta(seconds=options.stall_timeout_s),
        "timeout": timedelta(seconds=options.total_timeout_s),
        "pool_max_idle_per_host": str(options.max_connections),
        "http1_only": True,
    }
    if options.ca_file is not None:
        client_options["root_certificate"] = Path(options.ca_file).read_bytes()
    # obstore takes whatever the environment sets and its caller does not; so all is set here.
    base_url = f"{address.origin}{address.base_path}"
    endpoint = base_url if not address.path_style else base_url.rpartition("/")[0]
    client = obstore.store.S3Store(
        address.bucket,
        config={
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "region": address.region,
            "virtual_hosted_style_request": not address.path_style,
            "skip_signature": source is None,
            "s3_express": False,
            "request_payer": False,
        },
        client_options=client_options,  # pyright: ignore[reportArgumentType]: a dict built in steps
        retry_config={"max_retries": 0},
        credential_provider=None if source is None else partial(_provide, source),
    )
    _used_by_pid = os.getpid()
    return client


def _provide(source: CredentialsSource) -> S3Credential:
    credentials = source.resolve()
    changes = not isinstance(source, Credentials)
    return {
        "access_key_id": credentials.access_key_id,
        "secret_access_key": credentials.secret_access_key,
        "token": credentials.session_token,
        "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST if changes else None,
    }


def _drop(client: S3Store | None) -> None:
    del client  # dropping the last reference closes its connections
