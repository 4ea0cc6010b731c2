"""``shard --boxes`` with several splits: a table may be of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from concurrent_dataloader.datasets import open_dataset
from concurrent_dataloader.prepare.__main__ import main
from tests.datasets.conftest import encode_image


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Four images of each split, and a table for two of the training images."""
    for split in ("train", "val"):
        for number in range(4):
            path = tmp_path / "pets" / split / f"c{number % 2}" / f"{split}_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(number))
    (tmp_path / "train.csv").write_text("train_0.jpg,0,0,0.5,1\ntrain_3.jpg,0.25,0,1,1\n")
    return tmp_path / "pets"


def shard(pets: Path, *flags: str) -> int:
    return main(["shard", str(pets), str(pets.parent / "out"), *flags])


def boxes_of(pets: Path, split: str) -> list[Any]:
    dataset: Any = open_dataset(pets.parent / "out", split=split, boxes=True)
    items = sorted((dataset.key(n), dataset[n][0][1]) for n in range(len(dataset)))
    return [None if box is None else box.tolist() for _, box in items]


def test_a_table_of_one_split_leaves_null_to_the_others_and_says_so(
    pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pets.parent / "train.csv"

    assert shard(pets, "--splits", "train,val", "--boxes", str(table)) == 0

    out = capsys.readouterr().out
    assert f"{table}: no boxes of split val, whose samples get null instead\n" in out
    assert "no boxes of split train" not in out
    # train/c0/train_0, train/c0/train_2, train/c1/train_1, train/c1/train_3
    assert boxes_of(pets, "train") == [[0, 0, 0.5, 1], None, None, [0.25, 0, 1, 1]]
    assert boxes_of(pets, "val") == [None] * 4


@pytest.mark.parametrize("splits", ["train,val", "val", "train"])
def test_a_table_of_no_split_is_an_error_before_anything_is_written(
    pets: Path, capsys: pytest.CaptureFixture[str], splits: str
) -> None:
    table = pets.parent / "train.csv"
    table.write_text("other_0.jpg,0,0,0.5,1\n")

    assert shard(pets, "--splits", splits, "--boxes", str(table)) == 1

    err = capsys.readouterr().err
    assert "check the names" in err
    assert str(table) in err
    assert not list(pets.parent.glob("out/*.tar"))


def test_a_table_of_both_says_nothing(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pets.parent / "train.csv"
    table.write_text(table.read_text() + "val_2.jpg,0,0.5,1,1\n")

    assert shard(pets, "--splits", "train,val", "--boxes", str(table)) == 0

    assert "no boxes of" not in capsys.readouterr().out
    assert boxes_of(pets, "val") == [None, [0, 0.5, 1, 1], None, None]
