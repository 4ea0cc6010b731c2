"""Who asks: AWS Signature Version 4, in headers and in presigned addresses.

Source: "Authenticating Requests (AWS Signature Version 4)", Amazon S3 API reference.
"""

from __future__ import annotations

import calendar
import dataclasses
import hashlib
import hmac
import time
import urllib.parse
from collections.abc import Callable
from typing import Final, NamedTuple

from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import Request

MAX_SKEW_S: Final = 15 * 60
EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest().encode()
_UNSIGNED: Final = b"UNSIGNED-PAYLOAD"
_ALGORITHM: Final = b"AWS4-HMAC-SHA256"
_NOT_VERSION_4: Final = (
    "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256."
)
_MAX_CACHED: Final = 1024


@dataclasses.dataclass(slots=True)
class Credential:
    """A secret, by whose access key requests are signed."""

    access_key: str
    secret_key: str = dataclasses.field(repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)
    expires_at_s: float | None = None


class Seed(NamedTuple):
    """What the signatures of a body's chunks continue from."""

    signing_key: bytes
    amz_date: bytes
    scope: bytes
    signature: bytes


class _Signer(NamedTuple):
    """What stays the same from one request of a client to the next, for a day."""

    credential: Credential
    signing_key: bytes
    scope: bytes
    signed_names: tuple[bytes, ...]
    joined_names: bytes


class Authenticator:
    """Checks signatures; refuses with S3's own errors."""

    def __init__(self, region: str, clock: Callable[[], float] = time.time) -> None:
        self.region = region
        self._clock = clock
        self._credentials: dict[str, Credential] = {}
        self._signers: dict[bytes, _Signer] = {}
        self._last_date = b""

    def add(self, credential: Credential) -> None:
        """Let requests be signed with this credential; one of the same access key is replaced."""
        self._credentials[credential.access_key] = credential
        self._signers.clear()

    def remove_all(self) -> None:
        """Forget all credentials."""
        self._credentials.clear()
        self._signers.clear()

    def expire_session_tokens(self) -> None:
        """Let each credential that has a session token expire now."""
        for credential in self._credentials.values():
            if credential.session_token is not None:
                credential.expires_at_s = self._clock()

    def check(self, request: Request) -> Seed | None:
        """Check the signature of a request.

        Returns:
            What the chunks of its body are signed on, or None if the request is not signed at all.

        Raises:
            S3Error: It is signed, and wrongly.
        """
        authorization = request.headers.get(b"authorization")
        if authorization is not None:
            return self._check_header(request, authorization)
        if "X-Amz-Signature" in request.query:
            return self._check_presigned(request)
        if "AWSAccessKeyId" in request.query:
            raise S3Error("InvalidRequest", _NOT_VERSION_4)
        return None

    def _check_header(self, request: Request, authorization: bytes) -> Seed:
        prefix, _, signature = authorization.rpartition(b"Signature=")
        signer = self._signers.get(prefix) or self._add_signer(prefix)
        headers = request.headers
        amz_date = headers.get(b"x-amz-date", b"")
        if amz_date != self._last_date:
            self._check_date(amz_date)
        content_sha256 = headers.get(b"x-amz-content-sha256")
        if content_sha256 is None:
            raise S3Error(
                "InvalidRequest", "Missing required header for this request: x-amz-content-sha256"
            )
        for name in headers:
            if name.startswith(b"x-amz-") and name not in signer.signed_names:
                raise S3Error(
                    "AccessDenied",
                    "There were headers present in the request which were not signed",
                )
        raw_query = _canonical_query(request.raw_query) if request.raw_query else b""
        _check_signature(request, signer, amz_date, raw_query, content_sha256, signature)
        _check_session(signer.credential, headers.get(b"x-amz-security-token"), self._clock)
        _check_body(request.body, content_sha256)
        return Seed(signer.signing_key, amz_date, signer.scope, signature)

    def _check_presigned(self, request: Request) -> Seed:
        query = request.query
        try:
            fields = b"%s Credential=%s, SignedHeaders=%s, " % (
                query["X-Amz-Algorithm"].encode(),
                query["X-Amz-Credential"].encode(),
                query["X-Amz-SignedHeaders"].encode(),
            )
            amz_date, expires_s = query["X-Amz-Date"].encode(), int(query["X-Amz-Expires"])
        except (KeyError, ValueError) as error:
            raise S3Error(
                "AuthorizationHeaderMalformed",
                "A presigned query parameter is missing or malformed.",
            ) from error
        signer = self._signers.get(fields) or self._add_signer(fields)
        if self._clock() > _parse_date_s(amz_date) + expires_s:
            raise S3Error("AccessDenied", "Request has expired")
        raw_query = _canonical_query(request.raw_query)
        signature = query["X-Amz-Signature"].encode()
        payload = request.headers.get(b"x-amz-content-sha256", _UNSIGNED)
        _check_signature(request, signer, amz_date, raw_query, payload, signature)
        token = query.get("X-Amz-Security-Token")
        _check_session(signer.credential, token.encode() if token else None, self._clock)
        _check_body(request.body, payload)
        return Seed(signer.signing_key, amz_date, signer.scope, signature)

    def _add_signer(self, prefix: bytes) -> _Signer:
        """Read what stands before a signature, and derive the day's key."""
        algorithm, _, rest = prefix.partition(b" ")
        if algorithm != _ALGORITHM:
            raise S3Error("InvalidRequest", _NOT_VERSION_4)
        fields: dict[bytes, bytes] = {}
        for part in rest.split(b","):
            name, _, value = part.strip().partition(b"=")
            fields[name] = value
        try:
            scope_parts = fields[b"Credential"].decode().rsplit("/", 4)
            access_key, day, region, service, end = scope_parts
            signed_names = tuple(fields[b"SignedHeaders"].lower().split(b";"))
        except (KeyError, ValueError) as error:
            raise S3Error("AuthorizationHeaderMalformed") from error
        if service != "s3" or end != "aws4_request":
            raise S3Error("AuthorizationHeaderMalformed")
        if b"host" not in signed_names:
            raise S3Error("AccessDenied", "The Host header must be signed.")
        credential = self._credentials.get(access_key)
        if credential is None:
            raise S3Error("InvalidAccessKeyId")
        if region != self.region:
            raise S3Error(
                "AuthorizationHeaderMalformed",
                f"The authorization header is malformed; the region '{region}' is wrong;"
                f" expecting '{self.region}'",
            )
        signer = _Signer(
            credential,
            derive_signing_key(credential.secret_key, day, region),
            f"{day}/{region}/s3/aws4_request".encode(),
            signed_names,
            b";".join(signed_names),
        )
        if len(self._signers) >= _MAX_CACHED:
            self._signers.clear()
        self._signers[prefix] = signer
        return signer

    def _check_date(self, amz_date: bytes) -> None:
        then_s = _parse_date_s(amz_date)
        now_s = self._clock()
        if abs(now_s - then_s) > MAX_SKEW_S:
            raise S3Error("RequestTimeTooSkewed")
        # Most requests of a second carry the same date; one that is 14 minutes old may be kept here
        # for long, so only fresh ones are.
        if abs(now_s - then_s) < 2:
            self._last_date = amz_date


