"""Shards cut for N instances: nothing lost, nothing changed, and never taken for another set's."""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import itertools
import random
import warnings
from pathlib import Path

import google_crc32c
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from concurrent_dataloader.datasets import StreamedShards, shards_of_instance
from concurrent_dataloader.datasets.instances import InstanceShard, InstanceShards
from concurrent_dataloader.distribution import share
from concurrent_dataloader.errors import ChecksumError, IndexFormatError, ShardFormatError
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.distribute import check_distribution, distribute
from concurrent_dataloader.prepare.metadata import Metadata
from concurrent_dataloader.prepare.shard import write_shards
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.steps import Preparation
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores import Credentials, open_writable_store
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.memory_source import MemorySource
from tests.prepare.shard_sets import (
    Samples,
    digests,
    flat,
    flip_byte,
    make_samples,
    members,
    write_set,
)


def cut(samples: Samples, sizes: list[int]) -> list[Samples]:
    shards: list[Samples] = []
    for size in sizes:
        shards.append(samples[:size])
        samples = samples[size:]
    assert not samples
    return shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 shards of 7 samples, the last of 3."""
    sizes = [7] * 9 + [3]
    write_set(open_writable_store(tmp_path), cut(make_samples(sum(sizes)), sizes))
    return tmp_path


def read_all(folder: Path, own: InstanceShards) -> list[tuple[str, bytes]]:
    return [member for name in own.names for member in members((folder / name).read_bytes())]


def test_all_instances_together_read_each_sample_once(folder: Path) -> None:
    distribute(str(folder), 4)

    shares = [shards_of_instance(str(folder), instance, 4) for instance in range(4)]

    found = [member for own in shares for member in read_all(folder, own)]
    assert sorted(found) == sorted(flat(make_samples(66)))
    assert [own.num_samples for own in shares] == [14 + 3, 14 + 3, 14 + 2, 14 + 2]
    for own in shares:
        assert len(read_all(folder, own)) == 2 * own.num_samples
        assert own.num_skipped == 0


def test_ten_thousand_samples_over_four_instances_are_covered_disjointly(tmp_path: Path) -> None:
    counts = [64] * 156 + [16]
    samples = [(f"{number:07d}", {"cls": b"0"}) for number in range(sum(counts))]
    write_set(open_writable_store(tmp_path), cut(samples, counts))
    distribute(str(tmp_path), 4)

    shares = [shards_of_instance(str(tmp_path), instance, 4) for instance in range(4)]

    names = [name for own in shares for name, _ in read_all(tmp_path, own)]
    assert len(names) == len(set(names)) == 10_000
    assert {own.num_samples for own in shares} == {2500}


def test_pixels_of_a_part_are_those_of_the_shard_g01_g02(folder: Path) -> None:
    distribute(str(folder), 4)

    parts = [folder / f"distributed/4-instances/train-{part:06d}.tar" for part in range(4)]
    copied = b"".join(part.read_bytes()[:-1024] for part in parts)
    whole = [(folder / f"train-{shard:06d}.tar").read_bytes()[:-1024] for shard in (8, 9)]
    assert copied == b"".join(whole)


def test_tensors_of_a_part_are_those_of_the_shard_g01(tmp_path: Path) -> None:
    """The older system wrote a Python object's text where a tensor had been."""
    folder = tmp_path / "shards"
    images: dict[str, bytes] = {}
    for width in range(8, 18):
        file = io.BytesIO()
        Image.new("RGB", (width, 8)).save(file, "PNG")
        images[f"a/{width}.png"] = file.getvalue()
    as_tensors = ShardSettings(max_count=3, preparation=Preparation(payload="tensor"))
    write_shards(MemorySource(images), folder, as_tensors)

    distribute(str(folder), 2)

    own = [shards_of_instance(str(folder), instance, 2) for instance in range(2)]
    found = [member for each in own for member in read_all(folder, each)]
    whole = [
        member for path in sorted(folder.glob("*.tar")) for member in members(path.read_bytes())
    ]
    assert sorted(found) == sorted(whole)
    widths = [
        torch.load(io.BytesIO(raw), weights_only=True).shape[2]
        for name, raw in found
        if name.endswith(".pth")
    ]
    assert sorted(widths) == list(range(8, 18))


