"""ImageNet as torchvision and Kaggle lay it out is opened as it lies, with the right labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from concurrent_dataloader.datasets import open_dataset
from concurrent_dataloader.devkit import DEVKIT
from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.labels import imagenet_classes
from tests.datasets.conftest import encode_image

WNIDS = [entry.wnid for entry in imagenet_classes()]
# Source: the first lines of ILSVRC2012_validation_ground_truth.txt, and torchvision's labels.
IDS = [490, 361, 171, 822, 297]
TRAIN = sorted(WNIDS[number - 1] for number in IDS)
IMAGE = encode_image(0)


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def labels_of(dataset: Any) -> list[int]:
    return [dataset.label(position) for position in range(len(dataset))]


def test_a_flat_split_beside_one_of_classes_is_no_class(tmp_path: Path) -> None:
    """ "test" sorts before "train": its images in no folder had all of them taken for classes."""
    write_tree(tmp_path, {"test/1.jpg": IMAGE, "train/a/1.jpg": IMAGE, "train/b/1.jpg": IMAGE})

    assert labels_of(open_dataset(tmp_path)) == [0, 1]


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
