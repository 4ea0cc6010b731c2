"""Shards made of shards: the same samples, byte for byte, however they are cut and shuffled."""

from __future__ import annotations

import functools
import hashlib
import random
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import Buffer, override

from concurrent_dataloader.errors import ChecksumError, KeyNotFoundError, ShardFormatError
from concurrent_dataloader.formats.tar import parse_sample
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.extents import plan_reads, read_extents
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata
from concurrent_dataloader.prepare.reshard import ReshardSettings, SplitAt, reshard
from concurrent_dataloader.prepare.shard_set import check_keys
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores import Credentials, open_writable_store
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.shard_sets import (
    digests,
    flat,
    flip_byte,
    make_samples,
    members,
    strip_crcs,
    write_set,
)

SAMPLES = make_samples(60)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """60 samples in shards of 25, 25 and 10."""
    folder = tmp_path / "source"
    write_set(open_writable_store(folder), [SAMPLES[:25], SAMPLES[25:50], SAMPLES[50:]])
    return folder


def run(source: Path, target: Path, **how: Any) -> list[list[tuple[str, bytes]]]:
    """Reshard, and give the members of each new shard."""
    reshard([SplitAt(str(source))], target, ReshardSettings(**how))
    return read(target)


def read(folder: Path, split: str = "train") -> list[list[tuple[str, bytes]]]:
    return [members(path.read_bytes()) for path in sorted(folder.glob(f"{split}-*.tar"))]


