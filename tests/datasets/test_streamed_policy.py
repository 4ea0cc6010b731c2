"""Streams of shards that cannot all be read: what is passed over, counted and written down."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data

from concurrent_dataloader import DataLoader, ErrorBudget
from concurrent_dataloader.datasets.contract import SampleLocation
from concurrent_dataloader.datasets.streamed import ReadSettings, StreamedShards
from concurrent_dataloader.errors import (
    DeadlineError,
    ErrorBudgetError,
    MissingDependencyError,
    SampleDecodeError,
    ShardFormatError,
)
from concurrent_dataloader.formats.crc32c import IS_FAST
from concurrent_dataloader.formats.tar import SampleMembers, group_members, read_members
from concurrent_dataloader.formats.tfrecord import (
    ImageExample,
    TFRecordWriter,
    serialize_image_example,
)
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._memory import MemoryStore
from tests.datasets.conftest import encode_image
from tests.datasets.shard_doubles import pack_tars
from tests.datasets.shards import tar_of

COUNTS = [6, 7, 5]
"""Samples of the shards; labels count them through."""

FIRST = (0, 6, 13)
NAMES = ("s-000000.tar", "s-000001.tar", "s-000002.tar")
ALL = list(range(sum(COUNTS)))
IMAGES = [encode_image(number) for number in ALL]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards with an index of checksums."""
    root = tmp_path / "set"
    root.mkdir()
    samples = [(f"{n:03d}", {"jpg": IMAGES[n], "cls": b"%d" % n}) for n in ALL]
    shards = {
        name: samples[first : first + count]
        for name, first, count in zip(NAMES, FIRST, COUNTS, strict=True)
    }
    bodies, index = pack_tars(shards)
    for name, body in bodies.items():
        (root / name).write_bytes(body)
    index.save(root / "s-index.npz")
    return root


@pytest.fixture
def bare(folder: Path) -> Path:
    """The same without the index."""
    (folder / "s-index.npz").unlink()
    return folder


def make(folder: Path, num_workers: int, **settings: Any) -> DataLoader[Any]:
    given: dict[str, Any] = {"decode": None, "reading": ReadSettings(part_bytes=2048, max_parts=4)}
    names = ("shuffle", "seed", "decode", "transform", "length", "shuffle_buffer")
    given |= {name: settings.pop(name) for name in names if name in settings}
    settings = {"batch_size": 2, "collate_fn": list, "on_error": "skip", **settings}
    return DataLoader(StreamedShards(folder, **given), num_workers=num_workers, **settings)


def labels_of(batches: Any) -> list[int]:
    return [int(label) for batch in batches for _, label in batch]


def in_reading_order(labels: Sequence[int], num_workers: int) -> list[int]:
    """Give the order in which whole shards come, read by workers in turn, in batches of two."""
    shards = [
        [label for label in labels if first <= label < first + count]
        for first, count in zip(FIRST, COUNTS, strict=True)
    ]
    workers = max(num_workers, 1)
    rows = [list(itertools.chain(*shards[worker::workers])) for worker in range(workers)]
    batches = [[row[at : at + 2] for at in range(0, len(row), 2)] for row in rows]
    return [
        label for turn in itertools.zip_longest(*batches) for part in turn for label in part or ()
    ]


def samples_of(path: Path) -> list[SampleMembers]:
    with path.open("rb") as file:
        return list(group_members(read_members(file, ""), ""))


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def cut_short(folder: Path, *, in_sample: int = 4) -> int:
    """Cut the middle shard in an image; gives where the rest of the shard begins."""
    path = folder / NAMES[1]
    sample = samples_of(path)[in_sample]
    with path.open("r+b") as file:
        file.truncate(sample.members["jpg"].data.start + 10)
    return sample.extent.start


def garble_header(folder: Path) -> tuple[int, int]:
    """Garble a header; gives where, and where the sample before it begins."""
    path = folder / NAMES[1]
    before, garbled = samples_of(path)[3:5]
    patch(path, garbled.extent.start, b"<html>no such page</html>")
    return garbled.extent.start, before.extent.start


def spoil_image(folder: Path, *, shard: int = 1, in_sample: int = 4) -> ByteRange:
    """Make an image none; gives the range of its sample."""
    path = folder / NAMES[shard]
    sample = samples_of(path)[in_sample]
    start, stop = sample.members["jpg"].data
    patch(path, start, bytes(stop - start))
    return sample.extent


