"""``metadata.json``: read back as it was written, the older layout, and what is none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import orjson
import pytest

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.prepare.metadata import (
    Metadata,
    ShardMetadata,
    SplitMetadata,
    checksum,
)

SHARDS = (
    ShardMetadata(name="train-000000.tar", num_samples=2, size_bytes=4096, md5="b" * 32),
    ShardMetadata(name="train-000001.tar", num_samples=1, size_bytes=2048, md5="a" * 32),
)
TRAIN = SplitMetadata(
    num_samples=3,
    shards=SHARDS,
    payload="raw",
    image_size=(256, 224),
    transforms=("Resize(256)",),
    shuffle=True,
    seed=7,
    label_space="sorted_wnid",
    classes=("n01440764", "n01443537"),
)
VAL = SplitMetadata(
    num_samples=1,
    shards=(ShardMetadata(name="val-0.tar", num_samples=1, size_bytes=2, md5="c" * 32),),
)


def make() -> Metadata:
    return Metadata(splits={}).with_split("val", VAL).with_split("train", TRAIN)


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    make().save(tmp_path / "metadata.json")

    assert Metadata.load(tmp_path / "metadata.json") == make()


def test_the_older_systems_keys_stand_at_the_top() -> None:
    content = json.loads(make().to_bytes())

    assert {
        key: content[key]
        for key in (
            "train_length",
            "validation_length",
            "format",
            "shuffle",
            "seed",
            "train_transform_pipeline",
            "validation_transform_pipeline",
            "image_quality",
        )
    } == {
        "train_length": 3,
        "validation_length": 1,
        "format": "raw",
        "shuffle": True,
        "seed": 7,
        "train_transform_pipeline": ["Resize(256)"],
        "validation_transform_pipeline": [],
        "image_quality": None,
    }
    assert content["classes"] == ["n01440764", "n01443537"]
    assert content["label_space"] == "sorted_wnid"


def test_the_checksum_is_the_md5_of_the_sorted_md5s() -> None:
    expected = hashlib.md5(b"a" * 32 + b"b" * 32 + b"c" * 32).hexdigest()

    assert checksum(["b" * 32, "c" * 32, "a" * 32]) == expected
    assert make().checksum == make().find_checksum() == expected
    assert json.loads(make().to_bytes())["checksum"] == expected


def test_a_split_can_be_left_out_again() -> None:
    rest = make().with_split("val", None)

    assert dict(rest.splits) == {"train": TRAIN}
    assert rest.checksum == checksum(["a" * 32, "b" * 32])


def test_the_older_layout_is_read() -> None:
    old = {
        "train_length": 1281167,
        "validation_length": 50000,
        "format": "img",
        "shuffle": True,
        "train_transform_pipeline": ["Resize(256)"],
        "validation_transform_pipeline": [],
        "seed": 12,
        "image_quality": 95,
        "checksum": "d" * 32,
    }

    metadata = Metadata.from_bytes(json.dumps(old).encode(), "m")

    assert metadata.version is None
    assert metadata.checksum == "d" * 32
    assert metadata.find_checksum() is None
    train, validation = metadata.splits["train"], metadata.splits["validation"]
    assert (train.num_samples, train.seed, train.shuffle, train.shards) == (1281167, 12, True, None)
    assert (train.payload, train.image_quality, train.transforms) == ("jpeg", 95, ("Resize(256)",))
    assert (validation.num_samples, validation.transforms) == (50000, ())


def test_the_oldest_layout_has_one_pipeline_for_all() -> None:
    old = {"train_length": 2, "format": "tensor", "transform_pipeline": ["CenterCrop(3)"]}

    train = Metadata.from_bytes(json.dumps(old).encode(), "m").splits["train"]

    assert (train.payload, train.transforms) == ("tensor", ("CenterCrop(3)",))


def test_a_key_of_a_later_release_is_ignored() -> None:
    content = json.loads(make().to_bytes())
    content["splits"]["train"]["later"] = 1

    assert Metadata.from_bytes(orjson.dumps(content), "m") == make()


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b"{}",
        b'{"version": 2, "splits": {}}',
        b'{"version": 1, "splits": {"train": {}}}',
        b'{"version": 1, "splits": []}',
        b'{"version": 1}',
    ],
)
def test_what_is_no_metadata_is_refused(bad: bytes) -> None:
    with pytest.raises(IndexFormatError, match=r"^x/metadata\.json: no metadata of packed data"):
        Metadata.from_bytes(bad, "x/metadata.json")


def test_counts_that_do_not_add_up_are_refused() -> None:
    wrong = dataclasses.replace(TRAIN, num_samples=4)

    with pytest.raises(IndexFormatError, match="hold 3 samples, and it says 4"):
        Metadata.from_bytes(Metadata(splits={"train": wrong}).to_bytes(), "m")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metadata\.json: no such file, expected"):
        Metadata.load(tmp_path / "metadata.json")
