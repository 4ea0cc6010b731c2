"""Bounding boxes in XML files, read without rearranging them: as shards packed of them hold."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets import S3Dataset, ScratchDataset, open_dataset
from concurrent_dataloader.datasets.memory_cache import MemoryCachedDataset
from concurrent_dataloader.devkit import KAGGLE_SOLUTION, stem_of
from concurrent_dataloader.errors import KeyNotFoundError, ShardFormatError
from concurrent_dataloader.prepare.__main__ import main as run_command
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.test_boxes import encode_image
from tests.datasets.test_ground_truth import SOLUTION, VAL, write_tree

NOTES = "ILSVRC/Annotations/CLS-LOC"
TRAIN = [f"n0{wnid}/n0{wnid}_{number}" for wnid in (1440764, 1443537) for number in (1, 12, 3)]


def make_xml(*boxes: tuple[float, float, float, float]) -> bytes:
    """An annotation in Pascal VOC's layout of an image of 200 x 100."""
    objects = "".join(
        f"<object><name>n</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for x1, y1, x2, y2 in boxes
    )
    size = "<size><width>200</width><height>100</height></size>"
    return f"<annotation>{size}{objects}</annotation>".encode()


XML = {
    f"train/{TRAIN[0]}.xml": make_xml((20, 50, 100, 60)),
    f"train/{TRAIN[1]}.xml": make_xml((20, 50, 100, 60), (210, 10, 50, 20)),  # the union
    f"train/{TRAIN[2]}.xml": make_xml(),  # no object
    f"train/{TRAIN[5]}.xml": make_xml((33, 7, 77, 91)),
    f"val/{VAL[0]}.xml": make_xml((1, 2, 3, 4)),
    f"val/{VAL[4]}.XML": make_xml((-5, 0, 250, 120)),  # beyond the image
    f"val/._{VAL[1]}.xml": b"what macOS leaves",
}
BOXES = {
    TRAIN[0]: [0.1, 0.5, 0.5, 0.6],
    TRAIN[1]: [0.1, 0.1, 1.0, 0.6],
    TRAIN[5]: [0.165, 0.07, 0.385, 0.91],
    VAL[0]: [0.005, 0.02, 0.015, 0.04],
    VAL[4]: [0.0, 0.0, 1.0, 1.0],
}


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    data = "ILSVRC/Data/CLS-LOC"
    names = [*(f"{data}/train/{name}" for name in TRAIN), *(f"{data}/val/{name}" for name in VAL)]
    files = {f"{name}.JPEG": encode_image(seed) for seed, name in enumerate(names)}
    files |= {f"{NOTES}/{name}": raw for name, raw in XML.items()}
    return write_tree(tmp_path / "kaggle", files | {KAGGLE_SOLUTION: SOLUTION.encode()})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images in folders of classes."""
    files = {f"images/{name}.png": encode_image(seed) for seed, name in enumerate(TRAIN)}
    return write_tree(tmp_path, files) / "images"


def items_of(dataset: Any) -> dict[str, tuple[bytes, list[float] | None, int]]:
    """Pixels, box and label of each image, by its stem."""
    found: dict[str, tuple[bytes, list[float] | None, int]] = {}
    for position in range(len(dataset)):
        (image, box), label = dataset[position]
        stem = stem_of(dataset.key(position)).lower()
        found[stem] = (image.tobytes(), None if box is None else box.tolist(), label)
    return found


def check_boxes(dataset: Any, names: list[str]) -> None:
    boxes = {stem: box for stem, (_, box, _) in items_of(dataset).items()}
    for name in names:
        expected = BOXES.get(name)
        assert boxes.pop(stem_of(name).lower()) == (
            None if expected is None else torch.tensor(expected).tolist()
        ), name
    assert boxes == {}


def put_kaggle(server: ObjectServer, kaggle: Path) -> dict[str, Any]:
    server.put_folder("sets", kaggle, prefix="kaggle/")
    keys = {"access_key": server.access_key, "secret": server.secret_key}
    (kaggle / "credentials.json").write_text(json.dumps(keys))
    return {
        "s3_credential_file": kaggle / "credentials.json",
        "endpoint_url": server.endpoint_url,
    }


# The shards packed of the same tree are the oracle


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_w52_a_folder_of_kaggles_gives_the_items_of_shards_packed_from_it(
    kaggle: Path, tmp_path: Path, kind: str, object_server: ObjectServer
) -> None:
    settings = put_kaggle(object_server, kaggle)
    for split, names in (("train", TRAIN), ("val", VAL)):
        shards = tmp_path / f"shards-{split}"
        command = ["shard", str(kaggle), str(shards), "--format", kind, "--split", split]
        assert run_command([*command, "--boxes", "auto"]) == 0
        expected = items_of(open_dataset(shards, split=split, boxes=True))

        for boxes in ("auto", kaggle / NOTES / split, kaggle / NOTES):
            dataset = open_dataset(kaggle, split=split, boxes=boxes)
            assert items_of(dataset) == expected, boxes
            check_boxes(dataset, names)
        for boxes in ("auto", f"s3://sets/kaggle/{NOTES}/{split}/", kaggle / NOTES / split):
            dataset = open_dataset("s3://sets/kaggle", split=split, boxes=boxes, **settings)
            assert items_of(dataset) == expected, boxes


@pytest.mark.parametrize("below", ["ILSVRC", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/val"])
def test_w52_auto_finds_the_annotations_from_below_and_from_an_index(
    kaggle: Path, tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"ILSVRC/Data/CLS-LOC/val/{name}.JPEG" for name in VAL]
    (tmp_path / "val.json").write_text(json.dumps(keys))
    split = None if below.endswith("val") else "val"

    check_boxes(open_dataset(kaggle / below, split=split, boxes="auto"), VAL)
    check_boxes(
        ScratchDataset(kaggle, tmp_path / "val.json", boxes="auto", label_rule="parent"), VAL
    )
    monkeypatch.chdir(kaggle / "ILSVRC")
    check_boxes(open_dataset("Data/CLS-LOC", split="val", boxes="auto"), VAL)


# Names


def test_annotations_may_lie_flat_or_deeper_or_beside_the_images(
    images: Path, tmp_path: Path
) -> None:
    of_train = {name: raw for name, raw in XML.items() if name.startswith("train/")}
    flat = {f"flat/{stem_of(name)}.xml": raw for name, raw in of_train.items()}
    deep = {name.replace("flat/", "deep/a/b/"): raw for name, raw in flat.items()}
    beside = {name.replace("train/", "images/"): raw for name, raw in of_train.items()}
    write_tree(tmp_path, flat | deep | beside)

    for boxes in (tmp_path / "flat", tmp_path / "deep", images):
        check_boxes(ScratchDataset(images, boxes=boxes), TRAIN)


def test_a_name_that_two_annotations_have_is_neithers_but_by_its_folder(tmp_path: Path) -> None:
    images = {f"images/{name}.png": encode_image(0) for name in ("cat/1", "dog/1", "fox/1")}
    notes = {f"xml/{name}.xml": make_xml((0, 0, 200, 50)) for name in ("cat/1", "x/dog/1")}
    write_tree(tmp_path, images | notes)

    dataset = ScratchDataset(tmp_path / "images", boxes=tmp_path / "xml")

    assert [box is None for (_, box), _ in map(dataset.__getitem__, range(3))] == [0, 1, 1]


def test_a_limited_set_has_the_annotations_of_its_samples(images: Path, kaggle: Path) -> None:
    for limit, seed in ((1, None), (3, None), (3, 5)):
        options: dict[str, Any] = {"limit": limit, "sample_seed": seed}
        dataset = ScratchDataset(images, boxes=kaggle / NOTES, **options)

        keys = (dataset.key(position).removesuffix(".png") for position in range(len(dataset)))
        check_boxes(dataset, list(keys))


def test_shards_without_boxes_take_annotations(
    images: Path, kaggle: Path, tmp_path: Path, object_server: ObjectServer
) -> None:
    settings = put_kaggle(object_server, kaggle)
    assert run_command(["shard", str(images), str(tmp_path / "shards")]) == 0
    expected = items_of(ScratchDataset(images, boxes=kaggle / NOTES))
    object_server.put_folder("packed", tmp_path / "shards")

    for boxes in (kaggle / NOTES, f"s3://sets/kaggle/{NOTES}"):
        in_order = items_of(open_dataset("s3://packed", boxes=boxes, **settings))
        assert in_order == expected
    for fetch_impl in ("threaded", "asyncio"):
        dataset = open_dataset("s3://packed", boxes=boxes, **settings)
        loader = DataLoader(dataset, batch_size=None, num_workers=1, fetch_impl=fetch_impl)
        found = [None if box is None else box.tolist() for (_, box), _ in loader]
        assert found == [box for _, box, _ in in_order.values()]
    with pytest.raises(ValueError, match=r"boxes: got 'auto' for shards, .*, or True"):
        open_dataset(tmp_path / "shards", boxes="auto")


# When they are read


@pytest.mark.parametrize(
    ("fetch_impl", "start_method"),
    [
        ("threaded", "fork"),
        ("asyncio", "fork"),
        pytest.param("threaded", "spawn", marks=pytest.mark.grid),
    ],
)
def test_annotations_are_read_with_their_images_and_once_for_all_workers_and_epochs(
    kaggle: Path, object_server: ObjectServer, fetch_impl: Any, start_method: str
) -> None:
    settings = put_kaggle(object_server, kaggle)
    object_server.reset_counters()

    def count_xml() -> dict[str, int]:
        by_key = object_server.counters(by_key=True).num_gets_by_key
        return {key: number for key, number in by_key.items() if key.lower().endswith(".xml")}

    dataset = open_dataset(
        "s3://sets/kaggle",
        split="train",
        boxes="auto",
        transform=pil_to_tensor,
        missing_box=math.nan,
        **settings,
    )
    assert count_xml() == {}
    once = {f"sets/kaggle/{NOTES}/{name}": 1 for name in XML if name.startswith("train/")}
    expected = torch.tensor([BOXES.get(name, [math.nan] * 4) for name in sorted(TRAIN)])
    for method in (start_method, "fork"):  # an epoch each, with new workers
        loader = DataLoader(
            dataset,
            batch_size=2,
            num_workers=1 if method == "spawn" else 2,
            fetch_impl=fetch_impl,
            multiprocessing_context=method,
        )
        boxes = torch.cat([boxes for (_, boxes), _ in loader])
        assert torch.equal(boxes.nan_to_num(-1), expected.nan_to_num(-1))
        assert count_xml() == once


def test_images_that_are_kept_in_memory_keep_their_boxes(images: Path, kaggle: Path) -> None:
    dataset = ScratchDataset(images, boxes=kaggle / NOTES)
    expected = items_of(dataset)

    cached = MemoryCachedDataset(ScratchDataset(images, boxes=kaggle / NOTES), 1.0)

    assert items_of(cached) == expected
    assert cached.num_kept == len(TRAIN)
    assert items_of(cached) == expected
    assert items_of(pickle.loads(pickle.dumps(dataset))) == expected
    assert items_of(pickle.loads(pickle.dumps(ScratchDataset(images, boxes=kaggle)))) == expected


# What is wrong


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "a document type, which"),
        (b"<annotation>", "ExpatError"),
        (b"\xff\xd8\xff\xe0 an image", "ExpatError"),
        (make_xml((1, 2, 3, 4)).replace(b"<ymin>2</ymin>", b""), "'ymin'"),
        (b" " * (1 << 20) + make_xml(), "bytes, expected 1048576 at most"),
    ],
)
def test_a_file_that_is_no_annotation_fails_its_sample_and_is_named(
    images: Path, kaggle: Path, content: bytes, says: str
) -> None:
    (kaggle / NOTES / f"train/{TRAIN[1]}.xml").write_bytes(content)
    dataset = ScratchDataset(images, boxes=kaggle / NOTES, missing_box=math.nan)
    at = next(n for n in range(len(TRAIN)) if TRAIN[1] in dataset.key(n))

    for _ in range(2):
        with pytest.raises(
            ShardFormatError, match=rf"_12\.xml: no annotation in XML .*{says}.* position {at} of"
        ):
            dataset[at]
    assert dataset[0][0][1] is not None
    dataset.set_transform(pil_to_tensor)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, on_error="skip")
    assert sum(len(labels) for _, labels in loader) == len(TRAIN) - 1


def test_an_annotation_that_has_gone_is_named(images: Path, kaggle: Path) -> None:
    dataset = ScratchDataset(images, boxes=kaggle / NOTES)
    (kaggle / NOTES / f"train/{TRAIN[0]}.xml").unlink()

    with pytest.raises(KeyNotFoundError, match=r"n01440764_1\.xml: no such file.* position 0 of"):
        dataset[0]


def test_places_without_annotations_say_so(
    images: Path, kaggle: Path, tmp_path: Path, object_server: ObjectServer
) -> None:
    settings = put_kaggle(object_server, kaggle)
    write_tree(tmp_path, {"xml/z.xml": make_xml(), "boxes.tar": b"", "none/a.txt": b""})

    for boxes, says in (
        (tmp_path / "xml", r"xml: no XML file belongs to any of the 6 samples, the first of which"),
        (tmp_path / "none", r"boxes: .*none: holds no XML file, expected a table .*, or a folder"),
        (tmp_path / "boxes.tar", r"boxes: .*boxes\.tar: is a tar, .* unpack it, or give it to"),
        ("auto", r"boxes: got 'auto' for the images below .*images, which are not in Kaggle's"),
    ):
        with pytest.raises(ValueError, match=says):
            ScratchDataset(images, boxes=boxes)
    with pytest.raises(KeyNotFoundError, match=r"boxes: .*nowhere: no such file, expected a table"):
        ScratchDataset(images, boxes=tmp_path / "nowhere")
    with pytest.raises(KeyNotFoundError, match=r"boxes: s3://sets/nowhere: no such file, expecte"):
        S3Dataset("sets", prefix="kaggle", boxes="s3://sets/nowhere", **settings)
    with pytest.raises(ValueError, match=r"boxes: s3://sets/kaggle/ILSVRC/Data: holds no XML"):
        open_dataset("s3://sets/kaggle", boxes="s3://sets/kaggle/ILSVRC/Data", **settings)
    (kaggle / NOTES / "train").rename(kaggle / "moved")
    with pytest.raises(KeyNotFoundError, match=r"Annotations/CLS-LOC/train: no such folder, where"):
        open_dataset(kaggle, boxes="auto")
