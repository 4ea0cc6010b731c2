"""Stores: bytes by key, wherever they lie.

`open_store` turns a URL into a `Store`. A storage of the user's own is any class with the four
methods of `Store`; nothing has to be registered or inherited.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args
from urllib.parse import unquote, urlsplit

from concurrent_dataloader.errors import MissingDependencyError
from concurrent_dataloader.stores._arguments import (
    check_cache_folder,
    check_duration,
    check_instance,
    check_no_file,
    check_scheme,
    check_whole,
)
from concurrent_dataloader.stores.address import (
    ClientOptions,
    HttpAddress,
    S3Address,
    Verify,
    check_bucket,
    check_http_url,
    check_verify,
    is_host_label,
    show_url,
)
from concurrent_dataloader.stores.base import ObjectInfo, SizedStore, Store, WritableStore
from concurrent_dataloader.stores.cache import CachedStore, DiskCache, cached
from concurrent_dataloader.stores.credentials import (
    Credentials,
    CredentialsFile,
    CredentialsSource,
)
from concurrent_dataloader.stores.credentials_chain import CredentialsChain
from concurrent_dataloader.stores.hedging import HedgePolicy
from concurrent_dataloader.stores.in_flight import InFlightPolicy
from concurrent_dataloader.stores.ranged_file import RangedFile
from concurrent_dataloader.stores.resilience import (
    RequestCounts,
    ResilientStore,
    ResilientWritableStore,
)
from concurrent_dataloader.stores.retries import RetryPolicy

__all__ = [
    "CachedStore",
    "Client",
    "Credentials",
    "CredentialsChain",
    "CredentialsFile",
    "DiskCache",
    "HedgePolicy",
    "InFlightPolicy",
    "ObjectInfo",
    "RangedFile",
    "RequestCounts",
    "ResilientStore",
    "RetryPolicy",
    "SizedStore",
    "Store",
    "WritableStore",
    "open_store",
    "open_writable_store",
]

Client = Literal["obstore", "boto3", "aiobotocore", "aiohttp", "http"]

_ADAPTERS: Mapping[str, tuple[str, str]] = {
    "obstore": ("concurrent_dataloader.stores._obstore", "ObstoreStore"),
    "boto3": ("concurrent_dataloader.stores._boto3", "Boto3Store"),
    "aiobotocore": ("concurrent_dataloader.stores._aiobotocore", "AiobotocoreStore"),
    "aiohttp": ("concurrent_dataloader.stores._aiohttp", "AiohttpStore"),
    "http": ("concurrent_dataloader.stores._http", "HttpStore"),
}

_DEFAULT_DEADLINE_S = 120.0
_DEFAULT_HEDGE = HedgePolicy()


def open_store(
    url: str | os.PathLike[str],
    *,
    client: Client = "obstore",
    credentials: Credentials | CredentialsSource | str | os.PathLike[str] | None = None,
    endpoint_url: str | None = None,
    region: str | None = None,
    anonymous: bool = False,
    path_style: bool | None = None,
    fork_safe: bool = True,
    max_connections: int = 256,
    retry: RetryPolicy | None = None,
    deadline_s: float = _DEFAULT_DEADLINE_S,
    connect_timeout_s: float = 5.0,
    stall_timeout_s: float = 15.0,
    ca_file: str | os.PathLike[str] | None = None,
    hedge: HedgePolicy | None = _DEFAULT_HEDGE,
    in_flight: InFlightPolicy | None = None,
    verify: Verify = "checksum",
    cache: DiskCache | str | os.PathLike[str] | None = None,
) -> Store:
    """Open the place that a URL names; contacts nobody yet.

    Args:
        url: ``s3://bucket[/prefix]``, ``http(s)://host/folder/``, ``file:///folder``,
            ``memory://name``, or the path of a folder.
        client: Who talks to a bucket. ``"obstore"`` is the fastest in worker processes;
            ``"boto3"``, ``"aiobotocore"`` and ``"aiohttp"`` are alternatives, ``"http"`` is the
            standard library's. A plain web server is read by ``"aiohttp"`` or ``"http"``; the
            default takes the latter.
        credentials: In memory, or the path of a JSON file; None: the standard AWS chain. See
            `concurrent_dataloader.stores.credentials` for layouts and precedence.
        endpoint_url: Of an S3-compatible service. None: that of the credentials file, or of
            ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, or AWS's own, by https.
        region: None: that of the credentials file, of ``AWS_REGION`` or ``AWS_DEFAULT_REGION``, of
            the AWS profile, or ``us-east-1``.
        anonymous: Do not sign. Only then are no credentials needed.
        path_style: Whether the bucket stands in the path of a request, not before the host. None:
            if there is an endpoint, or the bucket's name is no host name.
        fork_safe: For ``"obstore"``: whether the main process reads by ``"http"``, so that workers
            that it forks later can use obstore. False is for programs that never fork.
        max_connections: Requests at once in a process, at most; as many as there are fetchers, or
            more.
        retry: When to ask again; None: the defaults of `RetryPolicy`, which also says what becomes
            of ``Retry-After``.
        deadline_s: For a request with all its attempts.
        connect_timeout_s: For an attempt, until the connection stands.
        stall_timeout_s: For an attempt, until the next byte comes.
        ca_file: Certificates to trust, PEM; None: those that ``AWS_CA_BUNDLE`` names, or the
            system's.
        hedge: When a request that takes long is made a second time; None: never.
        in_flight: Bounds of the number of requests under way in a process, which follows what the
            store takes, unless a loader was told ``num_fetch_workers``; None: from 64, up to
            ``max_connections``.
        verify: ``"checksum"`` compares whole objects with the checksum that the store sends: an
            ETag that is an MD5, or one of S3's checksum headers. obstore shows none of these
            headers, so that whole objects whose ETag is no MD5, as of one that was uploaded in
            parts, are read by ``"http"`` if they have one. What has neither is compared by its
            length alone. ``"length"`` saves the CPU of all this.
        cache: Keep what is read on this machine: a `DiskCache`, or its folder.

    Returns:
        A store; the caller may close it, and need not. It can be written too, but for a web server.

    Raises:
        ValueError: An argument cannot be used, or does not go with the URL.
        TypeError: An argument is of another type.
        CredentialsError: The credentials file cannot be used.
        MissingDependencyError: The client's package is not installed.
    """
    if client not in _ADAPTERS:
        names = ", ".join(map(repr, get_args(Client)))
        raise ValueError(f"client: got {client!r}, expected one of {names}")
    _check_settings(
        {
            "deadline_s": deadline_s,
            "connect_timeout_s": connect_timeout_s,
            "stall_timeout_s": stall_timeout_s,
        },
        max_connections,
        region,
    )
    check_instance("retry", retry, RetryPolicy, "its defaults")
    check_instance("hedge", hedge, HedgePolicy, "no request made again")
    check_instance("in_flight", in_flight, InFlightPolicy, "its defaults")
    if cache is not None:
        if not isinstance(cache, DiskCache):
            check_cache_folder("cache", cache)
        check_no_file("cache", cache.folder if isinstance(cache, DiskCache) else cache)
    text = _check_url(url)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in ("", "file"):
        from concurrent_dataloader.stores._local import LocalStore

        return cached(LocalStore(_local_path(text), max_connections), cache)
    if scheme == "memory":
        from concurrent_dataloader.stores._memory import open_named

        if cache is not None:
            raise ValueError(f"cache: got one for {text!r}, expected a store outside of memory")
        return open_named(text.removeprefix("memory://"))
    bundle = os.environ.get("AWS_CA_BUNDLE") if ca_file is None else os.fspath(ca_file)
    options = ClientOptions(
        max_connections=max_connections,
        connect_timeout_s=connect_timeout_s,
        stall_timeout_s=min(stall_timeout_s, deadline_s),
        total_timeout_s=deadline_s,
        ca_file=bundle or None,
        verify=check_verify(verify),
    )
    limits = in_flight or InFlightPolicy(
        start=min(InFlightPolicy().start, max_connections), maximum=max_connections
    )
    policy = RetryPolicy() if retry is None else retry
    if scheme in ("http", "https"):
        if client not in ("obstore", "http", "aiohttp"):
            raise ValueError(
                f"client: got {client!r} for a plain web server, expected 'http' or 'aiohttp'; "
                "for a bucket give 's3://bucket' and the server as endpoint_url"
            )
        address = HttpAddress(base_url=check_http_url("url", text))
        adapter = _import_adapter("http" if client == "obstore" else client)
        web_store = ResilientStore(adapter(address, options), policy, deadline_s, hedge, limits)
        return cached(web_store, cache)
    if scheme != "s3":
        raise ValueError(
            f"url: got {show_url(text)!r}, expected s3://, http://, https://, file://, memory:// "
            "or a path"
        )
    bucket_address = _s3_address(
        text, credentials, endpoint_url, region, anonymous=anonymous, path_style=path_style
    )
    arguments = (bucket_address, options)
    reader = _import_adapter(client)(*arguments, *((fork_safe,) if client == "obstore" else ()))
    from concurrent_dataloader.stores._s3 import S3Store

    store = S3Store(reader, bucket_address, options)
    bucket = ResilientWritableStore(store, policy, deadline_s, hedge, limits)
    return cached(bucket, cache, bucket_address.endpoint_url)


def open_writable_store(url: str | os.PathLike[str], **settings: Any) -> WritableStore:
    """Open a store that can be listed and written; takes what `open_store` takes.

    Raises:
        ValueError: The URL is that of a plain web server, which can be read only.
    """
    store = open_store(url, **settings)
    if not isinstance(store, WritableStore):
        raise ValueError(
            f"url: got {show_url(os.fspath(url))!r}, which can be read only, expected s3://, "
            "file://, memory:// or a path"
        )
    return store


def _import_adapter(client: str) -> Any:
    module, name = _ADAPTERS[client]
    try:
        return getattr(importlib.import_module(module), name)
    except MissingDependencyError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"client {client!r}: {error}; install it with `pip install {client}`"
        ) from error


def _check_settings(durations_s: Mapping[str, object], num: object, region: object) -> None:
    for name, value_s in durations_s.items():
        check_duration(name, value_s)
    check_whole("max_connections", num)
    check_instance("region", region, str, "that of the settings")


def _check_url(url: object) -> str:
    text = os.fspath(url) if isinstance(url, (str, os.PathLike)) else url
    if not isinstance(text, str):
        raise TypeError(f"url: got {url!r}, expected a URL or the path of a folder")
    if not text.strip():
        raise ValueError(
            f"url: got {text!r}, expected a URL or the path of a folder; '.' is the working folder"
        )
    check_scheme(text)
    return text


def _local_path(text: str) -> str:
    if "://" not in text:
        return os.path.expanduser(text)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"url: got {show_url(text)!r}, expected 'file:///folder' with three slashes"
        )
    return unquote(parts.path)


def _s3_address(
    url: str,
    credentials: Credentials | CredentialsSource | str | os.PathLike[str] | None,
    endpoint_url: str | None,
    region: str | None,
    *,
    anonymous: bool,
    path_style: bool | None,
) -> S3Address:
    rest = url.removeprefix("s3://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    contents = CredentialsFile.Contents()
    source: CredentialsSource | None
    if isinstance(credentials, (str, os.PathLike)):
        file = CredentialsFile(credentials)
        contents = file.read()
        has_credentials = contents.credentials is not None
        source = file if has_credentials else CredentialsChain()
    else:
        has_credentials = credentials is not None
        source = CredentialsChain() if credentials is None else credentials
    if anonymous and has_credentials:
        raise ValueError(
            "anonymous: got True together with credentials, expected one of the two; "
            "leave one of them out"
        )
    endpoint = (
        endpoint_url
        or contents.endpoint_url
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = (
        region
        or contents.region
        or os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or (_profile_region() if endpoint is None else None)
        or "us-east-1"
    )
    if path_style is None:
        path_style = endpoint is not None or not is_host_label(bucket)
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return S3Address(
        bucket=check_bucket(bucket),
        prefix=f"{prefix}/" if prefix else "",
        endpoint_url=check_http_url("endpoint_url", endpoint or f"https://s3.{region}.{suffix}"),
        region=region,
        path_style=path_style,
        credentials=None if anonymous else source,
    )


def _profile_region() -> str | None:
    try:
        import botocore.session
    except ImportError:  # no botocore, no profiles; the chain says so where it is needed
        return None
    region: str | None = botocore.session.Session().get_config_variable("region")
    return region