# -- shards


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_comes_before_the_cut_of_a_shard_is_delivered(bare: Path, num_workers: int) -> None:
    rest = cut_short(bare)
    stop = (bare / NAMES[1]).stat().st_size
    loader = make(bare, num_workers)

    labels = labels_of(loader)

    # Members come in the order of their fields, so that the cut sample had its class already.
    assert labels == in_reading_order([n for n in ALL if not 10 <= n < 13], num_workers)
    report = loader.error_report()
    (failure,) = report.failures
    assert failure.location == SampleLocation(NAMES[1], ByteRange(rest, stop), "", "tar")
    assert (failure.position, failure.num_samples, failure.error_type) == (
        None,
        None,
        "ShardFormatError",
    )
    assert re.search(r"s-000001\.tar: cut short: .* read before it was '009'", failure.error)
    assert (report.num_asked, report.num_failed) == (16, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_gone_is_one_entry(bare: Path, num_workers: int) -> None:
    size = (bare / NAMES[1]).stat().st_size
    loader = make(bare, num_workers)
    (bare / NAMES[1]).unlink()

    labels = labels_of(loader)

    assert labels == in_reading_order([n for n in ALL if not 6 <= n < 13], num_workers)
    (failure,) = loader.error_report().failures
    assert failure.location == SampleLocation(NAMES[1], ByteRange(0, size), "", "tar")
    assert failure.error_type == "KeyNotFoundError"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_index_tells_how_many_samples_are_lost(
    folder: Path, name: str, num_workers: int
) -> None:
    number = NAMES.index(name)
    lost = range(FIRST[number], FIRST[number] + COUNTS[number])
    loader = make(folder, num_workers)
    (folder / name).unlink()

    labels = labels_of(loader)

    assert sorted(labels) == [n for n in ALL if n not in lost]
    report = loader.error_report()
    assert (report.num_asked, report.num_failed) == (len(ALL), COUNTS[number])
    found: list[Any] = [(each.position, each.num_samples) for each in report.failures]
    assert sorted(at + n for at, num in found for n in range(num or 0)) == list(lost)
    if num_workers == 0:
        assert found == [(FIRST[number], COUNTS[number])]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_garbled_header_ends_its_shard(bare: Path, num_workers: int) -> None:
    garbled, before = garble_header(bare)
    stop = (bare / NAMES[1]).stat().st_size
    loader = make(bare, num_workers)

    labels = labels_of(loader)

    # A sample is whole when the next one begins, so that the one before it is lost too.
    assert labels == in_reading_order([n for n in ALL if not 9 <= n < 13], num_workers)
    (failure,) = loader.error_report().failures
    assert failure.location == SampleLocation(NAMES[1], ByteRange(before, stop), "", "tar")
    assert f"no header at offset {garbled}: got b'<html>no such pa'" in failure.error


def test_a_header_of_zeros_ends_its_shard_and_is_told(bare: Path) -> None:
    path = bare / NAMES[1]
    zeros = samples_of(path)[4].extent.start
    patch(path, zeros, bytes(512))

    with pytest.raises(ShardFormatError, match=f"s-000001.tar: zeros at offset {zeros}, .* other"):
        list(make(bare, 0, on_error="raise"))
    assert labels_of(make(bare, 0)) == [n for n in ALL if not 9 <= n < 13]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_garbled_header_under_an_index_ends_what_is_read_in_one_piece(
    folder: Path, num_workers: int
) -> None:
    garble_header(folder)
    loader = make(folder, num_workers)

    labels = labels_of(loader)

    # Two workers read batches in turn, each by its range: only that of samples 10 and 11 is lost.
    lost = range(9, 13) if num_workers == 0 else range(10, 12)
    assert sorted(labels) == [n for n in ALL if n not in lost]
    assert loader.error_report().num_failed == len(lost)


def test_a_sample_that_is_not_where_the_index_has_it_gets_no_label(folder: Path) -> None:
    """A name in an extended header, which has no checksum, makes two samples of one."""
    long = "x" * 120
    samples = [(f"{n}{long}", {"jpg": IMAGES[n], "cls": b"%d" % n}) for n in range(4)]
    bodies, index = pack_tars({NAMES[0]: samples}, checked=False)
    body = bodies[NAMES[0]].replace(b"path=1x", b"path=7x", 1)
    store = MemoryStore({NAMES[0]: body}, "changed")
    dataset = StreamedShards([NAMES[0]], store=store, index=index, fields=("__key__", "cls"))
    loader = DataLoader(dataset, 2, collate_fn=list, on_error="skip")

    assert [(key[0], label) for batch in loader for key, label in batch] == [("0", 0)]
    assert "expected one in ByteRange(" in loader.error_report().failures[0].error
    assert loader.error_report().num_failed == 3


def test_a_stream_of_which_nothing_can_be_read_has_no_batch(bare: Path) -> None:
    loader = make(bare, 2, persistent_workers=True)
    for name in NAMES:
        (bare / name).rename(bare / f"{name}.away")

    for epoch in range(2):
        assert labels_of(loader) == []
        report = loader.error_report()
        assert (report.epoch, report.num_asked, report.num_failed) == (epoch, 3, 3)


def test_what_an_epoch_lost_that_was_left_is_not_counted_in_the_next(folder: Path) -> None:
    loader = make(folder, 2, persistent_workers=True, prefetch_factor=8)
    (folder / NAMES[1]).unlink()
    next(iter(loader))  # the workers have read all by the time that they begin anew

    assert len(labels_of(loader)) == len(ALL) - COUNTS[1]

    report = loader.error_report()
    assert (report.epoch, report.num_asked, report.num_failed) == (1, len(ALL), COUNTS[1])


# -- single samples


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("has_index", [True, False])
def test_an_image_that_does_not_decode_is_passed_over_alone(
    folder: Path, has_index: bool, num_workers: int
) -> None:
    if not has_index:
        (folder / "s-index.npz").unlink()
    place = samples_of(folder / NAMES[1])[4].extent
    loader = make(folder, num_workers, decode=refuse_ten)

    labels = labels_of(loader)

    assert sorted(labels) == [n for n in ALL if n != 10]
    report = loader.error_report()
    (failure,) = report.failures
    assert failure.location == SampleLocation(NAMES[1], place, "010", "bytes")
    assert (failure.position, failure.num_samples) == (10 if has_index else None, 1)
    assert "s-000001.tar: sample '010', field 'jpg': got no image" in failure.error
    assert (report.num_asked, report.num_failed) == (len(ALL), 1)


def refuse_ten(raw: bytes) -> bytes:
    if raw == IMAGES[10]:
        raise SampleDecodeError("got no image")
    return raw


def refuse_zeros(raw: bytes) -> bytes:
    if not any(raw):
        raise SampleDecodeError("got no image")
    return raw


@pytest.mark.skipif(not IS_FAST, reason="checksums of samples are compared with google-crc32c only")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_sample_whose_checksum_is_wrong_is_passed_over_alone(
    folder: Path, shuffle: bool, num_workers: int
) -> None:
    path = folder / NAMES[1]
    sample = samples_of(path)[4]
    at = sample.members["jpg"].data.stop - 3
    patch(path, at, bytes([path.read_bytes()[at] ^ 1]))
    loader = make(folder, num_workers, shuffle=shuffle)

    labels = labels_of(loader)

    assert sorted(labels) == [n for n in ALL if n != 10]
    if not shuffle and num_workers == 0:
        assert labels == sorted(labels)
    (failure,) = loader.error_report().failures
    assert failure.location == SampleLocation(NAMES[1], sample.extent, "010", "tar")
    assert (failure.position, failure.error_type) == (10, "ChecksumError")


def fail_at_ten(raw: bytes) -> bytes:
    if raw == IMAGES[10]:
        raise ZeroDivisionError("ten")
    return raw


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_batches_single_samples_are_passed_over(bare: Path, num_workers: int) -> None:
    loader = make(
        bare, num_workers, batch_size=None, collate_fn=None, transform=fail_at_ten, decode=bytes
    )

    assert sorted(label for _, label in loader) == [n for n in ALL if n != 10]
    assert loader.error_report()[1:3] == (len(ALL), 1)


def test_records_of_which_one_is_damaged_come_up_to_it(tmp_path: Path) -> None:
    path = tmp_path / "train-0.tfrecord"
    starts: list[int] = []
    with path.open("wb") as file:
        writer = TFRecordWriter(file)
        for number in range(5):
            starts.append(file.tell())
            example = ImageExample(IMAGES[number], number, filename=f"{number}.jpg")
            writer.write(serialize_image_example(example, label_base=1))
    whole = path.read_bytes()
    patch(path, starts[3] + 20, b"damaged")
    quarantine = tmp_path / "bad.jsonl"
    loader = make(path, 0, decode="pillow", quarantine_file=quarantine)

    assert len(labels_of(loader)) == 3
    (failure,) = loader.error_report().failures
    size = path.stat().st_size
    assert failure.location == SampleLocation(path.name, ByteRange(starts[3], size), "", "tfrecord")
    assert main(["validate", str(tmp_path), "--from", str(quarantine)]) == 1
    path.write_bytes(whole)
    assert main(["validate", str(tmp_path), "--from", str(quarantine)]) == 0


def refuse_for_want_of_a_package(raw: bytes) -> bytes:
    raise MissingDependencyError("pip install it")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_that_no_sample_is_to_blame_for_is_raised(bare: Path, num_workers: int) -> None:
    loader = make(bare, num_workers, decode=refuse_for_want_of_a_package)

    with pytest.raises(MissingDependencyError, match="pip install it"):
        list(loader)


# -- the default, and what is refused


@pytest.mark.parametrize("num_workers", [0, 2])
def test_by_default_the_first_error_is_raised(bare: Path, num_workers: int) -> None:
    cut_short(bare)
    taken: list[int] = []

    with pytest.raises(ShardFormatError, match=r"s-000001\.tar: cut short"):
        taken.extend(labels_of(make(bare, num_workers, on_error="raise")))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_without_damage_batches_are_those_of_torch(
    folder: Path, shuffle: bool, num_workers: int
) -> None:
    settings: Any = {"batch_size": 4, "num_workers": num_workers, "collate_fn": list}
    dataset = StreamedShards(folder, decode=None, shuffle=shuffle, seed=3, batch_size=4)
    dataset.set_epoch(0)
    theirs = list(torch.utils.data.DataLoader(dataset, **settings))
    dataset.set_epoch(0)

    loader = DataLoader(dataset, on_error="skip", **settings)

    assert list(loader) == theirs
    assert loader.error_report() == (0, len(ALL), 0, ())


def test_replacing_is_refused_for_a_stream(folder: Path) -> None:
    with pytest.raises(ValueError, match="on_error: got 'replace' for a stream, expected 'skip'"):
        make(folder, 0, on_error="replace")


def test_streams_of_torchs_own_loader_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="or StreamedShards, and fetch_impl='threaded'"):
        make(folder, 0, fetch_impl="vanilla")


