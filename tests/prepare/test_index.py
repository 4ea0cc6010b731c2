"""Finding samples in buckets and folders."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from concurrent_dataloader.errors import AccessDeniedError, KeyNotFoundError
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.index import find_samples, split_url, upload
from concurrent_dataloader.stores import Credentials, WritableStore, open_writable_store
from concurrent_dataloader.testing import ObjectServer

IMAGENET = {
    "train/n01440764/n01440764_1.JPEG": b"1",
    "train/n01440764/n01440764_2.jpeg": b"22",
    "train/n02119789/n02119789_1.JPEG": b"333",
    "train/": b"",
    "train/n01440764/": b"",
    "train/classes.json": b"{}",
    "train2/n01440764/other.JPEG": b"4",
    "val/ILSVRC2012_val_00000001.JPEG": b"5",
}


def refuse(url: str) -> WritableStore:
    raise AssertionError(f"{url} is not to be opened")


@pytest.fixture
def open_root(object_server: ObjectServer) -> functools.partial[WritableStore]:
    object_server.put_objects("data", IMAGENET)
    return functools.partial(
        open_writable_store,
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )


def keys_of(index: Index) -> list[str]:
    return list(index.keys())


def test_a_prefix_is_a_folder_and_keys_are_those_of_the_bucket(
    open_root: functools.partial[WritableStore],
) -> None:
    index = find_samples("s3://data/train", open_root)

    assert keys_of(index) == [
        "train/n01440764/n01440764_1.JPEG",
        "train/n01440764/n01440764_2.jpeg",
        "train/n02119789/n02119789_1.JPEG",
    ]
    assert [index.size_bytes(position) for position in range(3)] == [1, 2, 3]


def test_suffixes_may_count_case(open_root: functools.partial[WritableStore]) -> None:
    index = find_samples("s3://data/train/", open_root, suffixes=(".jpeg",), ignore_case=False)

    assert keys_of(index) == ["train/n01440764/n01440764_2.jpeg"]


def test_without_suffixes_every_object_is_taken_but_markers_of_folders(
    open_root: functools.partial[WritableStore],
) -> None:
    assert len(find_samples("s3://data", open_root, suffixes=())) == len(IMAGENET) - 2


def test_a_bucket_and_a_copy_of_it_on_disk_give_the_same_index(
    open_root: functools.partial[WritableStore], tmp_path: Path
) -> None:
    for key, body in IMAGENET.items():
        if not key.endswith("/"):
            (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / key).write_bytes(body)

    assert find_samples("s3://data", open_root) == find_samples(str(tmp_path), refuse)
    assert find_samples("s3://data/train", open_root, relative=True) == find_samples(
        f"file://{tmp_path}/train", refuse
    )


def test_a_listing_of_several_pages_is_whole_sorted_and_told_of(
    open_root: functools.partial[WritableStore], object_server: ObjectServer
) -> None:
    keys = [f"many/{i % 7}/{i:05d}.jpg" for i in range(2500)]
    object_server.put_objects("data", dict.fromkeys(keys, b"x"))
    told: list[int] = []

    index = find_samples("s3://data/many", open_root, on_progress=told.append)

    assert keys_of(index) == sorted(keys)
    assert told == [1000, 2000, 2500]


@pytest.mark.parametrize("source", ["s3://data/none", "s3://data/train/n0"])
def test_a_source_without_samples_is_named(
    open_root: functools.partial[WritableStore], source: str
) -> None:
    with pytest.raises(KeyNotFoundError, match=f"{source}: no object with suffix .jpeg, .jpg"):
        find_samples(source, open_root)


def test_a_bucket_that_is_not_there_is_named(open_root: functools.partial[WritableStore]) -> None:
    with pytest.raises(KeyNotFoundError, match="nowhere"):
        find_samples("s3://nowhere", open_root)


def test_a_wrong_secret_is_refused(object_server: ObjectServer) -> None:
    object_server.put_objects("data", IMAGENET)
    wrong = functools.partial(
        open_writable_store,
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, "not-the-secret"),
    )

    with pytest.raises(AccessDeniedError) as caught:
        find_samples("s3://data", wrong)

    assert "not-the-secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://data/indexes/x.json", "s3://data//indexes/x.json"])
def test_an_upload_has_exactly_the_key_given(
    open_root: functools.partial[WritableStore], tmp_path: Path, url: str
) -> None:  # I-38
    path = tmp_path / "x.json"
    Index.from_keys(["a.jpg"]).save_json(path)

    upload(path, url, open_root)

    store = open_root("s3://data")
    assert json.loads(bytes(store.get("indexes/x.json"))) == ["a.jpg"]
    assert [info.key for info in store.list() if "x.json" in info.key] == ["indexes/x.json"]
    store.close()


@pytest.mark.parametrize("url", ["s3://data", "s3://data/", "s3://data/folder/"])
def test_an_upload_without_a_name_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="expected the name of an object"):
        upload(tmp_path / "x.json", url, refuse)


@pytest.mark.parametrize("url", ["", "data/x", "s3:/data/x", "://x", "s3://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected one such as 's3://bucket/key'"):
        split_url(url)
