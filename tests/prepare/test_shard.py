"""Shards: what is in them, the same bytes however they are written, and what ends a run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import subprocess
import threading
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
import pytest
import torch
import webdataset.tariterators
from PIL import Image
from torchvision.transforms import v2

from concurrent_dataloader.errors import LoaderError, SampleDecodeError
from concurrent_dataloader.formats import tfrecord
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.formats.tar import parse_sample, read_samples
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata, SplitMetadata, checksum
from concurrent_dataloader.prepare.reading import Reader
from concurrent_dataloader.prepare.shard import write_shards
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.steps import Preparation, parse_steps
from concurrent_dataloader.prepare.survey import check_splits
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores import open_writable_store
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.memory_source import MemorySource, SlowSource, make_samples


def make_image(width: int = 60, height: int = 40, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    image = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_names(folder: Path, split: str = "train") -> list[str]:
    shards = Metadata.load(folder / "metadata.json").splits[split].shards
    assert shards is not None
    return [shard.name for shard in shards]


def read_back(folder: Path, split: str = "train") -> list[tuple[str, dict[str, bytes]]]:
    return [
        (sample.key, sample.fields)
        for name in shard_names(folder, split)
        for sample in read_samples(io.BytesIO((folder / name).read_bytes()), name)
    ]


# -- what is in the shards


def test_g02_every_sample_is_there_once_with_its_own_bytes_and_label(tmp_path: Path) -> None:
    samples = make_samples()

    write_shards(MemorySource(samples), tmp_path, ShardSettings(max_count=7))

    found = dict(read_back(tmp_path))
    assert len(found) == len(samples)
    for name, content in samples.items():
        label = str(int(name[1:3])).encode()
        assert found[name.removesuffix(".JPEG")] == {"jpeg": content, "cls": label}


def test_samples_without_classes_have_no_label(tmp_path: Path) -> None:
    source = MemorySource(make_samples(3), has_labels=False)

    write_shards(source, tmp_path)

    assert [sorted(fields) for _, fields in read_back(tmp_path)] == [["jpeg"]] * 3
    assert ShardIndex.load(tmp_path / "train-index.npz").labels is None


def test_the_field_is_the_ending_unless_chosen(tmp_path: Path) -> None:
    names = ["a/1.JPG", "a/2.png", "a/3.gif", "a/4"]
    source = MemorySource(dict.fromkeys(names, b"x"))

    write_shards(source, tmp_path / "own", ShardSettings(seed=None))
    write_shards(source, tmp_path / "jpg", ShardSettings(field="jpg"))

    own = [fields for _, fields in read_back(tmp_path / "own")]
    assert [next(name for name in fields if name != "cls") for fields in own] == [
        "jpg",
        "png",
        "img",
        "img",
    ]
    assert all("jpg" in fields for _, fields in read_back(tmp_path / "jpg"))


def test_boxes_are_the_tables_row_or_null(tmp_path: Path) -> None:
    boxes = {"a/1.jpg": [Box(0.006, 0.262, 0.7545, 0.994)], "a/2.jpg": [Box(0, 0, 1, 1)] * 2}
    boxes["a/2.jpg"][1] = Box(0.5, 0.25, 0.75, 1)
    source = MemorySource(dict.fromkeys(["a/1.jpg", "a/2.jpg", "a/3.jpg"], b"x"), boxes=boxes)

    write_shards(source, tmp_path, ShardSettings(boxes=True, seed=None))

    found = [json.loads(fields["json"]) for _, fields in read_back(tmp_path)]
    assert found == [
        {"bbox": [0.006, 0.262, 0.7545, 0.994]},
        {"bbox": [0, 0, 1, 1], "bboxes": [[0, 0, 1, 1], [0.5, 0.25, 0.75, 1]]},
        {"bbox": None},
    ]


@pytest.mark.parametrize(
    ("style", "prefix", "expected"),
    [
        ("path", None, ["n00/000", "n00/003", "n01/001", "n02/002"]),
        ("stem", None, ["000", "003", "001", "002"]),
        ("index", None, ["train-0000000", "train-0000001", "train-0000002", "train-0000003"]),
        ("index", "", ["0000000", "0000001", "0000002", "0000003"]),
        ("stem", "t/", ["t/000", "t/003", "t/001", "t/002"]),
    ],
)
def test_keys_are_of_the_style_asked_for(
    tmp_path: Path, style: str, prefix: str | None, expected: list[str]
) -> None:
    settings = ShardSettings(key_style=style, key_prefix=prefix, seed=None)  # pyright: ignore[reportArgumentType]: a parameter

    write_shards(MemorySource(make_samples(4)), tmp_path, settings)

    assert [key for key, _ in read_back(tmp_path)] == expected


def test_a10_dots_in_names_do_not_break_samples(tmp_path: Path) -> None:
    names = ["a.b/c.d.e.JPEG", "a.b/.hidden.jpg", "a.b/x y.jpg", "a.b/ünï.jpg", "a.b/" + "n" * 200]
    source = MemorySource({name: name.encode() for name in names})

    write_shards(source, tmp_path, ShardSettings(seed=None))

    found = {key: next(iter(fields.values())) for key, fields in read_back(tmp_path)}
    assert set(found) == {"a.b/c_d_e", "a.b/_hidden", "a.b/x y", "a.b/ünï", "a.b/" + "n" * 200}
    read = {sample["__key__"] for sample in read_with_webdataset(tmp_path)}
    assert read == set(found)


def test_two_samples_with_one_key_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = MemorySource({"a/x.y.jpg": b"1", "a/x_y.jpg": b"2"})

    with pytest.raises(ValueError, match=r"'a/x\.y\.jpg' and 'a/x_y\.jpg': both get the key"):
        write_shards(source, tmp_path / "out")
    assert contents(tmp_path) == {}


def test_w09_splits_with_a_common_key_are_refused(tmp_path: Path) -> None:
    source = MemorySource({"a/1.jpg": b"1"})
    write_shards(source, tmp_path, ShardSettings(split="train"))
    before = contents(tmp_path)

    with pytest.raises(ValueError, match="'a/1', which split 'train' has too; give a key prefix"):
        write_shards(source, tmp_path, ShardSettings(split="val"))
    with pytest.raises(ValueError, match="which split 'train' has too"):
        check_splits([(source, ShardSettings()), (source, ShardSettings(split="val"))])
    assert contents(tmp_path) == before

    write_shards(source, tmp_path, ShardSettings(split="val", key_prefix="val/"))
    assert set(Metadata.load(tmp_path / "metadata.json").splits) == {"train", "val"}


def test_w09_numbered_keys_of_splits_differ(tmp_path: Path) -> None:
    for split in ("train", "val"):
        settings = ShardSettings(split=split, key_style="index")
        write_shards(MemorySource(make_samples(3)), tmp_path, settings)

    assert [key for key, _ in read_back(tmp_path, "val")] == [f"val-{i:07d}" for i in range(3)]
    assert len(read_back(tmp_path, "train")) == 3


# -- which sample goes where


def test_w07_g06_the_seed_says_the_order_and_is_recorded(tmp_path: Path) -> None:
    source = MemorySource(make_samples())
    seeds = {"a": 1, "b": 1, "c": 2, "d": None}

    for name, seed in seeds.items():
        write_shards(source, tmp_path / name, ShardSettings(seed=seed))

    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    orders = {name: [key for key, _ in read_back(tmp_path / name)] for name in seeds}
    assert orders["a"] != orders["c"]
    assert orders["d"] == sorted(orders["a"]) == sorted(orders["c"])
    for name, seed in seeds.items():
        split = Metadata.load(tmp_path / name / "metadata.json").splits["train"]
        assert (split.seed, split.shuffle) == (seed, seed is not None)


def test_the_permutation_of_a_seed_never_changes(tmp_path: Path) -> None:
    write_shards(MemorySource(make_samples(10)), tmp_path, ShardSettings(seed=7, key_style="stem"))

    keys = [key for key, _ in read_back(tmp_path)]
    assert keys == ["005", "004", "000", "006", "003", "008", "002", "009", "007", "001"]


def test_every_shard_but_the_last_has_exactly_the_count(tmp_path: Path) -> None:
    split = write_shards(
        MemorySource(make_samples(40)), tmp_path, ShardSettings(max_count=7, max_bytes=None)
    )

    assert [shard.num_samples for shard in split.shards or ()] == [7, 7, 7, 7, 7, 5]


def test_no_shard_exceeds_the_size_but_one_of_a_single_sample(tmp_path: Path) -> None:
    samples = make_samples(30) | {"n00/large.JPEG": bytes(50_000)}

    split = write_shards(MemorySource(samples), tmp_path, ShardSettings(max_bytes=9_000))

    shards = split.shards or ()
    assert sum(shard.num_samples for shard in shards) == 31
    too_large = [shard for shard in shards if shard.size_bytes > 9_000]
    assert [shard.num_samples for shard in too_large] == [1]
    assert all(shard.size_bytes == (tmp_path / shard.name).stat().st_size for shard in shards)
    # Full: the next sample would not have fitted.
    extents = {key: parse_size(fields) for key, fields in read_back(tmp_path)}
    order = list(extents.values())
    first = 0
    for shard in shards[:-1]:
        following = order[first + shard.num_samples]
        assert shard.size_bytes + following > 9_000
        first += shard.num_samples


def test_row_97_count_and_size_both_end_shards_of_one_run(tmp_path: Path) -> None:
    small = {f"n00/{number:02d}.JPEG": bytes(10) for number in range(12)}
    large = {f"n01/{number:02d}.JPEG": bytes(3_000) for number in range(6)}
    settings = ShardSettings(max_count=5, max_bytes=12_000, seed=None)

    shards = write_shards(MemorySource(small | large), tmp_path, settings).shards or ()

    # A small sample takes 2 KiB in a tar, a large one 4.5; the end of a tar 1.
    assert [shard.num_samples for shard in shards] == [5, 5, 3, 2, 2, 1]
    assert all(shard.size_bytes <= 12_000 for shard in shards)


def parse_size(fields: dict[str, bytes]) -> int:
    return sum(512 + len(content) + -len(content) % 512 for content in fields.values())


def test_sizes_that_the_source_does_not_know_are_found_out(tmp_path: Path) -> None:
    settings = ShardSettings(max_bytes=9_000)

    write_shards(MemorySource(make_samples()), tmp_path / "known", settings)
    write_shards(MemorySource(make_samples(), has_sizes=False), tmp_path / "unknown", settings)

    known, unknown = contents(tmp_path / "known"), contents(tmp_path / "unknown")
    shards = {name for name in known if name.endswith(".tar")}
    assert {name: known[name] for name in shards} == {name: unknown[name] for name in shards}
    assert len(shards) == len([name for name in unknown if name.endswith(".tar")])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("imagenet-train-%06d.tar", ["imagenet-train-000000.tar", "imagenet-train-000011.tar"]),
        ("Name%d.tar", ["Name00.tar", "Name11.tar"]),
        ("t-%03d-of-%03d.tar", ["t-000-of-012.tar", "t-011-of-012.tar"]),
    ],
)
def test_a07_names_sort_as_their_numbers(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    settings = ShardSettings(pattern=pattern, max_count=1)

    write_shards(MemorySource(make_samples(12)), tmp_path, settings)

    names = shard_names(tmp_path)
    assert [names[0], names[-1]] == expected
    assert sorted(names) == names
    assert {path.name for path in tmp_path.glob("*.tar")} == set(names)


# -- the same bytes


def test_one_process_and_two_write_the_same_bytes(tmp_path: Path) -> None:
    source = MemorySource(make_samples(), has_sizes=False)
    settings = ShardSettings(max_bytes=10_000)

    write_shards(source, tmp_path / "one", settings)
    write_shards(source, tmp_path / "two", settings, num_processes=2)

    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) > 5


def test_slow_reads_overlap_and_change_nothing(tmp_path: Path) -> None:
    samples = make_samples()
    slow = SlowSource(samples, delay_s=0.005)

    write_shards(MemorySource(samples), tmp_path / "fast", ShardSettings(max_count=25))
    write_shards(slow, tmp_path / "slow", ShardSettings(max_count=25), num_readers=8)

    assert contents(tmp_path / "fast") == contents(tmp_path / "slow")
    assert 4 <= slow.most_under_way <= 8


def test_samples_read_ahead_are_bounded_by_their_bytes() -> None:
    large = bytes(30 << 20)
    source = SlowSource({f"a/{i:02d}.jpg": large for i in range(20)}, delay_s=0.005)
    reader = Reader(source, num_readers=64)

    found = list(reader.read(range(20)))
    reader.close()

    assert len(found) == 20
    assert source.most_under_way == 2


def test_a_bucket_gets_the_same_files_as_a_folder(
    tmp_path: Path, object_server: ObjectServer
) -> None:
    object_server.put_objects("packed", {})
    source = MemorySource(make_samples())
    settings = ShardSettings(max_count=15)
    write_shards(source, tmp_path / "local", settings)

    for name, in_memory in (("file", False), ("memory", True)):
        (tmp_path / name).mkdir()
        store = open_server(object_server, f"s3://packed/{name}")
        write_shards(source, store, settings, in_memory=in_memory, scratch=tmp_path / name)
        found = {info.key: bytes(store.get(info.key)) for info in store.list()}
        store.close()
        assert found == contents(tmp_path / "local")
        assert contents(tmp_path / name) == {}


def open_server(server: ObjectServer, url: str):
    from concurrent_dataloader.stores import Credentials

    credentials = Credentials(server.access_key, server.secret_key)
    return open_writable_store(
        url, endpoint_url=server.endpoint_url, credentials=credentials, client="http"
    )


def test_a_shard_composed_in_memory_is_the_same(tmp_path: Path) -> None:
    source = MemorySource(make_samples())

    write_shards(source, tmp_path / "file")
    write_shards(source, tmp_path / "memory", in_memory=True)

    assert contents(tmp_path / "file") == contents(tmp_path / "memory")


# -- others read them


def read_with_webdataset(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in shard_names(folder):
        with open(folder / name, "rb") as file:
            files = webdataset.tariterators.tar_file_iterator(cast(Any, file))
            named = ({"__url__": name, **one} for one in files)
            found += webdataset.tariterators.group_by_keys(named)
    return found


def test_the_webdataset_package_reads_them(tmp_path: Path) -> None:
    samples = make_samples()
    write_shards(MemorySource(samples), tmp_path, ShardSettings(max_count=15))

    found = read_with_webdataset(tmp_path)

    assert {f"{one['__key__']}.JPEG": one["jpeg"] for one in found} == samples
    assert all(one["cls"] == str(int(one["__key__"][1:3])).encode() for one in found)


def test_gnu_tar_reads_them(tmp_path: Path) -> None:
    samples = make_samples(5) | {"n00/" + "ü" * 90 + ".JPEG": b"long"}
    write_shards(MemorySource(samples), tmp_path, ShardSettings())
    (tmp_path / "out").mkdir()

    command = ["tar", "-xf", tmp_path / "train-000000.tar", "-C", tmp_path / "out"]
    subprocess.run(command, check=True)

    images = contents(tmp_path / "out")
    assert {name: images[name.replace(".JPEG", ".jpeg")] for name in samples} == samples


def test_hugging_face_datasets_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    samples = {f"n{i % 2:02d}/{i}.png": make_image(seed=i) for i in range(6)}
    write_shards(MemorySource(samples), tmp_path / "out", ShardSettings(max_count=4))

    found = datasets.load_dataset(
        "webdataset",
        data_files=[str(tmp_path / "out" / name) for name in shard_names(tmp_path / "out")],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )

    assert {row["__key__"]: row["cls"] for row in found} == {
        name.removesuffix(".png"): int(name[1:3]) for name in samples
    }
    assert found[0]["png"].size == (60, 40)


def test_a_tfrecord_is_read_with_labels_and_boxes(tmp_path: Path) -> None:
    samples = make_samples(5)
    boxes = {"n00/000.JPEG": [Box(0.25, 0.5, 0.75, 1)]}
    source = MemorySource(samples, boxes=boxes)

    split = write_shards(
        source, tmp_path, ShardSettings(kind="tfrecord", max_bytes=2_000, boxes=True)
    )

    names = shard_names(tmp_path)
    assert names[0] == f"train-00000-of-{len(names):05d}"
    assert all(shard.size_bytes <= 2_000 for shard in split.shards or ())
    found: dict[str, tfrecord.ImageExample] = {}
    for name in names:
        raw = (tmp_path / name).read_bytes()
        for record in tfrecord.iter_records(io.BytesIO(raw), name):
            example = tfrecord.parse_image_example(record.payload, label_base=split.label_base)
            found[example.filename or ""] = example
    assert {name.replace("jpeg", "JPEG"): one.encoded for name, one in found.items()} == samples
    assert found["n02/002.jpeg"].label == 2
    assert found["n00/000.jpeg"].boxes == ((0.25, 0.5, 0.75, 1),)
    assert found["n01/001.jpeg"].boxes == ()


# -- what lies beside them


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_every_sample_is_one_range_of_its_shard(tmp_path: Path, kind: str) -> None:
    samples = make_samples()
    settings = ShardSettings(kind=kind, max_count=15)  # pyright: ignore[reportArgumentType]: a parameter
    write_shards(MemorySource(samples), tmp_path, settings)

    index = ShardIndex.load(tmp_path / "train-index.npz")

    assert len(index) == len(samples)
    assert index.classes == ("n00", "n01", "n02")
    for position in range(len(index)):
        name = index.names.key(position)
        raw = (tmp_path / index.shard_of(position).name).read_bytes()
        payload, extent = index.payload(position), index.extent(position)
        assert index.labels is not None
        assert index.labels[position] == int(name[1:3])
        if kind == "tar":
            sample = parse_sample(raw[extent.start : extent.stop], "sample")
            assert f"{sample.key}.jpeg" == name
            found = raw[payload.start : payload.stop]
        else:
            record = tfrecord.parse_record(raw[extent.start : extent.stop])
            found = tfrecord.parse_image_example(record, label_base=1).encoded
            assert payload == extent
        assert found == samples[name.replace("jpeg", "JPEG")]


def test_a08_seeking_to_a_file_infos_offset_yields_that_sample(tmp_path: Path) -> None:
    samples = make_samples()
    write_shards(MemorySource(samples), tmp_path, ShardSettings(max_count=15))

    info = json.loads((tmp_path / "train-FileInfo.json").read_bytes())

    assert set(info) == set(samples)
    for name, place in info.items():
        with open(tmp_path / place["shard"], "rb") as file:
            file.seek(place["offset"])
            sample = next(read_samples(file, name, offset=place["offset"]))
        assert sample.fields["jpeg"] == samples[name]
        assert sample.extent == (place["offset"], place["offset"] + place["size"])
        assert place["class"] == name.partition("/")[0]
        assert place["label"] == int(sample.fields["cls"])


def test_metadata_says_what_is_there(tmp_path: Path) -> None:
    split = write_shards(MemorySource(make_samples()), tmp_path, ShardSettings(max_count=15))

    metadata = Metadata.load(tmp_path / "metadata.json")

    assert metadata.splits["train"] == split
    assert split.classes == ("n00", "n01", "n02")
    assert [shard.crc32c for shard in split.shards or ()] == [
        f"{google_crc32c.value((tmp_path / shard.name).read_bytes()):08x}"
        for shard in split.shards or ()
    ]
    assert {shard.md5 for shard in split.shards or ()} == {None}
    assert metadata.checksum is None
    assert split.num_samples == 40


def test_md5s_and_the_older_systems_checksum_of_them_are_written_if_asked_for(
    tmp_path: Path,
) -> None:
    settings = ShardSettings(max_count=15, md5=True)

    split = write_shards(MemorySource(make_samples()), tmp_path, settings)

    digests = [
        hashlib.md5((tmp_path / shard.name).read_bytes()).hexdigest()
        for shard in split.shards or ()
    ]
    assert len(digests) == 3
    assert [shard.md5 for shard in split.shards or ()] == digests
    assert Metadata.load(tmp_path / "metadata.json").checksum == checksum(digests)


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
@pytest.mark.parametrize("size", [40, 9000])
def test_the_index_has_the_checksums_of_samples_and_payloads(
    tmp_path: Path, kind: Any, size: int
) -> None:
    samples = {name: content * size for name, content in make_samples(12).items()}

    write_shards(MemorySource(samples), tmp_path, ShardSettings(max_count=5, kind=kind))

    index = ShardIndex.load(tmp_path / "train-index.npz")
    assert len(index) == 12
    for position in range(12):
        raw = (tmp_path / index.shard_of(position).name).read_bytes()
        extent, payload = index.extent(position), index.payload(position)
        assert index.extent_crc(position) == google_crc32c.value(raw[slice(*extent)])
        assert index.payload_crc(position) == google_crc32c.value(raw[slice(*payload)])


def test_a_receipt_without_checksums_is_not_taken(tmp_path: Path) -> None:
    source, settings = MemorySource(make_samples()), ShardSettings(max_count=15)
    write_shards(source, tmp_path / "whole", settings)
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, target, settings, on_shard=interrupt)
    receipt = target / ".unfinished-train" / "train-000000.tar.json"
    known = json.loads(receipt.read_bytes())
    del known["crcs"]
    receipt.write_text(json.dumps(known))

    write_shards(source, target, settings)

    assert contents(target) == contents(tmp_path / "whole")


def interrupt(shard: ShardMetadata, num_shards: int) -> None:
    raise KeyboardInterrupt


# -- what may be done to images


def decode_all(folder: Path) -> dict[str, Image.Image]:
    return {
        key: Image.open(io.BytesIO(next(v for f, v in fields.items() if f != "cls")))
        for key, fields in read_back(folder)
    }


def test_steps_are_baked_in_and_recorded(tmp_path: Path) -> None:
    raw = make_image(60, 40)
    preparation = Preparation(payload="ppm", steps=parse_steps(["Resize(32)", "CenterCrop(28)"]))

    split = write_shards(
        MemorySource({"a/1.png": raw}), tmp_path, ShardSettings(preparation=preparation)
    )

    expected = v2.CenterCrop(28)(v2.Resize(32)(Image.open(io.BytesIO(raw))))
    assert np.array_equal(np.asarray(decode_all(tmp_path)["a/1"]), np.asarray(expected))
    assert split.transforms == ("Resize(32)", "CenterCrop(28)")
    assert json.loads((tmp_path / "metadata.json").read_bytes())["train_transform_pipeline"] == [
        "Resize(32)",
        "CenterCrop(28)",
    ]


def test_jpeg_quality_is_used_and_recorded(tmp_path: Path) -> None:
    source = MemorySource({"a/1.png": make_image(200, 200)})
    sizes: dict[int, int] = {}

    for quality in (0, 50, 100):
        preparation = Preparation(payload="jpeg", quality=quality)
        folder = tmp_path / str(quality)
        split = write_shards(source, folder, ShardSettings(preparation=preparation))
        sizes[quality] = len(read_back(folder)[0][1]["jpg"])
        assert split.image_quality == quality

    assert sizes[0] < sizes[50] < sizes[100]


def test_a11_raw_pixels_are_those_of_the_image(tmp_path: Path) -> None:
    raw = make_image(60, 40)
    preparation = Preparation(payload="raw", steps=parse_steps(["CenterCrop(32)"]))

    split = write_shards(
        MemorySource({"a/1.png": raw}), tmp_path, ShardSettings(preparation=preparation)
    )

    pixels = np.frombuffer(read_back(tmp_path)[0][1]["rgb"], np.uint8)
    assert split.image_size == (32, 32)
    expected = v2.CenterCrop(32)(Image.open(io.BytesIO(raw)))
    assert np.array_equal(pixels.reshape(32, 32, 3), expected)


def test_a_tensor_loads_with_the_restricted_loader(tmp_path: Path) -> None:
    raw = make_image(60, 40)

    write_shards(
        MemorySource({"a/1.png": raw}),
        tmp_path,
        ShardSettings(preparation=Preparation(payload="tensor")),
    )

    found = torch.load(io.BytesIO(read_back(tmp_path)[0][1]["pth"]), weights_only=True)
    assert torch.equal(found, v2.functional.pil_to_tensor(Image.open(io.BytesIO(raw))))


def reverse(raw: bytes) -> bytes:
    return raw[::-1]


def fail(raw: bytes) -> bytes:
    raise KeyError("no such thing")


def test_a_function_of_the_users_changes_the_bytes_and_its_error_names_the_file(
    tmp_path: Path,
) -> None:
    source = MemorySource({"a/1.jpg": b"123"})

    def pack(function: str, folder: str) -> SplitMetadata:
        preparation = Preparation(function=f"{__name__}:{function}")
        return write_shards(source, tmp_path / folder, ShardSettings(preparation=preparation))

    assert pack("reverse", "good").function == f"{__name__}:reverse"
    assert read_back(tmp_path / "good")[0][1]["jpg"] == b"321"
    with pytest.raises(SampleDecodeError, match=r"^a/1\.jpg: .*:fail raised KeyError"):
        pack("fail", "bad")


def test_g12_boxes_move_with_a_crop(tmp_path: Path) -> None:
    boxes = {"a/1.png": [Box(0.25, 0.25, 0.75, 0.75), Box(0, 0, 0.1, 0.1)]}
    source = MemorySource({"a/1.png": make_image(80, 40)}, boxes=boxes)
    preparation = Preparation(payload="ppm", steps=parse_steps(["CenterCrop(40)"]))

    write_shards(source, tmp_path, ShardSettings(boxes=True, preparation=preparation))

    assert json.loads(read_back(tmp_path)[0][1]["json"]) == {"bbox": [0, 0.25, 1, 0.75]}


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    source = MemorySource({"a/1.jpg": b"no image"})

    with pytest.raises(SampleDecodeError, match=r"^a/1\.jpg: "):
        write_shards(source, tmp_path, ShardSettings(preparation=Preparation(payload="jpeg")))


# -- what was there before, and what ends a run


def test_g04_what_is_there_is_refused_or_replaced_never_mixed(tmp_path: Path) -> None:
    write_shards(MemorySource(make_samples(40)), tmp_path, ShardSettings(max_count=5))
    before = contents(tmp_path)
    small = MemorySource(make_samples(6))

    with pytest.raises(FileExistsError, match=r"train-000000\.tar: already there, and 9 more"):
        write_shards(small, tmp_path, ShardSettings(max_count=5))
    assert contents(tmp_path) == before

    write_shards(small, tmp_path, ShardSettings(max_count=5), overwrite=True)
    write_shards(small, tmp_path / "fresh", ShardSettings(max_count=5))
    fresh = contents(tmp_path / "fresh")
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("fresh")} == fresh


def test_g04_stale_shards_without_metadata_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "train-0123.tar").write_bytes(b"stale")

    with pytest.raises(FileExistsError, match=r"train-0123\.tar: already there"):
        write_shards(MemorySource(make_samples(3)), tmp_path)

    write_shards(MemorySource(make_samples(3)), tmp_path, overwrite=True)
    assert not (tmp_path / "train-0123.tar").exists()


def test_overwriting_a_split_leaves_the_other(tmp_path: Path) -> None:
    for split in ("train", "val"):
        settings = ShardSettings(split=split, key_style="index")
        write_shards(MemorySource(make_samples(4)), tmp_path, settings)
    before = contents(tmp_path)

    settings = ShardSettings(split="val", key_style="index", seed=3)
    write_shards(MemorySource(make_samples(4)), tmp_path, settings, overwrite=True)

    after = contents(tmp_path)
    assert {k: v for k, v in after.items() if "train" in k} == {
        k: v for k, v in before.items() if "train" in k
    }
    assert Metadata.load(tmp_path / "metadata.json").splits["val"].seed == 3


def test_splits_do_not_share_the_names_of_their_shards(tmp_path: Path) -> None:
    train = ShardSettings(split="train", pattern="Name%d.tar", key_style="index")
    val = ShardSettings(split="val", pattern="Name%d.tar", key_style="index")
    source = MemorySource(make_samples(4))
    write_shards(source, tmp_path, train)
    before = contents(tmp_path)

    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"Name0\.tar: a shard of split 'train', expected"):
            write_shards(source, tmp_path, val, overwrite=overwrite)
    with pytest.raises(ValueError, match=r"got 'Name%d\.tar' for more than one split"):
        check_splits([(source, train), (source, val)])
    assert contents(tmp_path) == before


def test_overwriting_an_unfinished_run_removes_its_shards_whatever_they_are_called(
    tmp_path: Path,
) -> None:
    samples = make_samples()
    settings = ShardSettings(pattern="old%d.tar", max_count=10, seed=None)
    with pytest.raises(LoaderError):
        write_shards(MemorySource(samples, bad="n02/023.JPEG"), tmp_path / "out", settings)
    assert (tmp_path / "out" / "old0.tar").exists()

    write_shards(MemorySource(samples), tmp_path / "out", overwrite=True)

    write_shards(MemorySource(samples), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_metadata_of_the_older_system_is_not_mixed_with_ours(tmp_path: Path) -> None:
    old = {"train_length": 3, "validation_length": 1, "format": "img", "checksum": "0" * 32}
    (tmp_path / "metadata.json").write_text(json.dumps(old))

    with pytest.raises(ValueError, match=r"metadata\.json: written by an older system"):
        write_shards(MemorySource(make_samples(3)), tmp_path, overwrite=True)


def test_a_sample_that_cannot_be_read_ends_the_run_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    samples = make_samples()
    settings = ShardSettings(max_count=10, seed=None)
    write_shards(MemorySource(samples), tmp_path / "whole", settings)

    with pytest.raises(LoaderError, match=r"^n02/023\.JPEG: cannot be read$"):
        write_shards(MemorySource(samples, bad="n02/023.JPEG"), tmp_path / "out", settings)
    found = contents(tmp_path / "out")
    tars = sorted(name for name in found if name.endswith(".tar"))
    assert tars == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert not {"metadata.json", "train-index.npz"} & set(found)
    assert not [name for name in found if name.endswith(".partial")]

    kept = (tmp_path / "out" / "train-000001.tar").stat().st_ino
    write_shards(MemorySource(samples), tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out" / "train-000001.tar").stat().st_ino == kept


def test_a_run_with_other_settings_does_not_go_on(tmp_path: Path) -> None:
    samples = make_samples()
    settings = ShardSettings(max_count=10, seed=None)
    with pytest.raises(LoaderError):
        write_shards(MemorySource(samples, bad="n02/023.JPEG"), tmp_path, settings)

    for other in (ShardSettings(max_count=10, seed=1), ShardSettings(max_count=9, seed=None)):
        with pytest.raises(FileExistsError, match="with another source or other settings did not"):
            write_shards(MemorySource(samples), tmp_path, other)
    with pytest.raises(FileExistsError, match="another source"):
        write_shards(MemorySource(make_samples(39)), tmp_path, settings)
    with pytest.raises(FileExistsError, match="already there"):
        write_shards(MemorySource(samples), tmp_path, settings, resume=False)


def test_a_shard_that_was_cut_is_written_again_on_resuming(tmp_path: Path) -> None:
    samples = make_samples()
    settings = ShardSettings(max_count=10, seed=None)
    write_shards(MemorySource(samples), tmp_path / "whole", settings)
    with pytest.raises(LoaderError):
        write_shards(MemorySource(samples, bad="n02/038.JPEG"), tmp_path / "out", settings)
    os.truncate(tmp_path / "out" / "train-000001.tar", 1000)

    write_shards(MemorySource(samples), tmp_path / "out", settings)

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_runs_do_not_write_one_split_at_once(tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        reached.set()
        assert go_on.wait(30)

    source = MemorySource(make_samples(3))
    first = threading.Thread(
        target=write_shards, args=(source, tmp_path), kwargs={"on_shard": wait}
    )
    first.start()
    assert reached.wait(30)

    with pytest.raises(BlockingIOError, match="another run is writing the split 'train'"):
        write_shards(source, tmp_path)
    go_on.set()
    first.join()
    assert (tmp_path / "metadata.json").exists()


def test_g20_nested_targets_are_made(tmp_path: Path) -> None:
    write_shards(MemorySource(make_samples(3)), tmp_path / "a" / "b" / "c")

    assert (tmp_path / "a/b/c/metadata.json").exists()


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(OSError, match=r"file/out"):
        write_shards(MemorySource(make_samples(3)), tmp_path / "file" / "out")


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source: got no samples"):
        write_shards(MemorySource({}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_shard_and_the_next_run_finishes(tmp_path: Path) -> None:
    samples = {f"a/{i}.jpg": bytes([i]) * 60_000 for i in range(20)}
    settings = ShardSettings(max_bytes=300_000)
    write_shards(MemorySource(samples), tmp_path / "whole", settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=r"the shard was not written, make room.*000000\.tar"):
            write_shards(MemorySource(samples), tmp_path / "out", settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").rglob("*.tar*"))

    write_shards(MemorySource(samples), tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": -1}, "seed: got -1"),
        ({"max_count": 0}, "maxcount: got 0"),
        ({"max_bytes": 0}, "maxsize: got 0"),
        ({"pattern": "train.tar"}, "pattern: got 'train.tar'"),
        ({"pattern": "../%d.tar"}, "pattern: got"),
        ({"field": "cls"}, "field: got 'cls'"),
        ({"key_style": "md5"}, "key_style: got 'md5'"),
        ({"kind": "zip"}, "format: got 'zip'"),
        ({"split": "a/b"}, "split: got 'a/b'"),
        ({"key_prefix": "../"}, "unsafe member name"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ShardSettings(**given)  # pyright: ignore[reportArgumentType]: what a user may give


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"payload": "raw"}, "without CenterCrop"),
        ({"payload": "jpeg", "quality": 101}, "quality: got 101"),
        ({"quality": 50}, "with payload 'file'"),
        ({"payload": "gif"}, "payload: got 'gif'"),
        ({"steps": (parse_steps(["Resize(3)"]))}, "with payload 'file'"),
        ({"function": "os"}, "expected 'module:function'"),
        ({"function": "os:nothing"}, "cannot be imported"),
    ],
)
def test_preparations_that_cannot_be_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Preparation(**given)  # pyright: ignore[reportArgumentType]: what a user may give


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step: got 'Flip\(1\)', expected one of Resize\(n\)"):
        parse_steps(["Resize(3)", "Flip(1)"])
