"""Objects of an S3-compatible store, by boto3: reads, lists, writes."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import boto3.exceptions
import boto3.session
import botocore.config
import botocore.credentials
import botocore.exceptions
import botocore.loaders
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.compat import set_socket_timeout
from typing_extensions import Buffer, override

from concurrent_dataloader.errors import (
    BodyMismatchError,
    DeadlineError,
    StoreError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._answers import (
    broken_connection,
    check_body,
    error_for_status,
    timeout_error,
)
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores._time_left import end_of_call
from concurrent_dataloader.stores.address import ClientOptions, S3Address, check_byte_range
from concurrent_dataloader.stores.base import BlockingStore, ObjectInfo, PerProcess
from concurrent_dataloader.stores.credentials import CredentialsSource
from concurrent_dataloader.stores.credentials_chain import CredentialsChain

T = TypeVar("T")

_READ_BYTES = 256 * 1024

_MULTIPART_BYTES = 16 * 1024 * 1024
"""From this size on, and in parts of this size, an object is uploaded in parts; S3 allows 5 MiB or
more."""


class Boto3Store(BlockingStore):
    """One boto3 client for each process, made under a lock; clients may be shared by threads.

    Told that less time is left, a call waits no longer than that for the first byte of its answer,
    and of a body for the last one. Not bounded by it are connecting, uploads in parts, which have
    threads of their own, and, before botocore took a limit for a single request, the first byte.
    """

    def __init__(self, address: S3Address, options: ClientOptions) -> None:
        super().__init__(options.max_connections)
        self._address = address
        self._options = options
        self._checksums = Checksums(options.verify)
        self._client = PerProcess(partial(_open_client, address, options), _close_client)

    @override
    def _arguments(self) -> tuple[S3Address, ClientOptions]:
        return self._address, self._options

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._address.describe(key)

    @override
    def close(self) -> None:
        """Close this process's client."""
        super().close()
        self._client.close()

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get` says."""
        extra: dict[str, str] = {}
        if byte_range is not None:
            if check_byte_range(byte_range) == 0:
                return b""
            extra["Range"] = f"bytes={byte_range.start}-{byte_range.stop - 1}"
        elif self._options.verify == "checksum":
            extra["ChecksumMode"] = "ENABLED"
        status, header, body = self._call(key, partial(self._get_object, key, extra))
        return check_body(self._address, key, byte_range, status, header, body, self._checksums)

    def _get_object(
        self, key: str, extra: dict[str, str]
    ) -> tuple[int, Callable[[str], str | None], bytes]:
        until_s = min(end_of_call(), time.monotonic() + self._options.total_timeout_s)
        answer = self._client.get().get_object(
            Bucket=self._address.bucket, Key=self._address.object_key(key), **extra
        )
        # Not `with answer["Body"]`: that gives the stream inside, which checks nothing.
        with contextlib.closing(answer["Body"]) as stream:
            if hasattr(stream._raw_stream, "read1"):  # urllib3 2.1 and later
                stall_s = self._options.stall_timeout_s
                stream._raw_stream = _TimedStream(stream._raw_stream, stall_s, until_s)
            body: bytes = stream.read()
        return *read_answer(answer), body

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size."""
        answer = self._call(
            key,
            lambda: self._client.get().head_object(
                Bucket=self._address.bucket, Key=self._address.object_key(key)
            ),
        )
        return ObjectInfo(key, answer["ContentLength"])

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List as `WritableStore.list` says; 1,000 keys a request."""
        skip = len(self._address.prefix)
        arguments = {"Bucket": self._address.bucket, "Prefix": self._address.prefix + prefix}
        if start_after:
            arguments["StartAfter"] = self._address.prefix + start_after
        while True:
            page = self._call("", partial(self._client.get().list_objects_v2, **arguments))
            for entry in page.get("Contents", ()):
                if len(entry["Key"]) > skip:  # the marker of our own prefix has no name here
                    yield ObjectInfo(entry["Key"][skip:], entry["Size"])
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def put(self, key: str, body: Buffer) -> None:
        """Write an object whole; a large one in parts, which become one object at the end."""
        with memoryview(body) as view:
            target = {"Bucket": self._address.bucket, "Key": self._address.object_key(key)}
            if view.nbytes < _MULTIPART_BYTES:
                self._call(key, lambda: self._client.get().put_object(Body=bytes(view), **target))
                return
            config = TransferConfig(
                multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES
            )
            self._call(
                key,
                lambda: self._client.get().upload_fileobj(
                    io.BytesIO(view), Config=config, **target
                ),
            )

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._call(
            key,
            lambda: self._client.get().delete_object(
                Bucket=self._address.bucket, Key=self._address.object_key(key)
            ),
        )

    def _call(self, key: str, request: Callable[[], T]) -> T:
        try:
            return request()
        except TimeoutError as error:
            raise timeout_error(self._address, key, self._options) from error
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise translate(self._address, key, error) from error
        except boto3.exceptions.Boto3Error as error:
            cause = error.__context__
            raise translate(self._address, key, cause if cause is not None else error) from error


class _TimedStream:
    """The stream inside of botocore's, read no longer than allowed.

    A body that drips never times out by itself, and botocore gives no way to read what has come so
    far. What it checks of the whole, it checks of what `read` gives.
    """

    def __init__(self, stream: Any, stall_s: float, until_s: float) -> None:
        self._stream = stream
        self._stall_s = stall_s
        self._until_s = until_s

    def read(self, amt: None = None) -> bytes:
        """Read to the end, whatever ``amt``, which is botocore's.

        Raises:
            TimeoutError: Time was up before.
        """
        del amt
        chunks: list[bytes] = []
        while chunk := self._receive():
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _receive(self) -> bytes:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if left_s < self._stall_s:
            with contextlib.suppress(AttributeError):  # all has come, and the socket was let go
                set_socket_timeout(self._stream, left_s)
        chunk: bytes = self._stream.read1(_READ_BYTES)
        return chunk

    def close(self) -> None:
        """Close the stream inside."""
        self._stream.close()


def read_answer(answer: Any) -> tuple[int, Callable[[str], str | None]]:
    """Give the status of what botocore calls a response, and a look-up of its headers by name."""
    metadata = answer["ResponseMetadata"]
    headers: dict[str, str] = metadata["HTTPHeaders"]
    return metadata["HTTPStatusCode"], lambda name: headers.get(name.lower())


def translate(address: S3Address, key: str, error: BaseException) -> StoreError:
    """Translate an error of botocore's; `StoreUnavailableError` may be repeated."""
    where, endpoint = address.describe(key), address.endpoint_url
    if isinstance(error, botocore.exceptions.ClientError):
        answer: Any = error.response
        metadata = answer.get("ResponseMetadata", {})
        status = metadata.get("HTTPStatusCode", 0)
        code = str(answer.get("Error", {}).get("Code", ""))
        if code.isdigit():  # HEAD has no body, and botocore makes the status the code
            code = ""
        message = str(answer.get("Error", {}).get("Message", ""))
        retry_after = metadata.get("HTTPHeaders", {}).get("retry-after")
        return error_for_status(address, key, status, code, message, retry_after)
    if isinstance(
        error,
        (botocore.exceptions.ConnectTimeoutError, botocore.exceptions.ReadTimeoutError),
    ):
        return DeadlineError(f"{where}: no answer from {endpoint} in time")
    if isinstance(error, botocore.exceptions.IncompleteReadError):
        return BodyMismatchError(f"{where}: the body from {endpoint} was cut short: {error}")
    if isinstance(error, botocore.exceptions.FlexibleChecksumError):
        return BodyMismatchError(f"{where}: the body from {endpoint} is not the object: {error}")
    if isinstance(
        error, (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError)
    ):
        return broken_connection(address, key, str(error))
    return StoreError(f"{where}: boto3 could not ask {endpoint}: {error}")


def client_arguments(address: S3Address, options: ClientOptions) -> dict[str, Any]:
    """Give what a client of boto3's or aiobotocore's is made with; credentials apart."""
    return {
        "service_name": "s3",
        "endpoint_url": address.endpoint_url,
        "region_name": address.region,
        "verify": options.ca_file,
    }


def client_settings(address: S3Address, options: ClientOptions) -> dict[str, Any]:
    """Give the settings of a client of boto3's or aiobotocore's; its own retries are off."""
    settings: dict[str, Any] = {
        "max_pool_connections": options.max_connections,
        "connect_timeout": options.connect_timeout_s,
        "read_timeout": options.stall_timeout_s,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "s3": {"addressing_style": "path" if address.path_style else "virtual"},
        # Checksums that only AWS knows would make writes fail at many stores that speak S3.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "tcp_keepalive": True,
    }
    settings["signature_version"] = UNSIGNED if address.credentials is None else "s3v4"
    return settings


def _open_client(address: S3Address, options: ClientOptions) -> Any:
    arguments = client_arguments(address, options)
    arguments["config"] = botocore.config.Config(**client_settings(address, options))
    source = address.credentials
    if source is not None:
        source.resolve()  # says in our words that there are none
    profile = source.profile if isinstance(source, CredentialsChain) else None
    session = botocore.session.Session(profile=profile)
    if source is not None:
        session.register_component("credential_provider", _Provider(source))
    session.register_component("data_loader", shared_loader())
    client = boto3.session.Session(botocore_session=session).client(**arguments)
    client.meta.events.register("before-send.s3", partial(_limit_wait, options.stall_timeout_s))
    return client


def _limit_wait(stall_timeout_s: float, request: Any, **about: Any) -> None:
    """Let botocore wait for an answer no longer than the call may last, if it can be told."""
    del about
    until_s = end_of_call()
    context = getattr(request, "context", None)
    if until_s == math.inf or context is None:
        return
    left_s = max(until_s - time.monotonic(), 0.001)  # botocore takes no 0
    context["read_timeout"] = min(stall_timeout_s, left_s)


class _LiveCredentials(botocore.credentials.Credentials):
    """Asks a source of ours for each request, so that new credentials are used at once."""

    def __init__(self, source: CredentialsSource) -> None:
        now = source.resolve()
        super().__init__(now.access_key_id, now.secret_access_key, now.session_token)
        self._source = source

    @override
    def get_frozen_credentials(self) -> botocore.credentials.ReadOnlyCredentials:
        """Give the credentials of this moment."""
        return freeze(self._source)


def freeze(source: CredentialsSource) -> botocore.credentials.ReadOnlyCredentials:
    """Give a source's credentials of this moment, as botocore signs with them."""
    now = source.resolve()
    return botocore.credentials.ReadOnlyCredentials(
        now.access_key_id, now.secret_access_key, now.session_token
    )


class _Provider:
    """What botocore asks for credentials in place of its own chain."""

    def __init__(self, source: CredentialsSource) -> None:
        self._source = source

    def load_credentials(self) -> _LiveCredentials:
        """Give what asks the source."""
        return _LiveCredentials(self._source)


@functools.cache
def shared_loader() -> botocore.loaders.Loader:
    """Give what reads AWS's descriptions of its services: slow, hence once."""
    return botocore.loaders.create_loader()


def _close_client(client: Any) -> None:
    client.close()
