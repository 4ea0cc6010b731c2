"""Certificates are checked, by every client, and an authority of one's own can be named."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from concurrent_dataloader.errors import MissingDependencyError, StoreError, StoreUnavailableError
from concurrent_dataloader.stores import open_store
from concurrent_dataloader.stores._aiobotocore import check_version
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.stores.conftest import CLIENTS
from tests.stores.test_fork import read_ten, run_in_child
from tests.stores.tls_proxy import make_certificates, serve_tls

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificates")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def endpoint_url(
    object_server: ObjectServer, certificates: tuple[pathlib.Path, pathlib.Path]
) -> Iterator[str]:
    object_server.put_objects("bucket", {"ten": b"0123456789"})
    with serve_tls(certificates[1], object_server.port) as url:
        yield url


def open_bucket(client: Any, url: str, credentials_file: pathlib.Path, **settings: Any) -> Any:
    return open_store(
        "s3://bucket",
        client=client,
        endpoint_url=url,
        credentials=credentials_file,
        **settings,
    )


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_of_an_unknown_authority_is_refused(
    client: str, endpoint_url: str, credentials_file: pathlib.Path, object_server: ObjectServer
) -> None:
    store = open_bucket(client, endpoint_url, credentials_file)

    error = run_in_child("fork", read_ten, store)

    assert type(error) is StoreError, "asking again does not help"
    assert "certificate" in str(error)
    assert "ca_file" in str(error), "what to do"
    # Of this key: what an earlier test left under way may come now.
    assert "bucket/ten" not in object_server.counters(by_key=True).num_gets_by_key


@pytest.mark.parametrize("client", CLIENTS)
def test_an_authority_that_is_named_is_trusted(
    client: str,
    endpoint_url: str,
    credentials_file: pathlib.Path,
    certificates: tuple[pathlib.Path, pathlib.Path],
) -> None:
    store = open_bucket(client, endpoint_url, credentials_file, ca_file=certificates[0])

    assert run_in_child("fork", read_ten, store) == b"0123456789"


@pytest.mark.parametrize("client", CLIENTS)
def test_an_authority_of_the_environment_is_trusted(
    client: str,
    endpoint_url: str,
    credentials_file: pathlib.Path,
    certificates: tuple[pathlib.Path, pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates[0]))
    store = open_bucket(client, endpoint_url, credentials_file)
    monkeypatch.delenv("AWS_CA_BUNDLE")  # workers of a fork server may not have it

    assert run_in_child("fork", read_ten, store) == b"0123456789"


def test_releases_of_aiobotocore_that_take_such_certificates_are_refused() -> None:
    check_version("3.9.0")
    check_version("3.9rc1")
    check_version("4.0.dev1")
    for version in ("2.25.0", "3.8.0"):
        with pytest.raises(
            MissingDependencyError, match=rf"got aiobotocore {version}, which takes"
        ):
            check_version(version)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_certificate_of_another_host_is_refused(
    client: str,
    endpoint_url: str,
    credentials_file: pathlib.Path,
    certificates: tuple[pathlib.Path, pathlib.Path],
) -> None:
    url = endpoint_url.replace("localhost", "127.0.0.1")
    store = open_bucket(client, url, credentials_file, ca_file=certificates[0])

    error = run_in_child("fork", read_ten, store)

    assert type(error) is StoreError, "asking again does not help"
    assert "certificate" in str(error)


@pytest.mark.parametrize("client", CLIENTS)
def test_an_https_endpoint_that_speaks_plain_http_is_told_from_a_bad_certificate(
    client: str, credentials_file: pathlib.Path, object_server: ObjectServer
) -> None:
    url = object_server.endpoint_url.replace("http:", "https:")
    store = open_bucket(client, url, credentials_file)

    error = run_in_child("fork", read_ten, store)

    assert type(error) is StoreUnavailableError
    assert f"the endpoint is {object_server.endpoint_url}" in str(error)
    assert "6 attempts" in str(error)
