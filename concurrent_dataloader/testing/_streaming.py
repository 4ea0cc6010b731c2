"""Bodies in aws-chunked coding: chunks with or without signatures, and checksums in trailers.

Source: "Signature calculations for the Authorization header: Transferring a payload in multiple
chunks" and "... including trailing headers", Amazon S3 API reference.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import Request, read_chunk_size
from concurrent_dataloader.testing._signature import EMPTY_SHA256, Seed


class _Chunk(NamedTuple):
    data: bytes
    signature: bytes


def decode_streaming_body(request: Request, seed: Seed | None) -> None:
    """Replace an aws-chunked body by what it carries, and add its trailers to the headers.

    Raises:
        S3Error: It is malformed, of another length than announced, or a signature is wrong.
    """
    content_sha256 = request.headers.get(b"x-amz-content-sha256", b"")
    if not content_sha256.startswith(b"STREAMING-"):
        return
    is_signed = content_sha256.startswith(b"STREAMING-AWS4-HMAC-SHA256-PAYLOAD")
    if not is_signed and content_sha256 != b"STREAMING-UNSIGNED-PAYLOAD-TRAILER":
        raise S3Error("NotImplemented")
    chunks, trailers = _split_chunks(request.body)
    body = b"".join(chunk.data for chunk in chunks)
    if request.headers.get(b"x-amz-decoded-content-length", b"") != b"%d" % len(body):
        raise S3Error("IncompleteBody")
    if is_signed and seed is not None:
        last = _check_chunks(chunks, seed)
        if content_sha256.endswith(b"-TRAILER"):
            _check_trailers(trailers, seed, last)
    announced = request.headers.get(b"x-amz-trailer", b"").lower().split(b",")
    for name, value in trailers.items():
        if name in announced:
            request.headers[name] = value
    request.body = body


def _split_chunks(raw: bytes) -> tuple[list[_Chunk], dict[bytes, bytes]]:
    chunks: list[_Chunk] = []
    start = 0
    try:
        while True:
            end = raw.index(b"\r\n", start)
            size, _, extension = raw[start:end].partition(b";")
            num_bytes = read_chunk_size(size)
            signature = extension.partition(b"chunk-signature=")[2]
            start = end + 2
            chunks.append(_Chunk(raw[start : start + num_bytes], signature))
            if not num_bytes:
                return chunks, _split_trailers(raw[start:])
            start += num_bytes
            if raw[start : start + 2] != b"\r\n":
                raise S3Error("IncompleteBody")
            start += 2
    except ValueError as error:
        raise S3Error("IncompleteBody") from error


def _split_trailers(raw: bytes) -> dict[bytes, bytes]:
    trailers: dict[bytes, bytes] = {}
    for line in raw.replace(b"\r\n", b"\n").split(b"\n"):
        name, colon, value = line.partition(b":")
        if colon:
            trailers[name.strip().lower()] = value.strip()
    return trailers


def _check_chunks(chunks: list[_Chunk], seed: Seed) -> bytes:
    previous = seed.signature
    for chunk in chunks:
        digest = hashlib.sha256(chunk.data).hexdigest().encode()
        lines = (
            b"AWS4-HMAC-SHA256-PAYLOAD",
            seed.amz_date,
            seed.scope,
            previous,
            EMPTY_SHA256,
            digest,
        )
        previous = _sign(seed, lines)
        if not hmac.compare_digest(previous, chunk.signature):
            raise S3Error("SignatureDoesNotMatch")
    return previous


def _check_trailers(trailers: dict[bytes, bytes], seed: Seed, previous: bytes) -> None:
    signature = trailers.pop(b"x-amz-trailer-signature", b"")
    text = b"".join(b"%s:%s\n" % pair for pair in trailers.items())
    digest = hashlib.sha256(text).hexdigest().encode()
    lines = (b"AWS4-HMAC-SHA256-TRAILER", seed.amz_date, seed.scope, previous, digest)
    if not hmac.compare_digest(_sign(seed, lines), signature):
        raise S3Error("SignatureDoesNotMatch")


def _sign(seed: Seed, lines: tuple[bytes, ...]) -> bytes:
    return hmac.digest(seed.signing_key, b"\n".join(lines), "sha256").hex().encode()
