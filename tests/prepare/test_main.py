"""``concurrent-dataloader``: arguments, what is printed, and the exit status."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from concurrent_dataloader import __version__
from concurrent_dataloader.index import PACK_ABOVE_KEYS, Index, packed_path
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.testing import ObjectServer

COMMAND = [sys.executable, "-m", "concurrent_dataloader.prepare"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for name in ["dog/2.jpg", "dog/1.JPG", "cat/1.png", "cat/notes.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def credentials_file(object_server: ObjectServer, tmp_path: Path) -> Path:
    path = tmp_path / "credentials.json"
    content = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    path.write_text(json.dumps(content))
    return path


def test_a_folder_becomes_an_index_and_a_classes_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, classes_output = tmp_path / "out" / "index.json", tmp_path / "out" / "classes.json"

    status = main(
        ["index", str(folder), "--output", str(output), "--classes-output", str(classes_output)]
    )

    assert status == 0
    assert json.loads(output.read_bytes()) == ["cat/1.png", "dog/1.JPG", "dog/2.jpg"]
    classes = Classes.load(classes_output)
    assert classes.labels_of(Index.load(output).keys()).tolist() == [0, 1, 1]
    said = capsys.readouterr()
    assert said.out == f"{output}: 3 samples\n{classes_output}: 2 classes\n"
    assert said.err == ""


def test_suffixes_and_case_are_the_callers_choice(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "index.json"

    def index(*options: str) -> list[str]:
        assert main(["index", str(folder), "--output", str(output), *options]) == 0
        return json.loads(output.read_bytes())

    assert index("--suffix", ".jpg", "--no-ignore-case") == ["dog/2.jpg"]
    assert index("--suffix", ".jpg, .txt") == ["cat/notes.txt", "dog/1.JPG", "dog/2.jpg"]
    assert len(index("--suffix", "")) == 4


def test_a_bucket_becomes_an_index_that_is_uploaded_and_read_elsewhere(
    object_server: ObjectServer, credentials_file: Path, tmp_path: Path
) -> None:
    keys = [f"train/n{i % 3:08d}/{i:06d}.JPEG" for i in range(1500)]
    object_server.put_objects("data", dict.fromkeys(keys, b"x"))
    output, classes = tmp_path / "index.json", tmp_path / "classes.json"
    store = ["--endpoint-url", object_server.endpoint_url, "--credentials", str(credentials_file)]

    outputs = ["--output", str(output), "--classes-output", str(classes)]
    uploads = ["--upload", "s3://data/i/index.json"]
    uploads += ["--classes-upload", "s3://data/i/classes.json"]
    status = main(["index", "s3://data/train", *outputs, *uploads, *store])

    assert status == 0
    assert json.loads(output.read_bytes()) == sorted(keys)
    again = tmp_path / "uploaded.json"
    options = ["--suffix", ".json", "--output", str(again), "--relative", *store]
    assert main(["index", "s3://data/i", *options]) == 0
    assert json.loads(again.read_bytes()) == ["classes.json", "index.json"]


@pytest.mark.parametrize("client", ["obstore", "boto3", "aiobotocore", "aiohttp"])
def test_every_client_lists_the_same(
    object_server: ObjectServer, credentials_file: Path, tmp_path: Path, client: str
) -> None:
    object_server.put_objects("data", {"a/1.jpg": b"x", "b/ü 2.jpg": b"y"})
    output = tmp_path / "index.json"
    store = ["--endpoint-url", object_server.endpoint_url, "--credentials", str(credentials_file)]

    assert main(["index", "s3://data", "--output", str(output), "--client", client, *store]) == 0
    assert json.loads(output.read_bytes()) == ["a/1.jpg", "b/ü 2.jpg"]


def test_a_public_bucket_needs_no_credentials(object_server: ObjectServer, tmp_path: Path) -> None:
    object_server.create_bucket("public", public=True)
    object_server.put_objects("public", {"a/1.jpg": b"x"})
    output = tmp_path / "index.json"
    store = ["--endpoint-url", object_server.endpoint_url, "--anonymous"]

    assert main(["index", "s3://public", "--output", str(output), *store]) == 0


def test_a_large_index_is_packed_with_the_sizes_of_its_objects(
    object_server: ObjectServer,
    credentials_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    count = PACK_ABOVE_KEYS + 1
    object_server.put_objects("data", ((f"{i:05d}.jpg", b"x" * (i % 3)) for i in range(count)))
    output = tmp_path / "index.json"
    store = ["--endpoint-url", object_server.endpoint_url, "--credentials", str(credentials_file)]

    assert main(["index", "s3://data", "--output", str(output), *store]) == 0

    index = Index.load(output)
    assert index.packed_file == packed_path(output)
    assert [index.size_bytes(i) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert capsys.readouterr().out.endswith(f"{packed_path(output)}: packed\n")


def test_pack_writes_the_packed_form(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "index.json"
    main(["index", str(folder), "--output", str(output)])
    capsys.readouterr()

    assert main(["pack", str(output)]) == 0

    checksum = Index.from_keys(["cat/1.png", "dog/1.JPG", "dog/2.jpg"]).checksum()
    assert capsys.readouterr().out == f"{output}.packed: 3 samples, checksum {checksum}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["index", "nowhere", "--output", "x.json"], "nowhere: no such folder"),
        (["index", ".", "--output", "x.json"], "no object with suffix .jpeg, .jpg, .png, .webp"),
        (["index", "ftp://host/x", "--output", "x.json"], "url: got 'ftp://host', expected s3://"),
        (["pack", "nothing.json"], "nothing.json: no such index file"),
    ],
)
def test_what_does_not_work_is_one_line_and_status_1(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(arguments) == 1

    error = capsys.readouterr().err
    assert error.startswith("concurrent-dataloader: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_needs_another_one_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["index", ".", "--output", "x.json", "--classes-upload", "s3://b/k"]

    assert main(arguments) == 2
    assert "--classes-output" in capsys.readouterr().err


def test_a_wrong_secret_is_one_line_without_it(
    object_server: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    object_server.create_bucket("data")
    path = tmp_path / "credentials.json"
    content = {"access_key": object_server.access_key, "secret": "wrong-secret-0815"}
    path.write_text(json.dumps(content))
    store = ["--endpoint-url", object_server.endpoint_url, "--credentials", str(path)]

    assert main(["index", "s3://data", "--output", str(tmp_path / "x.json"), *store]) == 1

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "wrong-secret-0815" not in error
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["index"], ["index", "."], ["index", ".", "--output", "x", "--client", "curl"]],
)
def test_wrong_arguments_are_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "--help`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--maxcount", "many"], "--maxcount: got 'many', expected a whole number"),
        (["--maxsize", "1q"], "--maxsize: got '1q', expected a size such as"),
        (["--format", "zip"], "--format: got 'zip', expected one of 'tar', 'tfrecord'"),
        (["--nothing", "1"], "got --nothing 1, which "),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_where_all_are_listed(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["shard", "pets", "out", *arguments])

    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f"concurrent-dataloader shard: error: {said}")
    assert error.endswith("; see `concurrent-dataloader shard --help`\n")
    assert error.count("\n") == 1


def test_each_option_says_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["index", "--help"])

    text = capsys.readouterr().out.partition("options:")[2]
    options = text.split("\n  --")[1:]
    assert len(options) >= 12
    for option in options:
        assert "(default" in option or "(required)" in option, option


def test_it_starts_without_torch(tmp_path: Path, folder: Path) -> None:
    code = (
        "import sys; from concurrent_dataloader.prepare.__main__ import main;"
        f"status = main(['index', {str(folder)!r}, '--output', {str(tmp_path / 'i.json')!r}]);"
        "heavy = {'torch', 'torchvision', 'boto3', 'obstore', 'aiohttp', 'rich', 'PIL'};"
        "print(status, sorted(heavy & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "0 []"


def test_it_prints_its_version() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)

    assert done.stdout == f"concurrent-dataloader {__version__}\n"


def test_on_a_terminal_the_count_is_shown_in_place(folder: Path, tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    command = [*COMMAND, "index", str(folder), "--output", str(tmp_path / "i.json")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}

    done = subprocess.run(command, stderr=terminal, stdout=subprocess.PIPE, env=environment)
    os.close(terminal)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)

    assert done.returncode == 0
    assert "3 objects" in shown


def test_in_a_log_progress_is_plain_lines(
    object_server: ObjectServer,
    credentials_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    object_server.put_objects("data", ((f"{i:06d}.txt", b"") for i in range(20_001)))
    store = ["--endpoint-url", object_server.endpoint_url, "--credentials", str(credentials_file)]

    main(["index", "s3://data", "--output", str(tmp_path / "i.json"), "--suffix", ".txt", *store])

    assert capsys.readouterr().err == "listing s3://data: 20000 objects so far\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes-output", "index.json"], "--classes-output: got index.json, which --output is"),
        (
            ["--classes-output", "c.json", "--label-rule", "foo"],
            "--label-rule: got 'foo', expected",
        ),
        (["--upload", "s3://bucket"], "url: got 's3://bucket', expected the name of an object"),
        (["--classes-output", "."], "--classes-output: . is a folder, expected the name of a file"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_listed_or_written(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    status = main(["index", str(folder), "--output", "index.json", *arguments])

    assert status != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "index.json").exists()


def test_a_file_that_cannot_be_written_is_named_and_not_its_temporary_twin(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "index.json"

    status = main(["index", str(folder), "--output", str(output)])

    said = capsys.readouterr().err
    assert status != 0
    assert f"{output}" in said
    assert "partial" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lmdb", "pets", "out", "--map-size", "0"], "--map-size: got 0"),
        (["distribute", "shards", "-n", "1"], "-n: got 1"),
        (["distribute", "shards", "--instances=1"], "--instances: got 1"),
        (["shard", "pets", "out", "--maxcount", "0"], "--maxcount: got 0"),
        (["shard", "splits", "out"], "--splits: got None"),
        (["shard", "pets/dog/1.JPG", "out"], "SOURCE: got 'pets/dog/1.JPG'"),
        (["pack", "pets"], "pets: Is a directory, expected a file"),
        (["copy", "pets", "a file"], "a file: is a file, expected a folder"),
        (["shard", "pets", "a file"], "a file: is a file, expected a folder"),
        (["lmdb", "pets", "a file"], "a file: is a file, expected a folder"),
        (["folders", "pets", "a file"], "a file: is a file, expected a folder"),
    ],
)
def test_a_message_calls_things_as_the_user_does(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    for split in ("train", "val"):
        shutil.copytree(folder, Path("splits", split))
    Path("a file").touch()
    assert main(["shard", "pets", "shards"]) == 0
    capsys.readouterr()

    status = main(arguments)

    said = capsys.readouterr().err
    assert status == (2 if message.startswith("-") else 1)
    assert message in said
    assert said.count("\n") == 1, "one line"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shard", "pets", "shards", "--processes", "0"], "--processes: got 0, expected 1 or more"),
        (["shard", "pets", "shards", "--limit", "-1"], "--limit: got -1, expected 1 or more"),
        (["shard", "pets", "shards", "--limit-seed", "-1"], "--limit-seed: got -1, expected 0 to"),
        (["shard", "pets", "shards", "--label-rule", "foo"], "--label-rule: got 'foo', expected"),
        (["shard", "pets", "shards", "--class-map", "no"], "--class-map: got 'no', where there is"),
        (["shard", "pets", "shards", "--boxes", "no"], "--boxes: got 'no', where there is nothing"),
        (["shard", "pets", "shards", "--scratch", "no/a"], "--scratch: got 'no/a', expected a"),
        (["lmdb", "nowhere", "out", "--readers", "0"], "--readers: got 0, expected 1 or more"),
        (["lmdb", "nowhere", "out", "--seed", "-1"], "--seed: got -1, expected 0 to"),
        (["lmdb", "nowhere", "out", "--scratch", "pets/dog/1.JPG"], "expected a folder that is"),
        (["folders", "nowhere", "out", "--concurrency", "0"], "--concurrency: got 0, expected 1"),
        (["copy", "nowhere", "out", "--concurrency", "0"], "--concurrency: got 0, expected 1"),
        (["reshard", "nowhere", "out", "--maxsize", "0"], "--maxsize: got 0, expected 1 or more"),
        (["reshard", "nowhere", "out", "--shards", "0"], "--shards: got 0, expected 1 or more"),
        (["reshard", "nowhere", "out", "--seed", "-1"], "--seed: got -1, expected 0 to"),
        (["map", "nowhere", "out", "--function", "a:b", "--processes", "0"], "--processes: got 0"),
        (["distribute", "shards", "-n", "2", "1"], "-n: got 1, expected 2 or more"),
        (["validate", "nowhere", "--num-classes", "0"], "--num-classes: got 0, expected 1 or more"),
        (["validate", "pets", "--concurrency", "0"], "--concurrency: got 0, expected 1 or more"),
        (["advise", "nowhere", "--ranks", "0"], "--ranks: got 0, expected 1 or more"),
    ],
)
def test_an_option_that_cannot_be_is_told_before_anything_is_looked_at(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["shard", "pets", "shards"]) == 0
    before = sorted(folder.parent.rglob("*"))
    capsys.readouterr()

    status = main(arguments)

    assert status == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("verb", ["shard", "lmdb", "folders", "copy"])
def test_a_folder_that_may_not_be_written_is_named_with_what_to_do(
    folder: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = folder.parent / "locked"
    locked.mkdir(mode=0o555)

    assert main([verb, str(folder), str(locked / "out")]) == 1

    said = capsys.readouterr().err
    assert said.startswith(f"concurrent-dataloader: error: {locked}/out: Permission denied; ")
    assert said.count("check") == 1
    assert "its rights" in said
