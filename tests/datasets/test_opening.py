"""Data sets in buckets and folders: torchvision's ImageFolder is the oracle."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import concurrent_dataloader
from concurrent_dataloader.datasets import (
    S3_Dataset,
    S3Dataset,
    ScratchDataset,
    open_dataset,
)
from concurrent_dataloader.errors import (
    ClassesFormatError,
    CredentialsError,
    IndexFormatError,
    LoaderError,
    UnknownClassError,
)
from concurrent_dataloader.stores import Credentials
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.conftest import IMAGES

SECRET = "hunter2hunter2hunter2"


def items_of(dataset: Any) -> list[tuple[str, int]]:
    return [(image.tobytes(), label) for image, label in (dataset[i] for i in range(len(dataset)))]


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def bucket(object_server: ObjectServer, image_folder: Path) -> dict[str, Any]:
    """A bucket with the images below "data", and the arguments that open it."""
    object_server.put_folder("photos", image_folder, prefix="data/")
    return {"bucket_name": "photos", "endpoint_url": object_server.endpoint_url}


@pytest.fixture
def credential_file(object_server: ObjectServer, tmp_path: Path) -> Path:
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    return write_json(tmp_path / "credentials.json", keys)


@pytest.fixture
def open_bucket(bucket: dict[str, Any], credential_file: Path) -> Callable[..., S3Dataset]:
    def open_with(**options: Any) -> S3Dataset:
        options = bucket | {"s3_credential_file": credential_file} | options
        return S3Dataset(**options)

    return open_with


# A folder


def test_a_folder_has_the_items_of_torchvisions_image_folder(image_folder: Path) -> None:
    oracle = ImageFolder(image_folder)
    dataset = ScratchDataset(image_folder)

    assert [str(image_folder / dataset.key(i)) for i in range(len(dataset))] == [
        path for path, _ in oracle.samples
    ]
    assert items_of(dataset) == items_of(oracle)
    assert dataset.classes is not None
    assert [dataset.classes.name(label) for label in range(3)] == oracle.classes


def test_one_class_folder_is_class_0_as_for_image_folder(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "1.jpg").write_bytes(IMAGES["cat/1.jpg"])

    assert ScratchDataset(tmp_path).label(0) == ImageFolder(tmp_path).targets[0] == 0


def test_a_class_folder_without_images_is_an_error_as_for_image_folder(image_folder: Path) -> None:
    (image_folder / "bird").mkdir()

    with pytest.raises(FileNotFoundError):
        ImageFolder(image_folder)
    with pytest.raises(FileNotFoundError, match=r"no image in class folder 'bird'"):
        ScratchDataset(image_folder)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(IMAGES["cat/1.jpg"])

    assert ScratchDataset(tmp_path)[0][1] == -1
    assert ScratchDataset(tmp_path, missing_label=None)[0].mode == "RGB"


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IndexFormatError, match=r"no image, expected files that end in one of .jpg"):
        ScratchDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        ScratchDataset(tmp_path / "nowhere")


@pytest.mark.parametrize("depth", ["", "train/", "a/b/c/train/"])
def test_labels_come_from_the_parent_folder_at_any_depth(tmp_path: Path, depth: str) -> None:
    """I-30: the class was taken from a fixed depth of the path."""
    keys = [f"{depth}n01/a.jpg", f"{depth}n02/b.jpg", f"{depth}n02/c.jpg"]
    classes = {"n01": {"id": 1, "name": "tench"}, "n02": {"id": 2, "name": "kite"}}

    dataset = ScratchDataset(
        tmp_path,
        write_json(tmp_path / "index.json", keys),
        write_json(tmp_path / "classes.json", classes),
    )

    assert [dataset.label(position) for position in range(3)] == [0, 1, 1]


def test_one_index_serves_a_folder_and_a_bucket(
    image_folder: Path, tmp_path: Path, open_bucket: Callable[..., S3Dataset]
) -> None:
    """I-40: the local index held absolute paths."""
    index = write_json(tmp_path / "index.json", sorted(IMAGES))

    local = ScratchDataset(image_folder, index)
    remote = open_bucket(index_file=index, prefix="data")

    assert items_of(local) == items_of(remote)
    assert items_of(local)[0][1] == 0


def test_an_index_of_one_folder_has_no_labels_without_a_classes_file(tmp_path: Path) -> None:
    """I-34: no classes file was a crash. That all lie in "val" names no class."""
    index = write_json(tmp_path / "index.json", ["val/1.jpg", "val/2.jpg"])

    assert ScratchDataset(tmp_path, index).labels is None


def test_validation_images_get_labels_by_the_number_in_their_name(tmp_path: Path) -> None:
    keys = [f"val/ILSVRC2012_val_{number:08}.JPEG" for number in (1, 2, 50_000)]
    classes = {str(number): (number * 7) % 1000 + 1 for number in range(1, 50_001)}

    dataset = ScratchDataset(
        tmp_path,
        write_json(tmp_path / "index.json", keys),
        write_json(tmp_path / "classes.json", classes),
    )

    assert dataset.labels is not None
    assert dataset.labels.tolist() == [7, 14, 0]


def test_a_limit_is_the_head_or_a_seeded_sample_of_all(image_folder: Path) -> None:
    """I-33: the head of a sorted index is few classes."""
    whole = ScratchDataset(image_folder)
    head = ScratchDataset(image_folder, limit=3)
    samples = [ScratchDataset(image_folder, limit=3, sample_seed=seed) for seed in (5, 5, 6)]

    assert [head.key(i) for i in range(3)] == [whole.key(i) for i in range(3)]
    assert len(ScratchDataset(image_folder, limit=99)) == len(whole)
    keys = [[sample.key(i) for i in range(len(sample))] for sample in samples]
    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == 3
    labels_by_key = {whole.key(i): whole.label(i) for i in range(len(whole))}
    for sample in samples:  # a class keeps its number, whichever classes the sample has
        assert [sample.label(i) for i in range(3)] == [
            labels_by_key[sample.key(i)] for i in range(3)
        ]


def test_validation_images_can_have_the_classes_of_the_training_images(
    image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "val" / "cat-tail").mkdir(parents=True)
    (tmp_path / "val" / "cat-tail" / "1.png").write_bytes(IMAGES["cat-tail/0.png"])
    train = ScratchDataset(image_folder)

    assert ScratchDataset(tmp_path / "val").label(0) == 0
    assert ScratchDataset(tmp_path / "val", classes=train.classes).label(0) == 2


# A bucket


def test_a_listed_bucket_has_the_items_of_the_folder(
    image_folder: Path, open_bucket: Callable[..., S3Dataset]
) -> None:
    local = ScratchDataset(image_folder)
    remote = open_bucket(prefix="data")

    by_key = {local.key(i): item for i, item in enumerate(items_of(local))}
    assert {remote.key(i): item for i, item in enumerate(items_of(remote))} == by_key


def test_an_index_needs_no_request_before_the_first_sample(
    object_server: ObjectServer, tmp_path: Path, open_bucket: Callable[..., S3Dataset]
) -> None:
    index = write_json(tmp_path / "index.json", sorted(f"data/{key}" for key in IMAGES))

    dataset = open_bucket(index_file=index)
    num_before = sum(object_server.counters().num_by_status.values())
    dataset[0]

    assert num_before == 0
    assert sum(object_server.counters().num_by_status.values()) == 1


@pytest.mark.parametrize("client", ["obstore", "boto3", "aiobotocore", "aiohttp", "http"])
def test_each_client_gives_the_same_items(
    client: str, open_bucket: Callable[..., S3Dataset], image_folder: Path
) -> None:
    dataset = open_bucket(prefix="data", client=client)

    local = ScratchDataset(image_folder)
    keys = [local.key(position) for position in range(len(local))]
    assert dataset[0][0].tobytes() == local[keys.index(dataset.key(0))][0].tobytes()
    dataset.store.close()


def test_a_dataset_that_was_read_pickles_without_the_secret(
    object_server: ObjectServer, open_bucket: Callable[..., S3Dataset]
) -> None:
    dataset = open_bucket(prefix="data", transform=pil_to_tensor)
    first = dataset[0]

    pickled = pickle.dumps(dataset)
    again = pickle.loads(pickled)

    assert object_server.secret_key.encode() not in pickled
    assert object_server.secret_key not in repr(dataset)
    assert torch.equal(again[0][0], first[0])


def test_missing_files_are_downloaded_from_where_the_credentials_file_says(
    object_server: ObjectServer, bucket: dict[str, Any], tmp_path: Path
) -> None:
    keys = sorted(f"data/{key}" for key in IMAGES)
    classes = {"Dog": {"id": 0}, "cat": {"id": 1}, "cat-tail": {"id": 2}}
    rule = "regex:data/([^/]+)/"
    object_server.put_objects(
        "meta",
        {"i/train.json": json.dumps(keys).encode(), "classes.json": json.dumps(classes).encode()},
    )
    credential_file = write_json(
        tmp_path / "credentials.json",
        {
            "aws_access_key_id": object_server.access_key,
            "aws_secret_access_key": object_server.secret_key,
            "train_index_file_download_url": "s3://meta/i/train.json",
            "classes_file_download_url": "s3://meta/classes.json",
        },
    )

    dataset = S3Dataset(
        **bucket,
        index_file=tmp_path / "new" / "index.json",
        classes_file=str(tmp_path / "classes.json"),
        s3_credential_file=credential_file,
        label_rule=rule,
        split="train",
    )

    assert json.loads((tmp_path / "new" / "index.json").read_text()) == keys
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 2, 2, 1, 1, 1]
    with pytest.raises(FileNotFoundError, match=r"val.json: no such index file"):
        S3Dataset(
            **bucket,
            index_file=tmp_path / "val.json",
            s3_credential_file=credential_file,
            split="val",
        )


# What bad input gets, from the constructor


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (None, FileNotFoundError, "index.json: no such index file; write it with"),
        ({"a": 1}, IndexFormatError, "index.json"),
        ([], IndexFormatError, "index.json"),
        ([1, 2], IndexFormatError, "index.json"),
    ],
)
def test_a_missing_or_malformed_index_is_an_error(
    tmp_path: Path, content: Any, error: type[Exception], text: str
) -> None:
    index = tmp_path / "index.json"
    if content is not None:
        write_json(index, content)

    with pytest.raises(error, match=text):
        ScratchDataset(tmp_path, index)
    with pytest.raises(error, match=text):
        S3Dataset("photos", str(index))


def test_a_malformed_classes_file_and_a_class_that_it_lacks_are_errors(tmp_path: Path) -> None:
    index = write_json(tmp_path / "index.json", ["n01/a.jpg", "n02/b.jpg"])
    classes = tmp_path / "classes.json"

    classes.write_text("[1, 2]")
    with pytest.raises(ClassesFormatError, match=r"classes.json: got a JSON list"):
        ScratchDataset(tmp_path, index, classes)
    write_json(classes, {"n01": {"id": 0}})
    with pytest.raises(UnknownClassError, match=r"n02/b.jpg \(position 1\): got class 'n02'"):
        ScratchDataset(tmp_path, index, classes)


def test_an_unknown_key_in_the_credentials_file_is_an_error_that_shows_no_secret(
    tmp_path: Path,
) -> None:
    file = write_json(tmp_path / "c.json", {"acces_key": "me", "secret": SECRET})

    with pytest.raises(CredentialsError, match="unknown key 'acces_key'") as caught:
        S3Dataset("photos", write_json(tmp_path / "i.json", ["a/b.jpg"]), s3_credential_file=file)

    assert SECRET not in str(caught.value)


def test_no_such_bucket_and_a_wrong_secret_are_errors_of_the_listing(
    object_server: ObjectServer, tmp_path: Path, open_bucket: Callable[..., S3Dataset]
) -> None:
    wrong = write_json(
        tmp_path / "wrong.json", {"access_key": object_server.access_key, "secret": SECRET}
    )

    with pytest.raises(LoaderError, match="s3://nowhere"):
        open_bucket(bucket_name="nowhere")
    with pytest.raises(PermissionError) as caught:
        open_bucket(s3_credential_file=wrong)
    assert SECRET not in str(caught.value)


def test_open_dataset_looks_into_a_bucket_with_the_credentials_that_it_is_given(
    object_server: ObjectServer, bucket: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    keys = Credentials(object_server.access_key, object_server.secret_key)

    dataset = open_dataset(
        "s3://photos/data", credentials=keys, endpoint_url=bucket["endpoint_url"]
    )

    assert isinstance(dataset, S3Dataset)
    assert sorted(dataset.key(position) for position in range(len(dataset))) == sorted(IMAGES)


def test_a_prefix_without_images_is_an_error(open_bucket: Callable[..., S3Dataset]) -> None:
    with pytest.raises(IndexFormatError, match="s3://photos/empty: no image"):
        open_bucket(prefix="empty")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_an_error(image_folder: Path, limit: int) -> None:
    with pytest.raises(ValueError, match=rf"^limit: got {limit}, expected 1 or more"):
        ScratchDataset(image_folder, limit=limit)


# Names


def test_documented_names_are_exported() -> None:
    assert S3_Dataset is S3Dataset
    assert concurrent_dataloader.S3Dataset is S3Dataset
    assert concurrent_dataloader.open_dataset is open_dataset
    assert issubclass(ScratchDataset, concurrent_dataloader.StagedDataset)


def test_a_bucket_without_a_name_is_no_folder() -> None:
    for open_it in (lambda: S3Dataset(""), lambda: open_dataset("s3://")):
        with pytest.raises(ValueError, match="bucket"):
            open_it()


@pytest.mark.parametrize("bucket", ["s3://photos/train", "photos/train/"])
def test_a_bucket_with_more_than_its_name_is_told_apart(bucket: str) -> None:
    with pytest.raises(ValueError, match="name of the bucket only: 'photos', and prefix='train'"):
        S3Dataset(bucket)


def test_an_empty_path_is_not_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "1.png")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="path_or_url: got '', expected a path"):
        open_dataset("")
