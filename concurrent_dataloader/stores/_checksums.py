"""Whether a body is the object: compared with the checksum that the store sends."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Final

import google_crc32c
from typing_extensions import Buffer

from concurrent_dataloader.errors import BodyMismatchError
from concurrent_dataloader.stores.address import Address, Verify

log = logging.getLogger(__name__)

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_NOT_MD5_ENCRYPTION = "aws:kms"


def _crc32(body: Buffer) -> bytes:
    return zlib.crc32(body).to_bytes(4, "big")


def _crc32c(body: Buffer) -> bytes:
    # It reads bytes only.
    data = body if isinstance(body, bytes) else bytes(memoryview(body))
    return google_crc32c.value(data).to_bytes(4, "big")


HEADERS: Final[Mapping[str, Callable[[Buffer], bytes]]] = {
    "x-amz-checksum-crc32c": _crc32c,
    "x-amz-checksum-crc32": _crc32,
    "x-amz-checksum-sha256": lambda body: hashlib.sha256(body).digest(),
    "x-amz-checksum-sha1": lambda body: hashlib.sha1(body, usedforsecurity=False).digest(),
}
"""Headers of S3's, cheapest first. Left out is CRC64NVME, for which there is no library that is
everywhere; the ETag serves then.

Source: AWS, "Checking object integrity in Amazon S3"."""


class Checksums:
    """Compares whole bodies with what the store says of them; of one store in one process.

    An ETag of 32 hexadecimal digits is the MD5 of the object, but not where objects are encrypted
    with a customer's key (SSE-KMS, SSE-C), and one cannot see that from the ETag. So a store is
    believed once an ETag was the MD5. One whose first `_NUM_DOUBTED` objects all have ETags of
    another kind, each read twice with the same bytes, is compared by length only from then on.
    """

    _NUM_DOUBTED = 3

    def __init__(self, verify: Verify) -> None:
        self._is_off = verify == "length"
        # Touched by many threads; each operation is atomic, and a lost update costs one more read.
        self._is_believed = False
        self._doubted: dict[str, str] = {}
        self._num_doubted = 0

    def check(
        self,
        address: Address,
        key: str,
        header: Callable[[str], str | None],
        etag: str | None,
        body: Buffer,
    ) -> None:
        """Compare a whole object.

        Args:
            address: The place that answered.
            key: The object.
            header: Looks up a header of the answer by its usual name.
            etag: Of the answer.
            body: What came.

        Raises:
            BodyMismatchError: The body is not the object.
        """
        if self._is_off:
            return
        for name, compute in HEADERS.items():
            sent = header(name)
            if sent is not None and "-" not in sent:  # with one, it is made of those of parts
                got = base64.b64encode(compute(body)).decode()
                if got != sent:
                    raise _mismatch(address, key, body, name, got, sent)
                return
        encryption = header("x-amz-server-side-encryption") or ""
        is_own_key = header("x-amz-server-side-encryption-customer-algorithm") is not None
        if not encryption.startswith(_NOT_MD5_ENCRYPTION) and not is_own_key:
            self.check_etag(address, key, etag, body)

    def check_etag(self, address: Address, key: str, etag: str | None, body: Buffer) -> None:
        """Compare a whole object with its ETag, where that is an MD5; as `check`."""
        match = None if self._is_off or etag is None else _MD5.fullmatch(etag)
        if match is None:
            return
        got = hashlib.md5(body, usedforsecurity=False).hexdigest()
        if got == match[1]:
            self._is_believed = True
        elif self._is_believed or not self._doubts(address, key, got):
            raise _mismatch(address, key, body, "ETag", got, match[1])

    def _doubts(self, address: Address, key: str, got: str) -> bool:
        """Whether it is the ETag that is to be doubted, not the body."""
        if self._doubted.get(key) != got:
            self._doubted[key] = got
            return False
        del self._doubted[key]
        self._num_doubted += 1
        if self._num_doubted == self._NUM_DOUBTED:
            self._is_off = True
            log.warning(
                "%s: the ETags of %s are no MD5s of the objects; bodies are compared by their "
                "length only from now on",
                address.describe(key),
                address.endpoint_url,
            )
        return True


def _mismatch(
    address: Address, key: str, body: Buffer, name: str, got: str, expected: str
) -> BodyMismatchError:
    return BodyMismatchError(
        f"{address.describe(key)}: got {memoryview(body).nbytes} bytes whose {name} is {got} from "
        f"{address.endpoint_url}, expected {expected}; if the store's ETags are no MD5s, open it "
        "with verify='length'"
    )
