"""What lies at a path or URL is found out, or the error says what was looked for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from concurrent_dataloader.datasets import (
    S3Dataset,
    ScratchDataset,
    ShardDataset,
    open_dataset,
)
from concurrent_dataloader.datasets.detection import open_lmdb_split
from concurrent_dataloader.datasets.lmdb import LmdbDataset
from concurrent_dataloader.errors import (
    IndexFormatError,
    KeyNotFoundError,
    MissingSplitError,
    ShardFormatError,
)
from concurrent_dataloader.formats.tfrecord import TFRecordWriter
from concurrent_dataloader.prepare.__main__ import main as pack
from concurrent_dataloader.shard_index import Shard, ShardIndexBuilder
from concurrent_dataloader.stores import open_store
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.conftest import IMAGES
from tests.datasets.test_lmdb import write_database
from tests.datasets.test_shard_opening import write_split


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_images(root: Path) -> Path:
    for key, raw in IMAGES.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(raw)
    return root


def write_records(root: Path) -> Path:
    file = io.BytesIO()
    frame = TFRecordWriter(file).write(b"")
    builder = ShardIndexBuilder("tfrecord")
    builder.add_sample("a.jpg", frame, frame, 0)
    builder.add_shard(Shard("train-00000-of-00001", frame.stop))
    root.mkdir(exist_ok=True)
    (root / "train-00000-of-00001").write_bytes(file.getvalue())
    builder.build().save(root / "train-index.npz")
    return root


@pytest.fixture
def reach(object_server: ObjectServer, tmp_path: Path) -> dict[str, Any]:
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    file = write_json(tmp_path / "credentials.json", keys)
    return {"s3_credential_file": file, "endpoint_url": object_server.endpoint_url}


# A folder


def test_class_folders_and_indexes_of_images_are_found(image_folder: Path) -> None:
    index = write_json(image_folder / "index.json", sorted(IMAGES))

    opened = [open_dataset(image_folder), open_dataset(str(index)), open_dataset(index.as_uri())]

    assert [len(dataset) for dataset in opened] == [7, 7, 7]
    assert {type(dataset) for dataset in opened} == {ScratchDataset}


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cat" / "1.png").write_bytes(IMAGES["cat-tail/0.png"])

    assert len(open_dataset(tmp_path)) == 7
    assert len(open_dataset(tmp_path, split="val")) == 1
    assert len(open_dataset(tmp_path / "val", split="val")) == 1
    with pytest.raises(FileNotFoundError, match="has no folder 'test'"):
        open_dataset(tmp_path, split="test")


def test_classes_that_are_called_like_splits_stay_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(IMAGES["cat/1.jpg"])

    dataset = open_dataset(tmp_path)

    assert [dataset[i][1] for i in range(len(dataset))] == [0, 1]


def test_shards_are_found_by_their_index_and_metadata(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 5)
    write_split(tmp_path, "val", 3)
    write_json(tmp_path / "metadata.json", {"train_length": 5, "validation_length": 3})

    opened = [
        open_dataset(tmp_path),
        open_dataset(tmp_path, split="val"),
        open_dataset(tmp_path / "val-index.npz"),
        open_dataset(f"{tmp_path}/train-{{000000..000001}}.tar"),
        open_dataset(f"{tmp_path}/train-000002.tar"),
    ]

    assert [len(dataset) for dataset in opened] == [5, 3, 3, 4, 1]
    assert {type(dataset) for dataset in opened} == {ShardDataset}


def test_shards_in_folders_of_splits_are_found(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 4, folder="train")
    write_split(tmp_path, "val", 2, folder="val")

    assert [len(open_dataset(tmp_path)), len(open_dataset(tmp_path, split="val"))] == [4, 2]


def test_tfrecords_are_found_by_their_names(tmp_path: Path) -> None:
    dataset = open_dataset(write_records(tmp_path / "records"))

    assert isinstance(dataset, ShardDataset)
    assert dataset.shard_index.kind == "tfrecord"
    (tmp_path / "records" / "train-index.npz").unlink()
    with pytest.raises(KeyNotFoundError, match="1 shards such as train-00000-of-00001 without an"):
        open_dataset(tmp_path / "records")


# A database


def test_databases_are_found_by_their_split(tmp_path: Path) -> None:
    write_database(tmp_path / "ILSVRC-train.lmdb", [IMAGES["cat/1.jpg"]] * 3)
    write_database(tmp_path / "ILSVRC-val.lmdb", [IMAGES["cat/1.jpg"]] * 2)
    (tmp_path / "one").mkdir()
    write_database(tmp_path / "one" / "data.mdb", [IMAGES["cat/1.jpg"]])
    reach = {"s3_credential_file": None, "endpoint_url": None, "index_file": None}

    opened = [
        open_dataset(tmp_path),
        open_dataset(tmp_path, split="val", limit=1, **reach),
        open_dataset(tmp_path / "ILSVRC-val.lmdb"),
        open_dataset(tmp_path / "one"),
    ]

    assert [len(dataset) for dataset in opened] == [3, 1, 2, 1]
    assert {type(dataset) for dataset in opened} == {LmdbDataset}
    assert opened[0][1][0].mode == "RGB"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: holds no LMDB database; write one with"):
        open_lmdb_split(tmp_path / "empty", "train", {})
    with pytest.raises(FileNotFoundError, match="no database of split 'test' among ILSVRC-train"):
        open_dataset(tmp_path, split="test")


# Nothing, or too much


def test_shards_of_a_run_that_has_not_ended_are_not_to_be_indexed(
    tmp_path: Path, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".unfinished-train").mkdir()
    (tmp_path / ".unfinished-train" / "plan.json").write_text("{}")
    (tmp_path / "train-000000.tar").write_bytes(b"")
    names = ["train-000000.tar", ".unfinished-train/plan.json"]
    object_server.put_objects("bucket", dict.fromkeys(names, b"{}"))
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ShardFormatError, match="holds an unfinished run of split 'train'"):
        open_dataset(tmp_path)
    with pytest.raises(ShardFormatError, match="holds an unfinished run of split 'train'"):
        open_dataset("s3://bucket")


@pytest.mark.parametrize(
    ("name", "error"),
    [("nowhere", FileNotFoundError), ("README.txt", ValueError), ("ftp://host/x", ValueError)],
)
def test_what_is_no_data_set_says_what_was_looked_for(
    tmp_path: Path, name: str, error: type[Exception]
) -> None:
    (tmp_path / "README.txt").write_text("no data set")
    path = name if "://" in name else str(tmp_path / name)

    with pytest.raises(error, match=r"expected .*shards of tar .*LMDB .*images .*a JSON index"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        ([], "holds nothing"),
        (["notes.txt"], "holds notes.txt"),
        (["empty/"], "holds empty"),
        (["metadata.json"], "holds metadata.json, but no shards"),
    ],
)
def test_an_empty_root_says_what_was_looked_for(
    tmp_path: Path, names: list[str], holds: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in names:
        (root / name).mkdir() if name.endswith("/") else (root / name).write_text("{}")

    with pytest.raises(IndexFormatError, match=f"{holds}, looked for shards of tar"):
        open_dataset(root)


def test_an_ambiguous_root_says_what_was_found(tmp_path: Path) -> None:
    write_split(write_images(tmp_path), "train", 2)

    with pytest.raises(
        IndexFormatError, match=r"holds shards \(train-index.npz\) and folders of images \(Dog/10"
    ):
        open_dataset(tmp_path)


def test_a_bucket_without_a_name_is_no_folder() -> None:
    for open_it in (lambda: S3Dataset(""), lambda: open_dataset("s3://")):
        with pytest.raises(ValueError, match="bucket"):
            open_it()


# A bucket


def test_buckets_are_looked_into_by_a_small_listing(
    tmp_path: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    object_server.put_folder("sets", write_images(tmp_path / "images"), prefix="images/")
    object_server.put_folder("sets", tmp_path / "images", prefix="both/train/")
    object_server.put_folder("sets", tmp_path / "images", prefix="both/val/")
    object_server.put_folder("sets", write_split(tmp_path / "tars", "train", 5), prefix="tars/")
    object_server.put_objects(
        "sets", {"mixed/a/1.jpg": b"", "mixed/x.tar": b"", "lmdb/a.lmdb": b""}
    )

    def open_it(url: str, **options: Any) -> Any:
        return open_dataset(url, **reach, **options)

    opened = [
        open_it("s3://sets/images"),
        open_it("s3://sets/images/", limit=2),
        open_it("s3://sets/both", split="val"),
        open_it("s3://sets/tars/"),
        open_it("s3://sets/tars/train-index.npz"),
        open_it("s3://sets/tars/train-{000000..000001}.tar"),
    ]

    assert [len(dataset) for dataset in opened] == [7, 2, 7, 5, 5, 4]
    assert [type(dataset) for dataset in opened] == [S3Dataset] * 3 + [ShardDataset] * 3
    assert opened[2].key(0).partition("/")[0] in ("Dog", "cat")
    with pytest.raises(IndexFormatError, match=r"holds shards \(x.tar\) and folders of images"):
        open_it("s3://sets/mixed")
    with pytest.raises(IndexFormatError, match=r"a.lmdb, which are read from a disk only"):
        open_it("s3://sets/lmdb")
    with pytest.raises(IndexFormatError, match="s3://sets/nothing: holds nothing, looked for"):
        open_it("s3://sets/nothing")
    with pytest.raises(FileNotFoundError, match="s3://sets/images: has no folder 'val'"):
        open_it("s3://sets/images", split="val")


def test_an_index_of_a_bucket_needs_no_listing(
    tmp_path: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    object_server.put_folder("sets", write_images(tmp_path / "images"))
    index = write_json(tmp_path / "index.json", ["cat/1.jpg", "Dog/5.jpg"])
    object_server.reset_counters()

    dataset = open_dataset("s3://sets", index_file=index, **reach)

    assert isinstance(dataset, S3Dataset)
    assert len(dataset) == 2
    assert object_server.counters().num_requests == 0


def test_a_web_server_gives_shards(tmp_path: Path, object_server: ObjectServer) -> None:
    object_server.create_bucket("open", public=True)
    object_server.put_folder("open", write_split(tmp_path, "train", 3))

    assert len(open_dataset(f"{object_server.endpoint_url}/open")) == 3


# What cannot be opened


def test_an_option_of_another_kind_of_data_is_named_with_that_kind(
    image_folder: Path, tmp_path: Path
) -> None:
    shards, databases = tmp_path / "shards", tmp_path / "databases"
    write_split(shards, "train")
    databases.mkdir()
    write_database(databases / "train.lmdb", [IMAGES["cat/1.jpg"]])

    remote = r"'cache', which is for images in a bucket or shards, but this is "
    for place, option, message in (
        (image_folder, "cache", f"{remote}images in a folder; leave it out"),
        (databases, "cache", f"{remote}an LMDB database; leave it out"),
        (shards, "allow_pickle", "'allow_pickle', which is for an LMDB database, but this is sh"),
        ("s3://a/b", "max_gap_bytes", "'max_gap_bytes', which is for shards, but this is images"),
    ):
        more = {"index_file": "x.json"} if place == "s3://a/b" else {}
        with pytest.raises(TypeError, match=rf"^{place}.*: got the option {message}"):
            open_dataset(place, **{option: None}, **more)


def test_an_option_that_nothing_takes_is_named_with_all_that_there_are(image_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"'limits' for images in a folder, .* label_rule, limit, "):
        open_dataset(image_folder, limits=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "got a NoneType, expected a path or a URL such as"),
        (["a.tar"], "got a list, expected a path or a URL such as"),
        (open_store("memory://x"), "got a MemoryStore, expected a path or a URL such as"),
    ],
)
def test_what_is_no_path_and_no_url_is_named(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        open_dataset(given)


def test_a_data_set_is_not_opened_again(image_folder: Path) -> None:
    dataset: Any = open_dataset(image_folder)

    with pytest.raises(TypeError, match=r"got a ScratchDataset, .* is given to a loader as it is"):
        open_dataset(dataset)


def test_a_split_that_is_none_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "photos" / split)
    packing = ["shard", str(tmp_path / "photos"), str(tmp_path / "s"), "--splits", "train,val"]
    assert pack(packing) == 0

    for folder in ("photos", "s"):
        with pytest.raises(
            MissingSplitError, match=r"'tst'.*; give split='train' or 'val'"
        ) as error:
            open_dataset(tmp_path / folder, split="tst")
        assert error.value.splits == ("train", "val")
