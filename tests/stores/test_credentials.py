from __future__ import annotations

import json
import logging
import multiprocessing
import pathlib
import pickle
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from concurrent_dataloader.dataloader_mod.error_policy import is_of_sample
from concurrent_dataloader.errors import (
    AccessDeniedError,
    CredentialsError,
    ExpiredCredentialsError,
)
from concurrent_dataloader.stores import (
    Credentials,
    CredentialsChain,
    CredentialsFile,
    open_store,
)
from concurrent_dataloader.stores.credentials import parse_contents
from concurrent_dataloader.testing.object_server import ObjectServer
from tests.leftovers import stretch
from tests.stores.conftest import CLIENTS
from tests.stores.in_worker import StoreInWorker, start_worker

PROCESS_FAILED = r"custom-process\) have expired and could not be renewed .*; check what gives them"

SECRET = "dummy-s3cret-that-must-not-show"


def write(path: pathlib.Path, contents: Any) -> pathlib.Path:
    path.write_text(json.dumps(contents))
    return path


@pytest.mark.parametrize(
    "contents",
    [
        {"access_key": "key", "secret": SECRET},
        {"aws_access_key_id": "key", "aws_secret_access_key": SECRET},
    ],
)
def test_both_documented_layouts_are_read(tmp_path: pathlib.Path, contents: Any) -> None:  # I-35
    file = CredentialsFile(write(tmp_path / "c.json", contents))

    assert file.resolve() == Credentials("key", SECRET)


def test_an_unknown_key_is_an_error_that_names_file_and_key(tmp_path: pathlib.Path) -> None:  # I-35
    path = write(tmp_path / "c.json", {"acces_key": "key", "secret": SECRET})

    with pytest.raises(CredentialsError) as raised:
        open_store("s3://bucket", credentials=path)

    assert str(path) in str(raised.value)
    assert "'acces_key'" in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ({"access_key": "key"}, "'secret' is missing"),
        ({"secret": SECRET}, "'access_key' is missing"),
        ({"session_token": SECRET}, "'access_key' is missing"),
        ({"access_key": "a", "aws_access_key_id": "b", "secret": SECRET}, "a second time"),
        ({"access_key": "key", "secret": [SECRET]}, "'secret' has a value of type list"),
        ({"access_key": "key", "secret": ""}, "'secret'"),
        ([SECRET], "JSON list"),
    ],
)
def test_a_file_that_is_wrong_is_an_error_without_its_values(
    tmp_path: pathlib.Path, contents: Any, match: str
) -> None:
    path = write(tmp_path / "c.json", contents)

    with pytest.raises(CredentialsError, match=match) as raised:
        CredentialsFile(path).read()

    shown = "".join(traceback.format_exception(raised.value))
    assert str(path) in shown
    assert SECRET not in shown


