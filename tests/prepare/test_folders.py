"""Images sorted into class folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from concurrent_dataloader.devkit import GROUND_TRUTH
from concurrent_dataloader.labels import imagenet_classes
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.folders import sort_into_folders
from concurrent_dataloader.prepare.sources import open_source
from concurrent_dataloader.stores import open_writable_store
from tests.prepare.source_files import IMAGES, labels_of, make_tar, names_of, write_tree

LINES = [490, 361, 171]
VAL = {f"ILSVRC2012_val_{n:08d}.JPEG": IMAGES["cat/a.PNG"] + b"%d" % n for n in (1, 2, 3)}
WNIDS = [entry.wnid for entry in imagenet_classes()]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A flat validation set in its archive, beside its ground truth."""
    truth = "".join(f"{line}\n" for line in LINES).encode()
    files = {"ILSVRC2012_img_val.tar": make_tar(VAL), GROUND_TRUTH: truth}
    return write_tree(tmp_path / "flat", files)


def test_a_flat_validation_set_becomes_class_folders_with_the_same_labels(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "val"
    command = ["folders", str(flat), str(target), "--split", "val"]

    assert main(command) == 0

    assert capsys.readouterr().out.startswith(f"{target}: 3 images copied to folders of 1000 cl")
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.glob("*/*")}
    assert found == {
        f"{WNIDS[n - 1]}/{name}": VAL[name] for name, n in zip(VAL, LINES, strict=True)
    }
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(sorted(WNIDS)))
    before, after = open_source(flat, split="val"), open_source(target, class_map=classes)
    labels = dict(zip(names_of(before), labels_of(before), strict=True))
    for name, label in zip(names_of(after), labels_of(after), strict=True):
        assert labels[name.rpartition("/")[2]] == label

    assert main(command) == 0
    assert "0 images copied" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on(flat: Path, tmp_path: Path) -> None:
    source = open_source(flat, split="val")
    (tmp_path / "val").mkdir()
    target = open_writable_store(tmp_path / "val")
    sort_into_folders(source, target)
    victim = next((tmp_path / "val").glob("*/*2.JPEG"))
    victim.unlink()

    report = sort_into_folders(source, target, verify=True)

    assert (report.num_copied, report.num_skipped, report.num_failed) == (1, 2, 0)
    assert victim.read_bytes() == VAL[victim.name]


def test_a_tree_sorted_anew_is_the_same_to_torchvision(tmp_path: Path) -> None:
    tree = write_tree(
        tmp_path / "tree", {name: raw for name, raw in IMAGES.items() if "w" not in name}
    )
    (tmp_path / "out").mkdir()
    sort_into_folders(open_source(tree), open_writable_store(tmp_path / "out"))

    ours, theirs = ImageFolder(str(tmp_path / "out")), ImageFolder(str(tree))

    assert ours.classes == theirs.classes
    assert ours.targets == theirs.targets


def test_a_folder_into_which_nothing_came_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "tree", IMAGES)
    command = ["folders", str(tree), str(tmp_path / "new" / "val"), "--label-rule", "none"]

    assert main(command) == 1

    assert "its samples have no classes" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    target = open_writable_store("memory://folders")
    tree = write_tree(tmp_path / "tree", {"a/x/1.jpg": b"1", "a/y/1.jpg": b"2"})

    with pytest.raises(ValueError, match=r"'a/x/1\.jpg' and 'a/y/1\.jpg' would both be 'a/1\.jpg'"):
        sort_into_folders(open_source(tree), target)
    with pytest.raises(ValueError, match="its samples have no classes"):
        sort_into_folders(open_source(tree, label_rule="none"), target)
    with pytest.raises(ValueError, match="class 'a/x' cannot be the name of a folder"):
        sort_into_folders(open_source(tree, label_rule="regex:^(.*)/"), target)
    assert list(target.list()) == []
