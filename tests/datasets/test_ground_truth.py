"""ImageNet as torchvision and Kaggle lay it out is opened as it lies, with the right labels."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from concurrent_dataloader.datasets import S3Dataset, ScratchDataset, open_dataset
from concurrent_dataloader.devkit import DEVKIT, GROUND_TRUTH, KAGGLE_SOLUTION
from concurrent_dataloader.errors import ClassesFormatError, IndexFormatError, UnknownClassError
from concurrent_dataloader.labels import LabelSpace, imagenet_classes
from concurrent_dataloader.prepare.sources import open_source
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.conftest import encode_image

WNIDS = [entry.wnid for entry in imagenet_classes()]
# Source: the first lines of ILSVRC2012_validation_ground_truth.txt, and torchvision's labels.
IDS = [490, 361, 171, 822, 297]
LABELS = [65, 970, 230, 809, 516]
VAL = [f"ILSVRC2012_val_{number:08}" for number in range(1, 6)]
TRAIN = sorted(WNIDS[number - 1] for number in IDS)
IMAGE = encode_image(0)
SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"{name},{WNIDS[number - 1]} 1 2 3 4\n" for name, number in zip(VAL, IDS, strict=True)
)
LINES = "".join(f"{number}\n" for number in IDS)


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def make_kit() -> bytes:
    synsets = np.zeros((1000, 1), [("ILSVRC2012_ID", object), ("WNID", object)])
    for row, wnid in enumerate(WNIDS):
        synsets[row, 0] = (row + 1, wnid)
    meta, file = io.BytesIO(), io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, raw in (("meta.mat", meta.getvalue()), (GROUND_TRUTH, LINES.encode())):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return file.getvalue()


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    data = "ILSVRC/Data/CLS-LOC"
    files = {f"{data}/train/{wnid}/{wnid}_{n}.JPEG": IMAGE for wnid in TRAIN for n in (1, 2)}
    files |= {f"{data}/val/{name}.JPEG": IMAGE for name in VAL}
    files |= {f"{data}/test/ILSVRC2012_test_00000001.JPEG": IMAGE}
    files |= {f"ILSVRC/Annotations/CLS-LOC/val/{name}.xml": b"<x/>" for name in VAL}
    listed = "".join(f"{name} {number}\n" for number, name in enumerate(VAL, start=1))
    files |= {"ILSVRC/ImageSets/CLS-LOC/val.txt": listed.encode()}
    files |= {KAGGLE_SOLUTION: SOLUTION.encode(), "LOC_synset_mapping.txt": b""}
    return write_tree(tmp_path / "kaggle", files)


def labels_of(dataset: Any) -> list[int]:
    return [dataset.label(position) for position in range(len(dataset))]


# Kaggle's layout


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_layout_is_opened_by_split_w13(kaggle: Path, below: str) -> None:
    """Train and validation images were mixed in one class, with label 0."""
    root = kaggle / below

    whole, train, val = (open_dataset(root, split=split) for split in (None, "train", "val"))

    assert labels_of(train) == labels_of(whole) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert labels_of(val) == LABELS
    assert val[0][1] == LABELS[0]
    with contextlib.closing(open_source(kaggle, split="val")) as source:
        assert [source.label(position) for position in range(5)] == LABELS
    assert len(open_dataset(root, split="test")) == 1
    with pytest.raises(FileNotFoundError, match="has no folder 'dev'"):
        open_dataset(root, split="dev")


def test_validation_images_take_the_labels_of_training_classes(kaggle: Path) -> None:
    train = open_dataset(kaggle, split="train")

    val = open_dataset(kaggle, split="val", classes=train.classes)

    assert train.classes is not None
    names = [train.classes.name(label) for label in labels_of(val)]
    known = dict(imagenet_classes())
    assert names == [known[WNIDS[number - 1]] for number in IDS]


def test_kaggles_layout_in_a_bucket_is_opened_by_split(
    kaggle: Path, tmp_path: Path, object_server: ObjectServer
) -> None:
    # More annotations than a page of the listing has, and all before the images.
    notes = {f"kaggle/ILSVRC/Annotations/{n:04}.xml": b"" for n in range(1200)}
    object_server.put_objects("sets", notes)
    object_server.put_folder("sets", kaggle, prefix="kaggle/")
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    (tmp_path / "credentials.json").write_text(json.dumps(keys))
    reach: dict[str, Any] = {
        "s3_credential_file": tmp_path / "credentials.json",
        "endpoint_url": object_server.endpoint_url,
    }

    for url in (
        "s3://sets/kaggle",
        "s3://sets/kaggle/ILSVRC/",
        "s3://sets/kaggle/ILSVRC/Data/CLS-LOC",
    ):
        train = open_dataset(url, **reach)
        val = open_dataset(url, split="val", **reach)

        assert isinstance(train, S3Dataset)
        assert labels_of(train) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert labels_of(val) == LABELS


def test_a_flat_split_beside_one_of_classes_is_no_class(tmp_path: Path) -> None:
    """ "test" sorts before "train": its images in no folder had all of them taken for classes."""
    write_tree(tmp_path, {"test/1.jpg": IMAGE, "train/a/1.jpg": IMAGE, "train/b/1.jpg": IMAGE})

    assert labels_of(open_dataset(tmp_path)) == [0, 1]


def test_splits_beside_a_folder_of_other_things_are_no_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train/a/1.jpg": IMAGE, "train/b/1.jpg": IMAGE, "val/a/1.jpg": IMAGE})
    write_tree(tmp_path, {"ILSVRC2012_devkit_t12/readme.txt": b"x"})

    assert labels_of(open_dataset(tmp_path)) == [0, 1]


# A flat folder of validation images


@pytest.mark.parametrize(
    "name",
    [
        DEVKIT,
        GROUND_TRUTH,
        f"ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}",
        KAGGLE_SOLUTION,
        f"val/{GROUND_TRUTH}",
    ],
)
def test_flat_validation_images_have_the_classes_that_lie_beside(tmp_path: Path, name: str) -> None:
    raw = {DEVKIT: make_kit(), KAGGLE_SOLUTION: SOLUTION.encode()}.get(name, LINES.encode())
    write_tree(tmp_path, {f"val/{image}.JPEG": IMAGE for image in VAL} | {name: raw})
    index = tmp_path / "index.json"
    index.write_text(json.dumps([f"val/{VAL[2]}.JPEG", f"val/{VAL[0]}.JPEG"]))

    by_hand = ScratchDataset(tmp_path / "val")
    found = open_dataset(tmp_path, split="val", limit=3)
    indexed = ScratchDataset(tmp_path, index)

    assert labels_of(by_hand) == LABELS
    assert labels_of(found) == LABELS[:3]
    assert labels_of(indexed) == [LABELS[2], LABELS[0]]
    assert by_hand.classes is not None
    assert by_hand.classes.label_space is LabelSpace.SORTED_WNID
    assert by_hand.classes.count == 1000


def test_flat_validation_images_without_ground_truth_are_warned_of(tmp_path: Path) -> None:
    write_tree(tmp_path / "val", {f"{image}.JPEG": IMAGE for image in VAL})
    write_tree(tmp_path / "train", {f"{wnid}/1.JPEG": IMAGE for wnid in TRAIN})

    with pytest.warns(UserWarning, match=r"none of LOC_val_solution.csv, .*: each label is -1;"):
        assert ScratchDataset(tmp_path / "val").labels is None
    assert ScratchDataset(tmp_path / "val", missing_label=None)[0].mode == "RGB"
    train = open_dataset(tmp_path)
    with pytest.raises(ClassesFormatError, match=r"to find the classes given by; put one there"):
        open_dataset(tmp_path, split="val", classes=train.classes)


def test_a_ground_truth_of_other_images_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "val", {f"{image}.JPEG": IMAGE for image in VAL})
    (tmp_path / GROUND_TRUTH).write_text("490\n361\n")
    with pytest.raises(ClassesFormatError, match="from 1 to 5, expected each from 1 to 2"):
        ScratchDataset(tmp_path / "val")

    (tmp_path / GROUND_TRUTH).unlink()
    (tmp_path / KAGGLE_SOLUTION).write_text(SOLUTION.replace(VAL[3], "ILSVRC2012_val_00000099"))
    with pytest.raises(UnknownClassError, match=VAL[3]):
        ScratchDataset(tmp_path / "val")


# torchvision's layout


def test_torchvisions_root_with_its_archives_is_a_folder_of_images(tmp_path: Path) -> None:
    """The archives were taken for shards, and the root for ambiguous."""
    archives = [DEVKIT, "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]
    write_tree(tmp_path, {f"train/{wnid}/1.JPEG": IMAGE for wnid in TRAIN})
    write_tree(tmp_path, {f"val/{wnid}/1.JPEG": IMAGE for wnid in TRAIN})
    write_tree(tmp_path, dict.fromkeys([*archives, "meta.bin"], b"x"))

    opened = [open_dataset(tmp_path, split=split) for split in (None, "val")]

    assert [labels_of(dataset) for dataset in opened] == [[0, 1, 2, 3, 4]] * 2
    only = write_tree(tmp_path / "only", dict.fromkeys(archives, b"x"))
    with pytest.raises(IndexFormatError, match=r"original archives, .*concurrent-dataloader shard"):
        open_dataset(only)
