"""What each of N instances streams: all samples once, with their labels, by ranks and workers."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets import (
    InstanceShards,
    StreamedShards,
    open_shards,
    shards_of_instance,
)
from concurrent_dataloader.errors import IndexFormatError, MissingIndexError
from concurrent_dataloader.prepare.distribute import distribute
from concurrent_dataloader.shard_index import IndexPiece, ShardIndex, join_indexes
from concurrent_dataloader.stores import open_writable_store
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.shard_sets import make_samples, strip_crcs, write_set

NUM_SAMPLES = 66
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 shards of 7 samples, the last of 3; of 4 instances each reads 2, and a part of 2."""
    samples = make_samples(NUM_SAMPLES)
    shards = [samples[at : at + 7] for at in range(0, NUM_SAMPLES, 7)]
    write_set(open_writable_store(tmp_path), shards)
    return tmp_path


def stream(own: InstanceShards, **settings: Any) -> StreamedShards:
    defaults: dict[str, Any] = {"store": own.store, "index": own.index, "decode": None}
    defaults["fields"] = ("__key__", "cls")
    return StreamedShards(own.names, **defaults | settings)


def expected() -> list[tuple[str, int]]:
    return sorted((key, int(fields["cls"])) for key, fields in make_samples(NUM_SAMPLES))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make_loader", [DataLoader, torch.utils.data.DataLoader])
def test_ranks_and_workers_of_all_instances_read_each_sample_once(
    make_loader: Any, num_workers: int, folder: Path
) -> None:
    distribute(str(folder), 4)
    got: list[tuple[str, int]] = []

    for instance, rank in itertools.product(range(4), range(3)):
        own = shards_of_instance(folder, instance, 4)
        dataset = stream(
            own, shuffle=True, uneven="exact", rank=rank, world_size=3, batch_size=2, seed=5
        )
        dataset.set_epoch(1)
        loader = make_loader(dataset, batch_size=2, num_workers=num_workers, collate_fn=list)
        batches = list(loader)
        assert len(batches) == len(loader)
        got += itertools.chain(*batches)

    assert sorted(got) == expected()


def test_an_instance_knows_its_length_and_where_its_samples_stand(folder: Path) -> None:
    distribute(str(folder), 4)
    whole = ShardIndex.load(folder / "train-index.npz")

    lengths: list[int] = []
    for instance in range(4):
        own = shards_of_instance(str(folder), instance, 4)
        assert len(stream(own)) == own.num_samples == len(own.index) == len(own.positions)
        lengths.append(own.num_samples)
        keys = [whole.names.key(position) for position in own.positions.tolist()]
        assert list(own.index.names.keys()) == keys
        assert [f"{key}.jpg" for key, _ in stream(own)] == keys

    assert lengths == [17, 17, 16, 16]


@pytest.mark.parametrize("is_distributed", [True, False])
def test_a_percentage_is_the_begin_of_each_shard_on_all_instances(
    is_distributed: bool, folder: Path
) -> None:
    if is_distributed:
        distribute(str(folder), 2)
    names = [key for key, _ in make_samples(NUM_SAMPLES)]
    shards = [names[at : at + 7] for at in range(0, NUM_SAMPLES, 7)]
    wanted = [name for shard in shards for name in shard[: 4 if len(shard) == 7 else 2]]
    if is_distributed:  # the last two shards, of ten samples, in two parts of five
        wanted = [*wanted[:32], *names[56:59], *names[61:64]]

    owns = [shards_of_instance(folder, instance, 2, percentage=50) for instance in range(2)]

    for own in owns:
        assert len(stream(own)) == own.num_samples
    got = [key for own in owns for key, _ in stream(own, shuffle=True, uneven="exact")]
    assert sorted(got) == sorted(wanted)
    of_one = shards_of_instance(folder, 0, 1, percentage=50)
    assert len([key for key, _ in stream(of_one)]) == 9 * 4 + 2


def test_without_parts_the_rest_is_left_out_with_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"10 samples of the last 2 of 10 shards are skipped"):
        own = shards_of_instance(folder, 3, 4)

    assert len(stream(own)) == len(list(stream(own))) == own.num_samples == 14
    assert own.num_skipped == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shards_of_instance(folder, 3, 5).num_samples == 14


def test_whole_shards_change_hands_by_seed_and_epoch_and_are_all_read(folder: Path) -> None:
    distribute(str(folder), 4)

    def epoch(number: int) -> list[list[str]]:
        owns = [shards_of_instance(folder, at, 4, seed=2, epoch=number) for at in range(4)]
        return [sorted(key for key, _ in stream(own)) for own in owns]

    first, second = epoch(0), epoch(1)

    assert first != second
    for parts in (first, second):
        assert sorted(itertools.chain(*parts)) == [key for key, _ in expected()]


