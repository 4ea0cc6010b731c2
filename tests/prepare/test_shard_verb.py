"""``concurrent-dataloader shard``: its options, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from concurrent_dataloader.formats.tar import read_samples
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.metadata import Metadata
from concurrent_dataloader.prepare.target import ShardTarget
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.blocking import MARK

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "concurrent_dataloader.prepare", "shard"]
FUNCTION = "tests.prepare.blocking:block"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets")


def make_folder(root: Path, num_samples: int = 20) -> Path:
    for i in range(num_samples):
        path = root / ("cat", "dog")[i % 2] / f"{i:02d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]) * (1000 + i))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def keys_of(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return [sample.key for sample in read_samples(file, str(path))]


def shard(*arguments: str | Path) -> int:
    return main(["shard", *map(str, arguments)])


def test_a21_a_folder_becomes_shards_with_a_line_for_each(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    (folder / "notes.txt").write_text("stray")

    assert shard(folder, target, "--maxcount", "8") == 0

    said = capsys.readouterr()
    size_bytes = [(target / f"train-00000{i}.tar").stat().st_size for i in range(3)]
    assert said.err.splitlines() == [
        f"train-000000.tar: 8 samples, {size_bytes[0]} bytes, of 3 shards",
        f"train-000001.tar: 8 samples, {size_bytes[1]} bytes, of 3 shards",
        f"train-000002.tar: 4 samples, {size_bytes[2]} bytes, of 3 shards",
    ]
    assert said.out.splitlines() == [
        f"{target}: train: 20 samples, 3 shards, {sum(size_bytes)} bytes",
        f"{folder}: 1 stray files left out, as 'notes.txt'",
    ]


@pytest.mark.parametrize("verb", ["shard", "lmdb", "folders"])
def test_row_120_all_ignored_files_are_listed_if_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    strays = [f"cat/notes {number:02d}.txt" for number in range(30)]
    for name in strays:
        (folder / name).write_text("stray")

    status = main([verb, str(folder), str(tmp_path / "out"), "--strays", str(tmp_path / "list")])

    assert status == 0
    assert (tmp_path / "list").read_text().splitlines() == [f"{folder}/{name}" for name in strays]
    assert f"{folder}: 30 stray files left out, listed in {tmp_path / 'list'}\n" in (
        capsys.readouterr().out
    )


def test_a_link_to_nothing_is_an_error_not_a_smaller_set(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cat" / "99.JPEG").symlink_to(tmp_path / "gone.JPEG")

    assert shard(folder, tmp_path / "out") == 1

    assert "cat/99.JPEG: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metadata.json").exists()


def test_a_tar_gives_the_same_shards_as_the_folder(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        for path in sorted(folder.rglob("*.JPEG"), reverse=True):
            tar.add(path, str(path.relative_to(folder)))

    assert shard(folder, tmp_path / "a", "--maxsize", "9kB") == 0
    assert shard(tmp_path / "pets.tar", tmp_path / "b", "--maxsize", "9e3") == 0

    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_several_splits_are_written_each_from_its_part(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "set" / split, 5)
    prefixes = ["--key-style", "index"]

    assert shard(tmp_path / "set", tmp_path / "out", "--splits", "train,val", *prefixes) == 0

    metadata = Metadata.load(tmp_path / "out" / "metadata.json")
    assert {name: split.num_samples for name, split in metadata.splits.items()} == {
        "train": 5,
        "val": 5,
    }
    found = json.loads((tmp_path / "out" / "metadata.json").read_bytes())
    assert (found["train_length"], found["validation_length"]) == (5, 5)
    assert keys_of(tmp_path / "out" / "val-000000.tar") == [f"val-{i:07d}" for i in range(5)]


def test_splits_whose_files_have_the_same_names_get_different_keys(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "set" / split, 5)

    assert shard(tmp_path / "set", tmp_path / "out", "--splits", "train,val", "--no-shuffle") == 0

    keys = {split: keys_of(tmp_path / "out" / f"{split}-000000.tar") for split in ("train", "val")}
    assert [key.removeprefix("train/") for key in keys["train"]] == [
        key.removeprefix("val/") for key in keys["val"]
    ]
    assert all(key.startswith("train/") for key in keys["train"])


def test_w09_splits_with_common_keys_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "set" / split, 5)

    assert (
        shard(tmp_path / "set", tmp_path / "out", "--splits", "train,val", "--key-prefix", "") == 1
    )

    assert "which split 'train' has too; give a key prefix" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_there_is_refused_and_replaced_on_demand(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert shard(folder, target) == 0

    assert shard(folder, target, "--seed", "1") == 1
    assert "already there" in capsys.readouterr().err
    assert shard(folder, target, "--seed", "1", "--overwrite") == 0
    assert Metadata.load(target / "metadata.json").splits["train"].seed == 1


@pytest.mark.parametrize(
    ("below", "flags", "message"),
    [
        (".", [], "which is the source too"),
        ("../pets", ["--suffix", ""], "which is the source too"),
        ("shards", [], "lies in the source"),
        ("shards", ["--suffix", ""], "lies in the source"),
        ("shards", ["--suffix", ".JPEG,.TAR"], "lies in the source"),
        ("cat/shards", ["--suffix", "", "--splits", "cat"], "lies in the source"),
    ],
)
def test_a_target_whose_shards_would_be_samples_is_refused_before_anything_is_written(
    below: str, flags: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)

    assert shard(folder, folder / below, *flags) == 1

    assert message in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("flags", [[], ["--suffix", ""]])
def test_a_target_beside_the_folder_of_the_split_is_written(flags: list[str], folder: Path) -> None:
    more = ["--splits", "cat", "--label-rule", "none"]

    assert shard(folder, folder / "shards", *more, *flags) == 0

    assert list((folder / "shards").glob("*.tar"))


def test_an_empty_source_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()

    assert shard(tmp_path / "empty", tmp_path / "out") == 1

    assert "holds no sample" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bucket_gets_shards_from_a_bucket(tmp_path: Path, object_server: ObjectServer) -> None:
    folder = make_folder(tmp_path / "pets")
    object_server.put_objects(
        "raw", {f"pets/{name}": content for name, content in contents(folder).items()}
    )
    object_server.put_objects("packed", {})
    credentials = tmp_path / "credentials.json"
    credentials.write_text(
        json.dumps({"access_key": object_server.access_key, "secret": object_server.secret_key})
    )
    store = ["--endpoint-url", object_server.endpoint_url, "--credentials", str(credentials)]

    assert shard(folder, tmp_path / "local", "--maxcount", "8") == 0
    assert shard("s3://raw/pets", "s3://packed/p", "--maxcount", "8", *store) == 0
    assert shard("s3://packed/p", tmp_path / "again", "--maxcount", "8", *store) == 0

    assert contents(tmp_path / "again").keys() == contents(tmp_path / "local").keys()
    assert main(["copy", "s3://packed/p", str(tmp_path / "copy"), *store]) == 0
    assert contents(tmp_path / "copy") == contents(tmp_path / "local")
    secret = object_server.secret_key.encode()
    assert not any(secret in content for content in contents(tmp_path / "copy").values())


# -- options from files


def write_config(path: Path, **options: object) -> Path:
    path.write_text(json.dumps(options))
    return path


def test_later_files_win_and_the_command_line_wins_over_files(folder: Path, tmp_path: Path) -> None:
    first = write_config(tmp_path / "1.json", seed=1, maxcount=3, **{"key-style": "stem"})
    second = write_config(tmp_path / "2.json", maxcount=4, shuffle=True)
    target = tmp_path / "out"

    # The command line gives what is the default too: it wins all the same.
    arguments = ["-c", first, "-c", second, "--maxcount", "10", "--key-style", "path"]
    assert shard(folder, target, *arguments) == 0

    split = Metadata.load(target / "metadata.json").splits["train"]
    assert (split.seed, split.key_style, split.shuffle) == (1, "path", True)
    assert [one.num_samples for one in split.shards or ()] == [10, 10]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"maxcuont": 3}, "got the key 'maxcuont', expected one of anonymous"),
        ({"maxcount": "3"}, "key 'maxcount': got '3', expected an integer"),
        ({"maxcount": True}, "key 'maxcount': got True, expected an integer"),
        ({"shuffle": "maybe"}, "key 'shuffle': got 'maybe', expected true or false"),
        ({"maxsize": "big"}, "key 'maxsize': got 'big', expected a size"),
        ({"steps": ["Flip(1)"]}, "key 'steps': got .*expected one of Resize"),
        ({"key_style": "md5"}, "key 'key_style': got 'md5', expected one of path"),
    ],
)
def test_a03_wrong_keys_and_values_of_files_are_named(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    said: str,
) -> None:
    config = write_config(tmp_path / "c.json", **options)

    assert shard(folder, tmp_path / "out", "-c", config) == 1

    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a03_a_file_that_is_no_json_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text("maxcount=3 # not JSON")

    assert shard(folder, tmp_path / "out", "-c", tmp_path / "c.json") == 1

    assert f"{tmp_path / 'c.json'}, line 1: " in capsys.readouterr().err


@pytest.mark.parametrize(("value", "expected"), [("False", False), (False, False), ("on", True)])
def test_a01_false_is_false_in_whatever_form(
    folder: Path, tmp_path: Path, value: object, expected: bool
) -> None:
    config = write_config(tmp_path / "c.json", shuffle=value, in_memory=value)

    assert shard(folder, tmp_path / "out", "-c", config) == 0

    assert Metadata.load(tmp_path / "out" / "metadata.json").splits["train"].shuffle is expected


@pytest.mark.parametrize(
    ("size", "num_shards"),
    [("11e3", 7), ("11000", 7), ("11kB", 7), ("11KiB", 5), ("1GB", 1), ("none", 1)],
)
def test_a02_sizes_are_numbers_with_or_without_units(
    folder: Path, tmp_path: Path, size: str, num_shards: int
) -> None:
    assert shard(folder, tmp_path / "out", "--maxsize", size) == 0
    config = write_config(tmp_path / "c.json", maxsize=size)
    assert shard(folder, tmp_path / "file", "-c", config) == 0

    assert len(list((tmp_path / "out").glob("*.tar"))) == num_shards
    assert contents(tmp_path / "out") == contents(tmp_path / "file")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--maxsize", "3 apples"],
        ["--steps", "Resize(256),Flip(1)"],
        ["--key-style", "md5"],
        ["--payload", "gif"],
        ["--shuffle=maybe"],
        ["--seed", "x"],
        ["--splits", ""],
        ["--splits", ","],
    ],
)
def test_wrong_arguments_exit_with_2_before_work_starts(
    folder: Path, tmp_path: Path, wrong: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        shard(folder, tmp_path / "out", *wrong)

    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_no_readers_are_refused_by_the_name_that_was_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(folder, tmp_path / "out", "--readers", "0") != 0

    assert "--readers: got 0, expected 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_per_shard_and_maxcount_exclude_each_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(folder, tmp_path / "out", "--samples-per-shard", "3", "--maxcount", "3") == 2
    assert "expected one of the two" in capsys.readouterr().err

    assert shard(folder, tmp_path / "out", "--samples-per-shard", "8", "--maxsize", "1") == 0
    split = Metadata.load(tmp_path / "out" / "metadata.json").splits["train"]
    assert [one.num_samples for one in split.shards or ()] == [8, 8, 4]


# -- how it ends


@pytest.mark.parametrize(
    ("how", "num_processes"),
    [(signal.SIGKILL, 2), (signal.SIGINT, 2), (signal.SIGINT, 1)],
    ids=["killed, 2 processes", "Ctrl-C, 2 processes", "Ctrl-C, 1 process"],
)
def test_a_run_that_is_ended_leaves_nothing_and_the_next_one_finishes(
    folder: Path, tmp_path: Path, how: signal.Signals, num_processes: int
) -> None:
    (folder / "dog" / "99.JPEG").write_bytes(MARK)
    settings = ["--maxcount", "3", "--no-shuffle", "--function", FUNCTION]
    settings += ["--maxsize", "none"]
    assert shard(folder, tmp_path / "whole", *settings) == 0
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    target = tmp_path / "out"

    run = subprocess.Popen(
        [*COMMAND, str(folder), str(target), *settings, "--processes", str(num_processes)],
        cwd=ROOT,
        env=os.environ | {"BLOCKING_PIPE": str(pipe)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert pipe.read_bytes() == b"here"
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)

    assert alive == []
    assert run.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert said.decode().splitlines()[-1] == (
            "concurrent-dataloader: interrupted; repeat the command, and it goes on where it"
            " stopped"
        )
    begun, whole = contents(target), contents(tmp_path / "whole")
    assert "metadata.json" not in begun
    assert begun["train-000000.tar"] == whole["train-000000.tar"]
    assert all(whole[name] == raw for name, raw in begun.items() if not name.startswith("."))

    assert shard(folder, target, *settings) == 0
    assert contents(target) == whole


def test_a_process_that_is_killed_is_an_error_not_a_hang(folder: Path, tmp_path: Path) -> None:
    (folder / "dog" / "99.JPEG").write_bytes(MARK)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = [str(folder), str(tmp_path / "out"), "--function", FUNCTION, "--processes", "2"]

    run = subprocess.Popen(
        [*COMMAND, *arguments, "--maxcount", "50", "--maxsize", "none"],
        cwd=ROOT,
        env=os.environ | {"BLOCKING_PIPE": str(pipe)},
        stderr=subprocess.PIPE,
    )
    assert pipe.read_bytes() == b"here"
    for child in psutil.Process(run.pid).children(recursive=True):
        child.kill()
    _, said = run.communicate(timeout=60)

    assert run.returncode == 1
    assert "a process of --processes ended before its work was done" in said.decode()


def test_a_terminal_shows_a_bar(folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, str(folder), str(tmp_path / "out"), "--maxcount", "8"]

    with subprocess.Popen(command, cwd=ROOT, stderr=theirs) as run:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # the other side is closed
            pass
        os.close(ours)

    assert run.returncode == 0
    assert b"3/3" in shown
    assert b"20 samples" in shown


def test_a_second_run_at_the_same_time_leaves_the_first_alone(tmp_path: Path) -> None:
    first, second = ShardTarget(tmp_path, "train"), ShardTarget(tmp_path, "train")

    with first.lock():
        with pytest.raises(BlockingIOError, match="another run"), second.lock():
            pass
        assert (tmp_path / ".unfinished-train").is_dir()

    assert not (tmp_path / ".unfinished-train").exists()


def test_splits_with_different_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "set" / split, 9)
    absent = min((tmp_path / "set" / "val").iterdir())
    shutil.rmtree(absent)

    assert shard(tmp_path / "set", tmp_path / "out", "--splits", "train,val") == 1

    assert f"{absent.name!r} is in one of them only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_too_large_is_a_usage_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        shard(folder, tmp_path / "out", "--maxsize", "1e400")

    assert "expected less than 2**63 bytes" in capsys.readouterr().err


def test_a_target_that_is_taken_is_refused_before_anything_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(folder, tmp_path / "out") == 0
    shutil.rmtree(folder)

    assert shard(folder, tmp_path / "out", "--function", FUNCTION, "--seed", "5") == 1

    assert "already there, and 2 more files of split 'train'" in capsys.readouterr().err


def test_a_run_of_two_splits_goes_on_after_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "pets" / split)
    arguments = (tmp_path / "pets", tmp_path / "out", "--splits", "train,val")
    assert shard(*arguments) == 0
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert shard(tmp_path / "pets", tmp_path / "out", "--splits", "train") == 0
    capsys.readouterr()

    assert shard(*arguments) == 0

    assert "train: there already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole
    (tmp_path / "out" / "val-000000.tar").unlink()
    assert shard(*arguments) == 1, "all is there, but for what was removed"


def test_a_split_of_another_run_is_not_taken_for_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "pets" / split)
    target = tmp_path / "out"
    assert shard(tmp_path / "pets", target, "--splits", "train", "--seed", "1") == 0

    assert shard(tmp_path / "pets", target, "--splits", "train,val") == 1

    assert "already there" in capsys.readouterr().err
    assert not list(target.glob("val-*"))
