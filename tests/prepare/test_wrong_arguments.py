"""Arguments that cannot be: told in a line, with status 2, in the words of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from concurrent_dataloader.prepare.__main__ import main


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
    assert re.search(rf"error: {name}: got ' ?', expected {expected};", said)
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
