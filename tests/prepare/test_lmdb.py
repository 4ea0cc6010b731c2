from __future__ import annotations

import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from concurrent_dataloader.formats.lmdb_file import LmdbFile
from concurrent_dataloader.formats.lmdb_record import Order
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.lmdb import (
    drop_from_page_cache,
    measure_random,
    measure_sequential,
    write_lmdb,
)
from concurrent_dataloader.prepare.plan import shuffle_positions
from tests.prepare.listed_source import ListedSource

MIB = 1 << 20
TEN_RECORDS = 10 * os.sysconf("SC_PAGE_SIZE")
"""Portions of ten records, each of which takes a page."""

PAYLOADS = [bytes([number]) * (500 + 37 * number) for number in range(60)]


def write(path: Path, source: ListedSource | None = None, order: Order = "shuffled", **more: Any):
    chosen = ListedSource(PAYLOADS) if source is None else source
    return write_lmdb(chosen, path, split="train", order=order, commit_bytes=TEN_RECORDS, **more)


def content(path: Path) -> list[tuple[str, int | None, bytes]]:
    file = LmdbFile(path)
    records = (file.parse(*pair) for pair in file.scan_raw(range(len(file))))
    return [(record.name, record.label, bytes(record.payload)) for record in records]


def test_files_are_stored_as_they_are_with_names_and_labels(tmp_path: Path) -> None:
    written = write(tmp_path / "new" / "x.lmdb", order="list")

    assert content(tmp_path / "new" / "x.lmdb") == [
        (f"c/{number}.jpg", number % 3, payload) for number, payload in enumerate(PAYLOADS)
    ]
    assert (written.num_records, written.num_found) == (60, 0)
    assert written.size_bytes == (tmp_path / "new" / "x.lmdb").stat().st_size
    assert os.listdir(tmp_path / "new") == ["x.lmdb"]


def test_b_10_the_order_is_a_seeded_permutation(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, seed=seed)

    first, again, other = (content(tmp_path / name) for name in "abc")

    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(_expected())
    assert first != sorted(first)
    assert LmdbFile(tmp_path / "a").labels() is not None


def _expected() -> Iterator[tuple[str, int, bytes]]:
    for number, payload in enumerate(PAYLOADS):
        yield f"c/{number}.jpg", number % 3, payload


def test_b_10_the_same_seed_gives_the_same_file_whatever_the_concurrency(tmp_path: Path) -> None:
    for name, concurrency in (("a", 1), ("b", 7)):
        write(tmp_path / name, concurrency=concurrency)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_the_database_says_of_itself(tmp_path: Path) -> None:
    write(tmp_path / "x.lmdb", seed=5)

    metadata = LmdbFile(tmp_path / "x.lmdb").metadata

    assert metadata is not None
    assert metadata._replace(plan="") == (
        60,
        "shuffled",
        5,
        "train",
        ["a", "b", "c"],
        None,
        "",
        True,
    )


def test_b_11_samples_without_labels_are_written(tmp_path: Path) -> None:
    write(tmp_path / "x.lmdb", ListedSource(PAYLOADS, labelled=False))

    assert {label for _, label, _ in content(tmp_path / "x.lmdb")} == {None}


def test_no_more_is_read_ahead_than_is_allowed(tmp_path: Path) -> None:
    source = ListedSource(PAYLOADS)
    ahead: list[int] = []
    num_written = itertools.count(1)

    write(
        tmp_path / "x.lmdb",
        source,
        concurrency=3,
        on_record=lambda _: ahead.append(source.num_read - next(num_written)),
    )

    assert len(ahead) == 60
    assert max(ahead) <= 6


# -- runs that end early


def test_b_10_a_run_that_fails_leaves_no_final_name_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.lmdb"
    source = ListedSource(PAYLOADS)
    source.fail_at = 35

    with pytest.raises(ConnectionError, match=r"c/35\.jpg: gone"):
        write(path, source, order="list")
    left = os.listdir(tmp_path)
    again = ListedSource(PAYLOADS)
    num_told = itertools.count()
    written = write(path, again, order="list", on_record=lambda _: [next(num_told)])

    assert left == [".x.lmdb.partial"]
    assert written.num_found == 30
    assert again.num_read == 30
    assert next(num_told) == 60
    assert os.listdir(tmp_path) == ["x.lmdb"]
    assert content(path) == list(_expected())


