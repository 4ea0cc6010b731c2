"""Targets in what is read: refused by every verb, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.nesting import refuse_target_in_samples, refuse_target_in_source
from tests.prepare.source_files import IMAGES, make_tar, write_tree

TREE = {f"{split}/{name}": raw for split in ("train", "val") for name, raw in IMAGES.items()}


def is_refused(root: Path, target: str, splits: Sequence[str] = (), *, is_taken: bool) -> bool:
    try:
        refuse_target_in_samples(str(root), str(root / target), splits=splits, is_taken=is_taken)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("set", "set", "which is the source too"),
        ("set", "other/../set/", "which is the source too"),
        ("set", "link", "which is the source too"),
        ("set", "set/new", "which lies in the source 'set'"),
        ("set", "link/new", "which lies in the source 'set'"),
        ("s3://a/set/", "s3://a/set", "which is the source too"),
        ("s3://a/set", "s3://a/set/new", "which lies in the source"),
        ("s3://a", "s3://a/new", "which lies in the source"),
        ("/", "/new", "which lies in the source"),
    ],
)
def test_a_target_that_is_the_source_or_lies_in_it_is_refused(
    source: str, target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to("set")

    with pytest.raises(ValueError, match=message):
        refuse_target_in_source(source, target)


@pytest.mark.parametrize(
    ("source", "target"),
    [("set", "set2"), ("set/a", "set"), ("s3://a/set", "s3://a/set2"), ("s3://a", "set")],
)
def test_a_target_beside_the_source_is_not_refused(source: str, target: str) -> None:
    refuse_target_in_source(source, target)
    refuse_target_in_samples(source, target, is_taken=True)


def test_a_bucket_may_hold_shards_below_shards_of_which_they_are_no_part() -> None:
    refuse_target_in_source("s3://a", "s3://a/new", in_buckets=False)
    for source, target in (("s3://a", "s3://a/"), ("set", "set/new")):
        with pytest.raises(ValueError, match="got"):
            refuse_target_in_source(source, target, in_buckets=False)


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_target_among_class_folders_would_be_a_class(tmp_path: Path, is_taken: bool) -> None:
    root = write_tree(tmp_path / "set", TREE)

    assert is_refused(root / "train", "shards", is_taken=is_taken)
    assert is_refused(root / "train", "cat/shards", is_taken=is_taken)
    assert is_refused(root, "shards", is_taken=is_taken)


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_target_beside_the_folders_of_splits_is_no_part_of_them(
    tmp_path: Path, is_taken: bool
) -> None:
    root = write_tree(tmp_path / "set", TREE)

    assert not is_refused(root, "shards", ["train", "val"], is_taken=is_taken)
    assert is_refused(root, "val/shards", ["train", "val"], is_taken=is_taken)
    assert is_refused(root, "validation", ["train", "val"], is_taken=is_taken)
    assert is_refused(root, "shards", ["train", "test"], is_taken=is_taken), "test is all of it"


def test_a_target_below_archives_is_no_part_of_them_unless_it_is_taken_for_samples(
    tmp_path: Path,
) -> None:
    root = write_tree(tmp_path / "set", {"ILSVRC2012_img_val.tar": make_tar(IMAGES)})

    assert not is_refused(root, "shards", ["val"], is_taken=False)
    assert is_refused(root, "shards", ["val"], is_taken=True)
    assert is_refused(root, "val", ["val"], is_taken=False), "it would be read in their place"


def test_kaggles_layout_is_read_in_one_folder_only(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", {f"ILSVRC/Data/CLS-LOC/{k}": v for k, v in TREE.items()})

    assert not is_refused(root, "shards", ["train"], is_taken=True)
    assert is_refused(root, "ILSVRC/Data/CLS-LOC/shards", ["train"], is_taken=False)


def test_a_bucket_may_hold_both_where_one_is_not_taken_for_the_other() -> None:
    refuse_target_in_samples("s3://a", "s3://a/shards", is_taken=False)
    refuse_target_in_samples("s3://a", "s3://a/shards", splits=["train"], is_taken=True)
    for splits, target in ([], "s3://a/shards"), (["train"], "s3://a/train/shards"):
        with pytest.raises(ValueError, match="which lies in the source"):
            refuse_target_in_samples("s3://a", target, splits=splits, is_taken=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shard", "images", "images/new"], "got 'images/new', which lies in the source 'images'"),
        (["lmdb", "images", "images"], "got 'images', which is the source too"),
        (["lmdb", "images", "images/new"], "got 'images/new', which lies in"),
        (["folders", "images", "images/new"], "got 'images/new', which lies in"),
        (["copy", "images", "images/new"], "got 'images/new', which lies in"),
        (["copy", "images", "images"], "got 'images', which is the source too"),
        (["reshard", "shards", "shards/new"], "got 'shards/new', which lies in"),
        (["reshard", "shards", "link", "shards/new"], "got 'shards/new', which lies in"),
        (["map", "shards", "shards/new", "--function", "os.path:join"], "'shards/new', which lies"),
    ],
)
def test_each_verb_refuses_before_anything_is_written(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "images", IMAGES)
    assert main(["shard", "images", "shards"]) == 0
    (tmp_path / "link").symlink_to("shards")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()

    status = main(arguments)

    assert status == 1
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
