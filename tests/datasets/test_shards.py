"""Samples in shards by position: the same items as single files', by fewer requests."""

from __future__ import annotations

import asyncio
import io
import itertools
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from typing_extensions import Buffer

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import ScratchDataset, ShardDataset, StreamedShards
from concurrent_dataloader.errors import (
    ByteRangeError,
    ChecksumError,
    IndexFormatError,
    KeyNotFoundError,
    SampleDecodeError,
    ShardFormatError,
    UnknownClassError,
)
from concurrent_dataloader.formats.image import decode_image
from concurrent_dataloader.formats.tfrecord import (
    ImageExample,
    TFRecordWriter,
    serialize_image_example,
)
from concurrent_dataloader.labels import Classes, LabelSpace, imagenet_classes
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import Credentials, open_store
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.conftest import IMAGES, encode_image
from tests.datasets.shard_doubles import pack_tars

CLASSES = ["Dog", "cat", "cat-tail"]
WNIDS = sorted(entry.wnid for entry in imagenet_classes())


def samples_of(keys: list[str]) -> list[tuple[str, dict[str, bytes]]]:
    found: list[tuple[str, dict[str, bytes]]] = []
    for key in keys:
        stem, _, field = key.rpartition(".")
        label = CLASSES.index(key.partition("/")[0])
        fields = {field.lower(): IMAGES[key], "cls": b"%d" % label, "json": b'{"bbox":null}'}
        found.append((stem, fields))
    return found


# As ImageFolder sorts them, over three shards.
KEYS = [
    *("Dog/10.jpg", "Dog/5.jpg"),
    *("cat/1.jpg", "cat/sub/3.jpeg", "cat/sub-a/2.JPEG"),
    *("cat-tail/0.png", "cat-tail/9.png"),
]
SHARDS = {
    "train-000000.tar": samples_of(KEYS[:3]),
    "train-000001.tar": samples_of(KEYS[3:4]),
    "train-000002.tar": samples_of(KEYS[4:]),
}


class CountingStore(MemoryStore):
    """Remembers what it was asked for."""

    def __init__(self, objects: dict[str, bytes], name: str = "shards") -> None:
        super().__init__(objects, name)
        self.asked: list[tuple[str, ByteRange | None]] = []

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.asked.append((key, byte_range))
        return super().get(key, byte_range)


def open_shards(**options: Any) -> ShardDataset:
    bodies, index = pack_tars(SHARDS, classes=CLASSES)
    return ShardDataset(index, CountingStore(bodies), **options)


def asked(dataset: ShardDataset) -> list[tuple[str, ByteRange | None]]:
    assert isinstance(dataset.store, CountingStore)
    return dataset.store.asked


def items_of(dataset: Any) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), label) for image, label in (dataset[i] for i in range(len(dataset)))]


def open_one(contents: dict[str, bytes], **options: Any) -> ShardDataset:
    bodies, index = pack_tars({"s.tar": [("a/b", contents)]})
    return ShardDataset(index, MemoryStore(bodies, "one"), **options)


# The same items


def test_items_are_those_of_torchvisions_image_folder(image_folder: Path) -> None:
    oracle = ImageFolder(image_folder)
    dataset = open_shards()

    assert sorted(items_of(dataset)) == sorted(items_of(oracle))
    assert [dataset.key(i).lower() for i in range(7)] == [key.lower() for key in KEYS]
    assert dataset.classes is not None
    assert [dataset.classes.name(label) for label in range(3)] == oracle.classes


def test_a_sample_is_one_ranged_get_of_its_payload_alone() -> None:
    dataset = open_shards()

    dataset[4]

    ((key, byte_range),) = asked(dataset)
    assert key == "train-000002.tar"
    assert byte_range is not None
    assert byte_range.stop - byte_range.start == len(IMAGES["cat/sub-a/2.JPEG"])


def test_the_stages_compose_to_the_item() -> None:
    dataset = open_shards(transform=np.array)

    raw = dataset.fetch(3)
    image, label = dataset.apply_transform(dataset.decode(3, raw))

    assert bytes(raw) == bytes(asyncio.run(dataset.fetch_async(3))) == IMAGES[KEYS[3]]
    np.testing.assert_array_equal(image, dataset[3][0])
    assert label == dataset[3][1]


def test_w_02_the_length_is_that_of_the_index() -> None:
    """W-02: the epoch had 1,281,167 samples, whatever lay in the shards."""
    assert len(open_shards()) == 7


