from __future__ import annotations

import datetime
from urllib.parse import quote

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import pytest

from concurrent_dataloader.stores import Credentials
from concurrent_dataloader.stores._sigv4 import sign

NOW = datetime.datetime(2026, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)


@pytest.mark.parametrize("token", [None, "token/with+=signs"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("netloc", ["s3.eu-west-1.amazonaws.com", "127.0.0.1:9000"])
@pytest.mark.parametrize("key", ["a/b.jpg", "a b+c%20#?&=~*'\"", "n\u00fc/\u2026", "a//b", "./x"])
def test_the_signature_is_botocores(
    key: str, netloc: str, method: str, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/bucket/{quote(key, safe='-_.~/')}"
    request = botocore.awsrequest.AWSRequest(method, f"https://{netloc}{path}")
    request.context["payload_signing_enabled"] = True
    signer = botocore.auth.S3SigV4Auth(
        botocore.credentials.Credentials("AKID", "the/secret+key", token), "s3", "eu-west-1"
    )
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: NOW)

    signer.add_auth(request)
    ours = sign(
        method,
        netloc,
        path,
        "eu-west-1",
        Credentials("AKID", "the/secret+key", token),
        NOW.timestamp(),
    )

    assert ours["Authorization"] == request.headers["Authorization"]
    assert ours["x-amz-date"] == request.headers["X-Amz-Date"]