def test_the_shards_and_their_checksum_stay_as_they_were_g03(folder: Path) -> None:
    before = digests(folder)

    distribute(str(folder), 4)

    assert digests(folder) == before
    metadata = Metadata.load(folder / "metadata.json")
    shards = sorted(digest for name, digest in before.items() if name.endswith(".tar"))
    assert metadata.checksum == hashlib.md5("".join(shards).encode()).hexdigest()


@pytest.mark.parametrize("indexed", [True, False])
def test_gaps_and_foreign_files_do_not_matter_g07(tmp_path: Path, indexed: bool) -> None:
    samples = make_samples(50)
    write_set(open_writable_store(tmp_path), cut(samples, [10] * 5), indexed=indexed)
    if not indexed:
        (tmp_path / "train-000001.tar").rename(tmp_path / "train-000101.tar")
    (tmp_path / "train_notes-000077.tar").write_bytes(b"no tar")
    (tmp_path / "training.txt").write_text("something else")
    (tmp_path / "train-000002.tar.bak").write_bytes(b"no tar")

    distribute(str(tmp_path), 3)

    if not indexed:
        index = ["--output", str(tmp_path / "train-index.npz")]
        assert main(["index", f"{tmp_path}/train-*.tar", *index]) == 0
    shares = [shards_of_instance(str(tmp_path), instance, 3) for instance in range(3)]
    found = [member for own in shares for member in read_all(tmp_path, own)]
    assert sorted(found) == sorted(flat(samples))


@pytest.mark.filterwarnings("ignore:.*samples of the last:UserWarning")
def test_length_is_what_is_delivered_for_any_percentage_g08(folder: Path) -> None:
    distribute(str(folder), 4)

    for num_instances in (1, 3, 4):
        for percentage in (1, 33.3, 50, 100):
            for instance in range(num_instances):
                own = shards_of_instance(
                    str(folder), instance, num_instances, percentage=percentage
                )
                delivered = [
                    members((folder / name).read_bytes())[: 2 * count] for name, count in own.shards
                ]
                assert sum(map(len, delivered)) == 2 * own.num_samples
                assert own.num_samples > 0


def test_a_percentage_chooses_the_same_samples_in_each_epoch(folder: Path) -> None:
    distribute(str(folder), 4)

    chosen: list[set[InstanceShard]] = []
    lengths: set[int] = set()
    for epoch in range(3):
        shares = [
            shards_of_instance(str(folder), instance, 4, percentage=50, seed=1, epoch=epoch)
            for instance in range(4)
        ]
        chosen.append({shard for own in shares for shard in own.shards})
        lengths |= {own.num_samples for own in shares}

    assert chosen[0] == chosen[1] == chosen[2]
    assert max(lengths) - min(lengths) <= 1


def test_whole_shards_change_hands_by_seed_and_epoch(folder: Path) -> None:
    distribute(str(folder), 4)

    def names(seed: int, epoch: int) -> list[list[str]]:
        return [
            shards_of_instance(str(folder), instance, 4, seed=seed, epoch=epoch).names
            for instance in range(4)
        ]

    assert names(1, 0) == names(1, 0)
    assert names(1, 0) != names(1, 1)
    assert sorted(itertools.chain(*names(1, 0))) == sorted(itertools.chain(*names(1, 1)))


def test_parts_of_another_set_are_found_out_g09(folder: Path) -> None:
    location = str(folder)
    distribute(location, 4)
    assert check_distribution(location, 4) is None

    samples = make_samples(66)
    random.Random(0).shuffle(samples)
    write_set(open_writable_store(folder), cut(samples, [7] * 9 + [3]))

    wrong = check_distribution(location, 4)
    assert wrong is not None
    assert "made of another train-000000.tar" in wrong
    with pytest.raises(ShardFormatError, match=r"out of date, .*distribute .* -n 4"):
        shards_of_instance(location, 0, 4)
    distribute(location, 4)
    assert check_distribution(location, 4) is None


def test_parts_made_of_another_number_of_shards_are_found_out_g09(folder: Path) -> None:
    distribute(str(folder), 4)
    write_set(open_writable_store(folder), cut(make_samples(66), [6] * 11))

    wrong = check_distribution(str(folder), 4)

    assert wrong == "made of 10 shards, there are 11 now"


