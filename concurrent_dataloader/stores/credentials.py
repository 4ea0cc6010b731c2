"""Who asks: credentials in memory, in a JSON file, or found by AWS's own chain.

What `open_store` takes as ``credentials`` decides, and nothing is mixed:

1. a `Credentials` object: these;
2. a path: the JSON file, read when the store is opened to check it, again in each process that
   uses it, and again when it has been written anew, so that whatever renews short-lived credentials
   only has to replace the file;
3. None: the standard AWS chain, as botocore walks it: environment variables, profiles in
   ``~/.aws``, container and instance roles. Looked up at the first request or before workers
   start, handed to them, and refreshed before they end (`credentials_chain`).

An explicit file always wins over the chain. ``anonymous=True`` asks nobody and signs nothing.

**No secret is shown or stored.** The repr of each class leaves secrets out. A file's and the
chain's pickles hold the path, or nothing. Credentials that exist in memory only must reach worker
processes all the same, and those that the chain found are to; they pickle while one is being
spawned, as multiprocessing's own key does, and at no other time.

**The JSON file** is one flat object. Credentials in either of the two documented layouts::

    {"access_key": "...", "secret": "..."}
    {"aws_access_key_id": "...", "aws_secret_access_key": "..."}

and beside them, all optional:

- ``session_token`` or ``aws_session_token``;
- ``endpoint_url``, ``region`` (also ``region_name``, ``aws_region``), ``bucket_name``;
- ``index_file_download_url``, ``classes_file_download_url``, ``index_file_upload_url``:
  ``s3://bucket/key`` URLs of files that are fetched when the local one is missing; with ``train_``,
  ``val_`` or ``test_`` before the name for one split only.

A file without credentials gives the rest and leaves the credentials to the chain. An unknown key is
an error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing.context
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from typing_extensions import override

from concurrent_dataloader.errors import (
    CredentialsError,
)
from concurrent_dataloader.stores.base import PerProcess, ValueObject

T = TypeVar("T")

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")

_URL_NAMES = ("index_file_download_url", "classes_file_download_url", "index_file_upload_url")

_FIELDS = {
    "access_key": "access_key_id",
    "aws_access_key_id": "access_key_id",
    "secret": "secret_access_key",
    "aws_secret_access_key": "secret_access_key",
    "session_token": "session_token",
    "aws_session_token": "session_token",
    "endpoint_url": "endpoint_url",
    "region": "region",
    "region_name": "region",
    "aws_region": "region",
    "bucket_name": "bucket_name",
}
"""Key of the file -> field of `CredentialsFile.Contents`."""


class CredentialsSource(Protocol):
    """Something that knows, in each process, which credentials to sign with."""

    def resolve(self) -> Credentials:
        """Give the credentials of this moment; cheap when called for each request.

        Raises:
            CredentialsError: There are none.
            ExpiredCredentialsError: They have run out, and no new ones could be had.
        """
        ...


class Credentials:
    """An access key and its secret, in memory. A `CredentialsSource` that always gives itself."""

    __slots__ = ("access_key_id", "secret_access_key", "session_token")

    def __init__(
        self, access_key_id: str, secret_access_key: str, session_token: str | None = None
    ) -> None:
        for name, value in (
            ("access_key_id", access_key_id),
            ("secret_access_key", secret_access_key),
        ):
            if not value:
                raise CredentialsError(f"{name}: got an empty string, expected the {name}")
        self.access_key_id = access_key_id
        self.secret_access_key = secret_access_key
        self.session_token = session_token

    def resolve(self) -> Credentials:
        """Give itself."""
        return self

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credentials) and self._parts() == other._parts()

    @override
    def __hash__(self) -> int:
        return hash(self._parts())

    @override
    def __repr__(self) -> str:
        token = "" if self.session_token is None else ", session_token=<hidden>"
        return f"Credentials({self.access_key_id!r}, <hidden>{token})"

    @override
    def __reduce__(self) -> tuple[type[Credentials], tuple[str, str, str | None]]:
        if multiprocessing.context.get_spawning_popen() is None:
            raise CredentialsError(
                "credentials: got a request to pickle a secret, expected that only while a worker "
                "process is spawned; give a credentials file, whose path is pickled instead"
            )
        return Credentials, self._parts()

    def _parts(self) -> tuple[str, str, str | None]:
        return self.access_key_id, self.secret_access_key, self.session_token


class CredentialsFile(ValueObject):
    """A JSON file as the module's docstring describes it. Pickles as its path."""

    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class Contents:
        """What the file says, checked."""

        credentials: Credentials | None = None
        endpoint_url: str | None = None
        region: str | None = None
        bucket_name: str | None = None
        urls: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
        """As in the file: ``train_index_file_download_url`` -> URL."""

        def index_url(self, split: Split | None = None) -> str | None:
            """Where the split's index is: the split's own key, or that for all splits."""
            return self._url("index_file_download_url", split)

        def classes_url(self, split: Split | None = None) -> str | None:
            """Where the split's classes file can be had, likewise."""
            return self._url("classes_file_download_url", split)

        def index_upload_url(self, split: Split | None = None) -> str | None:
            """Where the split's index is to be written, likewise."""
            return self._url("index_file_upload_url", split)

        def _url(self, name: str, split: Split | None) -> str | None:
            own = self.urls.get(f"{split}_{name}") if split is not None else None
            return own if own is not None else self.urls.get(name)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(Path(path).expanduser().absolute())
        self._contents = PerProcess(partial(_Watched, self.path), _forget)

    @override
    def _arguments(self) -> tuple[str]:
        return (self.path,)

    def read(self) -> Contents:
        """Read the file, once in each process and again when it has changed.

        Raises:
            CredentialsError: It is missing, no flat JSON object of strings, or holds an unknown
                key.
        """
        return self._contents.get().read()

    def resolve(self) -> Credentials:
        """Give the file's credentials.

        Raises:
            CredentialsError: The file cannot be used, or has none.
        """
        credentials = self.read().credentials
        if credentials is None:
            raise CredentialsError(
                f"{self.path}: no credentials, expected 'access_key' and 'secret'"
            )
        return credentials


