"""A function over every sample of a set of shards."""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from concurrent_dataloader.errors import ChecksumError, LoaderError, ShardFormatError
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.map import map_shards
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata
from concurrent_dataloader.prepare.reshard import SplitAt
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores import Credentials, open_writable_store
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.shard_sets import digests, flat, flip_byte, make_samples, members, write_set

SAMPLES = make_samples(20)

FUNCTIONS = """
import os

def keep(key, fields):
    return fields

def flip(key, fields):
    return {**fields, "jpg": fields["jpg"][::-1], "txt": key.encode()}

def drop_odd(key, fields):
    return None if int(key[-1]) % 2 else fields

def drop_all(key, fields):
    return None

def double(key, fields):
    return [{"jpg": fields["jpg"]}, {"jpg": b"again", "cls": b"2", "__key__": f"second/{key}"}]

def one_key(key, fields):
    return {"jpg": b"", "__key__": "same"}

def fail(key, fields):
    if key.endswith("00013"):
        raise KeyError("no such thing")
    return fields

def die(key, fields):
    os._exit(3)

def number(key, fields):
    return 17

def text(key, fields):
    return {"jpg": "text"}

def upper(key, fields):
    return {"JPG": b""}

def bad_label(key, fields):
    return {"jpg": b"", "cls": b"3"}

def nothing(key, fields):
    return {}

def escape(key, fields):
    return {"jpg": b"", "__key__": "../x"}

not_callable = 5
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "functions_of_a_user.py"
    path.write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("functions_of_a_user", None)
    importlib.invalidate_caches()


@pytest.fixture
def source(tmp_path: Path, module: Path) -> Path:
    folder = tmp_path / "source"
    write_set(open_writable_store(folder), [SAMPLES[:8], SAMPLES[8:16], SAMPLES[16:]])
    return folder


def run(source: Path, target: Path, function: str, **how: Any) -> list[list[tuple[str, bytes]]]:
    map_shards(SplitAt(str(source)), target, f"functions_of_a_user:{function}", **how)
    return [members(path.read_bytes()) for path in sorted(target.glob("*.tar"))]


def test_a_function_that_changes_nothing_gives_the_same_shards(
    source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "new", "keep")

    old, new = digests(source), digests(tmp_path / "new")
    shards = [name for name in old if name.endswith(".tar")]
    assert len(shards) == 3
    assert [new[name] for name in shards] == [old[name] for name in shards]
    assert new["train-index.npz"] == old["train-index.npz"]


def test_new_content_and_new_fields_are_written(source: Path, tmp_path: Path) -> None:
    shards = run(source, tmp_path / "new", "flip")

    expected = [
        (key, {**fields, "jpg": fields["jpg"][::-1], "txt": key.encode()})
        for key, fields in SAMPLES
    ]
    assert shards == [flat(expected[:8]), flat(expected[8:16]), flat(expected[16:])]


def test_none_drops_a_sample_and_shards_keep_their_numbers(source: Path, tmp_path: Path) -> None:
    shards = run(source, tmp_path / "new", "drop_odd")

    assert shards == [flat(SAMPLES[0:8:2]), flat(SAMPLES[8:16:2]), flat(SAMPLES[16::2])]
    metadata = Metadata.load(tmp_path / "new/metadata.json").splits["train"]
    assert metadata.num_samples == 10
    assert metadata.function == "functions_of_a_user:drop_odd"


def test_a_list_gives_several_samples(source: Path, tmp_path: Path) -> None:
    shards = run(source, tmp_path / "new", "double")

    key, fields = SAMPLES[0]
    assert shards[0][:3] == [
        (f"{key}_0.jpg", fields["jpg"]),
        (f"second/{key}.cls", b"2"),
        (f"second/{key}.jpg", b"again"),
    ]
    index = ShardIndex.load(tmp_path / "new/train-index.npz")
    assert len(index) == 40
    assert index.labels is not None
    assert index.labels[:4].tolist() == [-1, 2, -1, 2]
    raw = (tmp_path / "new/train-000002.tar").read_bytes()
    assert raw[slice(*index.payload(39))] == b"again"


def test_any_number_of_processes_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one", "flip")
    run(source, tmp_path / "two", "flip", num_processes=2)

    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_names_shard_and_key(source: Path, tmp_path: Path, num_processes: int) -> None:
    with pytest.raises(
        LoaderError,
        match=r"train-000001.tar: sample 'n1/img 00013': function .*: KeyError: 'no such thing'",
    ):
        run(source, tmp_path / "new", "fail", num_processes=num_processes)

    assert not (tmp_path / "new/train-000001.tar").exists()
    assert not (tmp_path / "new/metadata.json").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", "gave a int, expected a dict, a list of them, or None"),
        ("text", "gave str as field 'jpg', expected bytes"),
        ("upper", "no upper case in a field"),
        ("bad_label", "gave b'3' as field 'cls', expected 0 to 2"),
        ("nothing", "got no field, expected at least one"),
        ("escape", r"'../x': an unsafe member name"),
    ],
)
def test_what_cannot_be_written_names_shard_and_key(
    source: Path, tmp_path: Path, function: str, message: str
) -> None:
    with pytest.raises(LoaderError, match=rf"train-000000.tar: sample 'n0/img 00000'.*{message}"):
        run(source, tmp_path / "new", function)


def test_two_samples_of_one_key_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardFormatError, match=r"train-000000.tar: key 'same' stands in"):
        run(source, tmp_path / "new", "one_key")
    assert not (tmp_path / "new").exists()


def test_a_set_of_which_nothing_is_left_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dropped all samples"):
        run(source, tmp_path / "new", "drop_all")
    assert not (tmp_path / "new").exists()


def test_a_function_that_fails_in_the_first_shard_leaves_nothing_behind(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "new"
    with pytest.raises(LoaderError, match="expected bytes"):
        run(source, target, "text")
    assert not target.parent.exists()

    with pytest.raises(LoaderError, match="no such thing"):
        run(source, target, "fail")
    assert (target / ".unfinished-train" / "train-000000.tar.json").exists(), "to go on after"


def test_what_an_earlier_run_left_stays_when_another_one_is_refused(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "new", "flip", on_shard=stop_at_two)
    before = sorted((tmp_path / "new").rglob("*"))

    with pytest.raises(FileExistsError, match="--overwrite"):
        run(source, tmp_path / "new", "keep")

    assert sorted((tmp_path / "new").rglob("*")) == before


def test_a_process_that_dies_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="ended before its work was done"):
        run(source, tmp_path / "new", "die", num_processes=2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("functions_of_a_user", "expected 'module:function'"),
        ("no_such_module:f", "cannot be imported"),
        ("functions_of_a_user:f", "cannot be imported"),
        ("functions_of_a_user:not_callable", "a int; expected a function"),
    ],
)
def test_a_function_that_is_none_is_refused(
    source: Path, tmp_path: Path, function: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        map_shards(SplitAt(str(source)), tmp_path / "new", function)


def stop_at_two(shard: ShardMetadata, num_shards: int) -> None:
    if shard.name == "train-000001.tar":
        raise KeyboardInterrupt


def test_an_interrupted_run_is_finished_by_the_next(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", "flip")
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "new", "flip", on_shard=stop_at_two)
    written = (tmp_path / "new/train-000000.tar").stat().st_mtime_ns

    run(source, tmp_path / "new", "flip")

    assert digests(tmp_path / "new") == digests(tmp_path / "whole")
    assert (tmp_path / "new/train-000000.tar").stat().st_mtime_ns == written


def test_shards_of_a_function_and_of_its_mended_form_are_never_mixed(
    source: Path, tmp_path: Path, module: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "new", "flip", on_shard=stop_at_two)
    module.write_text(FUNCTIONS + "\n# mended\n")

    with pytest.raises(FileExistsError, match="--overwrite"):
        run(source, tmp_path / "new", "flip")


def test_the_source_is_never_overwritten(source: Path) -> None:
    before = digests(source)

    with pytest.raises(ValueError, match="which is the source too"):
        run(source, source, "keep", overwrite=True)

    assert digests(source) == before


def test_a_bucket_is_mapped_as_a_folder_is(
    object_server: ObjectServer, source: Path, tmp_path: Path
) -> None:
    object_server.create_bucket("data")
    object_server.put_folder("data", source)
    open_root = functools.partial(
        open_writable_store,
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )
    run(source, tmp_path / "new", "flip")

    for fails in ("text", "drop_all"):
        with pytest.raises((LoaderError, ValueError)):
            map_shards(
                SplitAt("s3://data"),
                "s3://data/new",
                f"functions_of_a_user:{fails}",
                open_root=open_root,
            )
    remote = open_root("s3://data/new")
    assert list(remote.list()) == [], "nothing to go on after"
    map_shards(
        SplitAt("s3://data"), "s3://data/new", "functions_of_a_user:flip", open_root=open_root
    )

    found = {info.key: hashlib.md5(remote.get(info.key)).hexdigest() for info in remote.list()}
    remote.close()
    assert found == digests(tmp_path / "new")


def test_the_command_maps_with_a_function_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(open_writable_store(tmp_path / "source"), [SAMPLES])
    (tmp_path / "here").mkdir()
    (tmp_path / "here/functions_beside.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [*sys.path])

    arguments = ["map", str(tmp_path / "source"), str(tmp_path / "new"), "--processes", "1"]
    status = main([*arguments, "--function", "functions_beside:drop_odd"])

    out, err = capsys.readouterr()
    assert (status, out) == (0, f"{tmp_path / 'new'}: train, 10 samples in 1 shards\n")
    assert "train-000000.tar of 1: 10 samples" in err
    assert main([*arguments, "--function", "functions_beside:nope"]) == 2
    assert "function: got 'functions_beside:nope'" in capsys.readouterr().err


def test_a_changed_byte_reaches_no_function(source: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(source / "train-index.npz")
    flip_byte(source / "train-000001.tar", index.payload(10).start)

    with pytest.raises(ChecksumError, match=r"train-000001\.tar \[.*: got bytes of CRC-32C"):
        run(source, tmp_path / "new", "keep")

    assert not (tmp_path / "new" / "train-000001.tar").exists()


def test_what_functions_make_gets_checksums(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "new", "keep")

    index = ShardIndex.load(tmp_path / "new" / "train-index.npz")
    for position in range(len(index)):
        raw = (tmp_path / "new" / index.shard_of(position).name).read_bytes()
        assert index.extent_crc(position) == google_crc32c.value(
            raw[slice(*index.extent(position))]
        )
        assert index.payload_crc(position) == google_crc32c.value(
            raw[slice(*index.payload(position))]
        )