@pytest.mark.parametrize(
    ("how", "counts"),
    [
        ({"max_count": 16}, [16, 16, 16, 12]),
        ({"num_shards": 7}, [9, 9, 9, 9, 8, 8, 8]),
        ({"start": 20, "stop": 30, "max_count": 4}, [4, 4, 2]),
        ({"start": 50, "stop": 1000, "num_shards": 1}, [10]),
        ({}, [60]),
    ],
)
def test_samples_keep_bytes_and_order_in_shards_of_another_size(
    source: Path, tmp_path: Path, how: dict[str, int], counts: list[int]
) -> None:
    shards = run(source, tmp_path / "new", **how)

    assert [len(shard) // 2 for shard in shards] == counts
    start = how.get("start", 0)
    assert sum(shards, []) == flat(SAMPLES[start : start + sum(counts)])  # noqa: RUF017 - few


def test_a_shard_is_the_old_bytes_and_an_end(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "new", num_shards=1)

    old = [path.read_bytes()[:-1024] for path in sorted(source.glob("*.tar"))]
    assert (tmp_path / "new/train-000000.tar").read_bytes() == b"".join(old) + bytes(1024)


def test_no_shard_is_larger_than_asked_for(source: Path, tmp_path: Path) -> None:
    shards = run(source, tmp_path / "new", max_bytes=40_000)

    sizes = [path.stat().st_size for path in (tmp_path / "new").glob("*.tar")]
    assert max(sizes) <= 40_000
    assert len(sizes) > 3
    assert sum(map(len, shards)) == 2 * len(SAMPLES)


def test_a_seed_shuffles_across_shards_and_always_the_same(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "a", max_count=16, seed=3)
    run(source, tmp_path / "b", max_count=16, seed=3)
    run(source, tmp_path / "c", max_count=16, seed=4)

    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")
    first = {name for name, _ in read(tmp_path / "a")[0]}
    assert any(name in first for name, _ in flat(SAMPLES[50:]))
    found = sorted(sum(read(tmp_path / "a"), []))  # noqa: RUF017 - few
    assert found == sorted(flat(SAMPLES))


def test_processes_write_the_same_bytes_as_one(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one", max_count=16, seed=3)
    reshard(
        [SplitAt(str(source))],
        tmp_path / "two",
        ReshardSettings(max_count=16, seed=3),
        num_processes=2,
    )

    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_index_gives_each_sample_by_its_byte_range(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "new", max_count=16, seed=3)

    index = ShardIndex.load(tmp_path / "new/train-index.npz")
    assert (len(index), index.classes) == (60, ("a", "b", "c"))
    samples = dict(SAMPLES)
    for position in range(60):
        raw = (tmp_path / "new" / index.shard_of(position).name).read_bytes()
        sample = parse_sample(raw[slice(*index.extent(position))], "t")
        assert sample.fields == samples[sample.key]
        assert raw[slice(*index.payload(position))] == sample.fields["jpg"]
        assert index.names.key(position) == f"{sample.key}.jpg"
        assert index.labels is not None
        assert index.labels[position] == int(sample.fields["cls"])


def test_the_metadata_says_what_was_done(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "new", max_count=16, seed=3)

    metadata = Metadata.load(tmp_path / "new/metadata.json")
    split = metadata.splits["train"]
    shards = {name: md5 for name, md5 in digests(tmp_path / "new").items() if "tar" in name}
    assert (split.num_samples, split.shuffle, split.seed) == (60, True, 3)
    assert split.classes == ("a", "b", "c")
    assert split.shards is not None
    assert {shard.name: shard.md5 for shard in split.shards} == shards
    assert metadata.checksum == hashlib.md5("".join(sorted(shards.values())).encode()).hexdigest()


def test_sets_are_merged_in_the_order_given(source: Path, tmp_path: Path) -> None:
    more = make_samples(15, first=100)
    write_set(open_writable_store(tmp_path / "more"), [more], "val")

    reshard(
        [SplitAt(str(tmp_path / "more"), "val"), SplitAt(str(source))],
        tmp_path / "new",
        ReshardSettings(max_count=70),
    )

    shards = read(tmp_path / "new")
    assert [len(shard) // 2 for shard in shards] == [70, 5]
    assert shards[0] + shards[1] == flat([*more, *SAMPLES])


def test_a_set_without_index_is_taken_as_it_lies(tmp_path: Path) -> None:
    write_set(open_writable_store(tmp_path / "bare"), [SAMPLES[:30], SAMPLES[30:]], indexed=False)
    (tmp_path / "bare/train-000001.tar").rename(tmp_path / "bare/train-000010.tar")

    shards = run(tmp_path / "bare", tmp_path / "new", max_count=40)

    assert shards[0] + shards[1] == flat(SAMPLES)


def test_a_key_that_stands_in_two_sets_is_refused(source: Path, tmp_path: Path) -> None:
    write_set(open_writable_store(tmp_path / "more"), [make_samples(3, first=59)])

    with pytest.raises(
        ShardFormatError,
        match=r"more/train-000000.tar: key 'n2/img 00059' stands in .*source/train-000002.tar",
    ):
        reshard([SplitAt(str(source)), SplitAt(str(tmp_path / "more"))], tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.tar"))


def test_a_key_of_another_split_of_the_target_is_refused(source: Path, tmp_path: Path) -> None:
    reshard([SplitAt(str(source))], tmp_path / "new", ReshardSettings(split="val", stop=10))

    with pytest.raises(ShardFormatError, match=r"key 'n0/img 00000' stands in split 'val'"):
        run(source, tmp_path / "new")
    run(source, tmp_path / "new", start=10)
    assert set(Metadata.load(tmp_path / "new/metadata.json").splits) == {"train", "val"}


def test_sets_with_other_classes_are_refused(source: Path, tmp_path: Path) -> None:
    write_set(open_writable_store(tmp_path / "more"), [make_samples(3, first=100)], indexed=False)

    with pytest.raises(ValueError, match=r"more: its labels mean other classes .*3 classes"):
        reshard([SplitAt(str(source)), SplitAt(str(tmp_path / "more"))], tmp_path / "new")


def test_a_run_that_was_killed_is_finished_by_the_next(source: Path, tmp_path: Path) -> None:
    how = ReshardSettings(max_count=16, seed=3)
    reshard([SplitAt(str(source))], tmp_path / "whole", how)
    seen: list[str] = []

    def stop(shard: ShardMetadata, num_shards: int) -> None:
        seen.append(shard.name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard([SplitAt(str(source))], tmp_path / "new", how, on_shard=stop)
    assert not (tmp_path / "new/metadata.json").exists()
    kept = {name: (tmp_path / "new" / name).stat().st_mtime_ns for name in seen}
    reshard([SplitAt(str(source))], tmp_path / "new", how)

    assert digests(tmp_path / "new") == digests(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(digests(tmp_path / "whole"))
    assert {name: (tmp_path / "new" / name).stat().st_mtime_ns for name in seen} == kept


def test_an_existing_split_is_refused_and_overwritten_when_asked_to(
    source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "new", max_count=7)

    with pytest.raises(FileExistsError, match="already there"):
        run(source, tmp_path / "new", max_count=16)
    reshard([SplitAt(str(source))], tmp_path / "new", ReshardSettings(max_count=40), overwrite=True)

    assert len(read(tmp_path / "new")) == 2


def test_the_source_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    before = digests(source)
    (tmp_path / "link").symlink_to(source)

    for target in (source, tmp_path / "link"):
        with pytest.raises(ValueError, match="which is the source too"):
            reshard([SplitAt(str(source))], target, overwrite=True)
    assert digests(source) == before


def test_a_damaged_shard_leaves_no_shard_of_its_name(source: Path, tmp_path: Path) -> None:
    shard = source / "train-000001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))

    with pytest.raises(ShardFormatError, match=r"train-000001.tar \[0, \d+\): no header"):
        run(source, tmp_path / "new", max_count=20)

    assert [path.name for path in (tmp_path / "new").glob("*.tar")] == ["train-000000.tar"]
    assert not (tmp_path / "new/metadata.json").exists()

    with pytest.raises(ShardFormatError, match=r"train-000001.tar \[0, \d+\): no header"):
        run(source, tmp_path / "one", num_shards=1)

    assert not (tmp_path / "one").exists(), "no shard came of it, so there is nothing to go on with"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_count": 0}, "maxcount: got 0"),
        ({"max_bytes": 0}, "maxsize: got 0 bytes"),
        ({"num_shards": 0}, "shards: got 0"),
        ({"num_shards": 2, "max_count": 3}, "given together with maxcount"),
        ({"start": 5, "stop": 5}, "slice: got 5:5"),
        ({"start": -1}, "slice: got -1:"),
        ({"seed": -1}, "seed: got -1"),
        ({"pattern": "a/%d.tar"}, "pattern: got 'a/%d.tar'"),
    ],
)
def test_settings_that_cannot_be_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReshardSettings(**how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"start": 60}, "slice: got a start of 60, expected less than 60"),
        ({"num_shards": 61}, "shards: got 61, expected 60 or fewer, since the sources of "),
        (
            {"start": 59, "num_shards": 2},
            "expected 1 or fewer, since the slice of the sources of split 'train' holds 1 ",
        ),
    ],
)
def test_what_leaves_shards_without_samples_is_named(
    source: Path, tmp_path: Path, how: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "new", **how)


def test_a_split_that_is_too_small_is_told_before_another_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(open_writable_store(source), [make_samples(3, first=100)], "val")

    status = main(["reshard", str(source), str(tmp_path / "new"), "--shards", "5"])

    assert status == 2
    said = capsys.readouterr().err
    assert "expected 3 or fewer, since the sources of split 'val' hold 3 samples" in said
    assert not (tmp_path / "new").exists()


def test_a_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(KeyNotFoundError, match="no shard of split 'train'"):
        run(tmp_path / "empty", tmp_path / "new")


def test_a_bucket_to_a_bucket_gives_the_same_bytes(
    object_server: ObjectServer, source: Path, tmp_path: Path
) -> None:
    object_server.create_bucket("data")
    object_server.put_folder("data", source)
    open_root = functools.partial(
        open_writable_store,
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )
    how = ReshardSettings(max_count=16, seed=3)
    run(source, tmp_path / "new", max_count=16, seed=3)

    reshard([SplitAt("s3://data")], "s3://data/new", how, open_root=open_root)

    remote = open_root("s3://data/new")
    found = {info.key: hashlib.md5(remote.get(info.key)).hexdigest() for info in remote.list()}
    remote.close()
    assert found == digests(tmp_path / "new")


def test_samples_side_by_side_are_read_at_once(source: Path) -> None:
    index = ShardIndex.load(source / "train-index.npz")

    assert len(list(plan_reads(index, range(60)))) == 3
    shuffled = random.Random(0).sample(range(60), 60)
    assert len(list(plan_reads(index, shuffled))) > 50


@given(positions=st.lists(st.integers(0, 23), max_size=40))
def test_planned_reads_are_the_samples_one_after_the_other(positions: list[int]) -> None:
    store = MemoryStore()
    write_set(store, [SAMPLES[:10], SAMPLES[10:11], SAMPLES[11:24]])
    index = ShardIndex.from_bytes(store.get("train-index.npz"), "t")
    shards = [bytes(store.get(shard.name)) for shard in index.shards]

    reads = list(plan_reads(index, positions))

    assert b"".join(shards[number][slice(*part)] for number, part, _ in reads) == b"".join(
        shards[index.shard_numbers[position]][slice(*index.extent(position))]
        for position in positions
    )


class CountedStore(MemoryStore):
    """Counts what is asked of it."""

    num_gets = 0

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.num_gets += 1
        return super().get(key, byte_range)


def test_reading_ahead_is_bounded_whatever_the_number_of_samples() -> None:
    store = CountedStore()
    write_set(store, [make_samples(1000)])
    index = ShardIndex.from_bytes(store.get("train-index.npz"), "t")
    store.num_gets = 0
    order = random.Random(0).sample(range(1000), 1000)

    pieces = read_extents(index, order, [(store, "train-000000.tar")])
    for _ in range(10):
        next(pieces)
    pieces.close()

    assert 10 <= store.num_gets <= 10 + 64


def test_a_changed_byte_is_not_copied(source: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(source / "train-index.npz")
    shard, (start, stop) = index.shard_of(25).name, index.extent(25)
    flip_byte(source / shard, index.payload(25).stop - 1)

    with pytest.raises(ChecksumError) as raised:
        run(source, tmp_path / "new", max_count=60)

    key = index.names.key(25).partition(".")[0]
    got = google_crc32c.value((source / shard).read_bytes()[start:stop])
    assert str(raised.value).startswith(
        f"{source / shard} [{start}, {stop}) {key!r}: got bytes of CRC-32C {got:08x},"
        f" expected {index.extent_crc(25):08x} by the index"
    )
    assert not list((tmp_path / "new").glob("*.tar"))


class FlippingStore(MemoryStore):
    """Changes a byte of the first answer."""

    num_gets = 0

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        body = bytearray(super().get(key, byte_range))
        self.num_gets += 1
        if self.num_gets == 1:
            body[600] ^= 1
        return bytes(body)


def test_a_byte_that_was_changed_on_the_way_is_read_again() -> None:
    plain, flipping = MemoryStore(), FlippingStore()
    for store in (plain, flipping):
        write_set(store, [make_samples(4)])
    index = ShardIndex.from_bytes(plain.get("train-index.npz"), "t")

    (piece,) = read_extents(index, range(4), [(flipping, "train-000000.tar")])

    shard = bytes(plain.get("train-000000.tar"))
    assert bytes(piece.content) == shard[: index.extent(3).stop]
    assert flipping.num_gets == 2


class ShortStore(MemoryStore):
    """Leaves out the end of each answer."""

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        return bytes(super().get(key, byte_range))[:-512]


def test_a_read_that_is_short_is_an_error_without_checksums_too(
    source: Path, tmp_path: Path
) -> None:
    strip_crcs(source / "train-index.npz")
    index = ShardIndex.load(source / "train-index.npz")
    raw = (source / "train-000000.tar").read_bytes()
    start, stop = 0, index.extent(3).stop

    with pytest.raises(
        ShardFormatError, match=rf"\[{start}, {stop}\): got {stop - 512} bytes, expected {stop};"
    ):
        list(read_extents(index, range(4), [(ShortStore({"t": raw}), "t")]))


def test_copies_of_samples_without_checksums_get_some(source: Path, tmp_path: Path) -> None:
    strip_crcs(source / "train-index.npz")

    run(source, tmp_path / "new", max_count=25)

    copies = ShardIndex.load(tmp_path / "new" / "train-index.npz")
    shards = {shard.name: (tmp_path / "new" / shard.name).read_bytes() for shard in copies.shards}
    assert [shard.crc32c for shard in copies.shards] == [
        f"{google_crc32c.value(raw):08x}" for raw in shards.values()
    ]
    for position in range(len(copies)):
        raw = shards[copies.shard_of(position).name]
        assert copies.extent_crc(position) == google_crc32c.value(
            raw[slice(*copies.extent(position))]
        )
        assert copies.payload_crc(position) == google_crc32c.value(
            raw[slice(*copies.payload(position))]
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=20))
def test_keys_are_unique_if_and_only_if_no_two_are_alike(numbers: list[int]) -> None:
    names = Index.from_keys(f"folder.x/{number}.jpg" for number in numbers)

    if len(set(numbers)) == len(numbers):
        check_keys(names, str)
    else:
        with pytest.raises(ShardFormatError, match="stands in"):
            check_keys(names, str)


def test_the_command_merges_slices_and_shuffles(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(open_writable_store(source), [make_samples(10, first=100)], "val")
    new = tmp_path / "new"

    status = main(
        ["reshard", str(source), str(new), "--slice", "5:", "--maxcount", "20", "--seed", "1"]
    )

    out, err = capsys.readouterr()
    assert status == 0
    assert f"{new}: train, 55 samples in 3 shards\n{new}: val, 5 samples in 1 shards\n" == out
    assert "train-000002.tar of 3: 15 samples" in err
    arguments = ["reshard", str(source), str(tmp_path / "all"), "--target-split", "all"]
    assert main(arguments) == 0
    assert len(sum(read(tmp_path / "all", "all"), [])) == 140  # noqa: RUF017 - few


def test_the_command_fails_with_a_reason(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reshard", str(source), str(source)]) == 1
    assert "which is the source too" in capsys.readouterr().err
    assert main(["reshard", str(source), str(tmp_path / "new"), "--split", "test"]) == 2
    assert "--split: got 'test', expected one of train" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["reshard", str(source), str(tmp_path / "new"), "--slice", "5"])
    assert "expected A:B such as 0:1000" in capsys.readouterr().err


def test_a_size_may_have_a_unit(source: Path, tmp_path: Path) -> None:
    sizes = {"kilo": "20kB", "plain": "2e4"}

    for name, size in sizes.items():
        assert main(["reshard", str(source), str(tmp_path / name), "--maxsize", size]) == 0

    names = [sorted(path.name for path in (tmp_path / name).glob("*.tar")) for name in sizes]
    assert names[0] == names[1]
    assert all(path.stat().st_size <= 20_000 for path in (tmp_path / "kilo").glob("*.tar"))


def test_no_size_is_not_taken_for_the_default(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["reshard", str(source), str(tmp_path / "new"), "--maxsize", "none"])

    assert "leave it out and give --shards or --maxcount" in capsys.readouterr().err
