"""Streamed shards: all samples once, in an order that is drawn once, under every loader."""

from __future__ import annotations

import bz2
import gc
import gzip
import importlib
import io
import itertools
import lzma
import os
import pickle
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typing_extensions import Buffer

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets.streamed import ReadSettings, StreamedShards
from concurrent_dataloader.errors import (
    ChecksumError,
    IndexFormatError,
    KeyNotFoundError,
    SampleDecodeError,
    ShardFormatError,
    StoreError,
    StoreUnavailableError,
)
from concurrent_dataloader.formats.tar import read_samples
from concurrent_dataloader.formats.tfrecord import (
    ImageExample,
    TFRecordWriter,
    serialize_image_example,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import Credentials, RetryPolicy
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.testing import Fault, ObjectServer
from tests.datasets.conftest import encode_image
from tests.datasets.shard_doubles import pack_tars
from tests.datasets.shards import tar_of, write_shards

COUNTS = [10, 7, 0, 13, 20, 21, 8]
TOTAL = sum(COUNTS)
SMALL = ReadSettings(part_bytes=4096, max_parts=4, num_open=3)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without an index."""
    return write_shards(tmp_path_factory.mktemp("bare"), COUNTS, with_index=False)


def labels_of(samples: Any) -> list[int]:
    return [label for _, label in samples]


def stream(shards: Any, **settings: Any) -> StreamedShards:
    """A dataset whose images are the lengths of their bytes."""
    defaults: dict[str, Any] = {"decode": len, "reading": SMALL}
    return StreamedShards(shards, **defaults | settings)


def shuffled(shards: Any, **settings: Any) -> StreamedShards:
    return stream(shards, shuffle=True, **{"shuffle_buffer": 12, "seed": 3, **settings})


def batches_of(loader: Any) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


def torch_loader(dataset: Any, batch_size: int | None, **settings: Any) -> Any:
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, **settings)


def put_shards(server: ObjectServer, folder: Path) -> dict[str, Any]:
    server.put_folder("bucket", folder)
    return {
        "endpoint_url": server.endpoint_url,
        "credentials": None,
        "region": server.region,
    }


@pytest.fixture
def remote(
    object_server: ObjectServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ObjectServer:
    """The shards in a bucket, to be found by the environment."""
    object_server.put_folder("bucket", folder)
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    return object_server


# -- samples


def test_unshuffled_samples_come_in_the_order_of_the_shards(folder: Path, bare: Path) -> None:
    assert labels_of(stream(folder)) == list(range(TOTAL))
    assert labels_of(stream(bare)) == list(range(TOTAL))


@pytest.mark.parametrize("source", ["folder", "bare"])
def test_samples_are_those_that_webdataset_reads(source: str, request: Any) -> None:
    root: Path = request.getfixturevalue(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        webdataset: Any = importlib.import_module("webdataset")
        pipeline = webdataset.WebDataset(
            f"{root}/train-{{000000..000006}}.tar", shardshuffle=False, empty_check=False
        ).to_tuple("__key__", "jpg", "cls")
        theirs: list[Any] = list(pipeline)

    ours = list(
        StreamedShards(root, fields=("__key__", "jpg", "cls"), decode=None, decoders={"cls": bytes})
    )
    assert ours == theirs


def test_images_are_rgb_and_labels_ints_by_default(tmp_path: Path) -> None:
    grey = encode_image(1, mode="L")
    (tmp_path / "train-0.tar").write_bytes(tar_of({"a.jpg": grey, "a.cls": b"7"}))

    [(image, label)] = StreamedShards(tmp_path)

    assert image.mode == "RGB"
    assert label == 7


@pytest.mark.parametrize(
    "members",
    [
        {"0000000.jpg": b"J", "0000000.cls": b"3"},
        {"n01440764_10026.JPEG": b"J", "n01440764_10026.cls": b"3"},
        {"0.img": b"J", "0.cls": b"3", "0.json": b'{"bbox": null}'},
        {"n01440764/n01440764_10026.img": b"J", "n01440764/n01440764_10026.cls": b"3\n"},
        {"a.d/v1.2.x/p.png": b"J", "a.d/v1.2.x/p.cls": b"3", "x/__info__": b"?"},
    ],
    ids=["webdataset", "file stems", "graphcore", "class folders", "a10 dots in folders"],
)
def test_g15_a10_all_writers_layouts_are_read(tmp_path: Path, members: dict[str, bytes]) -> None:
    (tmp_path / "Data0.tar").write_bytes(tar_of(members))

    assert list(StreamedShards(tmp_path, decode=bytes)) == [(b"J", 3)]


def test_a10_names_with_dots_are_read_if_they_name_one_sample(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of({"a.v2.jpg": b"J", "a.v2.cls": b"3"}))
    assert list(stream(tmp_path)) == [(1, 3)]

    (tmp_path / "train-0.tar").write_bytes(
        tar_of({"a.v2.jpg": b"J", "a.v2.cls": b"3", "a.v3.jpg": b"K", "a.v3.cls": b"4"})
    )
    with pytest.raises(ShardFormatError, match=r"sample 'a' has no field .*got 'v2.jpg', 'v2.cls'"):
        list(stream(tmp_path))


def test_tensors_and_pixels_without_a_header_are_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    file = io.BytesIO()
    torch.save(torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2), file)
    members = {"a.img": pixels.tobytes(), "a.cls": b"0", "b.pth": file.getvalue(), "b.cls": b"1"}
    (tmp_path / "train-0.tar").write_bytes(tar_of(members))

    (image, _), (tensor, _) = StreamedShards(tmp_path, decode="torchvision")

    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert torch.equal(tensor, torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2))


def test_a_pickle_in_a_pth_field_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    raw = pickle.dumps(Evil(), protocol=2)
    (tmp_path / "train-0.tar").write_bytes(tar_of({"a.pth": raw, "a.cls": b"1"}))

    with pytest.raises(SampleDecodeError, match=r"sample 'a', field 'pth'"):
        list(StreamedShards(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_fields_are_given_as_a_dictionary_or_alone(tmp_path: Path) -> None:
    members = {"a.png": b"P", "a.json": b'{"bbox": [1, 2]}', "a.txt": "ü".encode()}
    (tmp_path / "train-0.tar").write_bytes(tar_of(members))
    fields = {"image": "jpg;png", "box": "json", "text": "txt", "key": "__key__"}

    assert list(StreamedShards(tmp_path, fields=fields, decode=bytes)) == [
        {"image": b"P", "box": {"bbox": [1, 2]}, "text": "ü".encode(), "key": "a"}
    ]
    assert list(StreamedShards(tmp_path, fields="txt", decoders={"txt": bytes.decode})) == ["ü"]


def test_a_batch_may_be_a_dictionary_of_fields(folder: Path) -> None:
    dataset = stream(folder, fields={"size": "jpg", "label": "cls"})

    batch = next(iter(DataLoader(dataset, batch_size=4)))

    assert batch["label"].tolist() == [0, 1, 2, 3]


def test_a_sample_without_a_field_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of({"x/a.jpg": b"1", "x/a.json": b"{}"}))

    with pytest.raises(
        ShardFormatError, match=r"train-0.tar: sample 'x/a' has no field 'cls', got 'jpg', 'json'"
    ):
        list(stream(tmp_path))


def test_samples_without_a_field_are_counted_when_left_out(tmp_path: Path) -> None:
    members = {"a.jpg": b"1", "b.jpg": b"1", "b.cls": b"5", "c.cls": b"6"}
    (tmp_path / "train-0.tar").write_bytes(tar_of(members))
    dataset = stream(tmp_path, missing="skip")

    loader = torch_loader(dataset, 2, num_workers=1)

    assert batches_of(loader) == [[5]]
    assert dataset.num_skipped == 2
    with pytest.raises(TypeError, match="skip"):
        len(dataset)


def test_labels_count_from_the_declared_base(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of({"a.jpg": b"1", "a.cls": b"1"}))

    assert labels_of(stream(tmp_path, label_base=1)) == [0]
    with pytest.raises(SampleDecodeError, match=r"sample 'a', field 'cls': class: got 1, expected"):
        list(stream(tmp_path, label_base=2))


def test_labels_are_those_of_the_index_as_for_random_access(folder: Path) -> None:
    index = ShardIndex.load(folder / "train-index.npz")
    own = np.arange(TOTAL) * 2
    own[7] = -1  # the sample says it

    assert labels_of(stream(folder, labels=own, index=index))[:9] == [0, 2, 4, 6, 8, 10, 12, 7, 16]
    by_label = sorted(shuffled(folder, labels=own, decode=bytes, target_transform=str), key=str)
    assert by_label == sorted(
        ((raw, str(7 if n == 7 else 2 * n)) for raw, n in stream(folder, decode=bytes)), key=str
    )
    assert labels_of(stream(folder, label_base=0, target_transform=float))[3] == 3.0
    with pytest.raises(ValueError, match=r"got an array of shape \(3,\), expected \(79,\)"):
        stream(folder, labels=own[:3])


def test_a_shard_of_several_has_its_own_labels(folder: Path) -> None:
    labels = np.arange(TOTAL) + 100

    assert labels_of(stream(f"{folder}/train-00000[36].tar", labels=labels)) == [
        *range(117, 130),
        *range(171, 179),
    ]


def test_a_label_that_the_index_alone_knows_is_given(tmp_path: Path) -> None:
    raw = tar_of({f"{number}.jpg": b"." for number in range(3)})
    (tmp_path / "train-0.tar").write_bytes(raw)
    builder = ShardIndexBuilder("tar")
    for number in range(3):
        place = ByteRange(1024 * number, 1024 * number + 1024)
        builder.add_sample(f"{number}.jpg", place, place, 5 - number)
    builder.add_shard(Shard("train-0.tar", len(raw)))
    builder.build().save(tmp_path / "train-index.npz")

    assert labels_of(stream(tmp_path)) == [5, 4, 3]
    assert labels_of(stream(tmp_path, missing="skip")) == [5, 4, 3]


def test_a_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of({"a.jpg": b"1", "a.cls": b"cat"}))

    with pytest.raises(SampleDecodeError, match=r"sample 'a', field 'cls': cls: got b'cat'"):
        list(stream(tmp_path))


def test_bytes_that_are_no_image_are_named(folder: Path) -> None:
    with pytest.raises(
        SampleDecodeError, match=r"train-000000.tar: sample 'n0/00000', field 'jpg'"
    ):
        list(StreamedShards(folder))


def test_g14_records_of_tensorflow_are_read_with_their_label_base(tmp_path: Path) -> None:
    write_records(tmp_path, (3, 3))
    fields = ("jpg;img", "cls", "__key__")
    expected = [(b"%d" % label * 50, label, f"n_{label}") for label in range(6)]

    for index in ("auto", None):
        dataset = StreamedShards(tmp_path, fields=fields, decode=None, index=index)
        assert list(dataset) == expected

    damaged = bytearray((tmp_path / "train-00001-of-00002").read_bytes())
    damaged[40] ^= 1
    (tmp_path / "train-00001-of-00002").write_bytes(damaged)
    with pytest.raises(ShardFormatError, match="train-00001-of-00002"):
        list(StreamedShards(tmp_path, fields=fields, decode=None))


# -- where shards come from


def test_a10_shards_are_named_by_ranges_globs_folders_and_lists(folder: Path) -> None:
    names = [str(folder / f"train-{shard:06d}.tar") for shard in range(7)]

    for source in (folder, f"{folder}/train-{{000000..000006}}.tar", f"{folder}/*.tar", names):
        assert labels_of(stream(source)) == list(range(TOTAL))


def test_w01_a_shard_that_is_not_there_is_named_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(KeyNotFoundError, match=r"train-000007.tar and 2 more: no such shard"):
        stream(f"{folder}/train-{{000000..000009}}.tar")


def test_w01_remote_shards_are_checked_by_one_listing(remote: ObjectServer) -> None:
    dataset = stream("s3://bucket/train-{000000..000006}.tar")

    counters = remote.counters()
    assert counters.num_by_method == {"GET": 3}  # the listing, the index, metadata.json
    assert len(dataset) == TOTAL
    with pytest.raises(KeyNotFoundError, match=r"s3://bucket/train-000007.tar"):
        stream("s3://bucket/train-{000000..000007}.tar")


def test_w09_splits_are_not_mixed(tmp_path: Path) -> None:
    write_shards(tmp_path, [4, 5])
    write_shards(tmp_path, [3], split="val")

    assert labels_of(stream(tmp_path, split="train")) == list(range(9))
    assert labels_of(stream(tmp_path, split="val")) == list(range(3))
    with pytest.raises(ValueError, match="shards of train and val, expected one of these"):
        stream(tmp_path)
    with pytest.raises(KeyNotFoundError, match="no shard of 'test'"):
        stream(tmp_path, split="test")


@pytest.mark.parametrize("pattern", ["s3://bucket/", "s3://bucket/train-*.tar"])
def test_shards_of_a_bucket_are_found(remote: ObjectServer, pattern: str) -> None:
    assert labels_of(stream(pattern)) == list(range(TOTAL))


def test_shards_of_a_web_server_are_read(object_server: ObjectServer, folder: Path) -> None:
    object_server.create_bucket("public", public=True)
    object_server.put_folder("public", folder)
    url = f"{object_server.endpoint_url}/public/train-{{000000..000006}}.tar"

    assert labels_of(stream(url)) == list(range(TOTAL))
    with pytest.raises(KeyNotFoundError, match=r"train-000007.tar"):
        stream(url.replace("000006", "000007"))


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_compressed_shards_are_read_and_checked_to_their_end(
    bare: Path, tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    for path in bare.glob("*.tar"):
        (tmp_path / f"{path.name}{ending}").write_bytes(compress(path.read_bytes()))
    assert labels_of(stream(tmp_path)) == list(range(TOTAL))

    last = tmp_path / f"train-000006.tar{ending}"
    last.write_bytes(last.read_bytes()[:-4])
    with pytest.raises(ShardFormatError, match=rf"train-000006.tar{ending}: the compressed shard"):
        list(stream(tmp_path))


def test_a_command_is_run_only_by_consent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pipe=True"):
        StreamedShards(f"pipe:touch {tmp_path}/ran")

    assert not (tmp_path / "ran").exists()


def test_the_output_of_commands_is_read_like_shards(bare: Path) -> None:
    command = f"pipe:cat {bare}/train-00000{{0..6}}.tar"

    assert sorted(labels_of(shuffled(command, allow_pipe=True))) == list(range(TOTAL))


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        ("cat {shard}; exit 3", StoreError, "status 3"),
        ("false", StoreError, "status 1"),
        ("false || true", ShardFormatError, "cut short: got 0 bytes"),
        ("head -c 5000 {shard}", ShardFormatError, "cut short"),
    ],
)
def test_w12_a_command_that_fails_is_never_an_empty_shard(
    bare: Path, command: str, error: type[Exception], words: str
) -> None:
    text = f"pipe:{command.format(shard=bare / 'train-000000.tar')}"

    with pytest.raises(error, match=words):
        list(stream(text, allow_pipe=True))


def test_a_command_ends_with_the_iterator(tmp_path: Path, bare: Path) -> None:
    shard, pid_file = bare / "train-000000.tar", tmp_path / "pid"
    command = f"pipe:echo $$ > {pid_file}; cat {shard}; exec sleep 1000"
    samples = iter(stream(command, allow_pipe=True, reading=ReadSettings(part_bytes=512)))
    next(samples)
    pid = int(pid_file.read_text())

    samples.close()  # pyright: ignore[reportAttributeAccessIssue]: a generator

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_errors_of_commands_show_no_argument() -> None:
    with pytest.raises(StoreError) as caught:
        list(stream("pipe:TOKEN=s3cret false --key s3cret", allow_pipe=True))

    assert "s3cret" not in str(caught.value)


def test_a_made_up_source_repeats_one_photo() -> None:
    dataset = StreamedShards("fake:10", shuffle=True)

    loader = torch_loader(dataset, None, num_workers=2, collate_fn=lambda item: item)

    items = list(loader)
    assert len(items) == len(dataset) == 10
    assert {(image.size, label) for image, label in items} == {((500, 375), 0)}


def test_a_store_of_the_users_own_needs_four_methods(folder: Path) -> None:
    class Plain:
        def __init__(self) -> None:
            self._inner = MemoryStore(
                {path.name: path.read_bytes() for path in folder.glob("*.tar")}
            )

        def get(self, key: str, byte_range: Any = None) -> Any:
            return self._inner.get(key, byte_range)

        async def get_async(self, key: str, byte_range: Any = None) -> Any:
            return self._inner.get(key, byte_range)

        def describe(self, key: str) -> str:
            return f"plain:{key}"

        def close(self) -> None:
            pass

    dataset = stream("train-{000000..000006}.tar", store=Plain())

    assert labels_of(dataset) == list(range(TOTAL))


# -- damage


def test_a_shard_that_is_cut_short_is_an_error(bare: Path, tmp_path: Path) -> None:
    raw = (bare / "train-000000.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(raw[: len(raw) // 1024 * 512])

    with pytest.raises(ShardFormatError, match=r"train-0.tar: cut short.*read before it was 'n"):
        list(stream(tmp_path))


def test_w12_a_shard_of_no_bytes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(b"")

    with pytest.raises(ShardFormatError, match="got 0 bytes, expected a shard"):
        list(stream(tmp_path))


def test_an_index_of_other_shards_is_refused(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4])
    foreign = ShardIndex.load(tmp_path / "train-index.npz")

    with pytest.raises(IndexFormatError, match=r"train-000000.tar: got .* bytes, expected"):
        stream(folder, index=foreign)
    (tmp_path / "train-000002.tar").write_bytes((tmp_path / "train-000000.tar").read_bytes())
    with pytest.raises(IndexFormatError, match=r"train-000002.tar: not in the index"):
        stream(tmp_path)


def test_a_part_of_an_index_is_refused(folder: Path) -> None:
    index = ShardIndex.load(folder / "train-index.npz")

    with pytest.raises(IndexFormatError, match="expected a whole one"):
        stream(folder, index=index.select([3, 2, 1]))


def test_an_index_with_other_samples_is_found_out(tmp_path: Path) -> None:
    write_shards(tmp_path, [4], max_bytes=2)
    index = ShardIndex.load(tmp_path / "train-index.npz")
    raw = tar_of({f"{number}.jpg": b"." for number in range(8)})
    size = index.shards[0].size_bytes
    (tmp_path / "train-000000.tar").write_bytes(raw[:size].ljust(size, b"\0"))

    with pytest.raises(ShardFormatError, match=r"got more than 4 samples in .*, expected 4; the"):
        list(stream(tmp_path, fields="jpg"))


def test_an_error_of_the_store_reaches_the_loop_with_the_shard(
    remote: ObjectServer, folder: Path
) -> None:
    size = (folder / "train-000003.tar").stat().st_size
    assert size > 4096
    remote.set_faults([Fault("internal_error", key_pattern="000003")])
    dataset = stream("s3://bucket/", retry=RetryPolicy(max_attempts=1))

    loader = DataLoader(dataset, batch_size=4, num_workers=2)

    with pytest.raises(StoreUnavailableError, match=r"train-000003.tar.*status 500.*read before"):
        list(loader)


def test_a_store_that_fails_now_and_then_loses_nothing(remote: ObjectServer) -> None:
    remote.set_faults([Fault("truncated_body", rate=0.2), Fault("slow_down", rate=0.1)])
    dataset = stream("s3://bucket/", retry=RetryPolicy(max_attempts=20, first_wait_s=0.001))

    assert labels_of(dataset) == list(range(TOTAL))


class FlippingStore(MemoryStore):
    """Changes a byte of a shard in the first answers that hold it."""

    def __init__(self, objects: dict[str, bytes], place: int, num_times: int) -> None:
        super().__init__(objects, "flipping")
        self._place, self._num_left = place, num_times

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        body = bytearray(super().get(key, byte_range))
        start, stop = byte_range or (0, len(body))
        if key == "s-000000.tar" and start <= self._place < stop and self._num_left:
            self._num_left -= 1
            body[self._place - start] ^= 1
        return bytes(body)


def flipping_stream(num_times: int, **settings: Any) -> tuple[StreamedShards, list[bytes]]:
    """Stream two shards of three images, one of which comes changed so many times."""
    images = [bytes([number]) * 6000 for number in range(6)]
    samples = [(f"a/{n}", {"jpg": images[n], "cls": b"%d" % n}) for n in range(6)]
    bodies, index = pack_tars({"s-000000.tar": samples[:3], "s-000001.tar": samples[3:]})
    store = FlippingStore(bodies, index.payload(1).start + 5000, num_times)
    dataset = StreamedShards(list(bodies), store=store, index=index, decode=None, **settings)
    return dataset, images


def test_a_payload_that_was_changed_on_the_way_is_read_again() -> None:
    dataset, images = flipping_stream(1)

    assert [image for image, _ in dataset] == images


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_payload_that_stays_changed_is_refused(shuffle: bool) -> None:
    dataset, _ = flipping_stream(99, shuffle=shuffle)

    with pytest.raises(ChecksumError, match=r"s-000000.tar \[\d+, \d+\) 'a/1.jpg': got bytes"):
        list(dataset)


def test_what_is_fetched_again_on_resuming_is_compared_too() -> None:
    dataset, _ = flipping_stream(0, shuffle=True, seed=1)
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    changed, _ = flipping_stream(99, shuffle=True, seed=1)
    changed.load_state_dict(state)

    with pytest.raises(ChecksumError, match=r"'a/1.jpg': got bytes"):
        list(changed)


# -- order


@pytest.mark.parametrize("source", ["folder", "bare"])
def test_w07_the_order_is_that_of_seed_and_epoch(source: str, request: Any) -> None:
    root: Path = request.getfixturevalue(source)

    def order(seed: int, epoch: int) -> list[int]:
        dataset = shuffled(root, seed=seed)
        dataset.set_epoch(epoch)
        return labels_of(dataset)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(*case)) for case in ((1, 0), (1, 1), (2, 0))}) == 3
    assert sorted(order(1, 0)) == list(range(TOTAL))


def test_w04_epochs_go_on_by_themselves_where_none_is_set(folder: Path) -> None:
    dataset = shuffled(folder)
    by_itself = [labels_of(dataset) for _ in range(3)]

    told = shuffled(folder)
    for epoch, order in enumerate(by_itself):
        told.set_epoch(epoch)
        assert labels_of(told) == order


def read_numpy_state() -> Any:
    state: Any = np.random.get_state()
    return state[1]


def test_the_order_draws_nothing_from_the_global_generators(folder: Path) -> None:
    dataset = shuffled(folder)
    states = random.getstate(), torch.get_rng_state(), read_numpy_state()

    list(dataset)

    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(read_numpy_state(), states[2])


def test_transforms_are_called_in_the_order_of_delivery(folder: Path) -> None:
    seen: list[int] = []

    def note(label: int) -> int:
        seen.append(label)
        return label

    assert labels_of(shuffled(folder, target_transform=note)) == seen


def test_the_order_does_not_depend_on_when_bytes_come(remote: ObjectServer, folder: Path) -> None:
    at_once = labels_of(shuffled(folder))

    remote.set_latency(median_s=0.004, sigma=1.0)

    assert labels_of(shuffled("s3://bucket/")) == at_once


@pytest.mark.parametrize("buffer_size", [2, 10, 40])
def test_no_sample_comes_earlier_than_its_buffer_allows(tmp_path: Path, buffer_size: int) -> None:
    write_shards(tmp_path, [300], max_bytes=2)
    one_open = ReadSettings(num_open=1)

    order = labels_of(shuffled(tmp_path, shuffle_buffer=buffer_size, index=None, reading=one_open))

    assert sorted(order) == list(range(300))
    assert max(label - place for place, label in enumerate(order)) == buffer_size - 1


def test_shards_are_mixed(folder: Path) -> None:
    first = labels_of(shuffled(folder, shuffle_buffer=12))[:20]
    starts = list(itertools.accumulate(COUNTS, initial=0))

    assert len({sum(start <= label for start in starts) for label in first}) >= 3


# -- lengths and parts


@pytest.mark.parametrize("make_loader", [torch_loader, DataLoader])
def test_w05_g08_g10_len_of_the_loader_is_what_it_delivers(folder: Path, make_loader: Any) -> None:
    grid = itertools.product((0, 1, 3), (4, 7, 200), (False, True), ("sorted", "shuffled"))
    for num_workers, batch_size, drop_last, kind in grid:
        make = shuffled if kind == "shuffled" else stream
        dataset = make(folder, batch_size=batch_size)
        loader = make_loader(
            dataset, batch_size=batch_size, num_workers=num_workers, drop_last=drop_last
        )

        got = batches_of(loader)

        full, left = divmod(TOTAL, batch_size)
        sizes = [batch_size] * full + [left] * bool(left and not drop_last)
        assert [len(batch) for batch in got] == sizes
        assert len(loader) == len(sizes)
        flat = [label for batch in got for label in batch]
        if kind == "sorted":
            assert flat == list(range(sum(sizes)))
        else:
            assert len(set(flat)) == len(flat)


def test_w02_lengths_come_from_the_index_and_overrides_are_checked(
    folder: Path, bare: Path
) -> None:
    assert len(stream(folder)) == TOTAL
    with pytest.raises(ValueError, match=f"length: got 5, expected {TOTAL}"):
        stream(folder, length=5)
    with pytest.raises(TypeError, match="no index"):
        len(stream(bare))
    with pytest.raises(TypeError):
        len(torch_loader(stream(bare), 4))
    assert len(stream(bare, length=TOTAL)) == len(list(stream(bare, length=TOTAL))) == TOTAL
    with pytest.raises(ShardFormatError, match=f"got {TOTAL} samples in 7 shards, expected 80"):
        list(stream(bare, length=80))


def test_lengths_of_ranks_are_what_they_deliver(folder: Path) -> None:
    for uneven, world_size in itertools.product(("drop", "pad", "exact"), (2, 3, 11)):
        got: list[list[int]] = []
        for rank in range(world_size):
            dataset = shuffled(folder, uneven=uneven, rank=rank, world_size=world_size)
            got.append(labels_of(dataset))
            assert len(got[-1]) == len(dataset)
        if uneven != "exact":
            assert len({len(part) for part in got}) == 1


@pytest.mark.parametrize("make_loader", [torch_loader, DataLoader])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("uneven", "sizes"),
    [(None, [26] * 3), ("drop", [26] * 3), ("pad", [27] * 3), ("exact", [27, 26, 26])],
)
def test_w05_lengths_agree_on_all_ranks_and_workers(
    folder: Path,
    make_loader: Any,
    num_workers: int,
    drop_last: bool,
    uneven: Any,
    sizes: list[int],
) -> None:
    got: list[list[int]] = []
    for rank, size in enumerate(sizes):
        dataset = shuffled(folder, rank=rank, world_size=3, batch_size=9, uneven=uneven)
        loader = make_loader(dataset, 9, num_workers=num_workers, drop_last=drop_last)
        dataset.set_epoch(2)
        batches = batches_of(loader)

        full, left = divmod(size, 9)
        expected = [9] * full + [left] * bool(left and not drop_last)
        assert [len(batch) for batch in batches] == expected
        assert len(loader) == len(expected)
        assert len(dataset) == size
        got.append(list(itertools.chain(*batches)))

    flat = list(itertools.chain(*got))
    num_doubled = len(flat) - len(set(flat))
    assert num_doubled <= (2 if uneven == "pad" else 0)
    if not drop_last and uneven in ("pad", "exact"):
        assert set(flat) == set(range(TOTAL))


def test_w11_ranks_validate_each_sample_once(folder: Path) -> None:
    parts = [labels_of(stream(folder, rank=rank, world_size=3)) for rank in range(3)]

    assert sorted(itertools.chain(*parts)) == list(range(TOTAL))


def test_a14_g18_unshuffled_epochs_are_equal(folder: Path) -> None:
    dataset = stream(folder)
    dataset.set_epoch(5)

    assert labels_of(dataset) == labels_of(dataset) == list(range(TOTAL))


def test_w03_w06_ranks_and_workers_part_fewer_shards_than_they_are(tmp_path: Path) -> None:
    write_shards(tmp_path, [25, 25])
    got: list[int] = []
    for rank in range(3):
        dataset = shuffled(tmp_path, rank=rank, world_size=3, uneven="exact", batch_size=2)
        dataset.set_epoch(1)
        got += itertools.chain(*batches_of(torch_loader(dataset, 2, num_workers=3)))

    assert sorted(got) == list(range(50))


def test_w06_without_an_index_ranks_without_shards_are_refused_on_all_ranks(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path, [5, 5], with_index=False)
    for rank in range(3):
        with pytest.raises(ValueError, match="got 2 shards without an index for 3 ranks"):
            list(stream(tmp_path, rank=rank, world_size=3))
        with pytest.raises(ValueError, match="expected one to give 3 ranks equally many"):
            list(shuffled(tmp_path, rank=rank, world_size=3))


def test_w06_idle_workers_without_an_index_are_warned_of(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 5], with_index=False)
    told: list[str] = []

    class Worker(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[str]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                labels = labels_of(stream(tmp_path))
            yield from (f"label {label}" for label in labels)
            yield from (str(warning.message) for warning in caught)

    told = list(torch_loader(Worker(), None, num_workers=3))

    assert {f"label {label}" for label in range(10)} < set(told)
    assert [line for line in told if "some workers idle" in line]
    assert len(told) == 11


def test_a15_the_rank_is_that_of_torch_distributed_and_travels(folder: Path) -> None:
    fake_pg: Any = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dataset = stream(folder)
    torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=1, world_size=4)
    try:
        spawned = pickle.loads(pickle.dumps(dataset))
    finally:
        torch.distributed.destroy_process_group()

    # A spawned worker has no process group to ask.
    assert labels_of(spawned) == list(range(20, 40))
    assert len(stream(folder)) == TOTAL


# -- loaders and processes


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_each_start_method_gives_the_same_samples(remote: ObjectServer, start_method: str) -> None:
    # Told, since a fork server has the environment of the time when some test started it.
    dataset = shuffled(
        "s3://bucket/",
        decode=bytes,
        batch_size=8,
        credentials=Credentials(remote.access_key, remote.secret_key),
        endpoint_url=remote.endpoint_url,
    )
    dataset.set_epoch(1)
    expected = labels_of(dataset)
    dataset.set_epoch(1)  # the parent has read before its worker starts

    loader = DataLoader(
        dataset, batch_size=8, num_workers=1, multiprocessing_context=start_method, collate_fn=list
    )

    assert [label for batch in loader for _, label in batch] == expected


@pytest.mark.parametrize("make_loader", [torch_loader, DataLoader])
def test_persistent_workers_hear_of_the_epoch(folder: Path, make_loader: Any) -> None:
    dataset = shuffled(folder, batch_size=8)
    loader = make_loader(dataset, batch_size=8, num_workers=2, persistent_workers=True)

    def run(epoch: int) -> list[list[int]]:
        dataset.set_epoch(epoch)
        return batches_of(loader)

    epochs = [run(0), run(1), run(0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(itertools.chain(*batches_of(loader))) == list(range(TOTAL))


def test_new_workers_draw_another_epoch_by_the_loaders_seed(folder: Path) -> None:
    dataset = shuffled(folder, batch_size=8)

    def run() -> list[list[list[int]]]:
        torch.manual_seed(5)
        loader = torch_loader(dataset, 8, num_workers=2)
        return [batches_of(loader) for _ in range(2)]

    epochs = run()
    assert epochs[0] != epochs[1]
    assert epochs == run()
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(TOTAL))


def test_a17_it_is_read_several_times_and_by_two_iterators(folder: Path) -> None:
    dataset = stream(folder)

    pairs = list(zip(dataset, dataset, strict=True))

    assert [first[1] for first, _ in pairs] == [second[1] for _, second in pairs]
    assert labels_of(dataset) == list(range(TOTAL))


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shard-reader")]


def await_no_reader() -> None:
    for thread in reader_threads():
        thread.join(5)
    assert not reader_threads()


@pytest.mark.parametrize("end", ["early", "forgotten", "error", "whole"])
def test_a17_no_thread_is_left(folder: Path, end: str) -> None:
    dataset = stream(folder)
    samples = iter(dataset)
    next(samples)
    assert reader_threads()

    if end == "early":
        samples.close()  # pyright: ignore[reportAttributeAccessIssue]: a generator
    elif end == "whole":
        list(samples)
    elif end == "error":
        dataset.set_transform(lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            next(samples)
    del samples
    gc.collect()

    await_no_reader()


def test_b04_an_error_of_a_transform_reaches_the_loop_with_the_sample(folder: Path) -> None:
    def fail(label: int) -> int:
        if label == 30:
            raise RuntimeError("no 30")
        return label

    with pytest.raises(RuntimeError) as caught:
        list(stream(folder, target_transform=fail))

    [note] = caught.value.__notes__
    assert note == f"{folder}/train-000004.tar: sample 'n0/00030', field 'cls'"


def test_a17_waiting_costs_no_cpu(remote: ObjectServer) -> None:
    dataset = stream("s3://bucket/train-000000.tar", index=None)
    remote.set_latency(median_s=0.6)
    started_s, cpu_s = time.monotonic(), time.process_time()

    next(iter(dataset))

    waited_s = time.monotonic() - started_s
    assert waited_s >= 0.6
    assert time.process_time() - cpu_s < 0.25 * waited_s


def test_reading_ahead_is_bounded(
    make_object_server: Callable[..., ObjectServer], tmp_path: Path
) -> None:
    object_server = make_object_server()  # of its own, as requests of others would be counted
    write_shards(tmp_path, [200] * 3, max_bytes=4000)
    object_server.create_bucket("public", public=True)
    object_server.put_folder("public", tmp_path)
    url = f"{object_server.endpoint_url}/public/train-{{000000..000002}}.tar"
    dataset = shuffled(url, reading=ReadSettings(part_bytes=8192, max_parts=6, num_open=3))
    object_server.reset_counters()
    object_server.set_latency(median_s=0.02)

    samples = iter(dataset)
    next(samples)
    counters = object_server.counters()
    while counters.num_in_flight:
        counters = object_server.counters()

    taken_bytes = 12 * 2 * 5120  # a full buffer
    assert 1 < counters.max_in_flight <= 6
    assert counters.body_bytes_sent <= taken_bytes + 2 * 6 * 8192


def test_requests_are_large(remote: ObjectServer, folder: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    part_bytes = 16384
    dataset = stream("s3://bucket/", reading=ReadSettings(part_bytes=part_bytes))
    remote.reset_counters()

    list(dataset)

    counters = remote.counters()
    assert counters.num_gets <= num_bytes / part_bytes + len(COUNTS)
    assert counters.body_bytes_sent <= num_bytes


# -- resuming


def compress_all(folder: Path, target: Path) -> Path:
    for path in folder.glob("*.tar"):
        (target / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return target


def write_records(folder: Path, counts: tuple[int, ...] = (30, 5, 25)) -> Path:
    """Write TFRecords with an index, as TensorFlow's builder counts classes."""
    builder = ShardIndexBuilder("tfrecord")
    label = 0
    for shard, count in enumerate(counts):
        name = f"train-{shard:05d}-of-{len(counts):05d}"
        with (folder / name).open("wb") as file:
            writer = TFRecordWriter(file)
            for _ in range(count):
                example = ImageExample(b"%d" % label * 50, label, filename=f"n_{label}.JPEG")
                record = writer.write(serialize_image_example(example, label_base=1))
                builder.add_sample(f"n_{label}.jpg", record, record, label)
                label += 1
        builder.add_shard(Shard(name, (folder / name).stat().st_size))
    builder.build().save(folder / "train-index.npz")
    return folder


SOURCES: dict[str, Callable[[Path, Path, Path], dict[str, Any]]] = {
    "sorted": lambda folder, _bare, _tmp: {"shards": folder},
    "shuffled": lambda folder, _bare, _tmp: {"shards": folder, "shuffle": True},
    "shuffled, no index": lambda _folder, bare, _tmp: {"shards": bare, "shuffle": True},
    "no index": lambda _folder, bare, _tmp: {"shards": bare},
    "rank": lambda folder, _bare, _tmp: {
        "shards": folder,
        "shuffle": True,
        "rank": 1,
        "world_size": 2,
    },
    "command": lambda _folder, bare, _tmp: {
        "shards": f"pipe:cat {bare}/train-00000{{0..6}}.tar",
        "allow_pipe": True,
        "shuffle": True,
    },
    "compressed": lambda _folder, bare, tmp: {"shards": compress_all(bare, tmp)},
    "records": lambda folder, _bare, tmp: {"shards": write_records(tmp), "shuffle": True},
    "made up": lambda _folder, _bare, _tmp: {
        "shards": "fake:30",
        "shuffle": True,
        "fields": ("__key__", "cls"),
    },
}


@pytest.mark.parametrize("source", SOURCES)
def test_it_goes_on_where_it_was_left(
    folder: Path, bare: Path, tmp_path: Path, source: str
) -> None:
    def make() -> StreamedShards:
        settings = SOURCES[source](folder, bare, tmp_path)
        dataset = stream(**{"shuffle_buffer": 12, **settings})
        dataset.set_epoch(4)
        return dataset

    whole = make()
    expected, after = labels_of(whole), labels_of(whole)
    for num_taken in (0, 1, 14, len(expected) - 1, len(expected)):
        dataset = make()
        samples = iter(dataset)
        assert labels_of(itertools.islice(samples, num_taken)) == expected[:num_taken]
        file = io.BytesIO()
        torch.save(dataset.state_dict(), file)
        file.seek(0)

        resumed = make()
        resumed.load_state_dict(torch.load(file, weights_only=True))

        assert labels_of(resumed) == expected[num_taken:]
        assert labels_of(resumed) == after


def test_an_epoch_that_is_set_after_a_state_between_epochs_was_loaded_counts(folder: Path) -> None:
    whole = shuffled(folder)
    list(whole)
    expected = shuffled(folder)
    expected.set_epoch(5)
    dataset = shuffled(folder)
    dataset.load_state_dict(whole.state_dict())
    dataset.set_epoch(5)
    dataset.state_dict()

    assert labels_of(dataset) == labels_of(expected)


def test_it_goes_on_twice_in_a_row(folder: Path) -> None:
    expected = labels_of(shuffled(folder))
    got: list[int] = []
    state: dict[str, Any] | None = None
    for _ in range(5):
        dataset = shuffled(folder)
        if state is not None:
            dataset.load_state_dict(state)
        samples = iter(dataset)
        got += labels_of(itertools.islice(samples, 16))
        state = dataset.state_dict()
        samples.close()  # pyright: ignore[reportAttributeAccessIssue]: a generator
        assert dataset.state_dict() == state

    assert got == expected


def test_what_was_delivered_is_not_fetched_again(
    object_server: ObjectServer, tmp_path: Path
) -> None:
    write_shards(tmp_path, [400], max_bytes=4000)
    object_server.create_bucket("public", public=True)
    object_server.put_folder("public", tmp_path)
    url = f"{object_server.endpoint_url}/public/train-000000.tar"
    num_bytes = (tmp_path / "train-000000.tar").stat().st_size
    dataset = shuffled(url, index=None)
    samples = iter(dataset)
    taken = labels_of(itertools.islice(samples, 300))
    state = dataset.state_dict()
    samples.close()  # pyright: ignore[reportAttributeAccessIssue]: a generator
    resumed = shuffled(url, index=None)
    resumed.load_state_dict(state)
    object_server.reset_counters()

    rest = labels_of(resumed)

    assert sorted(taken + rest) == list(range(400))
    assert object_server.counters().body_bytes_sent < 0.45 * num_bytes


def test_a_state_of_another_reader_is_refused(folder: Path) -> None:
    dataset = shuffled(folder)
    samples = iter(dataset)
    next(samples)
    state = dataset.state_dict()

    other = shuffled(folder, seed=4)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="made with seed 3, expected 4"):
        next(iter(other))
    with pytest.raises(ValueError, match="got version None"):
        other.load_state_dict({})


