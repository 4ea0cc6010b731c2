"""A stream and ``metadata.json``: what it must agree with, and what it gives where no index is."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concurrent_dataloader.datasets.streamed import ReadSettings, StreamedShards
from concurrent_dataloader.errors import IndexFormatError, KeyNotFoundError, ShardFormatError
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata, SplitMetadata
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.shards import tar_of, write_shards

COUNTS = [10, 7, 13]
TOTAL = sum(COUNTS)


def stream(shards: Any, **settings: Any) -> StreamedShards:
    defaults: dict[str, Any] = {"decode": len, "reading": ReadSettings(part_bytes=4096)}
    return StreamedShards(shards, **defaults | settings)


def labels_of(samples: Any) -> list[int]:
    return [label for _, label in samples]


def describe(folder: Path, counts: list[int], split: str = "train", **more: Any) -> SplitMetadata:
    """Say of the shards of a split what the writer of metadata.json says."""
    paths = sorted(folder.glob(f"{split}-*.tar"))
    shards = tuple(
        ShardMetadata(name=path.name, num_samples=count, size_bytes=path.stat().st_size)
        for path, count in zip(paths, counts, strict=True)
    )
    return SplitMetadata(num_samples=sum(counts), shards=shards, **more)


def write_metadata(folder: Path, **splits: SplitMetadata) -> None:
    Metadata(splits=splits).save(folder / "metadata.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards with an index and metadata."""
    folder = write_shards(tmp_path / "set", COUNTS)
    write_metadata(folder, train=describe(folder, COUNTS))
    return folder


@pytest.fixture
def bare(folder: Path) -> Path:
    """The same without an index."""
    (folder / "train-index.npz").unlink()
    return folder


SOURCES = ["", "train-*.tar", "train-{000000..000002}.tar", "train-{000000..000001}.tar"]


@pytest.mark.parametrize("source", SOURCES)
def test_an_index_that_has_another_number_of_samples_is_refused(source: str, folder: Path) -> None:
    assert len(stream(f"{folder}/{source}")) == (17 if "000001" in source else TOTAL)
    (folder / "metadata.json").write_text(json.dumps({"train_length": 99}))

    with pytest.raises(
        IndexFormatError, match=rf"metadata.json: says 99 samples of 'train', .* has {TOTAL}; one"
    ):
        stream(f"{folder}/{source}")
    assert len(stream(folder, index=ShardIndex.load(folder / "train-index.npz"))) == TOTAL


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([11, 6, 13], "says 11 samples in train-000000.tar, but the index has 10; one of them"),
        ([10, 7], r"says 17 samples of 'train', but the index has 30"),
    ],
)
def test_an_index_of_other_shards_is_refused(counts: list[int], message: str, folder: Path) -> None:
    said = describe(folder, COUNTS)
    assert said.shards is not None
    shards = tuple(
        dataclasses.replace(shard, num_samples=count)
        for shard, count in zip(said.shards, counts, strict=False)
    )
    write_metadata(folder, train=SplitMetadata(num_samples=sum(counts), shards=shards))

    with pytest.raises(IndexFormatError, match=message):
        stream(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.tar", "train-000001.tar", "train-000002.tar"], "names a.tar, but the index does not"),
        (["train-000001.tar", "train-000002.tar"], "does not name train-000000.tar, but the index"),
    ],
)
def test_shards_that_one_of_the_two_does_not_name_are_told(
    names: list[str], message: str, folder: Path
) -> None:
    shards = [{"name": name, "num_samples": 1, "size_bytes": 1} for name in names]
    content = {"splits": {"train": {"num_samples": TOTAL, "shards": shards}}}
    (folder / "metadata.json").write_text(json.dumps(content))

    with pytest.raises(IndexFormatError, match=message):
        stream(folder)


@pytest.mark.parametrize("source", SOURCES[:3])
def test_the_length_is_that_of_the_metadata_where_there_is_no_index(
    source: str, bare: Path
) -> None:
    dataset = stream(f"{bare}/{source}")

    assert len(dataset) == TOTAL
    assert labels_of(dataset) == list(range(TOTAL))
    with pytest.raises(TypeError, match="no index"):
        len(stream(bare, rank=0, world_size=2))


def test_a_part_of_the_shards_has_the_length_of_the_part(bare: Path) -> None:
    for source, length in (("train-{000000..000001}.tar", 17), ("train-*2.tar", 13)):
        dataset = stream(f"{bare}/{source}")
        assert len(dataset) == len(labels_of(dataset)) == length

    (bare / "train-000002.tar").unlink()
    assert len(stream(f"{bare}/train-{{000000..000001}}.tar")) == 17
    assert len(stream([bare / "train-000000.tar"])) == 10


@pytest.mark.parametrize("source", SOURCES[:2])
def test_a_shard_that_is_listed_and_not_there_is_an_error(source: str, bare: Path) -> None:
    (bare / "train-000001.tar").unlink()

    with pytest.raises(
        KeyNotFoundError,
        match=r"no shard 'train-000001.tar', one of 1 missing of the 3 that metadata.json beside",
    ):
        stream(f"{bare}/{source}")


def test_a_shard_that_is_not_listed_or_has_another_size_is_an_error(bare: Path) -> None:
    shutil.copyfile(bare / "train-000000.tar", bare / "train-000003.tar")
    with pytest.raises(IndexFormatError, match=r"train-000003.tar: not named by .*metadata.json,"):
        stream(bare)
    assert len(stream(f"{bare}/train-{{000000..000002}}.tar")) == TOTAL
    (bare / "train-000003.tar").unlink()

    with (bare / "train-000002.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(
        IndexFormatError, match=r"train-000002.tar: got \d+ bytes, expected \d+, as .*metadata.json"
    ):
        stream(bare)
    assert labels_of(stream(bare, index=None)) == list(range(TOTAL))


