"""The clients that the library uses work with the server as they are."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import aiobotocore.session
import aiohttp
import obstore
import pytest
from botocore.exceptions import ClientError
from obstore.store import S3Store

from concurrent_dataloader.testing import Fault, ObjectServer
from tests.testing.s3_conformance import make_client
from tests.testing.s3_raw import endpoint_of, sign

BODY = os.urandom(100_000)


@pytest.fixture
def server(object_server: ObjectServer) -> ObjectServer:
    object_server.create_bucket("bucket")
    return object_server


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """Give a process for obstore: workers that are forked from one that has used it may hang."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as executor:
        yield executor


def settings_of(server: ObjectServer) -> dict[str, Any]:
    return {
        "endpoint": server.endpoint_url,
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
        "region": server.region,
        "client_options": {"allow_http": True},
    }


def test_obstore_writes_lists_reads_copies_and_deletes(
    server: ObjectServer, process: Executor
) -> None:
    process.submit(write_list_read_copy_and_delete, settings_of(server)).result()

    assert server.counters().num_by_error == {"NoSuchKey": 1}


def write_list_read_copy_and_delete(settings: dict[str, Any]) -> None:
    store = S3Store("bucket", **settings)
    big = os.urandom(12 << 20)

    obstore.put(store, "a/ü b+c.bin", BODY)
    obstore.put(store, "a/big", big)
    obstore.copy(store, "a/ü b+c.bin", "b/copy")

    assert bytes(obstore.get(store, "a/ü b+c.bin").bytes()) == BODY
    assert bytes(obstore.get(store, "a/big").bytes()) == big
    assert bytes(obstore.get_range(store, "b/copy", start=10, end=20)) == BODY[10:20]
    parts = obstore.get_ranges(store, "b/copy", starts=[0, 90_000], ends=[5, 90_005])
    assert [bytes(part) for part in parts] == [BODY[:5], BODY[90_000:90_005]]
    assert obstore.head(store, "b/copy")["size"] == len(BODY)
    listed = {entry["path"] for batch in obstore.list(store) for entry in batch}
    assert listed == {"a/ü b+c.bin", "a/big", "b/copy"}
    folded = obstore.list_with_delimiter(store)
    assert sorted(folded["common_prefixes"]) == ["a", "b"]
    obstore.delete(store, ["a/big", "b/copy"])
    with pytest.raises(FileNotFoundError):
        obstore.head(store, "a/big")


def test_obstore_puts_only_where_there_is_none(server: ObjectServer, process: Executor) -> None:
    process.submit(put_twice, settings_of(server)).result()


def put_twice(settings: dict[str, Any]) -> None:
    store = S3Store("bucket", **settings)
    obstore.put(store, "a", b"1", mode="create", use_multipart=False)

    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "a", b"2", mode="create", use_multipart=False)


def test_obstore_overcomes_errors_by_its_own_retries(
    server: ObjectServer, process: Executor
) -> None:
    server.put_objects("bucket", {"a": BODY})
    server.set_faults([Fault("slow_down", first_attempts=2)])

    body = process.submit(get, settings_of(server), "a").result()

    assert body == BODY
    assert server.counters(by_key=True).num_gets_by_key == {"bucket/a": 3}


def get(settings: dict[str, Any], key: str) -> bytes:
    return bytes(obstore.get(S3Store("bucket", **settings), key).bytes())


def test_boto3_as_it_comes_verifies_what_it_put(server: ObjectServer) -> None:
    # Default settings: checksums of requests and answers, and a transfer in parts.
    client = make_client(endpoint_of(server), config=None)
    client.put_object(Bucket="bucket", Key="a", Body=BODY)

    assert client.get_object(Bucket="bucket", Key="a")["Body"].read() == BODY
    client.close()


def test_boto3_finds_a_foreign_body_by_its_checksum(server: ObjectServer) -> None:
    client = make_client(endpoint_of(server), config=None)
    for key in ("a", "b"):
        client.put_object(Bucket="bucket", Key=key, Body=key.encode() * 5)
    server.set_faults([Fault("foreign_body")])

    body = client.get_object(Bucket="bucket", Key="a")["Body"]
    with pytest.raises(Exception, match="checksum") as error:
        body.read()

    assert type(error.value).__name__ == "FlexibleChecksumError"
    client.close()


def test_aiobotocore_writes_and_reads(server: ObjectServer) -> None:
    async def write_and_read() -> tuple[bytes, int]:
        session: Any = aiobotocore.session.get_session()
        async with session.create_client(
            "s3",
            endpoint_url=server.endpoint_url,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name=server.region,
        ) as client:
            await client.put_object(Bucket="bucket", Key="a b", Body=BODY)
            answers = await asyncio.gather(
                *(client.get_object(Bucket="bucket", Key="a b") for _ in range(20))
            )
            bodies = [await answer["Body"].read() for answer in answers]
            assert set(bodies) == {BODY}
            try:
                await client.get_object(Bucket="bucket", Key="none")
            except ClientError as error:
                return bodies[0], error.response["ResponseMetadata"]["HTTPStatusCode"]
        raise AssertionError("a key that is not there was found")

    assert asyncio.run(write_and_read()) == (BODY, 404)


def test_aiohttp_reads_many_at_once(server: ObjectServer) -> None:
    endpoint = endpoint_of(server)
    keys = [f"k{number}" for number in range(100)]
    server.put_objects("bucket", {key: key.encode() * 1000 for key in keys})

    async def read() -> list[bytes]:
        async with aiohttp.ClientSession() as session:

            async def get(key: str) -> bytes:
                headers = sign(endpoint, "GET", f"/bucket/{key}")
                async with session.get(f"{endpoint.url}/bucket/{key}", headers=headers) as answer:
                    assert answer.status == 200
                    return await answer.read()

            return await asyncio.gather(*map(get, keys))

    assert asyncio.run(read()) == [key.encode() * 1000 for key in keys]
