"""Buckets, objects and uploads, in RAM or in a folder of files."""

from __future__ import annotations

import base64
import bisect
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import secrets
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from concurrent_dataloader.testing._refusals import S3Error


@dataclasses.dataclass(frozen=True, slots=True)
class FileBody:
    """A body that lies in a file, which is opened for each read."""

    path: pathlib.Path

    def read(self, start: int, stop: int) -> bytes:
        """Read a byte range; it is shorter than asked for if the file was cut since."""
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), stop - start, start)


Body = bytes | FileBody


@dataclasses.dataclass(slots=True)
class StoredObject:
    """One object, never changed once stored; a new PUT stores a new one."""

    key: str
    body: Body
    size_bytes: int
    etag: str
    modified_s: int
    headers: Mapping[str, str]
    checksums: Mapping[str, str]
    is_public: bool = False
    fields: bytes = b""
    """The header lines of each answer that carries it, made at the first one."""
    head: bytes = b""
    """The beginning of the answer to a plain GET, made at the first one."""

    def read_all(self) -> bytes:
        """Give the body, read into memory if it lies in a file."""
        body = self.body
        return body.read(0, self.size_bytes) if isinstance(body, FileBody) else body


@dataclasses.dataclass(slots=True)
class Part:
    """A part of a multipart upload."""

    body: bytes
    etag: str
    modified_s: int


@dataclasses.dataclass(slots=True)
class Upload:
    """A multipart upload that is neither complete nor aborted."""

    upload_id: str
    key: str
    headers: Mapping[str, str]
    is_public: bool
    started_s: int
    parts: dict[int, Part] = dataclasses.field(default_factory=dict[int, Part])


@dataclasses.dataclass(slots=True)
class Bucket:
    """Objects by key."""

    name: str
    created_s: int
    is_listed: bool = False
    """Anybody may list it."""
    is_public: bool = False
    """Anybody may list it and read its objects."""
    objects: dict[str, StoredObject] = dataclasses.field(default_factory=dict[str, StoredObject])
    uploads: dict[str, Upload] = dataclasses.field(default_factory=dict[str, Upload])
    _sorted_keys: list[str] | None = None

    def add(self, stored: StoredObject) -> None:
        """Store an object, in place of one of the same key."""
        if stored.key not in self.objects:
            self._sorted_keys = None
        self.objects[stored.key] = stored

    def remove(self, key: str) -> None:
        """Remove an object, if there is one."""
        if self.objects.pop(key, None) is not None:
            self._sorted_keys = None

    def sorted_keys(self) -> list[str]:
        """Give the keys in order; code points sort as their UTF-8, which is S3's order."""
        if self._sorted_keys is None:
            self._sorted_keys = sorted(self.objects)
        return self._sorted_keys

    def other_object(self, key: str) -> StoredObject | None:
        """Give the object that follows ``key``, around the end; None if there is no other."""
        keys = self.sorted_keys()
        position = bisect.bisect_right(keys, key)
        other = keys[position % len(keys)] if keys else key
        return self.objects[other] if other != key else None


class Buckets:
    """All buckets of the server, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Bucket] = {}

    def find(self, name: str) -> Bucket:
        """Find a bucket; refuses with NoSuchBucket."""
        try:
            return self.by_name[name]
        except KeyError:
            raise S3Error("NoSuchBucket") from None

    def find_object(self, bucket: str, key: str) -> StoredObject:
        """Find an object; refuses with NoSuchBucket or NoSuchKey."""
        try:
            return self.find(bucket).objects[key]
        except KeyError:
            raise S3Error("NoSuchKey") from None

    def create(self, name: str) -> Bucket:
        """Make a bucket, or give the one that is there."""
        if name not in self.by_name:
            self.by_name[name] = Bucket(name, int(time.time()))
        return self.by_name[name]


def make_object(
    key: str,
    body: bytes,
    *,
    headers: Mapping[str, str] | None = None,
    checksums: Mapping[str, str] | None = None,
    is_public: bool = False,
    etag: str | None = None,
) -> StoredObject:
    """Make an object of bytes; its ETag is their MD5, unless it is given."""
    if etag is None:
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
    now_s = int(time.time())
    return StoredObject(
        key, body, len(body), etag, now_s, headers or {}, checksums or {}, is_public
    )


def make_file_object(key: str, path: pathlib.Path) -> StoredObject:
    """Make an object of a file that stays where it is.

    Its ETag is not an MD5, for which the file would have to be read; like that of a multipart
    upload it ends in ``-1``, which tells clients so.
    """
    status = path.stat()
    seed = f"{path}:{status.st_size}:{status.st_mtime_ns}".encode()
    etag = hashlib.md5(seed, usedforsecurity=False).hexdigest() + "-1"
    return StoredObject(key, FileBody(path), status.st_size, etag, int(status.st_mtime), {}, {})


def etag_of_parts(md5s: Sequence[str]) -> str:
    """Give the ETag of an object that was uploaded in parts, by their MD5s in hex."""
    digests = b"".join(map(bytes.fromhex, md5s))
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(md5s)}"


def start_upload(bucket: Bucket, key: str, headers: Mapping[str, str], is_public: bool) -> Upload:
    """Begin a multipart upload."""
    now_ns = time.time_ns()
    # Of one key, S3 lists uploads as they began, and goes on after one by the order of their names.
    upload_id = f"{now_ns:016x}{secrets.token_urlsafe(12)}"
    upload = Upload(upload_id, key, headers, is_public, now_ns // 10**9)
    bucket.uploads[upload.upload_id] = upload
    return upload


CHECKSUM_ALGORITHMS: Final = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")

# Reflected polynomials: RFC 3720, appendix B.4, and NVM Express base specification 2.0, 5.2.1.3.4.
_CRC32C: Final = 0x82F63B78
_CRC64NVME: Final = 0x9A6C9329AC4BC9B5


def compute_checksum(algorithm: str, body: bytes) -> str:
    """Compute a checksum as S3 writes it, in base 64.

    Raises:
        KeyError: The algorithm is none of `CHECKSUM_ALGORITHMS`.
    """
    return base64.b64encode(_CHECKSUMS[algorithm](body)).decode()


def _crc32c(body: bytes) -> bytes:
    if importlib.util.find_spec("google_crc32c") is None:
        return _slow_crc(body, _CRC32C, 4)
    # Not a dependency, and wanted only for its speed.
    return importlib.import_module("google_crc32c").value(body).to_bytes(4, "big")


def _slow_crc(body: bytes, reflected_polynomial: int, num_bytes: int) -> bytes:
    """Compute a CRC, all ones before and inverted after, byte by byte: 10 ms for 100 kB."""
    mask = (1 << 8 * num_bytes) - 1
    table = _crc_table(reflected_polynomial)
    crc = mask
    for byte in body:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return (crc ^ mask).to_bytes(num_bytes, "big")


@functools.cache
def _crc_table(reflected_polynomial: int) -> list[int]:
    table: list[int] = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (reflected_polynomial if crc & 1 else 0)
        table.append(crc)
    return table


_CHECKSUMS: Mapping[str, Callable[[bytes], bytes]] = {
    "crc32": lambda body: zlib.crc32(body).to_bytes(4, "big"),
    "crc32c": _crc32c,
    "crc64nvme": lambda body: _slow_crc(body, _CRC64NVME, 8),
    "sha1": lambda body: hashlib.sha1(body, usedforsecurity=False).digest(),
    "sha256": lambda body: hashlib.sha256(body).digest(),
}
