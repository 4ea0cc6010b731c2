"""Samples by position: the stages, labels, metadata, and errors that say which sample."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from concurrent_dataloader.datasets import IndexedDataset, SampleMetadata
from concurrent_dataloader.errors import (
    IndexFormatError,
    KeyNotFoundError,
    SampleDecodeError,
    UnknownClassError,
)
from concurrent_dataloader.formats.image import decode_image
from concurrent_dataloader.index import Index
from concurrent_dataloader.labels import Classes, LabelSpace
from concurrent_dataloader.stores import open_store
from tests.datasets.conftest import IMAGES

KEYS = sorted(IMAGES)


@pytest.fixture
def open_images(image_folder: Any) -> Callable[..., IndexedDataset]:
    def open_with(keys: list[str] = KEYS, **options: Any) -> IndexedDataset:
        index = Index.from_keys(keys)
        return IndexedDataset(index, open_store(image_folder), index_name="idx.json", **options)

    return open_with


@pytest.fixture
def classes() -> Classes:
    return Classes({"Dog": 0, "cat": 1, "cat-tail": 2}, label_rule="regex:^([^/]+)/")


def test_an_item_is_an_rgb_image_and_a_label_from_zero(open_images, classes) -> None:
    dataset = open_images(classes=classes)

    items = [dataset[position] for position in range(len(dataset))]

    assert [label for _, label in items] == [0, 0, 2, 2, 1, 1, 1]
    assert {type(label) for _, label in items} == {int}
    for (image, _), key in zip(items, KEYS, strict=True):
        assert image.mode == "RGB"
        assert image.tobytes() == decode_image(IMAGES[key]).tobytes()


def test_the_stages_compose_to_the_item(open_images, classes) -> None:
    dataset = open_images(classes=classes, transform=np.array)

    raw = dataset.fetch(3)
    raw_async = asyncio.run(dataset.fetch_async(3))
    image, label = dataset.apply_transform(dataset.decode(3, raw))

    assert bytes(raw) == bytes(raw_async) == IMAGES[KEYS[3]]
    np.testing.assert_array_equal(image, dataset[3][0])
    assert label == dataset[3][1]


def test_without_classes_the_label_is_minus_one(open_images) -> None:
    dataset: IndexedDataset = open_images()

    assert dataset[0][1] == -1
    assert dataset.labels is None


def test_without_classes_an_item_is_the_image_alone_on_request(open_images) -> None:
    dataset = open_images(missing_label=None, transform=lambda image: image.size)

    assert dataset[0] == (24, 20)


def test_transforms_can_be_replaced(open_images, classes) -> None:
    dataset = open_images(classes=classes, transform=np.array, target_transform=str)

    dataset.set_transform(lambda image: image.size)
    dataset.set_target_transform(lambda label: label * 10)

    assert dataset[2] == ((24, 20), 20)


def test_a_random_item_is_any_item_and_leaves_the_global_generators_alone(
    open_images, classes
) -> None:
    dataset = open_images(classes=classes, transform=lambda image: image.size)
    states = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()

    labels = {dataset.get_random_item()[1] for _ in range(200)}

    assert labels == {0, 1, 2}
    assert random.getstate() == states[0]
    assert pickle.dumps(np.random.get_state()) == states[1]
    assert torch.get_rng_state().tolist() == states[2]


def test_metadata_is_a_last_element_on_request_and_can_be_collated(open_images, classes) -> None:
    dataset = open_images(classes=classes, with_metadata=True, transform=lambda image: image.size)

    batch = default_collate([dataset[0], dataset[1]])

    assert isinstance(batch[2], SampleMetadata)
    assert list(batch[2].key) == KEYS[:2]
    assert list(batch[2].size_bytes) == [len(IMAGES[key]) for key in KEYS[:2]]
    assert list(batch[2].source) == [dataset.store.describe(key) for key in KEYS[:2]]


def test_metadata_is_told_without_reading(open_images) -> None:
    dataset = open_images()

    assert dataset.metadata(0) == SampleMetadata(KEYS[0], -1, dataset.store.describe(KEYS[0]))
    assert dataset.key(-1) == KEYS[-1]


def test_raw_bytes_come_undecoded(open_images, classes) -> None:
    assert open_images(classes=classes, decode=None)[4] == (IMAGES[KEYS[4]], 1)


def test_a_function_of_the_users_own_decodes(open_images, classes) -> None:
    assert open_images(classes=classes, decode=len)[4] == (len(IMAGES[KEYS[4]]), 1)


def test_torchvisions_decoder_gives_a_tensor(open_images) -> None:
    image, _ = open_images(decode="torchvision")[0]

    assert image.shape == (3, 20, 24)
    assert image.dtype == torch.uint8


@pytest.mark.parametrize("decode", ["opencv", 3])
def test_an_unknown_decoder_is_refused_by_the_constructor(open_images, decode) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^decode: got {decode!r}, expected"):
        open_images(decode=decode)


def test_positions_are_those_of_a_list(open_images, classes) -> None:
    dataset = open_images(classes=classes, transform=lambda image: image.size)

    assert dataset[-1] == dataset[len(dataset) - 1]
    assert dataset[np.int64(2)] == dataset[2]
    for outside in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[outside]


def test_a_missing_object_is_named_with_position_and_index(open_images) -> None:
    dataset = open_images(["cat/1.jpg", "cat/gone.jpg"])

    for read in (lambda: dataset[1], lambda: asyncio.run(dataset.fetch_async(1))):
        with pytest.raises(KeyNotFoundError) as caught:
            read()
        assert dataset.store.describe("cat/gone.jpg") in str(caught.value)
        assert str(caught.value).endswith("; it is position 1 of idx.json")


def test_an_undecodable_image_is_named_with_key_position_and_index(open_images) -> None:
    dataset = open_images(["cat/1.jpg", "cat/notes.txt"])

    with pytest.raises(SampleDecodeError) as caught:
        dataset[1]

    assert str(caught.value) == (
        f"{dataset.store.describe('cat/notes.txt')}: image: got 8 bytes that begin with "
        "b'no image': no image format begins like that; it is position 1 of idx.json"
    )


def test_an_error_of_a_users_decoder_keeps_its_type_and_says_which_sample(open_images) -> None:
    def decode(raw: bytes) -> Any:
        raise KeyError(raw[:2])

    dataset = open_images(decode=decode)

    with pytest.raises(KeyError) as caught:
        dataset[2]

    source = dataset.store.describe(KEYS[2])
    assert caught.value.__notes__ == [f"{source}: it is position 2 of idx.json"]


def test_an_empty_index_is_refused(open_images) -> None:
    with pytest.raises(IndexFormatError, match=r"^idx.json: no samples"):
        open_images([])


def test_absolute_keys_are_refused(open_images) -> None:
    with pytest.raises(
        IndexFormatError, match=r"^idx.json: got key '/data/a.jpg', expected keys rel"
    ):
        open_images(["/data/a.jpg"])


def test_a_class_that_is_not_known_is_named_by_the_constructor(open_images) -> None:
    with pytest.raises(UnknownClassError, match=r"cat-tail/0.png \(position 2\)"):
        open_images(classes=Classes({"Dog": 0, "cat": 1}, label_rule="regex:^([^/]+)/"))


def test_imagenets_labels_are_converted_to_those_of_torchvisions_weights(image_folder) -> None:
    keys = ["n02119789/1.jpg", "n01440764/1.jpg"]  # kit fox and tench, 1 and 449 of the dev kit
    dataset = IndexedDataset(
        Index.from_keys(keys), open_store(image_folder), Classes.imagenet(LabelSpace.ILSVRC2012_ID)
    )
    before = dataset.labels

    dataset.convert_labels(LabelSpace.SORTED_WNID)

    assert before is not None
    assert before.tolist() == [0, 448]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [278, 0]


def test_it_pickles_with_its_transform(open_images, classes) -> None:
    dataset = open_images(classes=classes, transform=np.array)
    dataset[0]

    again = pickle.loads(pickle.dumps(dataset))

    np.testing.assert_array_equal(again[3][0], dataset[3][0])
    assert again[3][1] == dataset[3][1]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, for threads
def test_looking_through_a_large_index_does_not_grow_the_process(image_folder, tmp_path) -> None:
    Index.from_keys(f"n{i % 1000:08}/{i}.jpg" for i in range(300_000)).save_json(
        tmp_path / "i.json"
    )
    index = Index.load(tmp_path / "i.json")
    dataset = IndexedDataset(
        index, open_store(image_folder), Classes.from_keys(index.keys()), decode=None
    )

    def read_private_bytes() -> int:
        with open("/proc/self/smaps_rollup") as file:
            fields = dict(line.split(":", 1) for line in file if line.count(":") == 1)
        return sum(int(fields[name].split()[0]) for name in ("Private_Dirty",)) * 1024

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # a worker: its pages are its parent's until it writes to them
        gc.disable()
        before = read_private_bytes()
        for position in range(len(dataset)):
            dataset.key(position)
            dataset.label(position)
        os.write(writing, str(read_private_bytes() - before).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        growth_bytes = int(answer.read())
    os.waitpid(child, 0)

    assert growth_bytes < 2_000_000  # a list of these keys would be 20 MB