def test_g_08_a_limit_is_the_head_or_a_seeded_sample_and_len_says_so() -> None:
    """G-08: a part of the data kept the length of the whole."""
    whole = open_shards()
    by_key = {whole.key(i): item for i, item in enumerate(items_of(whole))}

    head, sample = open_shards(limit=2), open_shards(limit=4, sample_seed=3)

    assert items_of(head) == items_of(whole)[:2]
    assert len(sample) == 4
    assert items_of(sample) == [by_key[sample.key(i)] for i in range(4)]
    assert sample.classes is not None
    assert sample.classes.count == 3
    with pytest.raises(ValueError, match=r"^limit: got 0"):
        open_shards(limit=0)


def test_positions_are_those_of_a_list() -> None:
    dataset = open_shards(decode=len)

    assert dataset[-1] == dataset[6]
    for outside in (7, -8):
        with pytest.raises(IndexError):
            dataset[outside]


def test_metadata_says_shard_key_and_byte_range() -> None:
    dataset = open_shards(with_metadata=True, decode=len)

    batch = default_collate([dataset[3], dataset[4]])[2]

    assert list(batch.shard) == ["train-000001.tar", "train-000002.tar"]
    assert list(batch.key) == ["cat/sub/3.jpeg", "cat/sub-a/2.jpeg"]
    assert list(batch.source) == [f"memory://shards/{shard}" for shard in batch.shard]
    assert (batch.stop - batch.start).tolist() == [len(IMAGES[key]) for key in KEYS[3:5]]
    assert batch.size_bytes.tolist() == (batch.stop - batch.start).tolist()
    store = dataset.store
    for key, shard, start, stop in zip(KEYS[3:], *batch[3:], strict=False):
        assert bytes(store.get(shard, ByteRange(int(start), int(stop)))) == IMAGES[key]


def test_it_pickles() -> None:
    dataset = open_shards(transform=pil_to_tensor, fields=("jpg;png;jpeg", "cls"))

    again = pickle.loads(pickle.dumps(dataset))

    assert torch.equal(again[5][0], dataset[5][0])
    assert again[5][1] == 2


# Near ranges in one request


def test_near_samples_come_by_one_request_each_with_its_own_bytes() -> None:
    dataset = open_shards()
    positions = [6, 0, 3, 2, 5, 1]

    groups = dataset.plan_requests(positions)

    assert groups == [[0, 4], [1, 3, 5], [2]]
    for group in groups:
        chosen = [positions[number] for number in group]
        num_before = len(asked(dataset))
        raws = dataset.fetch_many(chosen)
        assert len(asked(dataset)) == num_before + 1
        assert [bytes(raw) for raw in raws] == [IMAGES[KEYS[position]] for position in chosen]
        again = asyncio.run(dataset.fetch_many_async(chosen))
        assert list(map(bytes, again)) == list(map(bytes, raws))


@pytest.mark.parametrize("wrap", [None, torch.utils.data.Subset])
def test_torchs_own_loader_merges_near_samples_too(wrap: Any) -> None:
    dataset = open_shards(transform=pil_to_tensor)
    alone = [dataset[position] for position in range(7)]
    asked(dataset).clear()
    given = dataset if wrap is None else wrap(dataset, range(7))

    batches = list(torch.utils.data.DataLoader(given, batch_size=3, collate_fn=list))

    assert len(asked(dataset)) == 4, "two shards in the second batch, one in each other"
    for (image, label), (expected, its_label) in zip(itertools.chain(*batches), alone, strict=True):
        assert torch.equal(image, expected)
        assert label == its_label


def test_torchs_own_loader_asks_a_class_that_overrides_getitem_for_each_sample() -> None:
    class Numbered(ShardDataset):
        def __getitem__(self, position: int) -> Any:
            return position, super().__getitem__(position)[1]

    bodies, index = pack_tars(SHARDS, classes=CLASSES)
    dataset = Numbered(index, CountingStore(bodies))

    batches = list(torch.utils.data.DataLoader(dataset, batch_size=7, collate_fn=list))

    assert [position for position, _ in batches[0]] == list(range(7))
    assert ScratchDataset.__getitem__ is ShardDataset.__getitem__


