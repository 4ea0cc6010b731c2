"""AWS Signature Version 4 for reading an object: no body, no query.

botocore's signer builds a request object, sorts and copies headers and formats times for each
request; this does the same sum in about a tenth of the CPU, and a test compares the two.

Source:
    AWS, "Authenticating Requests: Using the Authorization Header (AWS Signature Version 4)".
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import time

from concurrent_dataloader.stores.credentials import Credentials

SHA256_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def sign(
    method: str,
    netloc: str,
    path: str,
    region: str,
    credentials: Credentials,
    now_s: float,
    *,
    asks_checksum: bool = False,
) -> dict[str, str]:
    """Compute the headers that sign a request; pure.

    Args:
        method: ``GET`` or ``HEAD``.
        netloc: The ``Host`` header as it will be sent.
        path: Encoded once, as it will be sent, without a query.
        region: Of the bucket.
        credentials: Whose signature it is.
        now_s: Seconds since the epoch.
        asks_checksum: Whether the answer is to have the checksum that the object was stored with.

    Returns:
        Headers to send beside ``Host``.
    """
    stamp = _format_time(int(now_s))
    day = stamp[:8]
    token = credentials.session_token
    mode_name = "x-amz-checksum-mode;" if asks_checksum else ""
    mode_line = "x-amz-checksum-mode:ENABLED\n" if asks_checksum else ""
    signed = f"host;{mode_name}x-amz-content-sha256;x-amz-date"
    lines = (
        f"host:{netloc}\n{mode_line}x-amz-content-sha256:{SHA256_OF_NOTHING}\nx-amz-date:{stamp}\n"
    )
    if token is not None:
        signed += ";x-amz-security-token"
        lines += f"x-amz-security-token:{token}\n"
    request = f"{method}\n{path}\n\n{lines}\n{signed}\n{SHA256_OF_NOTHING}"
    scope = f"{day}/{region}/s3/aws4_request"
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
    signature = hmac.digest(
        _signing_key(credentials.secret_access_key, day, region), text.encode(), "sha256"
    ).hex()
    headers = {
        "x-amz-date": stamp,
        "x-amz-content-sha256": SHA256_OF_NOTHING,
        "Authorization": (
            f"AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{scope}, "
            f"SignedHeaders={signed}, Signature={signature}"
        ),
    }
    if asks_checksum:
        headers["x-amz-checksum-mode"] = "ENABLED"
    if token is not None:
        headers["x-amz-security-token"] = token
    return headers


@functools.lru_cache(maxsize=4)
def _format_time(now_s: int) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))


@functools.lru_cache(maxsize=64)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = hmac.digest(f"AWS4{secret}".encode(), day.encode(), "sha256")
    for part in (region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
