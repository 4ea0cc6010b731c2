"""The documented way to a data set by name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarking.misc.init_benchmarking import get_dataset
from concurrent_dataloader.datasets import S3Dataset, ScratchDataset, ShardDataset
from concurrent_dataloader.datasets.lmdb import LmdbDataset
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.conftest import IMAGES
from tests.datasets.test_lmdb import write_database
from tests.datasets.test_shard_opening import write_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the same images as train and val, and a flat test split."""
    for split in ("train", "val"):
        for key, raw in IMAGES.items():
            path = tmp_path / "data" / split / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
    (tmp_path / "data" / "test").mkdir()
    (tmp_path / "data" / "test" / "1.jpg").write_bytes(IMAGES["cat/1.jpg"])
    return tmp_path / "data"


@pytest.fixture
def reach(object_server: ObjectServer, root: Path, tmp_path: Path) -> dict[str, Any]:
    """The arguments that reach the same data in a bucket."""
    object_server.put_folder("photos", root, prefix="sets/a/")
    file = tmp_path / "credentials.json"
    content = {
        "access_key": object_server.access_key,
        "secret": object_server.secret_key,
        "bucket_name": "photos",
    }
    file.write_text(json.dumps(content))
    return {"s3_credential_file": file, "endpoint_url": object_server.endpoint_url}


def test_the_documented_arguments_come_in_the_documented_order() -> None:
    names = list(inspect.signature(get_dataset).parameters)

    assert names[:8] == [
        "dataset",
        "dataset_type",
        "limit",
        "use_cache",
        "index_file",
        "classes_file",
        "s3_credential_file",
        "endpoint_url",
    ]


def test_both_storages_give_the_same_items(root: Path, reach: dict[str, Any]) -> None:
    scratch = get_dataset("scratch", "train", data_path=root)
    s3 = get_dataset("s3", "train", prefix="sets/a", **reach)

    assert isinstance(scratch, ScratchDataset)
    assert isinstance(s3, S3Dataset)
    local = {scratch.key(i): (scratch[i][0].tobytes(), scratch[i][1]) for i in range(len(scratch))}
    assert {s3.key(i): (s3[i][0].tobytes(), s3[i][1]) for i in range(len(s3))} == local


@pytest.mark.parametrize("kind", [str, Path])
def test_an_index_is_taken_as_text_and_as_path(
    kind: type, root: Path, reach: dict[str, Any], tmp_path: Path
) -> None:
    """I-34: an index given as text was a crash."""
    index = tmp_path / "index.json"
    index.write_text(json.dumps(["val/cat/1.jpg", "val/Dog/5.jpg"]))

    for dataset in (
        get_dataset("scratch", index_file=kind(index), data_path=kind(root)),
        get_dataset("s3", index_file=kind(index), prefix="sets/a", limit=1, **reach),
    ):
        assert dataset[0][1] == 1
        assert dataset.key(0) == "val/cat/1.jpg"


def test_the_label_of_a_test_split_is_left_out(root: Path) -> None:
    assert get_dataset("scratch", "test", data_path=root)[0].size == (24, 20)


def test_a_missing_index_is_downloaded_for_its_split(
    object_server: ObjectServer, reach: dict[str, Any], tmp_path: Path
) -> None:
    object_server.put_objects("meta", {"val.json": b'["sets/a/val/cat/1.jpg"]'})
    file = reach["s3_credential_file"]
    urls = {"val_index_file_download_url": "s3://meta/val.json"}
    file.write_text(json.dumps(json.loads(file.read_text()) | urls))

    dataset = get_dataset("s3", "val", index_file=tmp_path / "i" / "val.json", **reach)

    assert len(dataset) == 1
    with pytest.raises(FileNotFoundError, match=r"train.json: no such index file"):
        get_dataset("s3", "train", index_file=tmp_path / "i" / "train.json", **reach)


def test_the_cache_is_read_instead_of_the_store(reach: dict[str, Any]) -> None:
    server = reach.pop("endpoint_url")

    dataset = get_dataset(
        "s3",
        "val",
        prefix="sets/a",
        use_cache=True,
        endpoint_url="http://127.0.0.1:1",  # nobody listens there
        cache_endpoint_url=server,
        **reach,
    )

    assert dataset[0][0].mode == "RGB"