# -- the budget and the file


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_lost_shard_counts_by_its_samples(folder: Path, num_workers: int) -> None:
    loader = make(folder, num_workers, error_budget=ErrorBudget(count=6, share=1.0))
    (folder / NAMES[1]).unlink()

    with pytest.raises(ErrorBudgetError, match=r"7 of \d+ samples .*allowed are count=6"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_budget_holds_for_what_is_lost_after_the_last_batch(bare: Path, num_workers: int) -> None:
    loader = make(bare, num_workers, error_budget=ErrorBudget(count=0))
    (bare / NAMES[2]).unlink()
    taken: list[Any] = []

    with pytest.raises(ErrorBudgetError, match=r"1 of \d+ samples .*: KeyNotFoundError"):
        taken.extend(loader)

    assert loader.error_report().num_failed == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validate_looks_at_what_was_lost_again(
    bare: Path, num_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bare, tmp_path / "whole")
    cut_short(bare)
    place = spoil_image(bare, shard=0, in_sample=2)
    quarantine = tmp_path / "bad.jsonl"
    loader = make(bare, num_workers, decode="pillow", quarantine_file=quarantine)
    labels_of(loader)

    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    status = main(["validate", str(bare), "--from", str(quarantine)])

    assert status == 1
    said = capsys.readouterr().out
    assert f"{NAMES[0]} [{place.start}, {place.stop}) sample '002'" in said
    assert NAMES[1] in said
    assert [
        (line["key"], line["num_samples"]) for line in sorted(lines, key=lambda x: x["key"])
    ] == [
        (NAMES[0], 1),
        (NAMES[1], None),
    ]
    for name in NAMES:
        shutil.copy(tmp_path / "whole" / name, bare / name)
    assert main(["validate", str(bare), "--from", str(quarantine)]) == 0


def test_a_compressed_shard_that_is_cut_short_is_one_entry(tmp_path: Path) -> None:
    tar = tar_of({f"{n:03d}.jpg": IMAGES[n] for n in range(9)})
    packed = gzip.compress(tar)
    (tmp_path / "s-0.tar.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "s-1.tar.gz").write_bytes(gzip.compress(tar_of({"9.jpg": IMAGES[9]})))
    quarantine = tmp_path / "bad.jsonl"
    dataset = StreamedShards(tmp_path / "s-{0,1}.tar.gz", fields="jpg", decode=None)
    loader = DataLoader(dataset, 2, collate_fn=list, on_error="skip", quarantine_file=quarantine)

    images = [image for batch in loader for image in batch]

    assert images[:-1] == IMAGES[: len(images) - 1]
    assert len(images) > 2
    assert images[-1] == IMAGES[9]
    (failure,) = loader.error_report().failures
    assert failure.location == SampleLocation("s-0.tar.gz", None, "", "tar")
    assert main(["validate", str(tmp_path), "--from", str(quarantine)]) == 1


def test_a_command_is_named_without_its_arguments() -> None:
    dataset = StreamedShards("pipe:false --password=pa55", allow_pipe=True)
    loader = DataLoader(dataset, 2, on_error="skip")

    assert list(loader) == []
    (failure,) = loader.error_report().failures
    assert "pa55" not in failure.to_line(0).decode()
    assert failure.location == SampleLocation("pipe:false ...", None, "", "tar")


def test_a_length_that_was_told_is_not_compared_where_shards_were_lost(bare: Path) -> None:
    cut_short(bare)

    loader = make(bare, 0, length=len(ALL))
    assert len(labels_of(itertools.islice(loader, 7))) == 14  # the last of another shard
    resumed = make(bare, 0, length=len(ALL))
    resumed.load_state_dict(loader.state_dict())

    assert labels_of(resumed) == [ALL[-1]]


# -- an epoch that goes on elsewhere


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_taken", [1, 3, 5])
def test_a_resumed_epoch_goes_on_after_what_was_passed_over(
    folder: Path, num_taken: int, shuffle: bool, has_index: bool, num_workers: int
) -> None:
    if not has_index:
        (folder / "s-index.npz").unlink()
    garble_header(folder)
    spoil_image(folder, shard=0, in_sample=1)

    def begin() -> DataLoader[Any]:
        settings: Any = {"shuffle": shuffle, "seed": 5, "shuffle_buffer": 4}
        return make(folder, num_workers, decode=refuse_zeros, **settings)

    torch.manual_seed(1)
    whole_loader = begin()
    whole = labels_of(whole_loader)
    torch.manual_seed(1)
    loader = begin()
    taken = labels_of(itertools.islice(loader, num_taken))
    before = loader.error_report()
    resumed = begin()
    resumed.load_state_dict(loader.state_dict())

    rest = labels_of(resumed)

    assert taken + rest == whole
    after = resumed.error_report()
    found = {failure.location for failure in (*before.failures, *after.failures)}
    assert found == {failure.location for failure in whole_loader.error_report().failures}
    assert before.num_failed + after.num_failed == whole_loader.error_report().num_failed


def test_a_compressed_shard_that_is_read_again_is_not_reported_again(tmp_path: Path) -> None:
    packed = gzip.compress(tar_of({f"{n:03d}.jpg": IMAGES[n] for n in range(9)}))
    (tmp_path / "s-0.tar.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "s-1.tar.gz").write_bytes(
        gzip.compress(tar_of({f"{n}.jpg": IMAGES[n] for n in range(9, 15)}))
    )

    def begin() -> DataLoader[Any]:
        dataset = StreamedShards(tmp_path / "s-{0,1}.tar.gz", fields="jpg", decode=None)
        return DataLoader(dataset, 1, collate_fn=list, on_error="skip")

    loader = begin()
    iterator = iter(loader)
    while next(iterator) != [IMAGES[10]]:
        pass
    assert loader.error_report().num_failed == 1
    resumed = begin()
    resumed.load_state_dict(loader.state_dict())

    assert list(resumed) == [[IMAGES[n]] for n in range(11, 15)]
    assert resumed.error_report()[1:3] == (4, 0)


def test_what_lay_in_the_buffer_and_is_gone_is_passed_over(folder: Path) -> None:
    loader = make(folder, 0, shuffle=True, seed=5)
    taken = labels_of(itertools.islice(loader, 2))
    state = loader.state_dict()
    resumed = make(folder, 0, shuffle=True, seed=5)
    resumed.load_state_dict(state)
    (folder / NAMES[1]).unlink()

    rest = labels_of(resumed)

    lost = {n for n in range(6, 13) if n not in taken}
    assert sorted(taken + rest) == [n for n in ALL if n not in lost]
    assert resumed.error_report().num_failed == len(lost)


def stall_at_ten(raw: bytes) -> bytes:
    if raw == IMAGES[10]:
        time.sleep(3600)
    return raw


@pytest.mark.timeout(60)
def test_a_batch_that_does_not_come_in_time_names_its_worker(bare: Path) -> None:
    with make(bare, 2, decode=stall_at_ten, timeout=2) as loader:
        batches: list[Any] = []

        # What lies ahead in a stream has no position: the worker is all that can be named.
        with pytest.raises(
            DeadlineError, match=r"worker 1 \(pid \d+\): no batch in 2 s \(timeout is 2 s\) and no"
        ):
            batches.extend(iter(loader))

        assert labels_of(batches) == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5]
        assert loader.error_report().num_failed == 0
