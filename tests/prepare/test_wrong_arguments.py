"""Arguments that cannot be: told in a line, with status 2, in the words of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.testing import ObjectServer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of five samples each; the working folder is another one, which is empty."""
    root = tmp_path / "pets"
    for number in range(10):
        path = root / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return root


def status_of(*arguments: str | Path) -> int:
    try:
        return main(list(map(str, arguments)))
    except SystemExit as end:
        return int(str(end.code))


def written() -> list[Path]:
    """What was written to the working folder."""
    return list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        *(([verb, "PETS", ""], "TARGET", "a folder or URL") for verb in ("shard", "lmdb", "copy")),
        *(([verb, "PETS", ""], "TARGET", "a folder or URL") for verb in ("folders", "reshard")),
        *(([verb, "", "out"], "SOURCE", "a folder or URL") for verb in ("shard", "lmdb", "copy")),
        (["index", "", "--output", "z"], "SOURCE", "a folder or URL"),
        (["validate", ""], "PATH_OR_URL", "a folder or URL"),
        (["advise", ""], "SOURCE", "a folder or URL"),
        (["map", "", "out", "module:function"], "SHARDS", "a folder or URL"),
        (["distribute", "", "-n", "2"], "SHARDS", "a folder or URL"),
        (["shard", "s3://", "out"], "SOURCE", "a bucket too: s3://bucket"),
        (["pack", ""], "INDEX", "an index file"),
        (["readspeed", " "], "PATH", "a database"),
    ],
)
def test_an_empty_place_is_no_working_folder(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    name: str,
    expected: str,
) -> None:
    words = [str(folder) if word == "PETS" else word for word in arguments]

    assert status_of(*words) == 2

    said = capsys.readouterr().err
    assert re.search(rf"error: {name}: got '( |s3://)?', expected {expected};", said)
    assert written() == []


@pytest.mark.parametrize("verb", ["shard", "lmdb"])
def test_splits_that_would_be_the_same_samples_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert status_of(verb, folder, "out", "--splits", "train,val") == 2

    said = capsys.readouterr().err
    assert "--splits: got train and val, which would be the same 10 samples" in said
    assert "looked there for train/ and val/ or validation/, or tars called so" in said
    assert "found cat, dog; give one split" in said
    assert written() == []


@pytest.mark.parametrize(
    "arguments", [["shard", "PETS", "out"], ["reshard", "PETS", "out"], ["map", "PETS", "out"]]
)
def test_processes_beyond_all_reason_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    words = [str(folder) if word == "PETS" else word for word in arguments]
    function = ["--function", "os:getcwd"] if words[0] == "map" else []

    assert status_of(*words, *function, "--processes", "5000") == 2

    assert "--processes: got 5000, expected 4096 or fewer" in capsys.readouterr().err
    assert written() == []


def test_instances_without_samples_are_warned_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("shard", folder, "out") == 0
    capsys.readouterr()

    assert status_of("distribute", "out", "-n", "13") == 0
    said = capsys.readouterr().err
    assert "warning: out: 3 of 13 instances have no sample, since train has only 10" in said
    assert "give -n 10 or fewer" in said

    assert status_of("distribute", "out", "-n", "10") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_label_rule_is_looked_at_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ("index", folder, "--output", "index.json")

    assert status_of(*index, "--label-rule", "banana") == 2
    assert "--label-rule: got 'banana', expected 'parent'" in capsys.readouterr().err
    assert status_of(*index, "--classes-output", "c.json", "--label-rule", "regex:(zebra)") == 1
    assert "names no class by --label-rule 'regex:(zebra)'" in capsys.readouterr().err
    assert status_of("shard", folder, "out", "--label-rule", "regex:(") == 2
    assert "--label-rule: got 'regex:(', no regular expression" in capsys.readouterr().err
    assert written() == []


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--samples-per-shard", "0"], 2, "--samples-per-shard: got 0, expected 1 or more"),
        (["--maxcount", "0"], 2, "--maxcount: got 0, expected 1 or more"),
        (["--num-shards", "0"], 2, "got --num-shards 0, which shard does not know"),
        (
            ["--label-rule", "regex:(zebra)"],
            1,
            "give --label-rule, --class-map or --ground-truth, or --on-unknown skip",
        ),
        (
            ["--label-rule", "parent", "--class-map", "MAP"],
            1,
            "choose another --label-rule, or give --on-unknown skip",
        ),
    ],
)
def test_errors_speak_of_options(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
    message: str,
) -> None:
    (tmp_path / "map.json").write_text('{"zebra": 0, "emu": 1}')
    words = [str(tmp_path / "map.json") if word == "MAP" else word for word in flags]

    assert status_of("shard", folder, "out", *words) == status

    assert message in capsys.readouterr().err


def test_errors_of_stores_speak_of_options(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    object_server: ObjectServer,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))

    url = object_server.endpoint_url
    assert status_of("index", "s3://data", "--output", "z", "--endpoint-url", url) == 1

    assert "or give --anonymous" in capsys.readouterr().err