@pytest.mark.parametrize("dataset", ["s3", "auto"])
def test_what_was_read_is_kept_in_a_folder(
    dataset: str, object_server: ObjectServer, reach: dict[str, Any], tmp_path: Path
) -> None:
    cached, other, off = (
        get_dataset(
            dataset,
            "val",
            prefix="sets/a",
            use_cache=use_cache,
            cache_dir=tmp_path / "cache",
            cache_limit_bytes=10**6,
            **reach,
        )
        for use_cache in (True, True, False)
    )
    first = cached[0][0].tobytes()
    object_server.reset_counters()

    assert other[0][0].tobytes() == cached[0][0].tobytes() == first
    assert object_server.counters().num_requests == 0
    assert off[0][0].tobytes() == first
    assert object_server.counters().num_requests == 1


@pytest.mark.parametrize("dataset", ["auto", "webdataset"])
def test_what_is_local_is_not_cached(dataset: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^use_cache: got True with the folder"):
        get_dataset(dataset, "val", use_cache=True, cache_dir=tmp_path, data_path=root)


# Packed


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    root = tmp_path / "packed"
    write_split(root, "train", 5)
    return write_split(root, "val", 3)


@pytest.mark.parametrize("dataset", ["webdataset", "auto"])
def test_shards_are_opened_by_split_from_a_folder_and_a_bucket(
    dataset: str, packed: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    object_server.put_folder("photos", packed, prefix="sets/b/")

    local = get_dataset(dataset, "train", data_path=packed)
    remote = get_dataset(dataset, "val", prefix="sets/b", limit=2, **reach)
    by_url = get_dataset(dataset, "val", data_path="s3://photos/sets/b", **reach)

    assert {type(opened) for opened in (local, remote, by_url)} == {ShardDataset}
    assert [len(opened) for opened in (local, remote, by_url)] == [5, 2, 3]
    assert remote[1][1] == 1
    assert remote[1][0].tobytes() == local[1][0].tobytes()


def test_folders_and_databases_are_opened_by_name_and_found_out(root: Path) -> None:
    (root / "lmdb").mkdir()
    write_database(root / "lmdb" / "ILSVRC-val.lmdb", [IMAGES["cat/1.jpg"]] * 2)

    opened = [
        get_dataset("folder", "val", data_path=root),
        get_dataset("lmdb", "val", data_path=root / "lmdb"),
        get_dataset("auto", "val", data_path=root / "lmdb"),
        get_dataset("lmdb", "val", data_path=root / "lmdb" / "ILSVRC-val.lmdb", limit=1),
    ]

    assert [len(dataset) for dataset in opened] == [7, 2, 2, 1]
    assert [type(dataset) for dataset in opened] == [ScratchDataset] + [LmdbDataset] * 3


def test_class_folders_are_found_out_by_auto(root: Path, reach: dict[str, Any]) -> None:
    (root / "test" / "1.jpg").unlink()

    local = get_dataset("auto", "val", data_path=root)
    remote = get_dataset("auto", "train", prefix="sets/a", **reach)

    assert [type(local), type(remote)] == [ScratchDataset, S3Dataset]
    assert sorted(local[i][1] for i in range(7)) == sorted(remote[i][1] for i in range(7))


def test_a_14_validation_is_in_order_and_the_same_twice(packed: Path) -> None:
    """A-14: validation images were shuffled and cropped at random."""
    val = get_dataset("webdataset", "val", data_path=packed)

    first, second = ([val[i][0].tobytes() for i in range(3)] for _ in range(2))

    assert first == second
    assert [val[i][1] for i in range(3)] == [0, 1, 2]


def test_shards_of_another_kind_than_named_are_an_error(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"^dataset: got 'tfrecord', but .* of kind 'tar'"):
        get_dataset("tfrecord", "train", data_path=packed)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("hdf5",),
            "dataset: got 'hdf5', expected one of s3, scratch, folder, webdataset",
        ),
        (("s3", "dev"), "dataset_type: got 'dev', expected one of train, val, test"),
        (("s3", "val", None, True), "use_cache: got True without cache_endpoint_url"),
        (("scratch", "val", None, True), "data_path: got None"),
        (("lmdb",), "data_path: got None, expected the folder of the data set 'lmdb'"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_what_can(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        get_dataset(*arguments)