def test_a_run_that_fails_before_a_record_is_written_leaves_nothing(tmp_path: Path) -> None:
    source = ListedSource(PAYLOADS)
    source.fail_at = 3

    with pytest.raises(ConnectionError):
        write(tmp_path / "deep" / "x.lmdb", source, order="list")

    assert os.listdir(tmp_path) == []


def test_a_run_that_is_resumed_writes_the_same_records(
    tmp_path: Path,
) -> None:
    source = ListedSource(PAYLOADS)
    source.fail_at = 7
    with pytest.raises(ConnectionError):
        write(tmp_path / "resumed.lmdb", source)

    write(tmp_path / "resumed.lmdb")
    write(tmp_path / "whole.lmdb")

    assert content(tmp_path / "resumed.lmdb") == content(tmp_path / "whole.lmdb")


@pytest.mark.parametrize("other", ["seed", "order", "samples", "damage", "garbage"])
def test_what_another_run_left_is_replaced(tmp_path: Path, other: str) -> None:
    path, partial = tmp_path / "x.lmdb", tmp_path / ".x.lmdb.partial"
    failing = ListedSource([*PAYLOADS, b"more"] if other == "samples" else PAYLOADS)
    order: Order = "list" if other == "order" else "shuffled"
    seed = 1 if other == "seed" else 0
    positions = shuffle_positions(len(failing), None if order == "list" else seed)
    failing.fail_at = int(positions[35])
    with pytest.raises(ConnectionError):
        write(path, failing, order=order, seed=seed)
    if other == "damage":
        partial.write_bytes(partial.read_bytes()[:20_000])
    if other == "garbage":
        partial.write_bytes(b"garbage" * 5000)

    written = write(path)

    assert written.num_found == 0
    assert sorted(content(path)) == sorted(_expected())


CHILD = """
    import sys
    from pathlib import Path
    from concurrent_dataloader.prepare.lmdb import write_lmdb
    from tests.prepare.listed_source import ListedSource

    class Slow(ListedSource):
        def read(self, position):
            if position == 40:
                print("now", flush=True)
                sys.stdin.read()
            return super().read(position)

    payloads = [bytes([number]) * (500 + 37 * number) for number in range(60)]
    write_lmdb(Slow(payloads), Path(sys.argv[1]), split="train", order="list", concurrency=1,
               commit_bytes=int(sys.argv[2]))
"""


def test_a_run_that_is_killed_leaves_no_final_name_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.lmdb"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(path), str(TEN_RECORDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"now\n"
        with pytest.raises(BlockingIOError, match="another process is writing it"):
            write(path, order="list")
        child.send_signal(signal.SIGKILL)
    left = os.listdir(tmp_path)

    written = write(path, order="list")

    assert left == [".x.lmdb.partial"]
    assert written.num_found == 30
    assert content(path) == list(_expected())


def test_a_run_that_finds_its_work_done_reads_nothing(tmp_path: Path) -> None:
    write(tmp_path / "x.lmdb")
    source = ListedSource(PAYLOADS)

    written = write(tmp_path / "x.lmdb", source)

    assert source.num_read == 0
    assert written.num_found == written.num_records == 60


