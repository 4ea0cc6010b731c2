"""The clients against an S3 server that is not ours; the skip reason names what to set."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import boto3.session
import pytest

from concurrent_dataloader.stores import open_writable_store
from tests.stores.conftest import CLIENTS, OpenBucket
from tests.stores.contract import OBJECTS, SizedStoreContract, WritableStoreContract

PREFIX = "CONCURRENT_DATALOADER_TEST_S3_"
NAMES = [PREFIX + name for name in ("ENDPOINT", "ACCESS_KEY", "SECRET_KEY")]

if f"{PREFIX}ENDPOINT" in os.environ:
    ENDPOINT, ACCESS_KEY, SECRET_KEY = (os.environ[name] for name in NAMES)

    @pytest.fixture
    def credentials_file(tmp_path: pathlib.Path) -> pathlib.Path:
        path = tmp_path / "credentials.json"
        path.write_text(
            json.dumps({"access_key": ACCESS_KEY, "secret": SECRET_KEY, "endpoint_url": ENDPOINT})
        )
        return path

    @pytest.fixture
    def bucket(credentials_file: pathlib.Path) -> Iterator[str]:
        """Make a bucket that holds what the contract wants, and remove it after the test."""
        name = f"contract-{uuid.uuid4().hex[:12]}"
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=ENDPOINT,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        with contextlib.closing(client):
            client.create_bucket(Bucket=name)
            store = open_writable_store(f"s3://{name}", credentials=credentials_file)
            for key, body in OBJECTS.items():
                store.put(key, body)
            yield name
            for info in list(store.list()):
                store.delete(info.key)
            client.delete_bucket(Bucket=name)
            store.close()

    @pytest.mark.network
    class TestWritableStore(WritableStoreContract):
        @pytest.fixture
        def store(self, open_bucket: OpenBucket, bucket: str) -> Any:
            return open_bucket("boto3", f"s3://{bucket}")

    @pytest.mark.network
    @pytest.mark.parametrize("client", CLIENTS)
    class TestEachClient(SizedStoreContract):
        @pytest.fixture
        def store(self, open_bucket: OpenBucket, bucket: str, client: str) -> Any:
            return open_bucket(client, f"s3://{bucket}")

        def test_a_used_store_pickles_to_an_equal_one(self, store: Any) -> None:
            pytest.skip("where a client is in another process; the main process tests this")

else:

    @pytest.mark.network
    @pytest.mark.skip(reason=f"no S3 server that is not ours: set {', '.join(NAMES)}")
    def test_a_real_server_keeps_the_contract() -> None:
        """Stand for all tests of the classes above in the summary, in one line."""
