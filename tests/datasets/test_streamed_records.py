"""Streams of TFRecord files by several ranks and workers, and what lies across files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets import ShardDataset, open_shards
from concurrent_dataloader.datasets.streamed import ReadSettings, StreamedShards
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.prepare.__main__ import main
from tests.datasets.conftest import encode_image
from tests.datasets.shards import tar_of

NUM_IMAGES, NUM_FILES = 23, 5

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of five samples, the last of three, as our command writes them."""
    root = tmp_path_factory.mktemp("records")
    for number in range(NUM_IMAGES):
        path = root / "images" / f"class{number % 3}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(number))
    flags = ["--format", "tfrecord", "--maxcount", "5", "--no-shuffle"]
    assert main(["shard", str(root / "images"), str(root / "packed"), *flags]) == 0
    assert len(list((root / "packed").glob("train-*-of-00005"))) == NUM_FILES
    return root / "packed"


@pytest.fixture
def bare(records: Path, tmp_path: Path) -> Path:
    """The same without an index."""
    for path in records.iterdir():
        if path.suffix != ".npz":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def stream(root: Path, **settings: Any) -> StreamedShards:
    defaults: dict[str, Any] = {"fields": ("__key__", "cls"), "shuffle": True, "seed": 4}
    return StreamedShards(root, **defaults | settings)


def expected(records: Path) -> list[tuple[str, int]]:
    dataset = open_shards(records, decode=None)
    labels = [dataset.label(position) for position in range(len(dataset))]
    keys = [stem(dataset.key(position)) for position in range(len(dataset))]
    return sorted((key, int(label or 0)) for key, label in zip(keys, labels, strict=True))


def stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def read_all(root: Path, world_size: int, num_workers: int, **settings: Any) -> list[list[Any]]:
    """Read an epoch on all ranks; gives the batches of each."""
    got: list[list[Any]] = []
    for rank in range(world_size):
        dataset = stream(root, rank=rank, world_size=world_size, batch_size=2, **settings)
        dataset.set_epoch(3)
        loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=list)
        got.append(list(loader))
    return got


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 7), (2, 3), (4, 2)])
def test_175_ranks_and_workers_read_five_files_without_loss_or_repetition(
    records: Path, world_size: int, num_workers: int
) -> None:
    batches = read_all(records, world_size, num_workers, uneven="exact")

    flat = itertools.chain(*itertools.chain(*batches))
    assert sorted((stem(key), label) for key, label in flat) == expected(records)
    sizes = [sum(map(len, of_rank)) for of_rank in batches]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.filterwarnings("ignore:.*some workers idle")
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 7), (2, 4), (5, 2)])
def test_175_workers_without_files_end_cleanly_where_there_is_no_index(
    bare: Path, records: Path, world_size: int, num_workers: int
) -> None:
    """7, 8 or 10 readers of five files."""
    batches = read_all(bare, world_size, num_workers, uneven="exact")

    flat = itertools.chain(*itertools.chain(*batches))
    assert sorted((stem(key), label) for key, label in flat) == expected(records)
    assert all(batches)


def test_175_the_length_is_the_count_that_was_kept(bare: Path, records: Path) -> None:
    """By the writer: in the index for any ranks, in metadata.json for one."""
    for world_size in (1, 2, 3):
        lengths = [
            len(stream(records, rank=rank, world_size=world_size, uneven="exact"))
            for rank in range(world_size)
        ]
        assert sum(lengths) == NUM_IMAGES
    assert len(stream(bare)) == len(list(stream(bare))) == NUM_IMAGES

    content = json.loads((bare / "metadata.json").read_text())
    described = content["splits"]["train"]
    described["num_samples"] += 1
    described["shards"][0]["num_samples"] += 1
    (bare / "metadata.json").write_text(json.dumps(content))
    with pytest.raises(ShardFormatError, match="got 23 samples in 5 shards, expected 24, as meta"):
        list(stream(bare))


def test_records_that_count_from_zero_are_told_by_the_metadata(bare: Path, records: Path) -> None:
    """Without it, TensorFlow's builder is assumed, which counts from 1."""
    content = json.loads((bare / "metadata.json").read_text())
    base = content["splits"]["train"]["label_base"]

    labels = [label for _, label in stream(bare)]

    assert sorted(labels) == sorted(label for _, label in expected(records))
    content["splits"]["train"]["label_base"] = base - 1
    (bare / "metadata.json").write_text(json.dumps(content))
    assert sorted(label for _, label in stream(bare)) == sorted(label + 1 for label in labels)


# -- samples end with their shard


def write_halves(folder: Path) -> None:
    """A shard ends with a sample of the key with which the next one begins."""
    (folder / "train-0.tar").write_bytes(tar_of({"a.jpg": b"A", "a.cls": b"0", "b.jpg": b"B"}))
    (folder / "train-1.tar").write_bytes(
        tar_of({"b.png": b"P", "b.cls": b"1", "c.jpg": b"C", "c.cls": b"2"})
    )


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_131_samples_are_not_grouped_across_shards(
    tmp_path: Path, indexed: bool, shuffle: bool
) -> None:
    write_halves(tmp_path)
    if indexed:
        output = str(tmp_path / "train-index.npz")
        assert main(["index", f"{tmp_path}/train-*.tar", "--output", output]) == 0
    settings: dict[str, Any] = {"shuffle": shuffle, "reading": ReadSettings(num_open=2)}

    whole = StreamedShards(tmp_path, decode=None, missing="skip", label_base=0, **settings)
    keys = StreamedShards(tmp_path, fields="__key__", **settings)

    assert sorted(whole) == [(b"A", 0), (b"C", 2), (b"P", 1)]
    assert whole.num_skipped == 1
    assert sorted(keys) == ["a", "b", "b", "c"]
    with pytest.raises(ShardFormatError, match=r"train-0\.tar: sample 'b' has no field"):
        list(StreamedShards(tmp_path, decode=None, label_base=0, **settings))


def test_131_nor_with_random_access(tmp_path: Path) -> None:
    write_halves(tmp_path)
    output = str(tmp_path / "train-index.npz")
    assert main(["index", f"{tmp_path}/train-*.tar", "--output", output]) == 0

    dataset = open_shards(tmp_path, decode=None, missing_label=-1)

    assert isinstance(dataset, ShardDataset)
    assert [stem(dataset.key(position)) for position in range(len(dataset))] == ["a", "b", "b", "c"]
    assert bytes(dataset[1][0]) == b"B"
    assert [dataset[position][1] for position in range(4)] == [0, -1, 1, 2]
    assert np.array_equal(dataset.shard_index.shard_numbers, [0, 0, 1, 1])