@pytest.mark.parametrize("there", ["database", "file", "folder"])
def test_another_target_that_is_there_is_left_alone(tmp_path: Path, there: str) -> None:
    path = tmp_path / "x.lmdb"
    if there == "database":
        write(path, seed=9)
    elif there == "file":
        path.write_text("mine")
    else:
        path.mkdir()
    before = path.read_bytes() if path.is_file() else b""

    with pytest.raises(FileExistsError, match="remove it, or choose another name"):
        write(path)
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.fixture
def limit_file_size() -> Iterator[Callable[[int | None], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes: int | None) -> None:
        soft = before[0] if num_bytes is None else num_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_full_disk_is_named_and_the_next_run_finishes(
    tmp_path: Path,
    limit_file_size: Callable[[int | None], None],
) -> None:
    payloads = [bytes([number]) * MIB for number in range(6)]
    limit_file_size(3 * MIB)

    with pytest.raises(OSError, match="make room and run it again"):
        write(tmp_path / "x.lmdb", ListedSource(payloads), order="list")
    limit_file_size(None)
    left = os.listdir(tmp_path)
    written = write(tmp_path / "x.lmdb", ListedSource(payloads), order="list")

    assert left == [".x.lmdb.partial"]
    assert written.num_found == 2
    assert [payload for _, _, payload in content(tmp_path / "x.lmdb")] == payloads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ListedSource([])}, "got a source without samples"),
        ({"seed": -1}, "seed: got -1"),
        ({"concurrency": 0}, "concurrency: got 0"),
        ({"map_bytes": 0}, "map_bytes: got 0"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x.lmdb", **settings)
    assert not (tmp_path / "x.lmdb").exists()


# -- how fast is it read?


class SteppedClock:
    """Goes on by a quarter of a second at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.25
        return self.now_s


@pytest.mark.parametrize("measure", [measure_sequential, measure_random])
def test_speed_is_counted_until_the_time_is_over(tmp_path: Path, measure: Any) -> None:
    write(tmp_path / "x.lmdb", ListedSource([bytes(1000)] * 60), order="list")
    file = LmdbFile(tmp_path / "x.lmdb")

    speed = measure(file, seconds=2.0, clock=SteppedClock())

    assert (speed.num_records, speed.elapsed_s) == (8, 2.0)
    assert speed.records_per_s == 4.0
    assert 8 * 1000 < speed.num_bytes < 8 * 1050
    assert speed.megabytes_per_s == speed.num_bytes / 2e6


@pytest.mark.parametrize("measure", [measure_sequential, measure_random])
def test_speed_of_a_small_database_ends_with_it(tmp_path: Path, measure: Any) -> None:
    write(tmp_path / "x.lmdb", order="list")

    speed = measure(LmdbFile(tmp_path / "x.lmdb"), seconds=1000.0)

    assert speed.num_records == 60


def test_a_file_that_was_dropped_from_memory_can_still_be_read(tmp_path: Path) -> None:
    write(tmp_path / "x.lmdb", order="list")

    drop_from_page_cache(tmp_path / "x.lmdb")

    assert content(tmp_path / "x.lmdb") == list(_expected())


# -- the commands


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A train and a val folder of three classes, one of which is not ImageNet's."""
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            path = tmp_path / "tree" / split / "abc"[number % 3] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{split} {number}".encode())
    return tmp_path / "tree"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_b_10_b_11_the_command_writes_both_splits_of_any_tree(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run("lmdb", tree, tmp_path / "out", "--split", "train,val")

    train, val = (content(tmp_path / f"out/ILSVRC-{split}.lmdb") for split in ("train", "val"))
    assert status == 0
    assert [name for name, _, _ in val] == [
        "a/0.jpg",
        "a/3.jpg",
        "b/1.jpg",
        "b/4.jpg",
        "c/2.jpg",
        "c/5.jpg",
    ]
    assert [label for _, label, _ in val] == [0, 0, 1, 1, 2, 2]
    assert sorted(payload for _, _, payload in train) == sorted(
        f"train {number}".encode() for number in range(12)
    )
    assert [name for name, _, _ in train] != sorted(name for name, _, _ in train)
    assert "ILSVRC-train.lmdb: 12 records, 3 classes, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--readers", "0", "--readers: got 0, expected 1 or more"), ("--splits", ",", "got ','")],
)
def test_no_readers_and_no_splits_are_refused_by_the_name_that_was_given(
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    said: str,
) -> None:
    try:
        status = run("lmdb", tree, tmp_path / "out", option, value)
    except SystemExit as ended:
        status = ended.code

    assert status
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.lmdb"))