def test_in_torchs_own_loader_an_error_is_that_of_its_sample() -> None:
    dataset = open_shards(decode=None)
    whole = dataset.shard_index.payload(4)
    _, shards = pack_tars(SHARDS, classes=CLASSES)
    assert shards.shard_of(4).name == "train-000002.tar"
    bodies, index = pack_tars(SHARDS, classes=CLASSES)
    body = bytearray(bodies["train-000002.tar"])
    body[whole.start] ^= 1
    broken = ShardDataset(
        index, CountingStore(bodies | {"train-000002.tar": bytes(body)}), decode=None
    )

    get_batch = dataset.__getitems__
    assert get_batch is not None
    assert [raw for raw, _ in get_batch([0, 1, 2])] == [IMAGES[key] for key in KEYS[:3]]
    with pytest.raises(ChecksumError, match="it is position 4 of"):
        list(torch.utils.data.DataLoader(broken, batch_size=7, collate_fn=list))


def test_the_gap_and_the_length_bound_what_is_merged() -> None:
    everything = list(range(7))

    assert len(open_shards(max_gap_bytes=0).plan_requests(everything)) == 7
    assert len(open_shards(max_request_bytes=1).plan_requests(everything)) == 7
    assert open_shards().plan_requests([0, 0, 0]) == [[0, 1, 2]]
    assert open_shards().plan_requests([]) == []


def test_positions_that_are_no_group_are_read_all_the_same() -> None:
    dataset = open_shards()

    raws = dataset.fetch_many([5, 0, 3])

    assert [bytes(raw) for raw in raws] == [IMAGES[KEYS[position]] for position in (5, 0, 3)]


@pytest.mark.parametrize(
    "options", [{"max_gap_bytes": -1}, {"max_request_bytes": 0}, {"fields": "jpg"}, {"fields": ()}]
)
def test_settings_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name}: got"):
        open_shards(**options)


# Fields and dialects


def test_fields_are_picked_by_alternatives_and_decoded_by_their_names() -> None:
    dataset = open_shards(
        fields=("png;jpg;jpeg", "json", "cls"),
        transform=lambda image: image.size,
        target_transform=lambda label: label * 10,
        with_metadata=True,
    )

    size, decoded_json, target, metadata = dataset[5]

    assert (size, decoded_json, target) == ((24, 20), {"bbox": None}, 20)
    assert metadata.stop - metadata.start == dataset.shard_index.extent(5)[1] - metadata.start


def test_a_field_that_is_absent_is_an_error_naming_the_sample() -> None:
    dataset = open_shards(fields=("jpg;jpeg", "cls"))

    assert dataset[0][0].mode == "RGB"
    with pytest.raises(SampleDecodeError, match=r"'cat-tail/0': no field 'jpg;jpeg', it has cls"):
        dataset[5]


TOP_FOLDER = "regex:([^/]+)/"
BARE = {
    shard: [(key, {"jpg": encode_image(1), "json": b"{}"}) for key, _ in samples]
    for shard, samples in SHARDS.items()
}
"""The same samples without the field ``cls``."""
LABELS = {
    key: CLASSES.index(key.partition("/")[0]) for samples in BARE.values() for key, _ in samples
}


@pytest.mark.parametrize("who", ["index", "rule", "classes"])
def test_the_field_cls_is_the_label_where_samples_have_no_such_field(who: str) -> None:
    ways: dict[str, Any] = {
        "index": {},
        "rule": {"label_rule": TOP_FOLDER},
        "classes": {"classes": Classes.from_keys(KEYS, label_rule=TOP_FOLDER)},
    }
    bodies, index = pack_tars(BARE, labels=LABELS if who == "index" else None)
    dataset = ShardDataset(
        index,
        MemoryStore(bodies),
        fields=("json", "txt;cls"),
        target_transform=lambda label: label * 10,
        **ways[who],
    )

    items = [dataset[i] for i in range(len(dataset))]

    assert items == [({}, 10 * label) for label in LABELS.values()]
    with pytest.raises(SampleDecodeError, match=r"no field 'png', it has cls, jpg, json; ask for"):
        ShardDataset(index, MemoryStore(bodies), fields=("png",), **ways[who])[0]


def test_the_field_cls_is_as_in_a_stream_of_the_same_shards() -> None:
    bodies, index = pack_tars(BARE, labels=LABELS)
    store = MemoryStore(bodies)
    fields = ("cls", "json", "cls;json")

    at_random = ShardDataset(index, store, fields=fields)
    streamed = StreamedShards(list(bodies), store=store, index=index, fields=fields)

    assert [at_random[i] for i in range(len(at_random))] == list(streamed)


