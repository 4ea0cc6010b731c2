"""Stores over the object server, by any client."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from concurrent_dataloader.stores import open_store
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.stores.in_worker import StoreInWorker, WorkerManager, start_worker

CLIENTS = ["http", "obstore", "boto3", "aiobotocore", "aiohttp"]

OpenBucket = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Take away what the machine's own AWS settings would change."""
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def worker() -> Iterator[WorkerManager]:
    """Give a worker process in which obstore is used."""
    with start_worker() as manager:
        yield manager


@pytest.fixture
def credentials_file(object_server: ObjectServer, tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a credentials file for the object server."""
    path = tmp_path / "credentials.json"
    path.write_text(
        json.dumps(
            {
                "access_key": object_server.access_key,
                "secret": object_server.secret_key,
                "endpoint_url": object_server.endpoint_url,
            }
        )
    )
    return path


@pytest.fixture
def open_bucket(
    credentials_file: pathlib.Path, request: pytest.FixtureRequest
) -> Iterator[OpenBucket]:
    """Give a function that opens ``s3://bucket`` by a client, signed unless told otherwise."""
    opened: list[Any] = []

    def open_it(client: str, url: str = "s3://bucket", **settings: Any) -> Any:
        if not settings.get("anonymous"):
            settings.setdefault("credentials", str(credentials_file))
        settings["client"] = client
        if client == "obstore":
            store: Any = StoreInWorker(request.getfixturevalue("worker"), url, settings)
        else:
            store = open_store(url, **settings)
        opened.append(store)
        return store

    yield open_it
    for store in opened:
        store.close()
