"""Nothing that comes out of a command, a training or an error holds a secret (promise 8)."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from concurrent_dataloader import DataLoader, S3Dataset
from concurrent_dataloader.errors import AccessDeniedError, CredentialsError
from concurrent_dataloader.stores import Credentials
from concurrent_dataloader.testing import ObjectServer
from tests.test_imagenet import encode_image, small_job

SECRET = "dummy+s3cret/that=must?not+show"
TOKEN = "dummy+t0ken/that=must?not+show"

REPOSITORY = pathlib.Path(__file__).parents[1]

PROGRAM = """
import json, logging, sys, traceback
import imagenet
from concurrent_dataloader.prepare.__main__ import main as command

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
# botocore's own DEBUG shows what it signs, token included. It is AWS's, and off by default.
logging.getLogger("botocore").setLevel(logging.INFO)
for arguments in json.load(sys.stdin):
    main = imagenet.main if arguments[0] == "train" else command
    try:
        status = main(arguments[1:] if arguments[0] == "train" else arguments)
    except SystemExit as error:
        status = error.code
    except Exception:
        traceback.print_exc()
        status = "an exception"
    print(arguments[0], "ended with", status, flush=True)
"""


def forms_of(secret: str) -> list[bytes]:
    """Give the ways in which a secret may be written."""
    return [
        secret.encode(),
        quote(secret, safe="").encode(),
        base64.b64encode(secret.encode()).rstrip(b"=")[:-1],
        json.dumps(secret).encode(),
        secret.encode("utf-16-le"),
    ]


def find_secrets(*texts: bytes | str) -> list[str]:
    """Name what can be found of the secrets, with what stands before it."""
    found: list[str] = []
    for text in texts:
        raw = text.encode() if isinstance(text, str) else text
        for secret in (SECRET, TOKEN):
            for form in forms_of(secret):
                place = raw.find(form)
                if place >= 0:
                    found.append(repr(raw[max(0, place - 100) : place]))
    return found


def test_the_search_finds_each_form() -> None:
    for form in forms_of(SECRET) + forms_of(TOKEN):
        assert find_secrets(b"before " + form + b" after")


@pytest.fixture
def server(make_object_server: Callable[..., ObjectServer]) -> ObjectServer:
    import numpy as np

    server = make_object_server(secret_key=SECRET, session_token=TOKEN)
    rng = np.random.default_rng(0)
    images = {
        f"{split}/class{label}/{number}.jpg": encode_image(rng, label)
        for split in ("train", "val")
        for label in range(2)
        for number in range(4)
    }
    server.put_objects("bucket", images)
    return server


def write_credentials(path: pathlib.Path, server: ObjectServer, **changes: str) -> pathlib.Path:
    contents = {
        "access_key": server.access_key,
        "secret": SECRET,
        "session_token": TOKEN,
        "endpoint_url": server.endpoint_url,
    }
    path.write_text(json.dumps(contents | changes))
    return path


def keep_sample(_: str, fields: dict[str, bytes]) -> dict[str, bytes]:
    """What ``map`` calls."""
    return fields


def run(commands: list[list[str]], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        env={**kept, "AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(REPOSITORY)}
        | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "environment"])
def test_no_secret_in_what_commands_and_training_print_and_write(
    server: ObjectServer, tmp_path: pathlib.Path, source: str
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    credentials = write_credentials(tmp_path / "credentials.json", server)
    # Right beginnings, so that the server's answers speak of the same secrets.
    wrong = write_credentials(tmp_path / "wrong.json", server, secret=SECRET + "x")
    gone = write_credentials(tmp_path / "gone.json", server, endpoint_url="http://127.0.0.1:9")
    broken = tmp_path / "broken.json"
    broken.write_text(credentials.read_text()[:-1])
    by_file = [f"--credentials={credentials}"] if source == "file" else []
    for_trainer = [f"--s3-credential-file={credentials}"] if source == "file" else []
    for_target = [f"--target-credentials={credentials}"] if source == "file" else []
    keep = ["--split=train", "--function=tests.test_secrets:keep_sample"]
    commands = [
        ["index", "s3://bucket/train", f"--output={output / 'index.json'}", *by_file],
        ["copy", "s3://bucket/train", str(output / "copy"), *by_file],
        ["validate", "s3://bucket", f"--index={output / 'index.json'}", *by_file],
        ["shard", "s3://bucket", str(output / "shards"), "--splits=train,val", *by_file],
        ["train", "s3://bucket", *small_job(output / "run"), "--epochs=1", *for_trainer],
        ["copy", str(output / "shards"), "s3://bucket/shards", *for_target],
        ["advise", "s3://bucket/train", *by_file],
        ["reshard", "s3://bucket/shards", str(output / "resharded"), "--split=train", *by_file],
        ["map", "s3://bucket/shards", str(output / "mapped"), *keep, *by_file],
        ["distribute", "s3://bucket/shards", "-n2", "--split=train", *by_file],
        ["lmdb", "s3://bucket", str(output / "databases"), "--splits=train,val", *by_file],
        ["folders", "s3://bucket/train", str(output / "folders"), *by_file],
    ]
    failing = [
        ["index", "s3://bucket/none", f"--output={output / 'none.json'}", *by_file],
        ["index", "s3://other", f"--output={output / 'none.json'}", *by_file],
        ["copy", "s3://bucket/train", str(output / "none"), f"--credentials={wrong}"],
        ["copy", "s3://bucket/train", str(output / "none"), f"--credentials={broken}"],
        ["train", "s3://bucket", *small_job(output / "none"), f"--s3-credential-file={wrong}"],
        ["train", "s3://bucket", *small_job(output / "none"), f"--s3-credential-file={broken}"],
        ["index", "s3://bucket", f"--output={output / 'none.json'}", f"--credentials={gone}"],
    ]

    done = run(commands + failing, **(server.environment() if source == "environment" else {}))

    ends = [line for line in done.stdout.splitlines() if " ended with " in line]
    assert [end.endswith(" 0") for end in ends] == [True] * len(commands) + [False] * len(failing)
    assert "DEBUG" in done.stderr
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"index.json", "checkpoint.pth.tar", "log.jsonl"} <= {path.name for path in files}
    assert not find_secrets(done.stdout, done.stderr, *(path.read_bytes() for path in files))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_no_secret_in_reprs_states_pickles_and_errors_of_a_loader(
    server: ObjectServer, tmp_path: pathlib.Path, method: str
) -> None:
    credentials = write_credentials(tmp_path / "credentials.json", server)
    dataset: Any = S3Dataset(
        "bucket",
        prefix="train",
        s3_credential_file=credentials,
        decode=None,
        cache=tmp_path / "cache",
    )
    loader = DataLoader(
        dataset, batch_size=2, num_workers=1, collate_fn=list, multiprocessing_context=method
    )
    dataset[0]
    assert len(list(loader)) == 4

    shown = [repr(dataset), repr(vars(dataset)), repr(loader), repr(vars(loader))]
    shown += [repr(vars(dataset.store)), repr(loader.state_dict())]
    pickles = [pickle.dumps(each) for each in (dataset, dataset.store, loader)]
    wrong = S3Dataset(
        "bucket",
        prefix="train",
        s3_credential_file=write_credentials(tmp_path / "w.json", server, session_token=TOKEN[1:]),
        index_file=_write_index(tmp_path),
        decode=None,
    )
    try:
        list(DataLoader(wrong, num_workers=1, multiprocessing_context=method))
    except AccessDeniedError as error:
        shown += [repr(error), str(error), *getattr(error, "__notes__", [])]
        pickles.append(pickle.dumps(error))

    assert len(pickles) == 4, "a wrong token was not refused"
    assert str(credentials).encode() in pickles[0], "the path goes along in place of the secret"
    cached = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert cached
    assert not find_secrets(*shown, *pickles, *cached)


def _write_index(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "index.json"
    path.write_text(json.dumps(["class0/0.jpg", "class1/1.jpg"]))
    return path


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_secret_in_memory_reaches_workers_and_no_other_pickle(
    server: ObjectServer, method: str
) -> None:
    credentials = Credentials(server.access_key, SECRET, TOKEN)
    dataset: Any = S3Dataset(
        "bucket",
        prefix="train",
        credentials=credentials,
        endpoint_url=server.endpoint_url,
        decode=None,
    )
    loader = DataLoader(
        dataset, batch_size=2, num_workers=1, collate_fn=list, multiprocessing_context=method
    )

    assert len(list(loader)) == 4
    for each in (dataset, loader, credentials):
        with pytest.raises(CredentialsError, match="pickle a secret") as caught:
            pickle.dumps(each)
        assert not find_secrets(str(caught.value), repr(each))
