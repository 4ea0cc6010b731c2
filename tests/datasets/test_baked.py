"""Steps that were done before packing are left out of transforms, and nothing else is."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

import imagenet
from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets import StreamedShards, open_dataset, skip_baked
from concurrent_dataloader.prepare.__main__ import main as run_command

STEPS = ("Resize(32)", "CenterCrop(28)")
PAYLOADS = ("ppm", "raw", "tensor")
FULL = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, of many sizes: as files, as they are in shards, and with steps baked in."""
    root = tmp_path_factory.mktemp("baked")
    rng = np.random.default_rng(0)
    for number in range(12):
        split, label = ("train", "val")[number % 2], number % 3
        height, width = (int(side) for side in rng.integers(30, 70, 2))
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        path = root / "images" / split / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    both = ["--splits", "train,val"]
    assert run_command(["shard", str(root / "images"), str(root / "whole"), *both]) == 0
    for payload in PAYLOADS:
        command = ["shard", str(root / "images"), str(root / payload), *both]
        assert run_command([*command, "--payload", payload, "--steps", ",".join(STEPS)]) == 0
    return root


@pytest.fixture(scope="module")
def bare(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards without their indexes."""
    root = tmp_path_factory.mktemp("bare")
    for payload in ("whole", *PAYLOADS):
        shutil.copytree(sets / payload, root / payload, ignore=shutil.ignore_patterns("*.npz"))
    return root


def batches_of(dataset: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(DataLoader(dataset, batch_size=4, num_workers=1))


def check_equal(dataset: Any, whole: Any) -> None:
    """Compare batches; the same seed has put the samples in the same order."""
    expected = batches_of(whole)
    for (images, labels), (other_images, other_labels) in zip(
        batches_of(dataset), expected, strict=True
    ):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_baked_steps_are_skipped_and_pixels_are_those_of_the_whole_images(
    sets: Path, payload: str, split: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "concurrent_dataloader")

    dataset = open_dataset(sets / payload, split=split, transform=FULL)

    check_equal(dataset, open_dataset(sets / "whole", split=split, transform=FULL))
    assert dataset.baked_steps == dataset.skipped_steps == STEPS  # pyright: ignore[reportAttributeAccessIssue]: shards lie there
    told = [record for record in caplog.records if "baked" in record.name]
    assert [record.levelname for record in told] == ["INFO"]
    assert told[0].getMessage() == (
        "left out Resize(32), CenterCrop(28) of the transform: the packed images have had it"
    )


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("has_index", [True, False])
def test_a_stream_says_which_steps_are_baked_in_for_the_caller_to_skip(
    sets: Path, bare: Path, payload: str, split: Any, has_index: bool
) -> None:
    folder = (sets if has_index else bare) / payload

    stream = StreamedShards(folder, split=split, shuffle=False)
    stream.set_transform(skip_baked(FULL, stream.baked_steps))

    assert stream.has_index == has_index
    assert stream.baked_steps == STEPS
    check_equal(stream, open_dataset(sets / "whole", split=split, transform=FULL))


def test_a_step_at_the_head_alone_is_skipped_and_what_follows_is_not(
    sets: Path, tmp_path: Path
) -> None:
    source = str(sets / "images" / "train")
    command = ["shard", source, str(tmp_path / "resized"), "--payload", "ppm"]
    assert run_command([*command, "--steps", "Resize(32)"]) == 0
    assert run_command(["shard", source, str(tmp_path / "whole")]) == 0

    dataset = open_dataset(tmp_path / "resized", transform=FULL)

    check_equal(dataset, open_dataset(tmp_path / "whole", transform=FULL))
    assert [type(part) for part in dataset.transform.transforms] == [v2.CenterCrop, v2.PILToTensor]  # pyright: ignore[reportOptionalMemberAccess, reportFunctionMemberAccess]: a Compose


def test_without_the_skipping_pixels_would_differ(sets: Path) -> None:
    dataset = open_dataset(sets / "ppm", split="val", transform=FULL, baked_steps=())

    assert dataset.transform is FULL
    pairs = zip(
        batches_of(dataset),
        batches_of(open_dataset(sets / "whole", split="val", transform=FULL)),
        strict=True,
    )
    assert not any(torch.equal(images, others) for (images, _), (others, _) in pairs)


def test_a_transform_that_is_set_later_is_treated_alike(sets: Path) -> None:
    dataset = open_dataset(sets / "raw", split="val")

    dataset.set_transform(FULL)

    check_equal(dataset, open_dataset(sets / "whole", split="val", transform=FULL))


def names_of(transform: Any) -> list[str]:
    parts: Sequence[Any] = (
        [transform] if not hasattr(transform, "transforms") else transform.transforms
    )
    if isinstance(transform, nn.Sequential):
        parts = list(transform)
    return [type(part).__name__ for part in parts]


@pytest.mark.parametrize(
    ("transform", "left"),
    [
        (v1.Compose([v1.Resize(32), v1.CenterCrop(28), v1.ToTensor()]), ["ToTensor"]),
        (v1.Compose([v1.Resize((32,)), v1.CenterCrop((28, 28)), v1.ToTensor()]), ["ToTensor"]),
        (nn.Sequential(v2.Resize(32), v2.CenterCrop(28), v2.ToImage()), ["ToImage"]),
        (
            v2.Compose([v2.ToImage(), v2.Resize([32]), v2.CenterCrop(28), v2.ToDtype(torch.uint8)]),
            ["ToImage", "ToDtype"],
        ),
        (
            v2.Compose([v2.Compose([v2.Resize(32), v2.CenterCrop(28)]), v2.ToImage()]),
            ["ToImage"],
        ),
        (
            v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.CenterCrop(20), v2.ToImage()]),
            ["CenterCrop", "ToImage"],
        ),
        (v2.Compose([v2.Resize(32), v2.CenterCrop(28)]), None),
    ],
)
def test_old_and_new_transforms_composed_in_any_way_are_known(
    transform: Any, left: list[str] | None
) -> None:
    rest = skip_baked(transform, STEPS)

    assert rest is None if left is None else names_of(rest) == left


@pytest.mark.parametrize(
    "steps",
    [
        [v2.Resize(30), v2.CenterCrop(28)],
        [v2.Resize(32), v2.CenterCrop(24)],
        [v2.CenterCrop(28), v2.Resize(32)],
        [v2.CenterCrop(28)],
        [v2.Resize(32)],
        [v2.Resize((32, 32)), v2.CenterCrop(28)],
        [v2.Resize(32, max_size=64), v2.CenterCrop(28)],
        [v2.Resize(32, InterpolationMode.BICUBIC), v2.CenterCrop(28)],
        [v2.Resize(32, antialias=False), v2.CenterCrop(28)],
        [v2.Resize(32), v2.CenterCrop((28, 20))],
        [v2.Resize(32), v2.RandomHorizontalFlip(), v2.CenterCrop(28)],
    ],
)
def test_other_fixed_steps_are_done_as_they_are_and_warned_of(
    steps: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    transform = v2.Compose([*steps, v2.ToImage()])

    assert skip_baked(transform, STEPS) is transform

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "have had Resize(32), CenterCrop(28), and the transform does " in record.getMessage()
    assert "expected a transform that begins with Resize(32), Cen" in record.getMessage()


class Resize:
    """Somebody's own, which happens to be called so."""

    size = 32

    def __call__(self, image: Any) -> Any:
        return image


@pytest.mark.parametrize(
    "transform",
    [
        v2.Compose([v2.RandomResizedCrop(28), v2.RandomHorizontalFlip(), v2.ToImage()]),
        v2.Compose([v2.RandomCrop(20), v2.Resize(28)]),
        v2.ToImage(),
        v1.ToTensor(),
        v1.Compose([Resize(), v1.ToTensor()]),
        Resize(),
        None,
    ],
)
def test_random_crops_conversions_and_other_functions_are_left_alone(
    transform: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "concurrent_dataloader")

    assert skip_baked(transform, STEPS) is transform
    assert skip_baked(FULL, ()) is FULL
    assert not caplog.records


@pytest.mark.parametrize(
    "steps",
    [
        {"train_transform_pipeline": ["Resize(9)"], "validation_transform_pipeline": STEPS},
        {"transform_pipeline": STEPS},
    ],
)
def test_metadata_of_the_older_system_is_heeded(
    sets: Path, tmp_path: Path, steps: dict[str, Any]
) -> None:
    for path in (sets / "ppm").glob("val-*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"validation_length": 6, **steps}))

    dataset = open_dataset(tmp_path, split="val", transform=FULL)

    check_equal(dataset, open_dataset(sets / "whole", split="val", transform=FULL))


def test_a_split_of_any_name_is_known_by_its_index(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "images" / "val", tmp_path / "images" / "mine")
    command = ["shard", str(tmp_path / "images"), str(tmp_path / "out"), "--splits", "mine"]
    assert run_command([*command, "--payload", "raw", "--steps", ",".join(STEPS)]) == 0

    dataset = open_dataset(tmp_path / "out", transform=FULL)

    assert dataset[0][0].shape == (3, 28, 28)
    assert getattr(dataset, "skipped_steps", None) == STEPS


def test_spaces_do_not_matter_and_unknown_steps_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert names_of(skip_baked(FULL, ["Resize( 32 )"])) == ["CenterCrop", "PILToTensor"]
    assert skip_baked(FULL, ["Grayscale(1)"]) is FULL
    assert caplog.records[-1].levelname == "WARNING"


def validation_pixels(data: Path, *flags: str) -> torch.Tensor:
    """All images of the trainer's validation, which is Resize(32), CenterCrop(28) then."""
    text = "--image-size 28 -b 4 -j 0 --seed 3 --no-accel"
    args = imagenet.parse_arguments([str(data), *text.split(), *flags])
    place = imagenet.Place(0, 1, 1, torch.device("cpu"))
    loader = imagenet.make_loader(args, imagenet.open_split(args, "val"), place, is_train=False)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_trainer_streams_baked_images_without_an_index_as_the_whole_ones(
    bare: Path, payload: str
) -> None:
    streamed = validation_pixels(bare / payload, "--stream")

    assert torch.equal(streamed, validation_pixels(bare / "whole", "--stream"))


def test_the_trainer_validates_baked_images_as_the_whole_ones(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = [validation_pixels(sets / name) for name in ("whole", "raw")]
    text = "--image-size 28 -b 4 -j 0 --seed 3 --no-accel --epochs 1 -a resnet18"
    flags = [*text.split(), "--output-base-folder", str(tmp_path / "raw")]
    assert imagenet.main([str(sets / "raw"), *flags]) == 0

    assert torch.equal(pixels[0], pixels[1])
    printed = capsys.readouterr().out
    assert printed.count("val: without Resize(32), CenterCrop(28), which is baked into") == 1
    assert "train: without" not in printed


@pytest.mark.parametrize("has_index", [True, False])
def test_the_trainer_says_what_is_baked_into_streams(
    sets: Path, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_index: bool
) -> None:
    root = sets if has_index else bare
    text = "--stream --image-size 28 -b 4 -j 0 --seed 3 --no-accel --epochs 1 -a resnet18"
    for payload in ("raw", "whole"):
        flags = [*text.split(), "--output-base-folder", str(tmp_path / payload)]
        assert imagenet.main([str(root / payload), *flags]) == 0

        printed = capsys.readouterr().out
        line = "val: without Resize(32), CenterCrop(28), which is baked into the shards\n"
        assert printed.count(line) == printed.count("without") == (payload == "raw")
