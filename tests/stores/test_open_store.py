from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest

from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import (
    Credentials,
    DiskCache,
    HedgePolicy,
    InFlightPolicy,
    ResilientStore,
    RetryPolicy,
    Store,
    WritableStore,
    open_store,
)
from concurrent_dataloader.stores.address import S3Address, show_url


def address_of(url: str, **settings: Any) -> S3Address:
    settings.setdefault("credentials", Credentials("key", "secret"))
    store: Any = open_store(url, **settings)
    return store._store._address


def test_an_unknown_client_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="'curl', expected one of 'obstore', 'boto3', 'aiobotocore', 'aiohttp'"
    ):
        open_store("s3://bucket", client="curl")  # pyright: ignore[reportArgumentType]: the point of the test


@pytest.mark.parametrize("url", ["gs://bucket", "ftp://host/x", "s3:///key", "s3://"])
def test_an_url_of_another_kind_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="got"):
        open_store(url, region="us-east-1")


@pytest.mark.parametrize(
    "url",
    [
        "http://user:password@host/",
        "http://h/x?token=password",
        "http://h/x#password",
        "http:///x?token=password",
        "ftp://user:password@h/x?token=password",
        "file://user:password@h/x?token=password",
        "s3://user:password@bucket/x",
        "s3://bucket?token=password",
    ],
)
def test_secrets_in_an_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"(url|bucket): got") as raised:
        open_store(url)

    assert "password" not in str(raised.value).replace("user name or password", "")


@pytest.mark.parametrize("endpoint", ["http://user:password@host", "http://h/x?token=password"])
def test_secrets_in_an_endpoint_are_refused_and_not_shown(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint_url") as raised:
        open_store("s3://bucket", endpoint_url=endpoint)

    assert "password" not in str(raised.value).replace("user name or password", "")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h:9000/a/b", "https://h:9000/a/b"),
        ("https://h/a?b=c&d=e#f", "https://h/a?...#..."),
        ("ftp://u:p@h/a@b?c", "ftp://...h/a@b?..."),
        ("/a?b", "/a?..."),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert show_url(url) == shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_connections", 0),
        ("deadline_s", 0.0),
        ("connect_timeout_s", -1.0),
        ("stall_timeout_s", 0.0),
    ],
)
def test_a_number_that_makes_no_sense_is_an_error(name: str, value: float) -> None:
    settings: dict[str, Any] = {name: value, "region": "us-east-1"}
    with pytest.raises(ValueError, match="expected"):
        open_store("s3://bucket", **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"hedge": False}, TypeError, "hedge: got False, expected a HedgePolicy, or None"),
        ({"hedge": 1.5}, TypeError, "hedge: got 1.5"),
        ({"in_flight": 0}, TypeError, "in_flight: got 0, expected an InFlightPolicy, or None"),
        ({"retry": 3}, TypeError, "retry: got 3, expected a RetryPolicy"),
        ({"region": 5}, TypeError, "region: got 5"),
        ({"max_connections": 1.5}, TypeError, "max_connections: got 1.5, expected a whole"),
        ({"deadline_s": "5"}, TypeError, "deadline_s: got '5', expected a number of seconds"),
        ({"deadline_s": 0}, ValueError, "^deadline_s: got 0 s, expected more than 0 s"),
        ({"connect_timeout_s": None}, TypeError, "connect_timeout_s: got None"),
        ({"stall_timeout_s": float("nan")}, ValueError, "stall_timeout_s: got nan s"),
        ({"cache": ""}, ValueError, "cache: got '', expected the path of a folder"),
        ({"cache": 5}, TypeError, "cache: got 5, expected the path of a folder"),
        ({"cache": "s3://bucket"}, ValueError, r"cache: got a URL \(s3:/...\)"),
        ({"cache": __file__}, ValueError, "cache: .*which is a file, expected a folder"),
    ],
)
def test_a_setting_of_another_type_is_an_error_that_names_it(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_store("http://host/folder", **settings)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("s3:/photos", "s3://photos"),
        (pathlib.Path("s3://photos/train"), "s3://photos/train"),
        ("file:/data", "file:///data"),
        ("http:/user:password@host", "http://..."),
    ],
)
def test_a_url_that_lost_a_slash_is_not_taken_for_a_folder(url: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'") as raised:
        open_store(url)

    assert "password" not in str(raised.value)


def test_what_is_no_url_is_an_error_that_says_so() -> None:
    with pytest.raises(TypeError, match="url: got 5, expected a URL or the path of a folder"):
        open_store(5)  # pyright: ignore[reportArgumentType]: the point of the test


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HedgePolicy(max_hedges=cast(int, 1.5)), "max_hedges: got 1.5"),
        (lambda: HedgePolicy(factor=cast(float, "2")), "factor: got '2'"),
        (lambda: RetryPolicy(max_attempts=cast(int, 2.5)), "max_attempts: got 2.5"),
        (lambda: RetryPolicy(max_wait_s=cast(float, None)), "max_wait_s: got None"),
        (lambda: InFlightPolicy(start=cast(int, "64")), "start: got '64'"),
        (lambda: DiskCache("f", cast(int, "5GB")), "limit_bytes: got '5GB', expected a whole"),
        (lambda: DiskCache("f", max_age_s=cast(float, "x")), "max_age_s: got 'x'"),
        (lambda: DiskCache("f", max_wait_s=cast(float, None)), "max_wait_s: got None"),
    ],
)
def test_a_policy_names_its_field_of_another_type(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_aws_is_asked_by_https_with_the_bucket_as_host(monkeypatch: pytest.MonkeyPatch) -> None:
    address = address_of("s3://bucket/some/folder", region="eu-west-1")  # I-36

    assert str(address.origin) == "https://bucket.s3.eu-west-1.amazonaws.com"
    assert address.request_path("a b") == "/some/folder/a%20b"


def test_a_bucket_that_is_no_host_name_stands_in_the_path() -> None:
    address = address_of("s3://my.bucket", region="eu-west-1")

    assert str(address.origin) == "https://s3.eu-west-1.amazonaws.com"
    assert address.request_path("a") == "/my.bucket/a"


@pytest.mark.parametrize(
    ("path_style", "url"),
    [
        (None, "http://h:9000/bucket/k"),
        (True, "http://h:9000/bucket/k"),
        (False, "http://bucket.h:9000/k"),
    ],
)
def test_an_endpoint_means_path_style_unless_told_otherwise(path_style: Any, url: str) -> None:
    address = address_of("s3://bucket", endpoint_url="http://h:9000/", path_style=path_style)

    assert f"{address.origin}{address.request_path('k')}" == url


def test_the_region_comes_from_the_call_the_environment_or_the_profile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    assert address_of("s3://bucket").region == "us-east-1"
    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert address_of("s3://bucket").region == "eu-north-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-south-1")
    assert address_of("s3://bucket").region == "eu-south-1"
    assert address_of("s3://bucket", region="eu-west-1").region == "eu-west-1"