def test_without_labels_the_field_cls_is_that_of_the_sample_or_an_error() -> None:
    samples = [("a", {"jpg": b"", "cls": b"7"}), ("b", {"jpg": b""})]
    bodies, index = pack_tars({"s.tar": samples}, labels={})

    dataset = ShardDataset(index, MemoryStore(bodies), fields=("cls",))

    assert dataset[0] == (7,)
    with pytest.raises(SampleDecodeError, match=r"'b': no field 'cls', it has jpg; ask for"):
        dataset[1]


@pytest.mark.parametrize(
    "wanted", ["jpg; json", " json ", "JPG ;\tjson;", ";;json", "img;v2 ; json", "none; v2.cls"]
)
def test_spaces_between_alternatives_are_as_in_a_stream(wanted: str) -> None:
    bodies, index = pack_tars({"s.tar": [("a", {"json": b"{}", "v2.cls": b"3"})]})
    store, fields = MemoryStore(bodies), (wanted,)

    at_random = ShardDataset(index, store, fields=fields)[0]
    (streamed,) = StreamedShards(list(bodies), store=store, index=index, fields=fields)

    assert at_random == streamed == ((3,) if "cls" in wanted else ({},))
    with pytest.raises(ValueError, match=r"fields: got \('jpg', ' ; '\), expected at least one"):
        ShardDataset(index, store, fields=("jpg", " ; "))


def test_bytes_stay_bytes_without_a_decoder_and_in_other_fields() -> None:
    raw = open_one({"jpg": IMAGES["cat/1.jpg"], "note": b"x", "cls": b"3"}, decode=None)
    other = open_one({"jpg": IMAGES["cat/1.jpg"], "note": b"x"}, fields=("note",))

    assert raw[0] == (IMAGES["cat/1.jpg"], 3)
    assert other[0] == (b"x",)


def test_g_15_shards_without_json_or_with_img_or_a_class_in_the_key_are_read() -> None:
    """G-15: a reader demanded a json member, which two of four dialects have not."""
    image = IMAGES["cat/1.jpg"]
    dialects: list[tuple[str, dict[str, bytes]]] = [
        ("0000001", {"jpg": image, "cls": b"7"}),
        ("n01440764_10026", {"jpeg": image, "cls": b"7\n"}),
        ("12", {"jpg": image, "cls": b"7", "json": b'{"bbox": [0.1, 0.2, 0.3, 0.4]}'}),
        ("n01440764/10026", {"img": image, "cls": b"7"}),
    ]
    bodies, index = pack_tars({"a.tar": dialects})
    dataset = ShardDataset(index, MemoryStore(bodies))

    expected = decode_image(image).tobytes()
    assert items_of(dataset) == [(expected, 7)] * 4


def pth(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


PIXELS = torch.arange(4 * 6 * 3, dtype=torch.uint8).reshape(3, 4, 6)


@pytest.mark.parametrize(
    "fields",
    [
        {"pth": pth(PIXELS)},
        {"pth": pth(PIXELS.permute(1, 2, 0).contiguous())},
        {"rgb": PIXELS.permute(1, 2, 0).contiguous().numpy().tobytes()},
    ],
)
def test_tensors_and_raw_pixels_become_what_images_do(fields: dict[str, bytes]) -> None:
    image, _ = open_one(fields, raw_size=(4, 6))[0]
    tensor, _ = open_one(fields, raw_size=(4, 6), decode="torchvision")[0]

    assert isinstance(image, Image.Image)
    assert torch.equal(pil_to_tensor(image), PIXELS)
    assert torch.equal(tensor, PIXELS)


def test_raw_pixels_without_a_size_are_a_square() -> None:
    assert open_one({"raw": bytes(256 * 256 * 3)})[0][0].size == (256, 256)
    with pytest.raises(SampleDecodeError, match=r"got 72 bytes, expected a square"):
        open_one({"raw": bytes(72)})[0]


def test_an_img_field_may_hold_an_image_file_or_raw_pixels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (256, 256, 3), np.uint8)
    ppm = b"P6 8 8 255\n" + bytes(8 * 8 * 3)
    as_long_as_pixels = ppm + bytes(256 * 256 * 3 - len(ppm))

    assert np.array_equal(open_one({"img": pixels.tobytes()})[0][0], pixels)
    small = open_one({"img": pixels[:2, :5].tobytes()}, raw_size=(2, 5))[0][0]
    assert np.array_equal(small, pixels[:2, :5])
    assert open_one({"img": as_long_as_pixels})[0][0].size == (8, 8)
    with pytest.raises(SampleDecodeError, match="no image format"):
        open_one({"img": pixels[:2].tobytes()})[0]


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/nonexistent/folder/executed"),)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (pth(Bomb()), "pth: "),
        (pth({"a": 1}), "expected a uint8 tensor"),
        (pth(torch.zeros(3, 2, 2)), r"got a torch.float32 tensor, expected a uint8 tensor"),
        (pth(torch.zeros(5, 2, 2, dtype=torch.uint8)), r"got a tensor of shape \(5, 2, 2\)"),
        (b"no tensor", "pth: "),
    ],
)
def test_what_is_no_tensor_is_an_error_and_executes_nothing(content: bytes, text: str) -> None:
    with pytest.raises(SampleDecodeError, match=text):
        open_one({"pth": content})[0]