def test_a_length_that_the_shards_do_not_have_is_found_out_at_their_end(bare: Path) -> None:
    said = describe(bare, [10, 7, 14])
    write_metadata(bare, train=said)

    with pytest.raises(ShardFormatError, match=r"got 30 samples in 3 shards, expected 31, as meta"):
        list(stream(bare))
    with pytest.raises(ValueError, match=r"length: got 30, expected 31, as metadata.json says"):
        stream(bare, length=30)
    assert len(stream(bare, index=None, length=30)) == 30


def test_an_older_systems_lengths_are_those_of_whole_folders(bare: Path) -> None:
    (bare / "metadata.json").write_text(json.dumps({"train_length": TOTAL, "format": "img"}))

    assert len(stream(bare)) == TOTAL
    for source in SOURCES[1:]:
        with pytest.raises(TypeError, match="no index"):
            len(stream(f"{bare}/{source}"))
    (bare / "metadata.json").write_text(json.dumps({"train_length": 29}))
    with pytest.raises(ShardFormatError, match=r"expected 29, as metadata\.json said"):
        list(stream(bare))


def test_each_split_has_its_own_length(bare: Path) -> None:
    write_shards(bare, [3, 2], split="validation", with_index=False)
    splits = {"train": describe(bare, COUNTS), "val": describe(bare, [3, 2], "validation")}
    write_metadata(bare, **splits)

    assert len(stream(bare, split="val")) == len(list(stream(bare, split="val"))) == 5
    assert len(stream(f"{bare}/train-*.tar")) == TOTAL


def test_shards_without_a_split_in_their_names_are_found_by_these(tmp_path: Path) -> None:
    write_shards(tmp_path, [4, 5], split="data", with_index=False)
    other = SplitMetadata(num_samples=9)
    write_metadata(tmp_path, data=describe(tmp_path, [4, 5], "data"), train=other)

    assert len(stream(tmp_path)) == 9


@pytest.mark.parametrize("content", ['{"license": "CC-0"}', '{"splits": {"test": {}}}', "{}"])
def test_what_another_program_calls_so_says_nothing(content: str, folder: Path) -> None:
    (folder / "metadata.json").write_text(content)

    assert len(stream(folder)) == TOTAL
    (folder / "train-index.npz").unlink()
    assert labels_of(stream(folder)) == list(range(TOTAL))


@pytest.mark.parametrize("content", ["{", "[1]", '{"splits": {"train": {"shards": [{}]}}}'])
def test_a_file_that_is_damaged_is_named(content: str, folder: Path) -> None:
    (folder / "metadata.json").write_text(content)

    with pytest.raises(IndexFormatError, match=r"metadata.json: no metadata of shards"):
        stream(folder)


def test_compressed_shards_beside_the_metadata_of_others_are_read(bare: Path) -> None:
    for path in bare.glob("*.tar"):
        (bare / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()

    assert labels_of(stream(bare)) == list(range(TOTAL))


def test_a_bucket_and_a_web_server_are_asked_for_it_once(
    folder: Path, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    for bucket in ("indexed", "bare"):
        object_server.create_bucket(bucket, public=True)
        object_server.put_folder(bucket, folder)
        (folder / "train-index.npz").unlink(missing_ok=True)
        for root in (f"s3://{bucket}", f"{object_server.endpoint_url}/{bucket}"):
            url = f"{root}/train-{{000000..000002}}.tar"
            object_server.reset_counters()
            assert len(stream(url)) == TOTAL
            gets = object_server.counters(by_key=True).num_gets_by_key
            assert gets[f"{bucket}/metadata.json"] == 1
            object_server.reset_counters()
            stream(url, index=None)
            gets = object_server.counters(by_key=True).num_gets_by_key
            assert gets.get(f"{bucket}/metadata.json", 0) == 0


def test_pixels_classes_and_the_base_of_labels_are_those_that_are_said(tmp_path: Path) -> None:
    pixels = np.arange(36, dtype=np.uint8)
    (tmp_path / "train-0.tar").write_bytes(tar_of({"a.raw": pixels.tobytes(), "a.cls": b"1"}))
    said = describe(tmp_path, [1], payload="raw", image_size=(2, 6), classes=("cat", "dog"))
    write_metadata(tmp_path, train=said)

    dataset = StreamedShards(tmp_path)

    [(image, label)] = dataset
    assert (image.size, label) == ((6, 2), 1)
    assert np.array_equal(np.asarray(image).ravel(), pixels)
    assert dataset.classes is not None
    assert [dataset.classes.name(label) for label in range(dataset.classes.count)] == ["cat", "dog"]


def test_classes_are_those_of_the_index_where_there_is_one(folder: Path) -> None:
    classes = stream(folder).classes

    assert classes is not None
    assert classes.count == TOTAL
    assert stream(folder, index=None).classes is None


def test_what_was_done_to_the_images_is_told(folder: Path) -> None:
    steps = ("Resize(256)", "CenterCrop(224)")
    write_metadata(folder, train=describe(folder, COUNTS, transforms=steps))
    assert stream(folder).baked_steps == steps

    older = {"train_length": TOTAL, "train_transform_pipeline": list(steps)}
    (folder / "metadata.json").write_text(json.dumps(older))
    assert stream(folder).baked_steps == steps
    (folder / "train-index.npz").unlink()
    assert stream(folder).baked_steps == steps
    assert stream(folder, index=None).baked_steps == ()
