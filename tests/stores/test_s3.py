"""Each client against a real S3 server, in a process of its own, that checks signatures."""

from __future__ import annotations

import asyncio
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from concurrent_dataloader.errors import (
    AccessDeniedError,
    BodyMismatchError,
    DeadlineError,
    ExpiredCredentialsError,
    KeyNotFoundError,
    StoreUnavailableError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Credentials, RetryPolicy, open_store
from concurrent_dataloader.testing.behaviour import Fault
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.stores.conftest import CLIENTS, OpenBucket
from tests.stores.contract import OBJECTS, SizedStoreContract, WritableStoreContract

QUICK = RetryPolicy(max_attempts=4, first_wait_s=0.001)
"""As patient as the default, nearly, and quicker."""


@pytest.fixture(autouse=True)
def _objects(object_server: ObjectServer) -> None:
    object_server.put_objects("bucket", OBJECTS)


class TestBoto3Store(WritableStoreContract):
    @pytest.fixture
    def store(self, open_bucket: OpenBucket) -> Any:
        return open_bucket("boto3")


class TestHttpStore(SizedStoreContract):
    @pytest.fixture
    def store(self, open_bucket: OpenBucket) -> Any:
        return open_bucket("http")


class TestAiohttpStore(SizedStoreContract):
    @pytest.fixture
    def store(self, open_bucket: OpenBucket) -> Any:
        return open_bucket("aiohttp")


class TestAiobotocoreStore(SizedStoreContract):
    @pytest.fixture
    def store(self, open_bucket: OpenBucket) -> Any:
        return open_bucket("aiobotocore")


class TestObstoreStoreInTheMainProcess(WritableStoreContract):
    @pytest.fixture
    def store(self, credentials_file: pathlib.Path) -> Any:
        return open_store("s3://bucket", credentials=credentials_file)


class TestObstoreStoreInAWorker(SizedStoreContract):
    @pytest.fixture
    def store(self, open_bucket: OpenBucket) -> Any:
        return open_bucket("obstore")

    def test_a_used_store_pickles_to_an_equal_one(self, store: Any) -> None:
        pytest.skip("it is in another process; the main process tests this")


def reads(store: Any) -> list[Callable[[str], bytes]]:
    return [
        lambda key: bytes(store.get(key)),
        lambda key: bytes(asyncio.run(store.get_async(key))),
    ]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "kind", ["internal_error", "slow_down", "reset_before_body", "truncated_body", "empty_body"]
)
def test_a_fault_that_passes_is_repeated_until_the_object_comes(
    client: str, kind: Any, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:  # I-37
    store = open_bucket(client, retry=QUICK)
    for read in reads(store):
        object_server.set_faults([Fault(kind, first_attempts=2)])
        object_server.reset_counters()

        body = read("large")

        assert body == OBJECTS["large"]
        assert object_server.counters(by_key=True).num_gets_by_key["bucket/large"] >= 3


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("checksum", [None, "crc32", "crc32c", "crc64nvme", "sha256"])
def test_another_objects_body_is_repeated_until_it_is_the_objects(
    client: str, checksum: str | None, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    # Of one length, so that nothing but a checksum tells them apart.
    bodies = {f"same{number}": bytes([number]) * 1000 for number in range(3)}
    object_server.put_objects("bucket", bodies, checksum=checksum)
    store = open_bucket(client, retry=QUICK)
    for read in reads(store):
        object_server.set_faults([Fault("foreign_body", first_attempts=2, key_pattern="same1")])

        assert read("same0") == bodies["same0"]
        assert read("same1") == bodies["same1"]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_body_that_stays_another_objects_is_an_error(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("twins", {"one": b"1" * 10, "two": b"2" * 10})
    store = open_bucket(client, "s3://twins", retry=QUICK)
    object_server.set_faults([Fault("foreign_body", key_pattern="one")])

    with pytest.raises(BodyMismatchError, match=r"s3://twins/one: got .* ETag is .* expected"):
        store.get("one")


@pytest.mark.parametrize("client", CLIENTS)
def test_checksums_are_not_compared_where_the_length_is_to_do(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("twins", {"one": b"1" * 10, "two": b"2" * 10})
    store = open_bucket(client, "s3://twins", retry=QUICK, verify="length")
    object_server.set_faults([Fault("foreign_body", key_pattern="one")])

    assert bytes(store.get("one")) == b"2" * 10


@pytest.mark.parametrize("client", CLIENTS)
def test_a_reset_inside_the_body_is_repeated(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client, retry=QUICK)
    object_server.set_faults([Fault("reset_inside_body", first_attempts=2)])

    assert bytes(store.get("large", ByteRange(1000, 200_000))) == OBJECTS["large"][1000:200_000]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_number_of_attempts_is_the_policys(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client, retry=RetryPolicy(max_attempts=3, first_wait_s=0.001))
    for read in reads(store):
        object_server.set_faults([Fault("internal_error")])
        object_server.reset_counters()

        with pytest.raises(StoreUnavailableError) as raised:
            read("ten")

        assert object_server.counters(by_key=True).num_gets_by_key["bucket/ten"] == 3
        assert "s3://bucket/ten" in str(raised.value)
        assert "3 attempts in" in str(raised.value)
        assert "InternalError" in str(raised.value)
        assert object_server.endpoint_url in str(raised.value)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "kind", ["internal_error", "slow_down", "reset_before_headers", "reset_before_body"]
)
def test_one_attempt_is_one_request_on_a_connection_that_was_used_before(
    client: str, kind: Any, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client, retry=RetryPolicy(max_attempts=1), hedge=None)
    for read in reads(store):
        read("large")
        object_server.set_faults([Fault(kind, key_pattern="ten")])
        object_server.reset_counters()

        with pytest.raises(StoreUnavailableError, match=r"s3://bucket/ten: .* 1 attempt in"):
            read("ten")

        assert object_server.counters(by_key=True).num_gets_by_key["bucket/ten"] == 1


@pytest.mark.parametrize("client", CLIENTS)
def test_a_body_that_stays_short_is_an_error_and_not_a_short_body(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client, retry=QUICK)
    object_server.set_faults([Fault("empty_body")])

    with pytest.raises(StoreUnavailableError, match="s3://bucket/ten"):
        store.get("ten")
    if client not in ("boto3", "aiobotocore"):
        with pytest.raises(BodyMismatchError):
            store.get("ten")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_missing_object_is_asked_for_once(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client)
    for read in reads(store):
        object_server.reset_counters()

        with pytest.raises(KeyNotFoundError, match="s3://bucket/missing: no such object"):
            read("missing")

        assert object_server.counters(by_key=True).num_gets_by_key["bucket/missing"] == 1


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("kind", ["stalled_headers", "stalled_body"])
def test_a_request_that_stalls_is_cut_and_repeated(
    client: str, kind: Any, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client, retry=QUICK, stall_timeout_s=0.2)
    for read in reads(store):
        object_server.set_faults([Fault(kind, first_attempts=1)])

        assert read("large") == OBJECTS["large"]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_store_that_never_answers_is_a_deadline_error_in_time(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client, deadline_s=0.4, stall_timeout_s=0.2)
    for read in reads(store):
        object_server.set_faults([Fault("stalled_headers")])
        begun_s = time.monotonic()

        with pytest.raises(DeadlineError, match="s3://bucket/ten") as raised:
            read("ten")

        assert isinstance(raised.value, TimeoutError)
        assert time.monotonic() - begun_s < 3


@pytest.mark.parametrize("client", CLIENTS)
def test_a_body_that_drips_is_cut_at_the_deadline(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    # Each byte comes in time, and the last one would after 20 s.
    object_server.put_objects("bucket", {"big": bytes(2_000_000)})
    store = open_bucket(client, deadline_s=0.6, hedge=None)
    store.head("big")
    object_server.set_bandwidth(connection_bytes_per_s=100_000)
    begun_s = time.monotonic()

    with pytest.raises(DeadlineError, match="s3://bucket/big"):
        store.get("big")

    object_server.set_bandwidth()
    assert time.monotonic() - begun_s < 4


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("kind", ["stalled_headers", "stalled_body"])
def test_a_stall_is_cut_at_a_deadline_that_is_sooner_than_its_own_limit(
    client: str, kind: Any, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client, deadline_s=0.6, hedge=None)
    object_server.set_faults([Fault(kind)])
    begun_s = time.monotonic()

    with pytest.raises(DeadlineError, match="s3://bucket/large"):
        store.get("large")

    assert time.monotonic() - begun_s < 4, "by the limit between two bytes it would take 15 s"


@pytest.mark.parametrize("client", CLIENTS)
def test_an_endpoint_that_refuses_connections_is_unavailable_soon(
    client: str, open_bucket: OpenBucket
) -> None:
    begun_s = time.monotonic()
    store = open_bucket(client, retry=QUICK, endpoint_url="http://127.0.0.1:9")

    with pytest.raises(StoreUnavailableError, match=r"http://127\.0\.0\.1:9.*4 attempts") as raised:
        store.get("ten")

    assert isinstance(raised.value, ConnectionError)
    assert time.monotonic() - begun_s < 10


@pytest.mark.parametrize("client", CLIENTS)
def test_a_missing_bucket_is_named(client: str, open_bucket: OpenBucket) -> None:
    store = open_bucket(client, "s3://no-such-bucket")
    for read in reads(store):
        with pytest.raises(KeyNotFoundError, match=r"no such bucket.*'no-such-bucket'"):
            read("ten")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_wrong_secret_is_access_denied_at_once_and_not_shown(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer, tmp_path: pathlib.Path
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(
        f'{{"access_key": "{object_server.access_key}", "secret": "not-the-secret-at-all"}}'
    )
    store = open_bucket(client, credentials=str(wrong), endpoint_url=object_server.endpoint_url)
    object_server.reset_counters()

    for read in reads(store):
        with pytest.raises(AccessDeniedError, match="s3://bucket/ten") as raised:
            read("ten")

        assert isinstance(raised.value, PermissionError)
        assert "not-the-secret-at-all" not in str(raised.value)
    assert object_server.counters().num_by_status == {403: 2}


@pytest.mark.parametrize("client", CLIENTS)
def test_an_expired_token_is_access_denied(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    store = open_bucket(client)
    object_server.set_faults([Fault("expired_token")])

    with pytest.raises(
        ExpiredCredentialsError, match=r"s3://bucket/ten: the credentials have expired.*replaced"
    ) as raised:
        store.get("ten")

    assert isinstance(raised.value, AccessDeniedError)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_file_that_is_replaced_when_its_token_has_expired_is_read_again(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "rotated.json"

    def rotate(name: str) -> None:
        object_server.add_credential(f"key-{name}", f"secret-{name}", session_token=f"token-{name}")
        fields = {
            "access_key": f"key-{name}",
            "secret": f"secret-{name}",
            "session_token": f"token-{name}",
        }
        beside = tmp_path / name
        beside.write_text(json.dumps(fields))
        beside.replace(path)

    rotate("first")
    store = open_bucket(client, credentials=str(path), endpoint_url=object_server.endpoint_url)
    for read, name in zip(reads(store), ("second", "third"), strict=False):
        assert read("ten") == OBJECTS["ten"]
        object_server.expire_session_tokens()
        rotate(name)

        assert read("ten") == OBJECTS["ten"]


@pytest.mark.parametrize("client", CLIENTS)
def test_anonymous_reads_what_is_public_and_no_more(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.create_bucket("open", public=True)
    object_server.put_objects("open", OBJECTS)
    settings: dict[str, Any] = {"anonymous": True, "endpoint_url": object_server.endpoint_url}

    public = open_bucket(client, "s3://open", **settings)
    private = open_bucket(client, "s3://bucket", **settings)

    assert bytes(public.get("ten")) == b"0123456789"
    with pytest.raises(AccessDeniedError):
        private.get("ten")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_session_token_is_sent(
    client: str, open_bucket: OpenBucket, object_server: ObjectServer, tmp_path: pathlib.Path
) -> None:
    object_server.add_credential("temporary", "its-secret", session_token="a/token+with=signs")
    path = tmp_path / "temporary.json"
    path.write_text(
        '{"aws_access_key_id": "temporary", "aws_secret_access_key": "its-secret", '
        '"aws_session_token": "a/token+with=signs"}'
    )

    store = open_bucket(client, credentials=str(path), endpoint_url=object_server.endpoint_url)

    for read in reads(store):
        assert read("ten") == b"0123456789"


@pytest.mark.parametrize("client", CLIENTS)
def test_keys_are_below_the_prefix_of_the_url(client: str, open_bucket: OpenBucket) -> None:
    store = open_bucket(client, "s3://bucket/folder/")

    assert bytes(store.get("a b+c.jpg")) == OBJECTS["folder/a b+c.jpg"]
    assert store.describe("x") == "s3://bucket/folder/x"
    assert [info.key for info in store.list("a")] == ["a b+c.jpg"]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("key", ["a//b", "/lead", "folder/", "./dot", "a/./b", "100%", "a\tb"])
def test_odd_keys_are_read_as_they_are(
    client: str, key: str, open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("bucket", {key: b"odd"})

    assert bytes(open_bucket(client).get(key)) == b"odd"


def test_listing_goes_on_beyond_a_page(
    open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    keys = [f"many/{number:05}" for number in range(2500)]
    object_server.put_objects("bucket", [(key, b"x") for key in keys])

    assert [info.key for info in open_bucket("http").list("many/")] == keys


def test_listing_shows_directory_markers(
    open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    object_server.put_objects("bucket", {"marked/": b"", "marked/x": b"x"})

    assert list(open_bucket("http").list("marked")) == [("marked/", 0), ("marked/x", 1)]
    assert list(open_bucket("http", "s3://bucket/marked").list()) == [("x", 1)]


def test_a_large_object_is_uploaded_in_parts(
    open_bucket: OpenBucket, object_server: ObjectServer
) -> None:
    body = bytes(1000) + bytes(range(256)) * (70 * 1024) + b"end"
    store = open_bucket("http")

    store.put("in-parts", body)

    assert bytes(store.get("in-parts")) == body
    assert object_server.counters().num_requests >= 4


def test_a_wrong_secret_cannot_write(
    open_bucket: OpenBucket, object_server: ObjectServer, tmp_path: pathlib.Path
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(f'{{"access_key": "{object_server.access_key}", "secret": "wrong"}}')
    store = open_bucket("boto3", credentials=wrong, endpoint_url=object_server.endpoint_url)

    with pytest.raises(AccessDeniedError, match="s3://bucket/new"):
        store.put("new", b"x")
    with pytest.raises(AccessDeniedError, match="s3://bucket/"):
        list(store.list())


def test_what_the_environment_says_does_not_override_arguments(
    monkeypatch: pytest.MonkeyPatch, credentials_file: pathlib.Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    from tests.stores.in_worker import StoreInWorker, start_worker

    settings = {"credentials": str(credentials_file), "region": "us-east-1"}
    for client in ("http", "boto3", "aiobotocore", "aiohttp"):
        store = open_store("s3://bucket", client=client, **settings)  # pyright: ignore[reportArgumentType]: a name from a list
        assert bytes(store.get("ten")) == b"0123456789"
        store.close()
    with start_worker() as worker:  # it inherits the environment of now
        assert bytes(StoreInWorker(worker, "s3://bucket", settings).get("ten")) == b"0123456789"


@pytest.mark.parametrize("client", CLIENTS)
def test_the_environment_gives_what_arguments_leave_open(
    client: str, monkeypatch: pytest.MonkeyPatch, object_server: ObjectServer
) -> None:
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)

    store = open_store("s3://bucket", client=client)  # pyright: ignore[reportArgumentType]: a name from a list

    assert bytes(store.get("ten")) == b"0123456789"
    store.close()


def test_credentials_in_memory_sign_too(object_server: ObjectServer) -> None:
    credentials = Credentials(object_server.access_key, object_server.secret_key)
    store = open_store(
        "s3://bucket", credentials=credentials, endpoint_url=object_server.endpoint_url
    )

    assert bytes(store.get("ten")) == b"0123456789"