def test_workers_resume_as_stateful_loaders_let_them(folder: Path) -> None:
    """A worker's dataset is asked after a batch, and told before it iterates."""

    class Stateful(torch.utils.data.IterableDataset[Any]):
        def __init__(self, states: dict[int, Any]) -> None:
            self.states = states

        def __iter__(self) -> Iterator[Any]:
            info = torch.utils.data.get_worker_info()
            assert info is not None
            dataset = shuffled(folder, batch_size=4)
            dataset.set_epoch(0)
            if info.id in self.states:
                dataset.load_state_dict(self.states[info.id])
            for _, label in dataset:
                yield label, info.id, dataset.state_dict()

    whole = list(torch_loader(Stateful({}), None, num_workers=2))
    head, tail = whole[:31], whole[31:]
    states = {worker: state for _, worker, state in head}

    resumed = list(torch_loader(Stateful(states), None, num_workers=2))

    for worker in range(2):
        mine = [label for label, by, _ in resumed if by == worker]
        assert mine == [label for label, by, _ in tail if by == worker]


# -- arguments


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"missing": "warn"}, "missing: got 'warn'"),
        ({"uneven": "join"}, "uneven: got 'join'"),
        ({"shuffle_buffer": 0}, "shuffle_buffer: got 0, expected 1 or more"),
        ({"rank": 1}, "rank, world_size: got 1, None"),
        ({"rank": 2, "world_size": 2}, "rank: got 2, expected 0 or more and less than 2"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"fields": ()}, "fields: got"),
        ({"decode": "opencv"}, "decode: got 'opencv'"),
        ({"store": MemoryStore(), "region": "x"}, "store: got one together with region"),
    ],
)
def test_a_wrong_argument_is_named_at_once(
    folder: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        stream(folder, **settings)


def test_its_description_shows_no_secret(remote: ObjectServer) -> None:
    dataset = stream("s3://bucket/")

    assert (
        repr(dataset)
        == f"StreamedShards({TOTAL} samples in 7 shards, s3://bucket/train-000000.tar)"
    )
    assert remote.secret_key.encode() not in pickle.dumps(dataset)


def test_images_of_shards_are_those_of_files(tmp_path: Path) -> None:
    raws = [encode_image(seed) for seed in range(4)]
    members = {
        f"{n}.{field}": value
        for n, raw in enumerate(raws)
        for field, value in (("jpg", raw), ("cls", b"0"))
    }
    (tmp_path / "train-0.tar").write_bytes(tar_of(members))

    images = [image for image, _ in StreamedShards(tmp_path)]

    for image, raw in zip(images, raws, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(raw))))


