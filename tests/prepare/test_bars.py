"""What a terminal shows of commands that take long: a bar with a count, and lines that stay."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.stores import open_writable_store
from tests.prepare.shard_sets import make_samples, write_set
from tests.prepare.source_files import IMAGES, write_tree


class Bar(NamedTuple):
    """A command, and what the bar says when all is done."""

    command: str
    what: str
    done: str


BARS = {
    "advise": Bar("advise images", "listing images", ": 6 objects"),
    "copy": Bar("copy images out", "copying to out", " 6/? objects"),
    "copy by an index": Bar("copy images out --index i.json", "copying to out", " 6/6 objects"),
    "distribute": Bar("distribute set -n 2", "train, 2 instances", " 2/2 parts"),
    "folders": Bar("folders images out", "sorting into out", " 6/6 images"),
    "index of shards": Bar("index set --output new.npz", "reading ", " 3/3 shards"),
    "lmdb": Bar("lmdb images out", "out/ILSVRC-train.lmdb", " 6/6 records"),
    "map": Bar(
        "map set out --function same_of_bars:same --processes 1", "mapping train", " 3/? shards"
    ),
    "reshard": Bar("reshard set out --maxcount 1 --processes 1", "writing train", " 6/? shards"),
    "validate": Bar("validate set", "reading set", " 3/3 shards"),
    "validate files": Bar("validate images --checksums known", "reading images", " 6/? files"),
    "validate deep": Bar("validate images --deep", "decoding images", " 6/6 files"),
    "validate again": Bar("validate images --from r.jsonl", "reading images", " 1/1 samples"),
    "record": Bar("validate images --write-checksums md5", "reading images", " 6/6 files"),
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with six images, three shards of six samples, and what the commands need besides."""
    write_tree(tmp_path / "images", IMAGES)
    Index.from_keys(sorted(IMAGES)).save_json(tmp_path / "i.json")
    known = (f"{hashlib.md5(raw).hexdigest()}  {name}\n" for name, raw in IMAGES.items())
    (tmp_path / "known").write_text("".join(known))
    samples = make_samples(6)
    shards = [samples[at : at + 2] for at in range(0, 6, 2)]
    write_set(open_writable_store(tmp_path / "set"), shards)
    (tmp_path / "same_of_bars.py").write_text("def same(key, fields):\n    return fields\n")
    (tmp_path / "r.jsonl").write_text('{"key": "cat/b.png", "range": null, "error": "x"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_on_terminal(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Run a command with a terminal as stderr; gives its status, and the lines as they came.

    A line that is drawn again comes again.
    """
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while piece := os.read(ours, 4096):
                shown.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(theirs, "w") as terminal, monkeypatch.context() as patch:
            for name, value in (("TERM", "xterm"), ("COLUMNS", "200")):
                patch.setenv(name, value)
            patch.setattr(sys, "stderr", terminal)
            status = main(command)
    finally:
        reader.join(20)
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    return status, [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    "name",
    [
        name if number < 4 else pytest.param(name, marks=pytest.mark.grid)
        for number, name in enumerate(BARS)
    ],
)
def test_a_terminal_shows_a_bar_that_comes_to_its_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, what, done = BARS[name]

    status, lines = run_on_terminal(command.split(), monkeypatch)

    assert status == 0, lines
    assert what in lines[-1]
    assert done in lines[-1]
    assert all(what in line for line in lines), "the bar alone, and no lines of a log"


@pytest.mark.usefixtures("work")
def test_what_goes_wrong_stays_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"gone/{'long name ' * 30}.jpg"
    Index.from_keys([*sorted(IMAGES), name]).save_json("i.json")

    status, lines = run_on_terminal(["copy", "images", "out", "--index", "i.json"], monkeypatch)

    assert status == 1
    (said,) = [line for line in lines if "not copied" in line and "long" in line]
    assert said.startswith(f"{name}: not copied: ")
    assert any(" 7/7 objects" in line for line in lines)