def test_a_part_that_is_missing_or_cut_is_found_out(folder: Path) -> None:
    manifest = distribute(str(folder), 4)
    part = folder / manifest.parts[1].name
    part.write_bytes(part.read_bytes()[:-512])

    assert "train-000001.tar has" in str(check_distribution(str(folder), 4))


def test_several_numbers_of_instances_lie_side_by_side(folder: Path) -> None:
    distribute(str(folder), 4)
    of_four = digests(folder / "distributed/4-instances")

    distribute(str(folder), 3)

    assert digests(folder / "distributed/4-instances") == of_four
    assert check_distribution(str(folder), 3) is None
    assert check_distribution(str(folder), 4) is None
    assert check_distribution(str(folder), 5) == "not distributed"


def test_what_is_there_is_not_written_again(folder: Path) -> None:
    first = distribute(str(folder), 4)
    written: list[object] = []

    second = distribute(str(folder), 4, on_part=written.append)

    assert second == first
    assert not written


def test_an_interrupted_run_leaves_no_manifest_and_is_finished_by_the_next(folder: Path) -> None:
    location = str(folder)
    distribute(location, 4)
    (folder / "distributed/4-instances/train-000002.tar").unlink()

    def stop(part: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distribute(location, 4, on_part=stop)
    with pytest.warns(UserWarning, match="skipped"):
        shards_of_instance(location, 0, 4)
    distribute(location, 4)

    assert check_distribution(location, 4) is None


def test_without_parts_a_warning_says_how_many_samples_are_skipped(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"10 samples of the last 2 of 10 shards are skipped"):
        own = shards_of_instance(str(folder), 1, 4)

    assert own.num_skipped == 10
    assert own.num_samples == 14
    assert own.names == ["train-000002.tar", "train-000003.tar"]


def test_shards_that_divide_evenly_need_no_parts(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = shards_of_instance(str(folder), 1, 5)

    assert own.shards == (("train-000002.tar", 7), ("train-000003.tar", 7))
    assert own.num_skipped == 0


def test_parts_have_an_index_of_byte_ranges(folder: Path) -> None:
    distribute(str(folder), 4)
    index = ShardIndex.load(folder / "distributed/4-instances/train-index.npz")

    assert len(index) == 10
    assert index.classes == ("a", "b", "c")
    for position, (_, fields) in enumerate(make_samples(10, first=56)):
        raw = (folder / "distributed/4-instances" / index.shard_of(position).name).read_bytes()
        start, stop = index.payload(position)
        assert raw[start:stop] == fields["jpg"]
        assert index.labels is not None
        assert index.labels[position] == int(fields["cls"])


def test_an_index_that_is_another_sets_is_refused(folder: Path) -> None:
    (folder / "train-000009.tar").write_bytes(b"\0" * (folder / "train-000009.tar").stat().st_size)

    with pytest.raises(ShardFormatError, match="no header of a sample"):
        distribute(str(folder), 4)
    assert not list(folder.glob("distributed/4-instances/train-*.json"))


def test_a_shard_that_was_cut_is_named(folder: Path) -> None:
    shard = folder / "train-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-512])

    with pytest.raises(ShardFormatError, match=r"train-000003.tar: got \d+ bytes, expected \d+"):
        distribute(str(folder), 4)


def test_a_damaged_manifest_is_named(folder: Path) -> None:
    distribute(str(folder), 4)
    (folder / "distributed/4-instances/train-manifest.json").write_text('{"version": 1}')

    with pytest.raises(IndexFormatError, match=r"train-manifest.json: no manifest .*distribute"):
        shards_of_instance(str(folder), 0, 4)


@pytest.mark.parametrize(
    ("instance", "num_instances", "percentage", "message"),
    [
        (4, 4, 100, "instance: got 4, expected 0 to 3"),
        (0, 0, 100, "num_instances: got 0"),
        (0, 4, 0, "percentage: got 0"),
        (0, 4, 101, "percentage: got 101"),
    ],
)
def test_what_is_out_of_range_is_refused(
    tmp_path: Path, instance: int, num_instances: int, percentage: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shards_of_instance(str(tmp_path), instance, num_instances, percentage=percentage)


@given(st.integers(0, 10_000), st.integers(1, 200))
def test_parts_differ_by_a_sample_at_most(num_samples: int, num_instances: int) -> None:
    counts = share(num_samples, num_instances)

    assert sum(counts) == num_samples
    assert max(counts) - min(counts) <= 1


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9), num_instances=st.integers(2, 5))
def test_any_set_is_covered_by_any_number_of_instances(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_instances: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    samples = make_samples(sum(sizes))
    write_set(open_writable_store(folder), cut(samples, sizes))

    distribute(str(folder), num_instances)

    shares = [shards_of_instance(str(folder), at, num_instances) for at in range(num_instances)]
    found = [member for own in shares for member in read_all(folder, own)]
    assert sorted(found) == sorted(flat(samples))


def test_a_bucket_is_distributed_as_a_folder_is(object_server: ObjectServer, folder: Path) -> None:
    object_server.create_bucket("data")
    open_root = functools.partial(
        open_writable_store,
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )
    remote = open_root("s3://data/set")
    write_set(remote, cut(make_samples(66), [7] * 9 + [3]))

    of_bucket = distribute("s3://data/set", 4, open_root=open_root)
    of_folder = distribute(str(folder), 4)

    assert of_bucket == of_folder
    for part in of_folder.parts:
        assert bytes(remote.get(part.name)) == (folder / part.name).read_bytes()
    assert check_distribution("s3://data/set", 4, open_root=open_root) is None
    remote.close()


def test_the_command_says_what_it_did_and_checks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distribute", str(folder), "-n", "4", "--check"]) == 1
    assert main(["distribute", str(folder), "-n", "3", "4"]) == 0
    out, err = capsys.readouterr()
    assert "train for 4 instances: not distributed" in out
    assert "train for 4 instances: 2 whole shards and a part each\n" in out
    assert err.count("distributed/4-instances/train-00000") == 4

    assert main(["distribute", str(folder), "-n", "4", "--check", "--split", "train"]) == 0
    assert main(["distribute", str(folder), "-n", "4"]) == 0
    out = capsys.readouterr().out
    assert "train for 4 instances: OK" in out
    assert "already there" in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-n", "1"], 2, "-n: got 1, expected 2 or more"),
        (["-n", "4", "--split", "val"], 1, "no shard of split 'val'"),
    ],
)
def test_the_command_fails_with_a_reason(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    assert main(["distribute", str(folder), *arguments]) == status
    assert message in capsys.readouterr().err


def test_the_shards_of_all_instances_stream_each_sample_once(folder: Path) -> None:
    distribute(str(folder), 4)

    seen: list[bytes] = []
    for instance in range(4):
        own = shards_of_instance(str(folder), instance, 4)
        paths = [folder / name for name in own.names]
        streamed = StreamedShards(paths, fields=("__key__",), rank=0, world_size=1, index=None)
        keys = [item[0] if isinstance(item, tuple) else item for item in streamed]
        assert len(keys) == own.num_samples
        seen.extend(keys)

    assert sorted(seen) == sorted(key for key, _ in make_samples(66))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files open
def test_the_webdataset_package_reads_the_parts(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    distribute(str(folder), 4)
    paths = [str(path) for path in sorted(folder.glob("distributed/4-instances/*.tar"))]

    found = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    gc.collect()

    assert [(item["__key__"], item["jpg"], item["cls"]) for item in found] == [
        (key, fields["jpg"], fields["cls"]) for key, fields in make_samples(10, first=56)
    ]


def test_a_changed_byte_is_not_distributed(folder: Path) -> None:
    index = ShardIndex.load(folder / "train-index.npz")
    flip_byte(folder / "train-000009.tar", index.payload(len(index) - 1).start)

    with pytest.raises(ChecksumError, match=r"train-000009\.tar \[.*: got bytes of CRC-32C"):
        distribute(str(folder), 4)

    assert check_distribution(str(folder), 4) == "not distributed"


def test_parts_have_checksums(folder: Path) -> None:
    manifest = distribute(str(folder), 4)

    assert [part.crc32c for part in manifest.parts] == [
        f"{google_crc32c.value((folder / part.name).read_bytes()):08x}" for part in manifest.parts
    ]
    index = ShardIndex.load(folder / "distributed" / "4-instances" / "train-index.npz")
    raw = (folder / "distributed" / "4-instances" / index.shard_of(0).name).read_bytes()
    assert index.payload_crc(0) == google_crc32c.value(raw[slice(*index.payload(0))])