# Labels


def test_a_12_labels_in_the_order_of_the_development_kit_are_converted() -> None:
    """A-12: ids of another order gave torchvision's weights accuracy near chance."""
    kit_fox, tench = "n02119789", "n01440764"
    ids = {"a": 1, "b": 450}  # in the kit, kit fox is 1
    samples = [
        (key, {"jpg": IMAGES["cat/1.jpg"], "cls": b"%d" % number}) for key, number in ids.items()
    ]
    bodies, index = pack_tars({"a.tar": samples}, label_base=1)
    kit = [entry.wnid for entry in imagenet_classes()]

    dataset = ShardDataset(index, MemoryStore(bodies), label_space=LabelSpace.ILSVRC2012_ID)
    dataset.convert_labels(LabelSpace.SORTED_WNID)

    assert [dataset.label(0), dataset.label(1)] == [WNIDS.index(kit_fox), WNIDS.index(kit[449])]
    assert dataset.classes is not None
    assert dataset.classes.name(WNIDS.index(tench)) == "tench"
    assert dataset.classes.label_space is LabelSpace.SORTED_WNID
    with pytest.raises(ValueError, match="label_space"):
        ShardDataset(index, MemoryStore(bodies)).convert_labels(LabelSpace.SORTED_WNID)


def test_a_label_space_that_contradicts_the_index_is_refused() -> None:
    bodies, index = pack_tars(SHARDS, classes=CLASSES, label_space="sorted_wnid")

    with pytest.raises(ValueError, match=r"^label_space: got 'tf_builder', but .* 'sorted_wnid'"):
        ShardDataset(index, MemoryStore(bodies), label_space=LabelSpace.TF_BUILDER)


def test_classes_of_another_split_are_matched_by_name() -> None:
    val = {"val.tar": [("x", {"jpg": IMAGES["cat/1.jpg"], "cls": b"0"})]}
    bodies, index = pack_tars(val, classes=["cat-tail"])
    train = open_shards()

    dataset = ShardDataset(index, MemoryStore(bodies), train.classes)

    assert dataset.label(0) == 2
    bodies, index = pack_tars(val, classes=["mouse"])
    with pytest.raises(UnknownClassError, match="'mouse'"):
        ShardDataset(index, MemoryStore(bodies), train.classes)


def test_classes_of_a_folder_are_matched_by_name(image_folder: Path) -> None:
    val = {"val.tar": [("0000001", {"jpg": IMAGES["cat/1.jpg"], "cls": b"0"})]}
    bodies, index = pack_tars(val, classes=["cat"])
    by_number = Classes({"1": 7}, label_rule="number")

    folder = ScratchDataset(image_folder)

    assert ShardDataset(index, MemoryStore(bodies), folder.classes).label(0) == 1
    assert ShardDataset(index, MemoryStore(bodies), by_number).label(0) == 7


def test_classes_of_another_split_count_labels_without_names() -> None:
    train = Classes.imagenet(LabelSpace.SORTED_WNID)
    val = {"val.tar": [("x", {"jpg": IMAGES["cat/1.jpg"], "cls": b"0"})]}
    bodies, index = pack_tars(val)

    same = ShardDataset(index, MemoryStore(bodies), train)
    kit = ShardDataset(index, MemoryStore(bodies), train, label_space=LabelSpace.ILSVRC2012_ID)

    assert same.label(0) == 0
    assert kit.label(0) == WNIDS.index("n02119789")
    with pytest.raises(UnknownClassError, match="got label 1, expected less than the 1"):
        ShardDataset(
            pack_tars({"v.tar": [("x", {"jpg": b"", "cls": b"1"})]})[1],
            MemoryStore(),
            Classes({"a": 0}),
        )


