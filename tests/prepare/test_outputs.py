"""Files that a command writes beside its work: links and pipes stay what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from concurrent_dataloader.prepare.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for name in ["dog/1.jpg", "cat/1.jpg", "cat/notes.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    "arguments",
    [
        ["index", "PETS", "--output", "LINK"],
        ["index", "PETS", "--output", "index.json", "--classes-output", "LINK"],
        ["validate", "PETS", "--write-checksums", "LINK"],
        ["shard", "PETS", "shards", "--strays", "LINK"],
    ],
)
def test_a_link_stays_and_its_target_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"")
    link.symlink_to(real)
    places = {"PETS": str(folder), "LINK": str(link)}

    assert main([places.get(word, word) for word in arguments]) == 0

    assert link.is_symlink()
    assert real.stat().st_size > 0


def test_an_index_goes_to_standard_output(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "concurrent_dataloader.prepare", "index", str(folder)]

    done = subprocess.run(
        [*command, "--output", "/dev/stdout"], capture_output=True, text=True, check=True
    )

    keys, end = json.JSONDecoder().raw_decode(done.stdout)
    assert keys == ["cat/1.jpg", "dog/1.jpg"]
    assert done.stdout[end:].strip() == "/dev/stdout: 2 samples"


def test_what_is_written_to_standard_output_cannot_be_uploaded(
    folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "concurrent_dataloader.prepare", "index", str(folder)]

    done = subprocess.run(
        [*command, "--output", "/dev/stdout", "--upload", "s3://nowhere/index.json"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "--upload: got --output /dev/stdout, which is no file that could be read" in done.stderr
