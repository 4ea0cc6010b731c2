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

    An ETag of 32 hexadecimal digits is the MD5 of the object, but where objects are encrypted with
    a customer's key (SSE-KMS, SSE-C) it is not. That is not to be guessed from bodies that do not
    fit: a store that answers with other objects looks the same. Only the store's own word counts.
    """

    def __init__(self, verify: Verify) -> None:
        self._is_off = verify == "length"

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
        if not has_own_key(header):
            self.check_etag(address, key, etag, body)

    def check_etag(
        self,
        address: Address,
        key: str,
        etag: str | None,
        body: Buffer,
        ask_header: Callable[[], Callable[[str], str | None]] | None = None,
    ) -> None:
        """Compare a whole object with its ETag, where that is an MD5; as `check`.

        Args:
            address: The place that answered.
            key: The object.
            etag: Of the answer.
            body: What came.
            ask_header: Asks the store for the object's headers, where those of the answer are not
                known. Called when the two differ; a store that encrypts with a customer's key is
                compared by length only from then on.
        """
        match = None if self._is_off or etag is None else _MD5.fullmatch(etag)
        if match is None:
            return
        got = hashlib.md5(body, usedforsecurity=False).hexdigest()
        if got == match[1]:
            return
        if ask_header is not None and has_own_key(ask_header()):
            self._is_off = True
            log.warning(
                "%s: %s encrypts objects with a customer's key, so their ETags are no MD5s; bodies "
                "are compared by their length only",
                address.describe(key),
                address.endpoint_url,
            )
            return
        raise _mismatch(address, key, body, "ETag", got, match[1])


def has_own_key(header: Callable[[str], str | None]) -> bool:
    """Whether an object is encrypted with a customer's key, by the headers of an answer.

    Source: AWS, "Checking object integrity in Amazon S3", on ETags.
    """
    encryption = header("x-amz-server-side-encryption") or ""
    return (
        encryption.startswith(_NOT_MD5_ENCRYPTION)
        or header("x-amz-server-side-encryption-customer-algorithm") is not None
    )


def _mismatch(
    address: Address, key: str, body: Buffer, name: str, got: str, expected: str
) -> BodyMismatchError:
    return BodyMismatchError(
        f"{address.describe(key)}: got {memoryview(body).nbytes} bytes whose {name} is {got} from "
        f"{address.endpoint_url}, expected {expected}; if the store's ETags are no MD5s, open it "
        "with verify='length'"
    )