@pytest.mark.parametrize("source", ["", "train-*.tar", "train-00000[0-9].tar"])
def test_a_shard_that_the_index_names_and_the_folder_lacks_is_an_error(
    source: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "train-000001.tar").unlink()

    with pytest.raises(KeyNotFoundError, match=r"no shard 'train-000001\.tar', one of 1 missing"):
        stream(str(tmp_path / "set" / source))


def test_a_glob_for_some_shards_of_the_index_gives_these(folder: Path) -> None:
    assert len(stream(str(folder / "train-*1.tar"))) == COUNTS[1]


def test_shards_of_a_run_that_has_not_ended_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / ".unfinished-train").mkdir()
    (tmp_path / "set" / ".unfinished-train" / "plan.json").write_text("{}")

    for source in (tmp_path / "set", tmp_path / "set" / "train-*.tar"):
        with pytest.raises(ShardFormatError, match="an unfinished run of split 'train'"):
            stream(str(source))


def test_a_garbled_shard_is_named_with_offset_and_what_to_do(bare: Path) -> None:
    shard = bare / "train-000000.tar"
    with shard.open("rb") as file:
        samples = [(sample.key, sample.extent) for sample in read_samples(file, "")]
    (before, _), _, (_, garbled) = samples[:3]  # a sample is whole when the next one begins
    with shard.open("r+b") as file:
        file.seek(garbled.start)
        file.write(b"<html>no such page</html>")

    with pytest.raises(ShardFormatError) as error:
        list(stream(bare))

    assert str(error.value) == (
        f"{shard}: no header at offset {garbled.start}: got b'<html>no such pa'... (bad checksum),"
        " expected the header of a file; the tar is damaged, fetch or write it anew; the sample"
        f" read before it was {before!r}"
    )