def test_labels_that_were_converted_go_with_the_samples(folder: Path) -> None:
    distribute(str(folder), 4)
    opened = open_shards(folder)
    assert opened.labels is not None
    doubled = opened.labels * 2 + 1

    got: list[tuple[str, int]] = []
    for instance in range(4):
        own = shards_of_instance(opened, instance, 4)
        got += stream(own, labels=doubled[own.positions])

    assert sorted(got) == [(key, 2 * label + 1) for key, label in expected()]


def test_an_epoch_of_an_instance_goes_on_where_it_was_left(folder: Path) -> None:
    distribute(str(folder), 4)
    own = shards_of_instance(folder, 1, 4)
    whole = list(stream(own, shuffle=True))
    dataset = stream(own, shuffle=True)
    taken = list(itertools.islice(iter(dataset), 9))
    resumed = stream(shards_of_instance(folder, 1, 4), shuffle=True)

    resumed.load_state_dict(dataset.state_dict())

    assert taken + list(resumed) == whole
    other = stream(shards_of_instance(folder, 2, 4), shuffle=True)
    other.load_state_dict(dataset.state_dict())
    with pytest.raises(ValueError, match="made with shards"):
        list(other)


def test_a_bucket_is_read_as_a_folder_is(
    folder: Path, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribute(str(folder), 4)
    object_server.create_bucket("sets")
    object_server.put_folder("sets", folder, prefix="p/")
    object_server.put_objects("sets", {f"p/other/{number}.jpg": b"" for number in range(3000)})
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)

    object_server.reset_counters()
    remote = shards_of_instance("s3://sets/p", 2, 4, region=object_server.region)
    dataset = stream(remote)

    # A page to look, and two names beyond it; index, metadata.json, sizes; manifest, sizes, index
    # of the parts; sizes of the whole shards and of the part. Other objects are not listed.
    assert object_server.counters().num_requests <= 14
    local = shards_of_instance(folder, 2, 4)
    assert remote.shards == local.shards
    assert list(dataset) == list(stream(local))


def test_places_that_cannot_be_listed_or_have_no_index_are_named(
    folder: Path, object_server: ObjectServer
) -> None:
    object_server.create_bucket("open", public=True)
    object_server.put_folder("open", folder)
    with pytest.raises(ValueError, match=r"/open: cannot be listed, expected a folder or s3://"):
        shards_of_instance(f"{object_server.endpoint_url}/open", 0, 4)

    (folder / "train-index.npz").unlink()
    with pytest.raises(MissingIndexError, match=r"10 shards such as train-000000.tar without an"):
        shards_of_instance(folder, 0, 4)


def test_an_index_of_other_parts_is_named(folder: Path) -> None:
    distribute(str(folder), 4)
    parts = folder / "distributed" / "4-instances" / "train-index.npz"
    index = ShardIndex.load(parts)
    index.select(range(len(index) - 1)).save(parts)

    with pytest.raises(IndexFormatError, match=r"4-instances/train-index.npz: got \[3, 3, 2, 1\]"):
        shards_of_instance(folder, 0, 4)


# -- indexes that are joined


def test_joined_indexes_name_the_same_bytes(folder: Path) -> None:
    index = ShardIndex.load(folder / "train-index.npz")
    first = np.flatnonzero(index.shard_numbers == 1)[:3]
    second = np.flatnonzero(index.shard_numbers == 4)

    joined = join_indexes(
        [IndexPiece(index, [1], first), IndexPiece(index, [3, 4], second, "other/")]
    )

    assert [shard.name for shard in joined.shards] == [
        "train-000001.tar",
        "other/train-000003.tar",
        "other/train-000004.tar",
    ]
    assert joined.shard_numbers.tolist() == [0] * 3 + [2] * 7
    for place, position in enumerate([*first.tolist(), *second.tolist()]):
        assert joined.names.key(place) == index.names.key(position)
        assert joined.extent(place) == index.extent(position)
        assert joined.payload(place) == index.payload(position)
        assert joined.sample_crcs(place) == index.sample_crcs(position)
    assert joined.classes == index.classes
    assert joined.labels is not None
    assert index.labels is not None
    assert joined.labels.tolist() == index.labels[[*first, *second]].tolist()
    again = ShardIndex.from_bytes(joined.to_bytes(), "again")
    assert again.extents.tolist() == joined.extents.tolist()


def test_checksums_that_one_index_lacks_are_not_known(folder: Path) -> None:
    index = ShardIndex.load(folder / "train-index.npz")
    strip_crcs(folder / "train-index.npz")
    bare = ShardIndex.load(folder / "train-index.npz")

    joined = join_indexes(
        [IndexPiece(bare, [0], np.arange(7)), IndexPiece(index, [1], np.arange(7, 14))]
    )

    assert joined.sample_crcs(0) is None
    assert joined.sample_crcs(7) == index.sample_crcs(7)
    with pytest.raises(ValueError, match="pieces: got shards of kind"):
        join_indexes([])