def _forget(value: object) -> None:
    del value


class _Watched:
    """What the file said when it was last read, and when to look again; of one process."""

    _LOOK_EVERY_S = 1.0

    def __init__(self, path: str) -> None:
        self._path = path
        # Touched by many threads without a lock: at worst two of them read the file.
        self._looked_s = time.monotonic()
        self._stamp = _read_stamp(path)
        self._contents = _read_contents(path)

    def read(self) -> CredentialsFile.Contents:
        """Give the contents; those before, while the file is away or half-written."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= self._LOOK_EVERY_S:
            self._looked_s = now_s
            stamp = _read_stamp(self._path)
            if stamp not in (None, self._stamp):
                try:
                    self._contents = _read_contents(self._path)
                except CredentialsError as error:
                    log.warning("%s; the credentials before are used on", error)
                self._stamp = stamp
        return self._contents


def _read_stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read_contents(path: str) -> CredentialsFile.Contents:
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise CredentialsError(
            f"{path}: cannot be read ({error.strerror}), expected a JSON file with credentials; "
            "check the path, or leave it out to use the standard AWS chain"
        ) from error
    try:
        parsed: Any = json.loads(text)
    except ValueError:  # `from None`: the error holds the text, and the text holds the secret
        raise CredentialsError(f"{path}: no JSON, expected one flat JSON object") from None
    if not isinstance(parsed, dict):
        raise CredentialsError(
            f"{path}: got a JSON {type(parsed).__name__}, expected one flat JSON object"
        )
    return parse_contents(path, parsed)


def parse_contents(path: str, parsed: Mapping[str, Any]) -> CredentialsFile.Contents:
    """Check the object of a credentials file; pure.

    Raises:
        CredentialsError: A key is unknown or given twice under two names, a value is no string, or
            one of key and secret is missing. Values are never shown.
    """
    fields: dict[str, str] = {}
    urls: dict[str, str] = {}
    for name, value in parsed.items():
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise CredentialsError(
                f"{path}: key {name!r} has a value of type {type(value).__name__}, "
                "expected a string that is not empty"
            )
        if name in _FIELDS:
            field = _FIELDS[name]
            if fields.get(field, value) != value:
                raise CredentialsError(
                    f"{path}: key {name!r} gives {field} a second time, expected it once"
                )
            fields[field] = value
        elif _is_url_name(name):
            urls[name] = value
        else:
            raise CredentialsError(
                f"{path}: unknown key {name!r}, expected only {', '.join(_FIELDS)}, "
                f"{', '.join(_URL_NAMES)}, and the last three after 'train_', 'val_' or 'test_'"
            )
    key_id, secret = fields.pop("access_key_id", None), fields.pop("secret_access_key", None)
    token = fields.pop("session_token", None)
    if (key_id is None) != (secret is None) or (token is not None and key_id is None):
        missing = "'access_key'" if key_id is None else "'secret'"
        raise CredentialsError(
            f"{path}: key {missing} is missing, expected access key and secret together"
        )
    credentials = None
    if key_id is not None and secret is not None:
        credentials = Credentials(key_id, secret, token)
    return CredentialsFile.Contents(credentials=credentials, urls=urls, **fields)


def _is_url_name(name: str) -> bool:
    split, _, rest = name.partition("_")
    return name in _URL_NAMES or (split in SPLITS and rest in _URL_NAMES)
