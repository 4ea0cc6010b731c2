from __future__ import annotations

import io
import itertools
import pickle
import random
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import torch.utils.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets.lmdb import (
    LmdbDataset,
    SequentialLmdb,
    count_held,
    draw_local_order,
)
from concurrent_dataloader.errors import SampleDecodeError, ShardFormatError, UnknownClassError
from concurrent_dataloader.formats.lmdb_file import LmdbFile
from concurrent_dataloader.formats.lmdb_record import (
    DatabaseMetadata,
    Record,
    pack_labels,
    pack_record,
)
from concurrent_dataloader.formats.lmdb_writer import LmdbWriter
from concurrent_dataloader.labels import Classes, LabelSpace

from .conftest import encode_image

NUM_RECORDS = 45  # not a multiple of the batch size
CLASSES = ["cat", "dog", "eel"]


def write_database(path: Path, payloads: list[bytes]) -> Path:
    labels = [position % 3 for position in range(len(payloads))]
    metadata = DatabaseMetadata(
        len(payloads), "list", None, "train", CLASSES, "custom", "plan", True
    )
    with LmdbWriter(path) as writer:
        for position, payload in enumerate(payloads):
            record = Record(
                f"{CLASSES[labels[position]]}/{position}.jpg", labels[position], payload
            )
            writer.put_record(position, pack_record(record))
        writer.put_metadata(metadata, pack_labels(labels))
    return path


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [
        encode_image(position, mode="L" if position % 4 else "RGB")
        for position in range(NUM_RECORDS)
    ]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Path:
    return write_database(tmp_path_factory.mktemp("lmdb") / "x.lmdb", images)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database whose records hold their numbers, so that a batch says what it holds."""
    payloads = [position.to_bytes(4, "big") for position in range(NUM_RECORDS)]
    return write_database(tmp_path_factory.mktemp("lmdb") / "n.lmdb", payloads)


def to_number(raw: Any) -> int:
    return int.from_bytes(raw, "big")


def random_pixels(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels + torch.rand(1) + random.random() + np.random.rand()


# -- by position


def test_items_are_rgb_images_and_labels(database: Path, images: list[bytes]) -> None:
    dataset = LmdbDataset(database)

    assert len(dataset) == NUM_RECORDS
    for position in range(NUM_RECORDS):
        image, label = dataset[position]
        expected = Image.open(io.BytesIO(images[position])).convert("RGB")
        assert image.mode == "RGB"
        assert np.array_equal(np.array(image), np.array(expected))
        assert label == position % 3


def test_classes_and_labels_come_from_the_database(database: Path) -> None:
    dataset = LmdbDataset(database)

    assert dataset.classes is not None
    assert [dataset.classes.name(label) for label in range(3)] == CLASSES
    assert dataset.classes.label_space is LabelSpace.CUSTOM
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [position % 3 for position in range(NUM_RECORDS)]


def test_classes_of_another_split_give_the_labels(numbered: Path) -> None:
    classes = Classes({"eel": 0, "dog": 4, "cat": 9})

    dataset = LmdbDataset(numbered, decode=to_number, classes=classes)

    assert [dataset[position][1] for position in range(3)] == [9, 4, 0]
    assert dataset.labels is not None
    assert dataset.labels[:3].tolist() == [9, 4, 0]
    assert dataset.classes is classes


def test_a_classes_file_gives_the_labels(numbered: Path, tmp_path: Path) -> None:
    Classes({"eel": 0, "dog": 1, "cat": 2}).save_json(tmp_path / "classes.json")

    dataset = LmdbDataset(numbered, decode=to_number, classes_file=tmp_path / "classes.json")

    assert [dataset[position][1] for position in range(3)] == [2, 1, 0]


def test_classes_that_lack_one_of_the_database_are_refused(numbered: Path) -> None:
    with pytest.raises(UnknownClassError, match="got class 'cat'"):
        LmdbDataset(numbered, classes=Classes({"eel": 0, "dog": 1}))


def test_labels_of_imagenet_can_be_converted(tmp_path: Path) -> None:
    values = ["n01440764", "n02119789", "n01443537"]  # 449, 1 and 450 in the development kit
    metadata = DatabaseMetadata(3, "list", None, "val", values, None, "plan", True)
    with LmdbWriter(tmp_path / "x.lmdb") as writer:
        for position, label in enumerate((0, 1, None)):
            writer.put_record(position, pack_record(Record("a", label, b"bytes")))
        writer.put_metadata(metadata, pack_labels([0, 1, None]))

    dataset = LmdbDataset(tmp_path / "x.lmdb", decode=None, classes=Classes.imagenet())
    before = [label for _, label in (dataset[0], dataset[1], dataset[2])]
    dataset.convert_labels(LabelSpace.ILSVRC2012_ID)

    assert before == [0, 278, -1]
    assert [dataset[position][1] for position in range(3)] == [448, 0, -1]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [448, 0, -1]
    assert dataset.classes is not None
    assert dataset.classes.label_space is LabelSpace.ILSVRC2012_ID


def test_labels_of_ones_own_cannot_be_converted(numbered: Path) -> None:
    with pytest.raises(ValueError, match="'custom'"):
        LmdbDataset(numbered).convert_labels(LabelSpace.SORTED_WNID)


def test_a_label_space_that_the_database_contradicts_is_refused(numbered: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'tf_builder', but .* says 'custom'"):
        LmdbDataset(numbered, label_space=LabelSpace.TF_BUILDER)


def test_stored_bytes_are_given_unchanged(database: Path, images: list[bytes]) -> None:
    dataset = LmdbDataset(database, decode=None)

    assert [dataset[position][0] for position in range(NUM_RECORDS)] == images


def test_transforms_make_the_item(numbered: Path) -> None:
    dataset = LmdbDataset(
        numbered, decode=to_number, transform=lambda n: -n, target_transform=lambda n: n * 10
    )

    assert dataset[4] == (-4, 10)
    assert dataset[-1] == (-44, 20)


def test_metadata_say_where_a_sample_is(numbered: Path) -> None:
    _, _, metadata = LmdbDataset(numbered, decode=None, with_metadata=True)[5]

    assert metadata.key == "eel/5.jpg"
    assert metadata.size_bytes == 4
    assert metadata.source == f"{numbered}, record 5"


def test_a_limit_takes_the_first_or_a_seeded_sample(numbered: Path) -> None:
    first = LmdbDataset(numbered, decode=to_number, limit=5)
    drawn = [LmdbDataset(numbered, decode=to_number, limit=5, sample_seed=1) for _ in range(2)]

    assert [first[i][0] for i in range(len(first))] == [0, 1, 2, 3, 4]
    numbers = [[dataset[i] for i in range(len(dataset))] for dataset in drawn]
    assert numbers[0] == numbers[1]
    assert len({number for number, _ in numbers[0]}) == 5
    assert drawn[0].labels is not None
    assert drawn[0].labels.tolist() == [label for _, label in numbers[0]]


@pytest.mark.parametrize("position", [45, -46])
def test_a_position_that_is_not_there_is_an_index_error(numbered: Path, position: int) -> None:
    with pytest.raises(IndexError, match=f"got position {position}, expected -45 to 44"):
        LmdbDataset(numbered)[position]


def test_a_record_that_is_no_image_is_named(tmp_path: Path) -> None:
    path = write_database(tmp_path / "x.lmdb", [encode_image(0), b"no image"])

    with pytest.raises(SampleDecodeError, match=r"x\.lmdb, record 1 \('dog/1\.jpg'\): image: got"):
        LmdbDataset(path)[1]


def test_an_error_of_a_decoder_names_the_record(numbered: Path) -> None:
    def fail(raw: object) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError) as caught:
        LmdbDataset(numbered, decode=fail)[3]

    assert caught.value.__notes__ == [f"{numbered}, record 3 ('cat/3.jpg')"]


def test_a_database_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardFormatError, match="no records"):
        LmdbDataset(write_database(tmp_path / "x.lmdb", []))


def test_it_pickles(database: Path) -> None:
    dataset = LmdbDataset(database, limit=9, sample_seed=0)
    dataset[0]

    copy = pickle.loads(pickle.dumps(dataset))

    assert np.array_equal(copy[3][0], dataset[3][0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("fetch_impl", "method", "num_workers"),
    [
        ("threaded", None, 0),
        ("asyncio", None, 0),
        ("threaded", "fork", 2),
        ("asyncio", "fork", 2),
        ("vanilla", "fork", 2),
        pytest.param("threaded", "spawn", 1, marks=pytest.mark.slow),
    ],
)
def test_batches_are_those_of_torch(
    database: Path, fetch_impl: Any, method: str | None, num_workers: int
) -> None:
    dataset = LmdbDataset(database, transform=random_pixels)
    dataset[0]  # opened in the parent before workers start
    settings: dict[str, Any] = {"batch_size": 4, "shuffle": True, "num_workers": num_workers}

    expected = read_seeded(torch.utils.data.DataLoader(dataset, **settings))
    loader = DataLoader(dataset, **settings, multiprocessing_context=method, fetch_impl=fetch_impl)
    batches = read_seeded(loader)

    assert len(batches) == 12
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def read_seeded(loader: Any) -> list[list[torch.Tensor]]:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return [[part.clone() for part in batch] for batch in loader]


def test_an_older_database_gives_items_by_consent(tmp_path: Path) -> None:
    path = tmp_path / "ILSVRC-val.lmdb"
    raws = [encode_image(0), encode_image(1)]
    with (
        lmdb.open(str(path), subdir=False, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        for position, raw in enumerate(raws):
            value = [np.frombuffer(raw, np.uint8), 7 + position]
            transaction.put(b"%08d" % position, pickle.dumps(value, -1))
        transaction.put(b"__keys__", pickle.dumps([b"00000000", b"00000001"], -1))

    dataset = LmdbDataset(path, allow_pickle=True)

    assert [label for _, label in (dataset[0], dataset[1])] == [7, 8]
    assert np.array_equal(np.array(dataset[1][0]), np.array(Image.open(io.BytesIO(raws[1]))))
    assert dataset.labels is None
    assert dataset.classes is not None
    assert dataset.classes.label_space is LabelSpace.SORTED_WNID
    assert dataset.classes.name(7) == "cock"


# -- front to back


class CountingFile(LmdbFile):
    """Notes which records were read, and which bytes of the map they were."""

    numbers: list[int]

    def scan_raw(self, positions: Any) -> Any:
        self.numbers = []
        for number, raw in super().scan_raw(positions):
            self.numbers.append(number)
            yield number, raw

    def read_raw(self, position: int) -> bytes:
        raise AssertionError(f"record {position} was read by position")


def sequential(path: Any, **settings: Any) -> SequentialLmdb:
    chosen: dict[str, Any] = {"batch_size": 4, "shuffle": True, "cache": 8, **settings}
    return SequentialLmdb(path, decode=to_number, **chosen)


def numbers_of(dataset: SequentialLmdb, epoch: int = 0) -> list[int]:
    dataset.set_epoch(epoch)
    return [number for number, _ in dataset]


@given(
    count=st.integers(1, 400),
    cache=st.integers(1, 120),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 9),
)
def test_b_03_a_local_order_holds_each_record_once_and_no_more_than_the_cache(
    count: int, cache: int, seed: int, epoch: int
) -> None:
    order = draw_local_order(count, cache, seed, epoch)

    assert sorted(order.tolist()) == list(range(count))
    assert hold(order.tolist()) == count_held(order)
    assert count_held(order) <= min(cache, count)


def hold(order: list[int]) -> int:
    """Play it: read in order until the next one is there, and hand it out."""
    held: set[int] = set()
    num_read = most = 0
    for number in order:
        while number not in held:
            held.add(num_read)
            num_read += 1
        most = max(most, len(held))
        held.remove(number)
    return most


def test_a_local_shuffle_uses_its_cache() -> None:
    order = draw_local_order(20_000, 500, seed=0, epoch=0)

    distances = np.abs(order - np.arange(20_000))
    assert 400 <= count_held(order) <= 500
    assert distances.mean() > 200


def test_b_03_the_first_record_comes_long_before_the_cache_is_full(numbered: Path) -> None:
    order = draw_local_order(1_000_000, 50_000, seed=0, epoch=0)

    assert order[:256].max() < 10_000


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_b_03_workers_hold_no_more_than_the_cache_and_a_batch_each(num_workers: int) -> None:
    count, cache, batch_size = 4000, 400, 16
    order = draw_local_order(count, cache, seed=0, epoch=0)
    batches = np.arange(count) // batch_size

    num_held = 0
    for worker in range(num_workers):
        mine = order[batches % num_workers == worker]
        num_held += count_held(np.argsort(np.argsort(mine)))

    assert num_held <= cache + num_workers * batch_size


def test_a_cache_of_the_whole_shuffles_the_whole() -> None:
    firsts = {int(draw_local_order(10, 10, seed, 0)[0]) for seed in range(200)}

    assert firsts == set(range(10))


def test_b_10_an_order_can_be_had_again() -> None:
    orders = [draw_local_order(100, 20, 5, epoch).tolist() for epoch in (0, 0, 1)]

    assert orders[0] == orders[1] != orders[2]
    # numpy promises this stream; written down so that a change of ours is seen.
    assert draw_local_order(8, 3, 5, 0).tolist() == [1, 0, 3, 5, 2, 6, 7, 4]


@pytest.mark.parametrize("shuffle", [False, True])
def test_b_01_b_02_each_epoch_holds_each_record_once(numbered: Path, shuffle: bool) -> None:
    dataset = sequential(numbered, shuffle=shuffle)

    epochs = [numbers_of(dataset, epoch) for epoch in range(3)]

    assert all(sorted(epoch) == list(range(NUM_RECORDS)) for epoch in epochs)
    assert (epochs[0] == epochs[1]) is not shuffle
    assert (epochs[0] == list(range(NUM_RECORDS))) is not shuffle


def test_records_are_read_in_the_order_of_their_keys_each_once(numbered: Path) -> None:
    file = CountingFile(numbered)

    numbers = numbers_of(sequential(file, cache=12))

    assert numbers != sorted(numbers)
    assert file.numbers == list(range(NUM_RECORDS))


def test_b_03_it_yields_before_it_has_read_more_than_its_cache(numbered: Path) -> None:
    file = CountingFile(numbered)
    dataset = sequential(file, cache=12)

    num_held: list[int] = []
    for num_given, _ in enumerate(dataset):
        num_held.append(len(file.numbers) - num_given)

    assert max(num_held) <= 12


def test_each_record_is_as_the_dataset_gives_it(database: Path) -> None:
    by_position = LmdbDataset(database)

    dataset = SequentialLmdb(database, batch_size=4, shuffle=True, cache=9, with_metadata=True)

    for image, label, metadata in dataset:
        expected, expected_label = by_position[int(Path(metadata.key).stem)]
        assert np.array_equal(image, expected)
        assert label == expected_label


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 45, 100])
def test_b_01_plans_of_workers_make_up_the_batches_of_one(
    numbered: Path, batch_size: int, shuffle: bool, drop_last: bool
) -> None:
    dataset = sequential(numbered, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    expected = dataset.plan(epoch=2).tolist()

    assert len(expected) == len(dataset) == (45 // batch_size * batch_size if drop_last else 45)
    for num_workers in (1, 2, 3, 8):
        plans = [dataset.plan(2, worker, num_workers).tolist() for worker in range(num_workers)]
        batches = [
            [plan[at : at + batch_size] for at in range(0, len(plan), batch_size)] for plan in plans
        ]
        taken = [
            batches[number % num_workers][number // num_workers]
            for number in range(dataset.num_batches)
        ]
        assert list(itertools.chain(*taken)) == expected
        assert sum(map(len, batches)) == dataset.num_batches


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("uneven", ["pad", "drop", "exact"])
def test_b_06_ranks_read_keys_side_by_side(numbered: Path, world_size: int, uneven: Any) -> None:
    ranks = [
        sequential(numbered, rank=rank, world_size=world_size, uneven=uneven)
        for rank in range(world_size)
    ]
    spans = [sorted(numbers_of(rank)) for rank in ranks]

    for span in spans:
        assert span == list(range(span[0], span[-1] + 1))
    counts = [len(span) for span in spans]
    union = set(itertools.chain(*spans))
    if uneven == "exact":
        assert sum(counts) == NUM_RECORDS == len(union)
        assert max(counts) - min(counts) <= 1
    else:
        assert len(set(counts)) == 1
        assert len({rank.num_batches for rank in ranks}) == 1
    if uneven == "pad":
        assert len(union) == NUM_RECORDS
        assert sum(counts) - NUM_RECORDS < world_size
    if uneven == "drop":
        assert sum(counts) == len(union) > NUM_RECORDS - world_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"cache": 0}, "cache: got 0"),
        ({"rank": 1}, "rank: got 1, expected 0 to 0"),
        ({"world_size": 46}, "world_size: got 46, expected 45 at most"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**32}, "seed: got 4294967296"),
    ],
)
def test_wrong_settings_are_refused_at_once(
    numbered: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sequential(numbered, **settings)


def test_an_error_of_a_transform_names_the_record(numbered: Path) -> None:
    def fail(number: int) -> int:
        if number == 7:
            raise RuntimeError("no sevens")
        return number

    dataset = sequential(numbered, shuffle=False, transform=fail)

    with pytest.raises(RuntimeError, match="no sevens") as caught:
        list(dataset)
    assert caught.value.__notes__ == [f"{numbered}, record 7"]