def test_keys_name_the_classes_where_a_rule_says_so() -> None:
    dataset = open_shards(label_rule="regex:^([^/]+)/")

    assert [dataset.label(i) for i in range(7)] == [0, 0, 1, 1, 1, 2, 2]


def test_shards_without_labels_have_none() -> None:
    assert open_one({"jpg": IMAGES["cat/1.jpg"]})[0][1] == -1
    alone = open_one({"jpg": IMAGES["cat/1.jpg"]}, missing_label=None)[0]
    assert isinstance(alone, Image.Image)


# TFRecord


def pack_records(examples: list[ImageExample], label_base: int = 1) -> tuple[bytes, ShardIndex]:
    file = io.BytesIO()
    writer = TFRecordWriter(file)
    builder = ShardIndexBuilder("tfrecord")
    for example in examples:
        frame = writer.write(serialize_image_example(example, label_base=label_base))
        builder.add_sample(example.filename or "", frame, frame, example.label)
    builder.add_shard(Shard("train-00000-of-00001", writer.stop))
    return file.getvalue(), builder.build()


def test_records_are_samples_like_others_and_their_crcs_are_checked() -> None:
    examples = [
        ImageExample(IMAGES[key], CLASSES.index(key.partition("/")[0]), filename=key)
        for key in KEYS
    ]
    body, index = pack_records(examples)
    dataset = ShardDataset(index, MemoryStore({"train-00000-of-00001": body}))

    assert sorted(items_of(dataset)) == sorted(items_of(open_shards()))
    assert dataset.plan_requests([2, 1]) == [[0, 1]]
    fields = ShardDataset(index, dataset.store, fields=("jpg", "cls", "image/filename"))[1]
    assert fields[1:] == (0, [b"Dog/5.jpg"])
    assert fields[0].tobytes() == decode_image(IMAGES["Dog/5.jpg"]).tobytes()
    spoilt = bytearray(body)
    spoilt[index.payload(1).stop - 300] ^= 1
    with pytest.raises(ShardFormatError, match=r"train-00000-of-00001 .*'Dog/5.jpg'.*CRC"):
        ShardDataset(index, MemoryStore({"train-00000-of-00001": bytes(spoilt)}))[1]


# Damage


def test_damage_is_an_error_that_names_shard_sample_and_position() -> None:
    bodies, index = pack_tars(SHARDS, checked=False)
    start, _ = index.payload(1)
    body = bytearray(bodies["train-000000.tar"])
    body[start : start + 20] = bytes(20)
    spoilt = bodies | {"train-000000.tar": bytes(body)}
    cut = bodies | {"train-000000.tar": bodies["train-000000.tar"][:start]}
    missing = {name: body for name, body in bodies.items() if name != "train-000000.tar"}
    index_of_others, _ = pack_tars({"train-000000.tar": SHARDS["train-000001.tar"] * 4})

    def item(objects: dict[str, bytes], **options: Any) -> Any:
        return ShardDataset(index, MemoryStore(objects), index_name="i.npz", **options)[1]

    where = r"train-000000.tar \[\d+, \d+\) 'Dog/5.jpg': .*position 1 of i.npz"
    with pytest.raises(SampleDecodeError, match=where):
        item(spoilt)
    with pytest.raises(ByteRangeError, match=r"train-000000.tar .*position 1 of i.npz"):
        item(cut)
    with pytest.raises(KeyNotFoundError, match=r"train-000000.tar.*position 1 of i.npz"):
        item(missing)
    with pytest.raises(ShardFormatError, match=where):
        item(index_of_others, fields=("jpg",))


def test_an_empty_index_is_an_error() -> None:
    with pytest.raises(IndexFormatError, match="no samples"):
        ShardDataset(ShardIndexBuilder("tar").build(), MemoryStore())


# In loaders