def derive_signing_key(secret_key: str, day: str, region: str) -> bytes:
    """Derive the key that signs a day's requests."""
    key = b"AWS4" + secret_key.encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _parse_date_s(amz_date: bytes) -> float:
    try:
        return calendar.timegm(time.strptime(amz_date.decode(), "%Y%m%dT%H%M%SZ"))
    except ValueError as error:
        raise S3Error(
            "AccessDenied", "AWS authentication requires a valid Date or x-amz-date header"
        ) from error


def _check_signature(
    request: Request,
    signer: _Signer,
    amz_date: bytes,
    canonical_query: bytes,
    payload: bytes,
    signature: bytes,
) -> None:
    headers = request.headers
    lines = [request.method, canonical_path(request), canonical_query]
    for name in signer.signed_names:
        value = headers.get(name, b"")
        lines.append(name + b":" + (b" ".join(value.split()) if b"  " in value else value))
    lines += (b"", signer.joined_names, payload)
    digest = hashlib.sha256(b"\n".join(lines)).hexdigest().encode()
    to_sign = b"\n".join((_ALGORITHM, amz_date, signer.scope, digest))
    expected = hmac.digest(signer.signing_key, to_sign, "sha256").hex().encode()
    if not hmac.compare_digest(expected, signature):
        raise S3Error("SignatureDoesNotMatch")


def canonical_path(request: Request) -> bytes:
    """Give the path as it is signed: each byte but letters, digits and ``-._~/`` as ``%XX``."""
    if request.is_plain:
        return request.path
    return urllib.parse.quote(request.plain_path, safe="-._~/").encode()


def _canonical_query(raw_query: bytes) -> bytes:
    pairs: list[tuple[str, str]] = []
    for part in raw_query.decode().split("&"):
        name, _, value = part.partition("=")
        name = urllib.parse.unquote_plus(name)
        if name not in ("X-Amz-Signature", ""):
            value = urllib.parse.unquote_plus(value)
            pairs.append((_quote(name), _quote(value)))
    return "&".join(f"{name}={value}" for name, value in sorted(pairs)).encode()


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="-._~")


def _check_session(credential: Credential, token: bytes | None, clock: Callable[[], float]) -> None:
    if (credential.session_token or "").encode() != (token or b""):
        raise S3Error("InvalidToken")
    if credential.expires_at_s is not None and clock() >= credential.expires_at_s:
        raise S3Error("ExpiredToken")


def _check_body(body: bytes, content_sha256: bytes) -> None:
    if content_sha256 == _UNSIGNED or content_sha256.startswith(b"STREAMING-"):
        return
    if not body:
        is_right = content_sha256 == EMPTY_SHA256
    else:
        is_right = hashlib.sha256(body).hexdigest().encode() == content_sha256
    if not is_right:
        raise S3Error("XAmzContentSHA256Mismatch")
