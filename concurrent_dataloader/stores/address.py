"""Where objects lie, how they are named in a request, and how the client talks to the place."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, NamedTuple, cast, get_args
from urllib.parse import quote, urlsplit

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.credentials import CredentialsSource

Verify = Literal["checksum", "length"]
"""What a whole object is compared with: the checksum that the store sends, or its length only."""

_UNRESERVED = "-_.~/"
"""Characters that stay in a path. Source: AWS Signature Version 4, "UriEncode"."""


class Origin(NamedTuple):
    """The server behind a URL."""

    scheme: str
    host: str
    port: int

    @property
    def is_default_port(self) -> bool:
        """Whether the ``Host`` header leaves the port out."""
        return self.port == (443 if self.scheme == "https" else 80)

    @property
    def netloc(self) -> str:
        """The ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.is_default_port else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


def parse_origin(url: str) -> Origin:
    """Take the server out of a URL that `check_http_url` has passed."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return Origin(parts.scheme, parts.hostname or "", port)


_SECRET_PARTS = re.compile(r"(?<=//)[^/?#]*@|(?<=\?)[^#]+|(?<=#).+")


def show_url(url: str) -> str:
    """Give a URL without what may be a secret: its user, its password, its query, its fragment."""
    return _SECRET_PARTS.sub("...", url)


def check_http_url(name: str, url: str) -> str:
    """Check a URL given by a user, and take the slash off its end.

    Raises:
        ValueError: It is no http(s) URL, or it holds a user name, a password or a query.
    """
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"{name}: got a URL with a user name or password in it, expected none; "
            "give credentials apart from the URL"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{name}: got {show_url(url)!r}, expected a URL such as 'https://host:9000'"
        )
    if parts.query or parts.fragment:
        raise ValueError(f"{name}: got {show_url(url)!r}, expected a URL without '?' and '#'")
    return url.rstrip("/")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class S3Address:
    """A bucket, or the part of it below a prefix, and who asks."""

    bucket: str

    prefix: str = ""
    """Put before each key; empty, or ends in ``/``."""

    endpoint_url: str
    """The service, without the bucket, such as ``https://s3.eu-west-1.amazonaws.com``."""

    region: str

    path_style: bool
    """Whether the bucket stands in the path, or before the endpoint's host."""

    credentials: CredentialsSource | None
    """None: requests are not signed."""

    @property
    def origin(self) -> Origin:
        """The server that answers for the bucket."""
        origin = parse_origin(self.endpoint_url)
        return origin if self.path_style else origin._replace(host=f"{self.bucket}.{origin.host}")

    @property
    def base_path(self) -> str:
        """The encoded path of the bucket, without a slash at its end."""
        path = quote(urlsplit(self.endpoint_url).path.rstrip("/"), safe=_UNRESERVED + "%")
        return f"{path}/{quote(self.bucket, safe=_UNRESERVED)}" if self.path_style else path

    def object_key(self, key: str) -> str:
        """Give the key in the bucket; an empty one names no object."""
        if not key:
            raise KeyNotFoundError(
                f"{self.describe('')}: got an empty key, expected an object's name"
            )
        return self.prefix + key

    def request_path(self, key: str) -> str:
        """Give the encoded path of an object."""
        return f"{self.base_path}/{quote(self.object_key(key), safe=_UNRESERVED)}"

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return f"s3://{self.bucket}/{self.prefix}{key}"

    @property
    def where(self) -> str:
        """Name the place for a person: the bucket."""
        return f"bucket {self.bucket!r}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HttpAddress:
    """A folder of a plain web server."""

    base_url: str
    """Without a slash at its end."""

    @property
    def endpoint_url(self) -> str:
        """The server."""
        return str(self.origin)

    @property
    def origin(self) -> Origin:
        """The server."""
        return parse_origin(self.base_url)

    def request_path(self, key: str) -> str:
        """Give the encoded path of an object."""
        if not key:
            raise KeyNotFoundError(f"{self.base_url}/: got an empty key, expected an object's name")
        path = quote(urlsplit(self.base_url).path, safe=_UNRESERVED + "%")
        return f"{path}/{quote(key, safe=_UNRESERVED)}"

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return f"{self.base_url}/{key}"

    @property
    def where(self) -> str:
        """Name the place for a person."""
        return self.base_url


Address = S3Address | HttpAddress


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClientOptions:
    """How a client talks, whatever client it is."""

    max_connections: int = 256
    """Requests at once, at most, in one process, where the client has such a bound. More than the
    library ever fetches at once by default (128)."""

    connect_timeout_s: float = 5.0
    """Until the connection stands. obstore's and reqwest's own default."""

    stall_timeout_s: float = 15.0
    """Until the next byte comes."""

    total_timeout_s: float = 120.0
    """Until the last byte has come, where the client can cut there."""

    ca_file: str | None = None
    """Certificates to trust, as a PEM file; None: those of the system."""

    verify: Verify = "checksum"

    def __post_init__(self) -> None:
        if self.max_connections < 1:
            raise ValueError(f"max_connections: got {self.max_connections}, expected 1 or more")
        for name in ("connect_timeout_s", "stall_timeout_s", "total_timeout_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}: got {value} s, expected more than 0 s")


def check_verify(verify: object) -> Verify:
    """Give back a known word, else raise ValueError."""
    if verify not in get_args(Verify):
        raise ValueError(f"verify: got {verify!r}, expected 'checksum' or 'length'")
    return cast(Verify, verify)


def check_byte_range(byte_range: ByteRange) -> int:
    """Give a range's length in bytes.

    Raises:
        ValueError: It begins below 0, or ends before it begins.
    """
    start, stop = byte_range
    if start < 0 or stop < start:
        raise ValueError(f"byte_range: got [{start}, {stop}), expected 0 <= start <= stop")
    return stop - start


_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:-]{0,253}[a-zA-Z0-9]|[a-zA-Z0-9]")


def check_bucket(bucket: str) -> str:
    """Check a bucket's name loosely: Ceph and old buckets allow more than today's rules.

    Raises:
        ValueError: It cannot be one, for instance since it holds a slash.
    """
    if not _BUCKET.fullmatch(bucket):
        shown = show_url(f"//{bucket}").removeprefix("//")
        name, _, prefix = shown.removeprefix("s3://").partition("/")
        if "/" in bucket and _BUCKET.fullmatch(name):
            below = f", and prefix={prefix.rstrip('/')!r}" if prefix else ""
            raise ValueError(
                f"bucket: got {shown!r}, expected the name of the bucket only: {name!r}{below}"
            )
        raise ValueError(f"bucket: got {shown!r}, expected letters, digits, '.', '-' and '_' only")
    return bucket


def is_host_label(bucket: str) -> bool:
    """Whether a bucket's name may stand before a host name under a wildcard certificate."""
    return re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", bucket) is not None
