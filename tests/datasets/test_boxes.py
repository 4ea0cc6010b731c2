"""Bounding boxes beside images: from a table, or from shards, always by the image's name."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets import S3Dataset, ScratchDataset, open_dataset
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.prepare.__main__ import main as run_command
from concurrent_dataloader.stores import Credentials
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.test_shards import open_one

NAMES = ("cat/a.png", "cat/b.png", "cat/deep/c.png", "dog/d.png", "dog/e.PNG")
TABLE = """name,x1,y1,x2,y2
d.png,0.1,0.6,0.2,0.9
cat/b.png,0,0,1,0.5
d.png,0.05,0.7,0.15,0.95
e,0.5,0.25,0.75,1
somewhere/else.png,0,0,1,1
"""
BOXES: dict[str, tuple[float, ...] | None] = {
    "cat/a.png": None,
    "cat/b.png": (0.0, 0.0, 1.0, 0.5),
    "cat/deep/c.png": None,
    "dog/d.png": (0.05, 0.6, 0.2, 0.95),  # the union of two rows
    "dog/e.PNG": (0.5, 0.25, 0.75, 1.0),  # by its stem
}


def encode_image(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for seed, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_image(seed))
    (tmp_path / "boxes.csv").write_text(TABLE)
    return root


@pytest.fixture
def table(folder: Path) -> Path:
    return folder.parent / "boxes.csv"


def items_of(dataset: Any) -> dict[str, tuple[bytes, list[float] | None, int]]:
    """Pixels, box and label of each image, by its key in lower case, as shards have it."""
    found: dict[str, tuple[bytes, list[float] | None, int]] = {}
    for position in range(len(dataset)):
        (image, box), label = dataset[position]
        sides = None if box is None else box.tolist()
        found[dataset.key(position).lower()] = (image.tobytes(), sides, label)
    return found


def check_boxes(dataset: Any, names: tuple[str, ...] = NAMES) -> None:
    boxes = {name: box for name, (_, box, _) in items_of(dataset).items()}
    assert boxes.keys() == {name.lower() for name in names}
    for name in names:
        expected = BOXES[name]
        assert boxes[name.lower()] == (
            None if expected is None else np.array(expected, np.float32).tolist()
        ), name


def test_g12_a_folder_with_a_table_gives_the_union_of_an_images_rows_or_null(
    folder: Path, table: Path
) -> None:
    dataset = ScratchDataset(folder, boxes=table)
    plain = ScratchDataset(folder)

    check_boxes(dataset)
    (image, box), label = dataset[3]
    assert box.dtype == torch.float32
    assert box.shape == (4,)
    assert (image.tobytes(), label) == (plain[3][0].tobytes(), plain[3][1])
    assert dataset[-2][0][1].equal(box)
    check_boxes(open_dataset(folder, boxes=str(table)))


def test_g13_boxes_are_found_by_the_files_name_and_never_by_its_class(
    folder: Path, table: Path
) -> None:
    rows = [f"{name},0,0,1,1" for name in ("0", "1", "cat", "dog", "images", "deep")]
    table.write_text("\n".join([*rows, "c.png,0.25,0.5,0.75,1", ""]))

    boxes = {
        name: box for name, (_, box, _) in items_of(ScratchDataset(folder, boxes=table)).items()
    }

    assert boxes.pop("cat/deep/c.png") == [0.25, 0.5, 0.75, 1]
    assert set(boxes.values()) == {None}


def test_g13_a_table_that_is_not_there_is_named(
    folder: Path, table: Path, object_server: ObjectServer
) -> None:
    table.unlink()
    object_server.put_folder("photos", folder)

    with pytest.raises(FileNotFoundError, match=r"boxes: .*boxes\.csv: no such file, expected a"):
        ScratchDataset(folder, boxes=table)
    with pytest.raises(FileNotFoundError, match=r"boxes: s3://photos/b\.csv: no such file, expect"):
        S3Dataset("photos", boxes="s3://photos/b.csv", **reach(object_server))
    with pytest.raises(ValueError, match=r"boxes: .*images: holds no XML file, expected a table"):
        ScratchDataset(folder, boxes=folder)


def reach(server: ObjectServer) -> dict[str, Any]:
    return {
        "endpoint_url": server.endpoint_url,
        "credentials": Credentials(server.access_key, server.secret_key),
    }


def test_a_bucket_takes_a_table_of_its_own_or_of_this_machine(
    folder: Path, table: Path, object_server: ObjectServer
) -> None:
    object_server.put_folder("photos", folder, prefix="train/")
    object_server.put_objects("photos", {"boxes.csv": TABLE.encode()})

    for place in ("s3://photos/boxes.csv", table):
        dataset = S3Dataset("photos", prefix="train", boxes=place, **reach(object_server))
        check_boxes(dataset)


def test_boxes_may_be_given_as_they_are(folder: Path) -> None:
    given = {name: [box] for name, box in BOXES.items() if box is not None}

    check_boxes(ScratchDataset(folder, boxes=given))
    with pytest.raises(ValueError, match=r"boxes\['a\.png'\]: got box 0, 0, 2, 1, expected x1"):
        ScratchDataset(folder, boxes={"a.png": [(0, 0, 2, 1)]})
    with pytest.raises(TypeError, match=r"boxes\['a\.png'\]: got \(0, 0, 1, 1\), expected a list"):
        ScratchDataset(folder, boxes={"a.png": (0, 0, 1, 1)})  # pyright: ignore[reportArgumentType]: on purpose
    with pytest.raises(ValueError, match=r"boxes: no row belongs to any of the 5 samples"):
        ScratchDataset(folder, boxes={"z.png": [(0, 0, 1, 1)]})


def test_a_limited_set_has_the_boxes_of_its_samples(folder: Path, table: Path) -> None:
    for limit, seed in ((1, None), (3, None), (3, 5)):
        dataset = ScratchDataset(folder, boxes=table, limit=limit, sample_seed=seed)

        check_boxes(dataset, tuple(dataset.key(position) for position in range(len(dataset))))


def test_transforms_are_given_the_image_and_metadata_stays_last(folder: Path, table: Path) -> None:
    dataset = ScratchDataset(
        folder, boxes=table, transform=pil_to_tensor, target_transform=str, with_metadata=True
    )

    (image, box), label, metadata = dataset[3]

    assert image.shape == (3, 20, 24)
    assert label == "1"
    assert metadata.key == "dog/d.png"
    assert pickle.loads(pickle.dumps(dataset))[3][0][1].equal(box)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_boxes_collate_where_images_without_one_get_numbers(
    folder: Path, table: Path, num_workers: int
) -> None:
    dataset = ScratchDataset(folder, boxes=table, transform=pil_to_tensor, missing_box=math.nan)
    others = torch.utils.data.DataLoader(dataset, batch_size=5)

    (((images, boxes), labels),) = DataLoader(dataset, batch_size=5, num_workers=num_workers)

    (((torchs_images, torchs_boxes), _),) = others
    assert boxes.shape == (5, 4)
    assert boxes.isnan().all(dim=1).tolist() == [True, False, True, False, False]
    assert torch.equal(boxes.nan_to_num(-1), torchs_boxes.nan_to_num(-1))
    assert torch.equal(images, torchs_images)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(TypeError, match="NoneType"):
        default_collate([ScratchDataset(folder, boxes=table, transform=pil_to_tensor)[0]])


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_shards_that_hold_boxes_give_the_items_of_the_folder(
    folder: Path, table: Path, tmp_path: Path, kind: str
) -> None:
    command = ["shard", str(folder), str(tmp_path / "shards"), "--format", kind]
    assert run_command([*command, "--boxes", str(table)]) == 0

    dataset = open_dataset(tmp_path / "shards", boxes=True)
    limited = open_dataset(tmp_path / "shards", boxes=True, limit=2)

    expected = items_of(ScratchDataset(folder, boxes=table))
    assert items_of(dataset) == expected
    assert items_of(limited).items() <= expected.items()
    for raw, position in zip(dataset.fetch_many(range(5)), range(5), strict=True):
        assert bytes(raw) == bytes(dataset.fetch(position))
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert [(image.tobytes(), label) for (image, _), label in loader] == [
        (image.tobytes(), label) for (image, _), label in map(dataset.__getitem__, range(5))
    ]


def test_shards_without_boxes_take_a_table(folder: Path, table: Path, tmp_path: Path) -> None:
    assert run_command(["shard", str(folder), str(tmp_path / "shards")]) == 0

    dataset = open_dataset(tmp_path / "shards", boxes=table)
    limited = open_dataset(tmp_path / "shards", boxes=table, limit=3, sample_seed=1)

    expected = items_of(ScratchDataset(folder, boxes=table))
    assert items_of(dataset) == expected
    assert items_of(limited).items() <= expected.items()
    assert {box is None for (_, box), _ in (open_dataset(tmp_path / "shards", boxes=True)[0],)} == {
        True
    }


def test_g15_a_sample_without_a_json_member_has_no_box() -> None:
    image = encode_image(0)
    null = {"png": image, "cls": b"0", "json": b'{"bbox": null}'}
    several = {"png": image, "json": b'{"bbox": [[0, 0, 0.5, 1], [0.25, 0, 1, 0.5]]}'}

    assert open_one({"png": image}, boxes=True)[0][0][1] is None
    assert open_one(null, boxes=True)[0][0][1] is None
    assert open_one(several, boxes=True)[0][0][1].tolist() == [0, 0, 1, 1]
    assert open_one(null, boxes=True, missing_box=-1.0)[0][0][1].tolist() == [-1] * 4
    assert open_one({"png": image}, boxes=True, missing_label=None)[0][1] is None
    with pytest.raises(ShardFormatError, match=r"'a/b\.png': field 'json': no boxes .*position 0"):
        open_one({"png": image, "json": b'{"bbox": [0, 0, 2, 1]}'}, boxes=True)[0]


def test_what_holds_no_boxes_says_so(folder: Path, table: Path) -> None:
    with pytest.raises(TypeError, match="boxes: got True, but single images hold none"):
        open_dataset(folder, boxes=True)
    with pytest.raises(ValueError, match="boxes: got them together with fields, expected one"):
        open_one({"png": encode_image(0)}, boxes=True, fields=("png",))
    assert open_dataset(folder, boxes=None)[0][1] == 0