def test_the_same_command_twice_gives_the_same_databases(tree: Path, tmp_path: Path) -> None:
    for target in ("one", "two"):
        run("lmdb", tree / "train", tmp_path / target, "--seed", 7)

    one, two = (tmp_path / name / "ILSVRC-train.lmdb" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_tar_and_its_tree_give_the_same_database(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tree / "val", arcname=".")

    run("lmdb", tmp_path / "val.tar", tmp_path / "by-tar", "--split", "val")
    run("lmdb", tree / "val", tmp_path / "by-tree", "--split", "val")

    by_tar, by_tree = (tmp_path / name / "ILSVRC-val.lmdb" for name in ("by-tar", "by-tree"))
    assert content(by_tar) == content(by_tree)


def test_shards_give_the_database_of_their_tree(tree: Path, tmp_path: Path) -> None:
    run("shard", tree / "val", tmp_path / "shards", "--split", "val")

    run("lmdb", tmp_path / "shards", tmp_path / "out", "--split", "val", "--order", "list")

    by_shards = content(tmp_path / "out" / "ILSVRC-val.lmdb")
    assert sorted((label, payload) for _, label, payload in by_shards) == [
        (number % 3, f"val {number}".encode()) for number in (0, 3, 1, 4, 2, 5)
    ]


def test_name_and_order_can_be_chosen(tree: Path, tmp_path: Path) -> None:
    run("lmdb", tree, tmp_path, "--split", "val", "--name", "my-{split}.db", "--order", "shuffled")

    metadata = LmdbFile(tmp_path / "my-val.db").metadata
    assert metadata is not None
    assert (metadata.order, metadata.seed, metadata.split) == ("shuffled", 0, "val")


def test_splits_with_other_classes_are_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "val" / "d").mkdir()
    (tree / "val" / "d" / "9.jpg").write_bytes(b"nine")

    status = run("lmdb", tree, tmp_path / "out", "--split", "train,val")

    assert status == 1
    assert "'d' is in one of them only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--boxes", "auto"), "LMDB records hold no boxes"),
        (("--split", "train,val", "--name", "x.lmdb"), "the same for train, val"),
        (("--map-size", "none"), "--map-size: got none"),
    ],
)
def test_what_cannot_be_done_is_said(
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert run("lmdb", tree, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_in_a_bucket_is_written(object_server: Any, tree: Path, tmp_path: Path) -> None:
    objects = {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*.jpg")}
    object_server.put_objects("bucket", objects)
    credentials = tmp_path / "credentials.json"
    credentials.write_text(
        json.dumps({"access_key": object_server.access_key, "secret": object_server.secret_key})
    )

    status = run(
        "lmdb",
        "s3://bucket/val",
        tmp_path / "out",
        "--split",
        "val",
        "--endpoint-url",
        object_server.endpoint_url,
        "--credentials",
        credentials,
    )

    run("lmdb", tree / "val", tmp_path / "by-tree", "--split", "val")
    by_bucket, by_tree = (tmp_path / name / "ILSVRC-val.lmdb" for name in ("out", "by-tree"))
    assert status == 0
    assert content(by_bucket) == content(by_tree)


def test_the_read_speed_is_told_for_both_orders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "x.lmdb", order="list")

    status = run("readspeed", tmp_path / "x.lmdb")

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert re.match(r"sequential +[\d.]+ records/s +[\d.]+ MB/s  \(60 records in ", lines[0])
    assert re.match(r"random +[\d.]+ records/s +[\d.]+ MB/s  \(60 records in ", lines[1])
    assert re.fullmatch(r"sequential is [\d.]+ times as fast as random", lines[2])


def test_the_folder_of_a_database_is_told_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "x.lmdb", order="list")

    assert run("readspeed", tmp_path) == 1
    assert "a folder of 1 LMDB databases, expected one; give x.lmdb" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_no_time_to_measure_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    write(tmp_path / "x.lmdb")

    assert run("readspeed", tmp_path / "x.lmdb", f"--seconds={seconds}") == 2
    assert "--seconds: got" in capsys.readouterr().err