def test_a_file_that_is_no_json_is_an_error_without_its_text(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(f'{{"secret": "{SECRET}"')

    with pytest.raises(CredentialsError, match="no JSON") as raised:
        open_store("s3://bucket", credentials=path)

    assert SECRET not in "".join(traceback.format_exception(raised.value))


def test_a_file_that_is_missing_is_an_error_in_open_store(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CredentialsError, match=r"none\.json: cannot be read"):
        open_store("s3://bucket", credentials=tmp_path / "none.json")


def test_urls_are_those_of_the_split_or_else_of_all_splits() -> None:
    contents = parse_contents(
        "c.json",
        {
            "index_file_download_url": "s3://b/index.json",
            "train_index_file_download_url": "s3://b/train.json",
            "val_classes_file_download_url": "s3://b/val-classes.json",
            "test_index_file_upload_url": "s3://b/up.json",
            "bucket_name": "b",
            "endpoint_url": "http://h",
            "region": "r",
        },
    )

    assert contents.index_url("train") == "s3://b/train.json"
    assert contents.index_url("val") == contents.index_url() == "s3://b/index.json"
    assert contents.classes_url("val") == "s3://b/val-classes.json"
    assert contents.classes_url("train") is None
    assert contents.index_upload_url("test") == "s3://b/up.json"
    assert (contents.bucket_name, contents.endpoint_url, contents.region) == ("b", "http://h", "r")


def test_an_endpoint_in_the_file_and_one_in_the_call_do_not_collide(
    credentials_file: pathlib.Path, object_server: ObjectServer
) -> None:  # I-36
    object_server.put_objects("bucket", {"ten": b"0123456789"})
    contents = json.loads(credentials_file.read_text())
    write(credentials_file, {**contents, "endpoint_url": "http://127.0.0.1:9"})

    store = open_store(
        "s3://bucket", credentials=credentials_file, endpoint_url=object_server.endpoint_url
    )

    assert bytes(store.get("ten")) == b"0123456789"


def test_an_explicit_file_wins_over_the_environment(
    credentials_file: pathlib.Path, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_server.put_objects("bucket", {"ten": b"0123456789"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")

    chain = open_store("s3://bucket", endpoint_url=object_server.endpoint_url)
    file = open_store("s3://bucket", credentials=credentials_file)

    assert bytes(file.get("ten")) == b"0123456789"
    with pytest.raises(AccessDeniedError, match="InvalidAccessKeyId"):
        chain.get("ten")


def test_the_chain_reads_profiles(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "aws-credentials"
    path.write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = two\n"
        "[other]\naws_access_key_id = three\naws_secret_access_key = four\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))

    assert CredentialsChain().resolve() == Credentials("one", "two")
    assert CredentialsChain("other").resolve() == Credentials("three", "four")


def test_a_profile_that_is_not_there_is_a_credentials_error() -> None:
    with pytest.raises(CredentialsError, match="no-such-profile"):
        CredentialsChain("no-such-profile").resolve()


@pytest.mark.slow
def test_a_chain_whose_renewal_fails_is_named_by_each_client_and_is_no_samples_fault(
    object_server: ObjectServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_server.put_objects("bucket", {"ten": b"0123456789"})
    path = tmp_path / "process.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {path}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with start_worker() as worker:  # it inherits the environment of now
        stores: dict[str, Any] = {}
        end = datetime.now(UTC)
        for client in CLIENTS:
            settings: Any = {"client": client, "endpoint_url": object_server.endpoint_url}
            end = datetime.now(UTC) + timedelta(seconds=4)
            answer = {
                "Version": 1,
                "AccessKeyId": object_server.access_key,
                "SecretAccessKey": object_server.secret_key,
                "Expiration": end.isoformat(),
            }
            write(path, answer)
            stores[client] = (
                StoreInWorker(worker, "s3://bucket", settings)
                if client == "obstore"
                else open_store("s3://bucket", **settings)
            )
            assert bytes(stores[client].get("ten")) == b"0123456789"

        path.unlink()
        threading.Event().wait((end - datetime.now(UTC)).total_seconds())  # the last ones are over

        for client, store in stores.items():
            with pytest.raises(ExpiredCredentialsError, match=PROCESS_FAILED) as raised:
                store.get("ten")

            assert not is_of_sample(raised.value), client
            store.close()


@pytest.mark.parametrize("client", CLIENTS)
def test_no_credentials_anywhere_is_an_error_that_says_what_to_do(
    client: Any, object_server: ObjectServer
) -> None:
    store = open_store("s3://bucket", client=client, endpoint_url=object_server.endpoint_url)

    with pytest.raises(CredentialsError, match="anonymous=True"):
        store.get("ten")
    store.close()


def test_anonymous_together_with_credentials_is_an_error(credentials_file: pathlib.Path) -> None:
    for given in (credentials_file, Credentials("key", SECRET)):
        with pytest.raises(ValueError, match="anonymous"):
            open_store("s3://bucket", credentials=given, anonymous=True)


@pytest.mark.parametrize("client", CLIENTS)
def test_no_secret_in_reprs_logs_errors_and_pickles(
    client: Any,
    object_server: ObjectServer,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # I-42
    caplog.set_level(logging.DEBUG)
    logging.getLogger("botocore").setLevel(logging.INFO)  # its DEBUG is AWS's own, and off
    path = write(tmp_path / "c.json", {"access_key": object_server.access_key, "secret": SECRET})
    stores: list[Any] = [
        open_store(
            "s3://bucket", client=client, credentials=given, endpoint_url=object_server.endpoint_url
        )
        for given in (path, Credentials(object_server.access_key, SECRET, "token" + SECRET))
    ]

    shown = [repr(store) + str(store) + repr(vars(store)) for store in stores]
    for store in stores:
        with pytest.raises(AccessDeniedError) as raised:
            store.get("ten")
        shown += traceback.format_exception(raised.value)
        store.close()
    shown += [repr(pickle.dumps(stores[0])), caplog.text, *capfd.readouterr()]

    assert SECRET not in "".join(shown)


def test_credentials_in_memory_do_not_pickle_by_themselves() -> None:
    store = open_store("s3://bucket", credentials=Credentials("key", SECRET))

    with pytest.raises(CredentialsError, match="pickle a secret") as raised:
        pickle.dumps(store)

    assert SECRET not in str(raised.value)


def _exit_with_match(store: Any, expected_repr: str) -> None:
    source = store._store._address.credentials
    raise SystemExit(
        0
        if (source.resolve().secret_access_key, repr(store))
        == (
            SECRET,
            expected_repr,
        )
        else 1
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_credentials_in_memory_reach_worker_processes(method: str) -> None:
    store = open_store("s3://bucket", credentials=Credentials("key", SECRET))
    context: Any = multiprocessing.get_context(method)

    child = context.Process(target=_exit_with_match, args=(store, repr(store)))
    child.start()
    child.join(min(stretch(30.0), 100.0))

    assert child.exitcode == 0
    child.close()


def test_a_file_that_is_half_written_leaves_the_credentials_before(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "credentials.json"
    path.write_text('{"access_key": "key", "secret": "hidden-secret"}')
    file = CredentialsFile(path)
    before = file.resolve()
    path.write_text('{"access_key": "key", "sec')

    deadline_s = time.monotonic() + 30
    while "the credentials before are used on" not in caplog.text:
        assert file.resolve() == before
        assert time.monotonic() < deadline_s

    assert "hidden-secret" not in caplog.text
