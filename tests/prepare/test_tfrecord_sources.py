"""TFRecord shards as a source of other forms: names, labels, boxes, and the bytes of images."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concurrent_dataloader.errors import (
    ChecksumError,
    KeyNotFoundError,
    LoaderError,
    ShardFormatError,
)
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.formats.tfrecord import (
    ImageExample,
    TFRecordWriter,
    serialize_image_example,
)
from concurrent_dataloader.labels import imagenet_classes
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.sources import SampleTable, open_source
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores import Credentials
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.shard_sets import flip_byte, members

WNIDS = sorted(entry.wnid for entry in imagenet_classes())


def encode_image(seed: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_records(path: Path, examples: Sequence[ImageExample], label_base: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = TFRecordWriter(file)
        for example in examples:
            writer.write(serialize_image_example(example, label_base=label_base))


def table(source: SampleTable) -> dict[str, tuple[int | None, bytes]]:
    return {
        source.name(at): (source.label(at), bytes(source.read(at))) for at in range(len(source))
    }


def tree_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Records as TensorFlow's builder of ImageNet writes them, without anything beside them."""
    for number in range(2):
        examples = [
            ImageExample(
                encode_image(label),
                label,
                (Box(0.25, 0.25, 0.5, 0.75),) * (label == 7),
                filename=f"{WNIDS[label]}_{number}.JPEG",
                synset=WNIDS[label],
            )
            for label in (7, 999, 3)
        ]
        write_records(tmp_path / f"built/train-0000{number}-of-00002", examples)
    return tmp_path / "built"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Records that `shard` wrote, with all that lies beside them, and a tree they were made of."""
    for split, count in (("train", 9), ("val", 4)):
        for number in range(count):
            path = tmp_path / f"images/{split}/{'abc'[number % 3]}/{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(number + 100 * (split == "val")))
    arguments = ["--format", "tfrecord", "--splits", "train,val", "--maxcount", "4", "--file-info"]
    arguments += ["--key-style", "path"]
    assert main(["shard", str(tmp_path / "images"), str(tmp_path / "tf"), *arguments]) == 0
    return tmp_path / "tf"


def test_records_of_tensorflows_builder_are_samples(built: Path) -> None:
    with contextlib.closing(open_source(built)) as source:
        found = table(source)
        twin = pickle.loads(pickle.dumps(source))
        boxes = [source.boxes(at) for at in range(len(source))]
        sizes = [source.size_bytes(at) for at in range(len(source))]

    assert list(found) == [
        f"{WNIDS[label]}/{WNIDS[label]}_{number}.JPEG"
        for number in range(2)
        for label in (7, 999, 3)
    ]
    assert list(found.values()) == [(label, encode_image(label)) for label in (7, 999, 3)] * 2
    assert table(twin) == found
    assert sizes == [len(raw) for _, raw in found.values()]
    assert (source.label_space, list(source.classes or ())) == ("sorted_wnid", WNIDS)
    assert boxes == [(Box(0.25, 0.25, 0.5, 0.75),), (), ()] * 2
    twin.close()


def test_what_shard_packed_into_records_comes_back_as_it_was(packed: Path, tmp_path: Path) -> None:
    again = ["shard", str(packed), str(tmp_path / "tar"), "--splits", "train,val", "--no-shuffle"]

    assert main(again) == 0
    assert main(["folders", str(packed), str(tmp_path / "folders"), "--split", "val"]) == 0
    assert main(["lmdb", str(packed), str(tmp_path / "lmdb"), "--split", "val"]) == 0

    contents = members((tmp_path / "tar/train-000000.tar").read_bytes())
    images = {raw for name, raw in contents if name.endswith(".jpg")}
    tree = tmp_path / "images"
    assert images == {path.read_bytes() for path in tree.glob("train/*/*.jpg")}
    index = ShardIndex.load(tmp_path / "tar/train-index.npz")
    assert (index.classes, index.label_space) == (("a", "b", "c"), None)
    assert index.labels is not None
    assert sorted(index.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert tree_below(tmp_path / "folders") == tree_below(tree / "val")


@pytest.mark.parametrize("pattern", ["train-*", "train-0000{0..2}-of-00003", "train-?????-of-*"])
def test_records_are_named_by_a_pattern_whatever_lies_beside_them(
    packed: Path, tmp_path: Path, pattern: str
) -> None:
    with contextlib.closing(open_source(str(packed / pattern))) as source:
        assert len(source) == 9
        assert source.classes == ("a", "b", "c")

    assert main(["index", str(packed / pattern), "--output", str(tmp_path / "i.npz")]) == 0
    assert len(ShardIndex.load(tmp_path / "i.npz")) == 9


def test_records_of_a_bucket_are_those_of_a_folder(
    object_server: ObjectServer, packed: Path
) -> None:
    object_server.put_folder("data", packed, prefix="tf/")
    how: dict[str, Any] = {
        "endpoint_url": object_server.endpoint_url,
        "credentials": Credentials(object_server.access_key, object_server.secret_key),
    }

    with (
        contextlib.closing(open_source("s3://data/tf", split="train", **how)) as remote,
        contextlib.closing(open_source("s3://data/tf/train-*", **how)) as named,
        contextlib.closing(open_source(packed, split="train")) as local,
    ):
        assert table(remote) == table(named) == table(local)
        assert remote.classes == named.classes == local.classes == ("a", "b", "c")


def test_a_folder_of_several_splits_asks_for_one(packed: Path) -> None:
    with pytest.raises(ValueError, match="which holds TFRecords of train, val; expected one"):
        open_source(packed)
    with pytest.raises(KeyNotFoundError, match="no TFRecord of split 'test', but of train, val"):
        open_source(packed, split="test")
    with contextlib.closing(open_source(packed, split="validation")) as source:
        assert len(source) == 4


def test_labels_that_count_from_0_are_refused_unless_classes_come_from_elsewhere(
    tmp_path: Path,
) -> None:
    examples = [ImageExample(encode_image(at), at, filename=f"{at}.jpg") for at in range(2)]
    write_records(tmp_path / "train-00000-of-00001", examples, label_base=0)

    with pytest.raises(ShardFormatError, match="got label 0, expected 1 or more"):
        open_source(tmp_path)
    with contextlib.closing(open_source(tmp_path, label_rule="none")) as source:
        assert source.classes is None


def test_records_without_names_and_labels_are_numbered_and_called_what_they_are(
    tmp_path: Path,
) -> None:
    examples = [ImageExample(encode_image(0)), ImageExample(encode_image(1, "PNG"))]
    write_records(tmp_path / "x.tfrecord", [*examples, ImageExample(b"no image")])

    with contextlib.closing(open_source(tmp_path / "x.tfrecord")) as source:
        names = list(table(source))

    assert names == ["x.tfrecord/0000000.jpeg", "x.tfrecord/0000001.png"]
    assert (source.classes, source.num_stray) == (None, 1)


def test_damage_and_names_that_cannot_be_are_told(built: Path, tmp_path: Path) -> None:
    one = ImageExample(encode_image(0), 1, filename="../a.jpg")
    write_records(tmp_path / "unsafe/train-00000-of-00001", [one])
    write_records(tmp_path / "twice/train-00000-of-00001", [one._replace(filename="a.jpg")] * 2)
    source = open_source(built)
    flip_byte(built / "train-00001-of-00002", 200)

    for folder, message in (
        (built, r"train-00001-of-00002 \[0, .*CRC of a record's payload"),
        (tmp_path / "unsafe", "unsafe member name"),
        (tmp_path / "twice", "'a.jpg' stands there, and again"),
    ):
        with pytest.raises(LoaderError, match=message):
            open_source(folder)
    with pytest.raises(ChecksumError, match="train-00001-of-00002"):
        source.read(3)
    source.close()


def test_a_set_that_is_being_written_is_not_read(packed: Path) -> None:
    (packed / ".unfinished-val").mkdir()
    (packed / ".unfinished-val/plan.json").write_bytes(b"{}")

    with pytest.raises(ShardFormatError, match="unfinished run of split 'val'"):
        open_source(packed, split="train")


def test_advice_counts_records(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(packed)]) == 0

    assert "kB, 13 samples" in capsys.readouterr().out
