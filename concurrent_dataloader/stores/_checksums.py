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
from concurrent_dataloader.stores._crc64nvme import crc64nvme
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


def _crc64nvme(body: Buffer) -> bytes:
    return crc64nvme(body).to_bytes(8, "big")


_Computed = Mapping[str, Callable[[Buffer], bytes]]

HEADERS: Final[_Computed] = {
    "x-amz-checksum-crc32c": _crc32c,
    "x-amz-checksum-crc32": _crc32,
    "x-amz-checksum-sha256": lambda body: hashlib.sha256(body).digest(),
    "x-amz-checksum-sha1": lambda body: hashlib.sha1(body, usedforsecurity=False).digest(),
}
"""Headers of S3's, cheapest first, that are compared before the ETag is.

Source: AWS, "Checking object integrity in Amazon S3"."""

LATE_HEADERS: Final[_Computed] = {"x-amz-checksum-crc64nvme": _crc64nvme}
"""Those that cost more than the MD5, and are compared where the ETag is none."""


class Checksums:
    """Compares whole bodies with what the store says of them; of one store in one process.

    An ETag of 32 hexadecimal digits is the MD5 of the object, but where objects are encrypted with
    a customer's key (SSE-KMS, SSE-C) it is not. That is not to be guessed from bodies that do not
    fit: a store that answers with other objects looks the same. Only the store's own word counts.
    """

    def __init__(self, verify: Verify) -> None:
        self._is_off = verify == "length"
        self._are_etags_odd = False
        self.needs_headers = False
        """Whether an object came whose ETag is no MD5, with a header that was compared."""

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
        if self._is_off or self._check_headers(HEADERS, address, key, header, etag, body):
            return
        if has_own_key(header) or not self.check_etag(address, key, etag, body):
            self._check_headers(LATE_HEADERS, address, key, header, etag, body)

    def _check_headers(
        self,
        computed: _Computed,
        address: Address,
        key: str,
        header: Callable[[str], str | None],
        etag: str | None,
        body: Buffer,
    ) -> bool:
        """Compare the first header that came; tells whether there was one."""
        for name, compute in computed.items():
            sent = header(name)
            if sent is not None and "-" not in sent:  # with one, it is made of those of parts
                if self._are_etags_odd or _MD5.fullmatch(etag or "") is None:
                    self.needs_headers = True
                got = base64.b64encode(compute(body)).decode()
                if got != sent:
                    raise _mismatch(address, key, body, name, got, sent)
                return True
        return False

    def check_etag(
        self,
        address: Address,
        key: str,
        etag: str | None,
        body: Buffer,
        ask_header: Callable[[], Callable[[str], str | None]] | None = None,
    ) -> bool:
        """Compare a whole object with its ETag, where that is an MD5; as `check`.

        Args:
            address: The place that answered.
            key: The object.
            etag: Of the answer.
            body: What came.
            ask_header: Asks the store for the object's headers, where those of the answer are not
                known. Called when the two differ; the ETags of a store that encrypts with a
                customer's key are not looked at from then on.

        Returns:
            Whether all is compared that is to be; if not, a header could tell more.
        """
        if self._is_off:
            return True
        is_odd = self._are_etags_odd and ask_header is not None
        match = None if is_odd or etag is None else _MD5.fullmatch(etag)
        if match is None:
            return False
        got = hashlib.md5(body, usedforsecurity=False).hexdigest()
        if got == match[1]:
            return True
        if ask_header is not None and has_own_key(ask_header()):
            self._are_etags_odd = True
            log.warning(
                "%s: %s encrypts objects with a customer's key, so their ETags are no MD5s; bodies "
                "are compared with its other checksums, and by their length where it sends none",
                address.describe(key),
                address.endpoint_url,
            )
            return False
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