@pytest.fixture
def remote(object_server: ObjectServer) -> Callable[..., ShardDataset]:
    samples = [
        (f"{number:07d}", {"jpg": encode_image(number), "cls": b"%d" % (number % 5)})
        for number in range(48)
    ]
    bodies, index = pack_tars(
        {f"t-{first:02}.tar": samples[first : first + 12] for first in range(0, 48, 12)}
    )
    object_server.put_objects("sets", {f"p/{name}": body for name, body in bodies.items()})
    store = open_store(
        "s3://sets/p",
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
        hedge=None,  # a busy machine makes requests late that nothing is wrong with
    )

    def open_remote(**options: Any) -> ShardDataset:
        return ShardDataset(index, store, **options)

    return open_remote


class RandomCrop:
    """Draws from torch's generator, as train transforms do."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        left, top = torch.randint(0, 4, (2,)).tolist()
        return pil_to_tensor(image.crop((left, top, left + 16, top + 16)))


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_torchs_loader_gives_the_same_shuffled_batches(
    remote: Callable[..., ShardDataset], fetch_impl: str
) -> None:
    dataset = remote(transform=RandomCrop())

    def epoch(loader_class: Any, **options: Any) -> list[list[torch.Tensor]]:
        torch.manual_seed(3)
        loader = loader_class(dataset, batch_size=7, shuffle=True, num_workers=1, **options)
        return list(loader)

    ours = epoch(DataLoader, fetch_impl=fetch_impl)
    torchs = epoch(torch.utils.data.DataLoader)

    assert len(ours) == len(torchs) == 7
    for mine, theirs in zip(ours, torchs, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_reading_in_order_takes_few_requests_and_shuffled_one_a_sample(
    remote: Callable[..., ShardDataset], object_server: ObjectServer
) -> None:
    def count_gets(dataset: ShardDataset, *, shuffle: bool) -> int:
        object_server.reset_counters()
        torch.manual_seed(1)
        loader = DataLoader(dataset, batch_size=8, num_workers=1, shuffle=shuffle)
        labels = torch.cat([labels for _, labels in loader]).tolist()
        assert sorted(labels) == sorted(number % 5 for number in range(48))
        return object_server.counters().num_gets

    assert count_gets(remote(transform=pil_to_tensor), shuffle=False) <= 48 * 0.3
    apart = remote(transform=pil_to_tensor, max_gap_bytes=0)
    assert count_gets(apart, shuffle=True) == 48


@pytest.mark.parametrize("num_workers", [0, 1])
def test_small_batches_share_requests_with_those_that_are_begun_with_them(
    remote: Callable[..., ShardDataset], object_server: ObjectServer, num_workers: int
) -> None:
    all_sent = multiprocessing.get_context("fork").Event()

    def begin_late(_: int) -> None:
        all_sent.wait()

    def count_gets(batch_pool: int) -> int:
        all_sent.clear()
        object_server.reset_counters()
        loader = DataLoader(
            remote(transform=pil_to_tensor),
            batch_size=2,
            num_workers=num_workers,
            batch_pool=batch_pool,
            worker_init_fn=begin_late,
        )
        batches = iter(loader)
        all_sent.set()
        labels = [label for _, labels in batches for label in labels.tolist()]
        assert labels == [number % 5 for number in range(48)]
        return object_server.counters().num_gets

    assert count_gets(batch_pool=0) == 24
    # Four shards, and as many more as a queue between processes may tear apart.
    assert 4 <= count_gets(batch_pool=24) <= (4 if num_workers == 0 else 12)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_goes_on_in_the_middle_without_reading_again(
    remote: Callable[..., ShardDataset], object_server: ObjectServer, num_workers: int
) -> None:
    dataset = remote(transform=pil_to_tensor, max_gap_bytes=0)

    def open_loader(num_workers: int) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=8, num_workers=num_workers, shuffle=True)

    torch.manual_seed(5)
    whole = list(open_loader(2))
    torch.manual_seed(5)
    loader = open_loader(2)
    begun = list(itertools.islice(loader, 2))
    state = loader.state_dict()
    loader.close()
    object_server.reset_counters()
    loader = open_loader(num_workers)
    loader.load_state_dict(state)
    rest = list(loader)

    assert len(begun + rest) == len(whole) == 6
    for (images, labels), (their_images, their_labels) in zip(begun + rest, whole, strict=True):
        assert torch.equal(images, their_images)
        assert torch.equal(labels, their_labels)
    assert object_server.counters().num_gets == 48 - 16


def test_json_and_bytes_of_fields_are_those_written() -> None:
    content = orjson.dumps({"bbox": [[0.0, 0.5, 1.0, 1.0]], "n": 3})

    got = open_one({"jpg": b"", "json": content, "cls": b"1"}, fields=("json", "cls"))[0]

    assert got == ({"bbox": [[0.0, 0.5, 1.0, 1.0]], "n": 3}, 1)
    for name, spoilt in (("json", b"{"), ("cls2.cls", b"x1"), ("cls2.cls", b"9" * 5000)):
        with pytest.raises(SampleDecodeError, match=f"{name[-3:]}: "):
            open_one({"jpg": b"", name: spoilt}, fields=(name,))[0]


# Bytes that are not those that were written


class FlippingStore(CountingStore):
    """Changes a byte of what holds a certain place of a shard, so many times."""

    def __init__(self, objects: dict[str, bytes], shard: str, place: int, num_times: int) -> None:
        super().__init__(objects)
        self._shard, self._place, self._num_left = shard, place, num_times

    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        body = bytearray(super().get(key, byte_range))
        assert byte_range is not None
        start, stop = byte_range
        if key == self._shard and start <= self._place < stop and self._num_left:
            self._num_left -= 1
            body[self._place - start] ^= 1
        return bytes(body)


def open_flipping(num_times: int, *, checked: bool = True, **options: Any) -> ShardDataset:
    """Open shards of which the image of sample 1 comes changed so many times."""
    bodies, index = pack_tars(SHARDS, classes=CLASSES, checked=checked)
    place = index.payload(1).start + 100
    store = FlippingStore(bodies, index.shard_of(1).name, place, num_times)
    return ShardDataset(index, store, **options)


def fetch_together(dataset: ShardDataset, position: int) -> Buffer:
    return dataset.fetch_many([0, position])[1]


def fetch_together_async(dataset: ShardDataset, position: int) -> Buffer:
    return asyncio.run(dataset.fetch_many_async([0, position]))[1]


def fetch_async(dataset: ShardDataset, position: int) -> Buffer:
    return asyncio.run(dataset.fetch_async(position))


FETCHES: list[Callable[[ShardDataset, int], Buffer]] = [
    ShardDataset.fetch,
    fetch_async,
    fetch_together,
    fetch_together_async,
]


@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize("fields", [None, ("jpg;jpeg;png", "cls")])
def test_bytes_that_were_changed_on_the_way_are_read_again(
    fetch: Callable[[ShardDataset, int], Buffer], fields: tuple[str, ...] | None
) -> None:
    dataset = open_flipping(1, fields=fields)

    raw = bytes(fetch(dataset, 1))

    assert raw == bytes(open_shards(fields=fields).fetch(1))
    assert len(asked(dataset)) == 2


@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize("fields", [None, ("jpg;jpeg;png", "cls")])
def test_bytes_that_stay_changed_are_refused(
    fetch: Callable[[ShardDataset, int], Buffer], fields: tuple[str, ...] | None
) -> None:
    dataset = open_flipping(99, fields=fields)
    index = dataset.shard_index
    start, stop = index.payload(1) if fields is None else index.extent(1)
    expected = index.payload_crc(1) if fields is None else index.extent_crc(1)

    with pytest.raises(ChecksumError) as raised:
        fetch(dataset, 1)

    begin, _, rest = str(raised.value).partition(": got bytes of CRC-32C ")
    assert begin == f"memory://shards/train-000000.tar [{start}, {stop}) 'Dog/5.jpg'"
    assert f", expected {expected:08x} by the index of shards" in rest
    assert rest.endswith("; it is position 1 of the index of shards")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_changed_sample_fails_its_batch_in_the_loader(num_workers: int) -> None:
    dataset = open_flipping(99, decode=len)

    loader = DataLoader(dataset, batch_size=7, num_workers=num_workers)

    with pytest.raises(ChecksumError, match=r"'Dog/5.jpg': got bytes of CRC-32C"):
        list(loader)


@pytest.mark.parametrize("how", [{"checked": False}, {"compare_checksums": False}])
def test_nothing_is_compared_without_checksums_or_if_not_wanted(how: dict[str, bool]) -> None:
    dataset = open_flipping(99, **how)

    raw = bytes(dataset.fetch(1))

    assert raw != IMAGES[KEYS[1]]
    assert len(raw) == len(IMAGES[KEYS[1]])
