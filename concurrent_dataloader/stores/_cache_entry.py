"""How an entry of the disk cache is named and laid out, and which ones go first. Pure.

An entry is one file: a header of 56 bytes, then the body.

```text
 0  8s  magic
 8  I   CRC32C of all that follows, the body included
12  Q   bytes of the body
20  20s digest of the store's identity and the key
40  q   first byte of the range; 0 for a whole object
48  q   byte after the last one; -1 for a whole object
```

So an entry that was cut short, overwritten, or put under the name of another is told apart.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c

from concurrent_dataloader.ranges import ByteRange

_HEADER = struct.Struct("<8sIQ20sqq")
_IDENTITY = struct.Struct("<Q20sqq")
_MAGIC = b"CDLcach1"
_CHECKED_FROM = 12
_DIGEST_BYTES = 20
_BLOCK_BYTES = 4096

HEADER_BYTES = _HEADER.size
NUM_SHARDS = 256
"""Folders that entries are spread over, by the first byte of their digest."""


class EntryName(NamedTuple):
    """Which bytes an entry holds: a digest, so that no key is ever part of a path."""

    digest: bytes
    start: int
    stop: int

    @property
    def shard(self) -> int:
        """The folder that the entry lies in."""
        return self.digest[0]

    @property
    def text(self) -> str:
        """The name as text: hexadecimal digits, and the range if it is one."""
        text = self.digest.hex()
        return text if self.stop < 0 else f"{text}.{self.start}-{self.stop}"


class Found(NamedTuple):
    """An entry of a listing."""

    path: str
    charge_bytes: int
    used_ns: int
    """When it was last used, to the minute or so."""


def digest_key(endpoint: str, description: str) -> bytes:
    """Digest what tells an object from all others: its store, and its name there."""
    text = f"{endpoint}\0{description}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES, usedforsecurity=False).digest()


def name_entry(digest: bytes, byte_range: ByteRange | None) -> EntryName:
    """Name the entry of an object, or of a range of it."""
    if byte_range is None:
        return EntryName(digest, 0, -1)
    return EntryName(digest, byte_range.start, byte_range.stop)


def pack_header(name: EntryName, body: bytes) -> bytes:
    """Make the header of an entry."""
    identity = _IDENTITY.pack(len(body), *name)
    crc: int = google_crc32c.extend(google_crc32c.value(identity), body)
    return _HEADER.pack(_MAGIC, crc, len(body), *name)


def is_whole(name: EntryName, header: bytes, body: bytes) -> bool:
    """Tell whether what was read is the entry of that name, to the last bit."""
    if len(header) != HEADER_BYTES:
        return False
    magic, crc, body_bytes, *identity = _HEADER.unpack(header)
    if magic != _MAGIC or body_bytes != len(body) or tuple(identity) != name:
        return False
    computed: int = google_crc32c.extend(google_crc32c.value(header[_CHECKED_FROM:]), body)
    return crc == computed


def charge_bytes(file_bytes: int) -> int:
    """Count what a file takes from the limit: whole blocks, as a disk gives them out."""
    return -(-file_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def plan_eviction(sample: Sequence[Found], wanted_bytes: int, max_entries: int) -> list[Found]:
    """Choose what to remove: the entries that were used longest ago.

    Args:
        sample: Entries to choose among.
        wanted_bytes: How much to free; more only by what the last entry is larger.
        max_entries: Choose no more than that, even if it is not enough.

    Returns:
        Oldest first.
    """
    chosen: list[Found] = []
    freed_bytes = 0
    for entry in sorted(sample, key=lambda found: found.used_ns)[:max_entries]:
        if freed_bytes >= wanted_bytes:
            break
        chosen.append(entry)
        freed_bytes += entry.charge_bytes
    return chosen
