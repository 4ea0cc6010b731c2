"""Signed requests without a client in between, to see what a server sends, byte by byte."""

from __future__ import annotations

import datetime
import hashlib
import http.client
import urllib.parse
from typing import Any, NamedTuple

import botocore.auth
import botocore.awsrequest
import botocore.credentials

from concurrent_dataloader.testing import ObjectServer


class Endpoint(NamedTuple):
    """Where an S3 server is, and as whom to talk to it."""

    url: str
    access_key: str
    secret_key: str
    region: str


def endpoint_of(server: ObjectServer) -> Endpoint:
    """Give where a server of ours is, and its first user."""
    return Endpoint(server.endpoint_url, server.access_key, server.secret_key, server.region)


class RawAnswer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of an error, from its XML."""
        return self.body.decode().partition("<Code>")[2].partition("</Code>")[0]


def sign(
    endpoint: Endpoint,
    method: str,
    target: str,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    *,
    token: str | None = None,
    at: datetime.datetime | None = None,
    content_sha256: str | None = None,
) -> dict[str, str]:
    """Give the headers of a request, signed by botocore.

    ``at`` replaces the time of signing, ``content_sha256`` what is said of the body.
    """
    url = endpoint.url + target
    request = botocore.awsrequest.AWSRequest(method, url, headers=dict(headers or {}), data=body)
    credentials = botocore.credentials.Credentials(endpoint.access_key, endpoint.secret_key, token)
    signer = _Signer(credentials, "s3", endpoint.region)
    signer.timestamp = (at or datetime.datetime.now(datetime.UTC)).strftime("%Y%m%dT%H%M%SZ")
    signer.content_sha256 = content_sha256 or hashlib.sha256(body).hexdigest()
    signer.add_auth(request)
    return dict(request.headers.items())


class _Signer(botocore.auth.S3SigV4Auth):
    """Botocore's signatures, of what it would not sign by itself."""

    timestamp: str
    content_sha256: str

    def _modify_request_before_signing(self, request: Any) -> None:
        request.context["timestamp"] = self.timestamp
        super()._modify_request_before_signing(request)

    def payload(self, request: Any) -> str:
        return self.content_sha256


def ask(
    endpoint: Endpoint,
    method: str,
    target: str,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    *,
    timeout_s: float = 20.0,
) -> RawAnswer:
    """Send a request as it is, signed or not, on a connection of its own."""
    address = urllib.parse.urlsplit(endpoint.url).netloc
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request(method, target, body or None, headers or {})
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return RawAnswer(response.status, names, response.read())
    finally:
        connection.close()


def ask_signed(
    endpoint: Endpoint,
    method: str,
    target: str,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    **options: Any,
) -> RawAnswer:
    """Send a signed request on a connection of its own."""
    signed = sign(endpoint, method, target, headers, body, **options)
    return ask(endpoint, method, target, signed, body)