def test_the_number_of_connections_reaches_the_client() -> None:
    from concurrent_dataloader.stores._boto3 import client_settings
    from concurrent_dataloader.stores.address import ClientOptions

    store: Any = open_store(
        "s3://bucket", client="boto3", credentials=Credentials("k", "s"), max_connections=7
    )
    options: ClientOptions = store._store._options

    assert options.max_connections == 7
    assert client_settings(address_of("s3://bucket"), options)["max_pool_connections"] == 7


def test_stores_with_the_same_settings_are_equal() -> None:
    def open_it(**settings: Any) -> Store:
        return open_store("s3://bucket", credentials=Credentials("k", "s"), **settings)

    assert open_it() == open_it()
    assert hash(open_it()) == hash(open_it())
    assert open_it() != open_it(region="eu-west-1")
    assert open_it() != open_it(client="http")


def test_what_it_opens_fits_the_protocols(tmp_path: pathlib.Path) -> None:
    bucket = open_store("s3://bucket", credentials=Credentials("k", "s"))
    web = open_store("http://127.0.0.1/x")

    assert isinstance(bucket, WritableStore)
    assert isinstance(open_store(tmp_path), WritableStore)
    assert isinstance(open_store("memory://x"), WritableStore)
    assert isinstance(web, Store)
    assert not isinstance(web, WritableStore)


def test_a_storage_of_the_users_own_needs_four_methods() -> None:
    class Own:
        def get(self, key: str, byte_range: ByteRange | None = None) -> bytes:
            return key.encode()

        async def get_async(self, key: str, byte_range: ByteRange | None = None) -> bytes:
            return key.encode()

        def describe(self, key: str) -> str:
            return key

        def close(self) -> None:
            pass

    own: Store = Own()

    assert isinstance(own, Store)
    assert not isinstance(own, ResilientStore)


def test_nothing_native_and_no_client_is_imported_before_it_is_asked_for() -> None:
    clients = ["torch", "obstore", "boto3", "aiohttp", "aiobotocore", "botocore"]
    code = (
        "import sys, concurrent_dataloader.stores as s;"
        "s.open_store('/tmp'); s.open_store('http://127.0.0.1/');"
        ""
        f"bad = set({clients}) & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_opening_starts_no_thread_and_contacts_nobody() -> None:
    code = (
        "import threading, concurrent_dataloader.stores as s\n"
        "for client in ('obstore', 'boto3', 'aiobotocore', 'aiohttp', 'http'):\n"
        "    s.open_store('s3://b', client=client, region='r', endpoint_url='http://127.0.0.1:9')\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("aiohttp", "s.open_store('s3://b', client='aiohttp', credentials=c, region='r')"),
        ("boto3", "next(s.open_store('s3://b', credentials=c, region='r').list())"),
        ("botocore", "s.open_store('s3://b').get('k')"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command(package: str, use: str) -> None:
    code = (
        "import sys, concurrent_dataloader.stores as s\n"
        "from concurrent_dataloader.errors import MissingDependencyError\n"
        "c = s.Credentials('key', 'secret')\n"
        f"sys.modules['{package}'] = None\n"  # as if it were not installed
        f"try:\n    {use}\n"
        "except MissingDependencyError as error:\n"
        "    assert 'pip install' in str(error), error\n"
        "else:\n    sys.exit('no error')\n"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_word_for_verify_is_an_error() -> None:
    with pytest.raises(ValueError, match="verify: got 'md5', expected 'checksum' or 'length'"):
        open_store("s3://bucket", verify="md5")  # pyright: ignore[reportArgumentType]: wrong


@pytest.mark.parametrize("url", ["", " "])
def test_an_empty_url_is_not_the_working_folder(url: str) -> None:
    with pytest.raises(ValueError, match=f"url: got '{url}', expected a URL or the path of a"):
        open_store(url)
