from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb
import pytest

from concurrent_dataloader.errors import MissingDependencyError, ShardFormatError
from concurrent_dataloader.formats import lmdb_environment
from concurrent_dataloader.formats.lmdb_file import LmdbFile
from concurrent_dataloader.formats.lmdb_record import (
    DatabaseMetadata,
    Record,
    pack_labels,
    pack_record,
)
from concurrent_dataloader.formats.lmdb_writer import LmdbWriter

MIB = 1 << 20


def metadata_of(count: int, *, complete: bool = True) -> DatabaseMetadata:
    return DatabaseMetadata(count, "list", None, "train", ["a", "b"], None, "plan", complete)


def payload_of(position: int, size: int = 20_000) -> bytes:
    return bytes([position % 251]) * (size + position)


def write(path: Path, count: int, size: int = 20_000, **settings: int) -> Path:
    with LmdbWriter(path, **settings) as writer:
        writer.put_metadata(metadata_of(count, complete=False))
        for position in range(count):
            record = Record(f"{position}.jpg", position % 2, payload_of(position, size))
            writer.put_record(position, pack_record(record))
        writer.put_metadata(metadata_of(count), pack_labels([i % 2 for i in range(count)]))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("lmdb") / "x.lmdb", 30)


def test_records_come_back_at_random_and_in_order(whole: Path) -> None:
    file = LmdbFile(whole)

    scanned = [file.parse(*pair) for pair in file.scan_raw(range(30))]

    assert len(file) == 30
    assert [(r.name, r.label, bytes(r.payload)) for r in scanned] == [
        (f"{i}.jpg", i % 2, payload_of(i)) for i in range(30)
    ]
    assert bytes(file.read(17).payload) == payload_of(17)
    assert (labels := file.labels()) is not None
    assert labels.tolist() == [i % 2 for i in range(30)]


def test_reading_leaves_no_lock_file_and_writing_none(whole: Path) -> None:
    LmdbFile(whole).read(0)

    assert os.listdir(whole.parent) == ["x.lmdb"]


def test_b_15_the_file_is_no_larger_than_its_records_and_not_sparse(whole: Path) -> None:
    stored = sum(len(payload_of(i)) for i in range(30))

    assert stored < whole.stat().st_size < 1.3 * stored + 100_000
    assert whole.stat().st_blocks * 512 >= 0.9 * whole.stat().st_size


def test_b_15_the_map_grows_from_next_to_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", 60, size=MIB, map_bytes=4096, commit_bytes=4 * MIB)

    assert bytes(LmdbFile(path).read(59).payload) == payload_of(59, MIB)


def test_a_record_larger_than_a_portion_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", 3, size=40 * MIB, map_bytes=MIB, commit_bytes=MIB)

    assert LmdbFile(path).read_raw(2).endswith(payload_of(2, 40 * MIB))


def test_a_writer_holds_no_more_than_a_portion(tmp_path: Path) -> None:
    code = f"""
        import resource
        from pathlib import Path
        from concurrent_dataloader.formats.lmdb_writer import LmdbWriter

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with LmdbWriter(Path({str(tmp_path / "x.lmdb")!r}), commit_bytes=4 << 20) as writer:
            for position in range(20):
                writer.put_record(position, bytes(1 << 20))
            before = peak()
            for position in range(20, 200):
                writer.put_record(position, bytes(1 << 20))
            print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )

    assert int(done.stdout) < 12 * 1024  # KiB; what was written is 180 MiB


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.02])
def test_a_database_that_is_cut_short_is_refused_before_it_is_read(
    whole: Path, tmp_path: Path, share: float
) -> None:
    cut = tmp_path / "cut.lmdb"
    size = whole.stat().st_size
    cut.write_bytes(whole.read_bytes()[: int(share * size)])

    with pytest.raises(ShardFormatError, match=rf"got {int(share * size)} bytes, expected {size}"):
        LmdbFile(cut)


@pytest.mark.parametrize("content", [b"", b"x", b"no database" * 2000, bytes(100_000)])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.lmdb"
    path.write_bytes(content)

    with pytest.raises(ShardFormatError, match=f"got {len(content)} bytes that are no LMDB"):
        LmdbFile(path)
    assert path.read_bytes() == content


def test_a_database_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with (
        lmdb.open(str(path), subdir=False, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.put(b"key", b"value")

    with pytest.raises(ShardFormatError, match="none of ours"):
        LmdbFile(path)


def test_a_database_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.lmdb: no such LMDB database"):
        LmdbFile(tmp_path / "x.lmdb")
    with pytest.raises(FileNotFoundError, match="no such LMDB database"):
        LmdbFile(tmp_path)
    assert not os.listdir(tmp_path)


def test_b_10_a_database_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with LmdbWriter(path) as writer:
        writer.put_metadata(metadata_of(3, complete=False))
        writer.put_record(0, pack_record(Record("a", 0, b"bytes")))
        writer.commit()

    with pytest.raises(ShardFormatError, match="did not finish; run it again"):
        LmdbFile(path)


def test_a_database_with_fewer_records_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with LmdbWriter(path) as writer:
        writer.put_record(0, pack_record(Record("a", 0, b"bytes")))
        writer.put_metadata(metadata_of(3), pack_labels([0, 0, 0]))

    with pytest.raises(ShardFormatError, match="got 1 records, expected 3"):
        LmdbFile(path)


def test_a_record_that_was_changed_is_refused(whole: Path, tmp_path: Path) -> None:
    changed = tmp_path / "x.lmdb"
    raw = bytearray(whole.read_bytes())
    raw[raw.index(payload_of(5)) + 1000] ^= 1
    changed.write_bytes(raw)
    file = LmdbFile(changed)

    file.read(4)
    with pytest.raises(ShardFormatError, match=r"x\.lmdb, record 5: got a record whose checksum"):
        file.read(5)


@pytest.mark.parametrize("position", [-1, 30])
def test_a_position_that_is_not_there_is_an_index_error(whole: Path, position: int) -> None:
    with pytest.raises(IndexError, match=f"got position {position}, expected 0 to 29"):
        LmdbFile(whole).read(position)


def test_a_folder_with_a_database_in_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "data.mdb", 3)

    assert LmdbFile(tmp_path).read(2).name == "2.jpg"


class HintedFile(LmdbFile):
    """Notes which parts of the file are asked for, and where what is read lies in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, readahead=True)
        self.hints: list[tuple[int, int]] = []

    def _ask_for(self, file_map: Any, start: int, stop: int) -> None:
        self.hints.append((start, stop))
        super()._ask_for(file_map, start, stop)


@pytest.mark.parametrize("step", [1, 2])
def test_front_to_back_the_file_is_asked_for_in_few_large_pieces(tmp_path: Path, step: int) -> None:
    path = write(tmp_path / "x.lmdb", 60, size=MIB, commit_bytes=4 * MIB)
    file = HintedFile(path)
    content = path.read_bytes()

    num_hints: list[int] = []
    for position, raw in file.scan_raw(range(0, 60, step)):
        num_hints.append(len(file.hints))
        at = content.index(raw)
        assert any(start <= at <= at + len(raw) <= stop for start, stop in file.hints)
        assert bytes(file.parse(position, raw).payload) == payload_of(position, MIB)

    assert num_hints[0] == 2  # one piece ahead, no more
    assert len(file.hints) == 4
    assert sum(stop - start for start, stop in file.hints) <= path.stat().st_size


def test_records_that_jump_back_are_read_all_the_same(whole: Path) -> None:
    file = HintedFile(whole)

    assert [p for p, _ in file.scan_raw([5, 29, 3, 3, 4])] == [5, 29, 3, 3, 4]


def test_one_process_may_hold_the_same_file_twice(whole: Path) -> None:
    first, second = LmdbFile(whole), LmdbFile(whole, readahead=True)

    scan = first.scan_raw(range(30))
    next(scan)
    second.read(3)
    second.close()
    first.close()

    assert [position for position, _ in scan] == list(range(1, 30))


def test_what_was_read_outlives_the_database(whole: Path) -> None:
    file = LmdbFile(whole)

    record = file.read(3)
    file.close()
    del file
    gc.collect()

    assert bytes(record.payload) == payload_of(3)


def test_a_file_that_nobody_reads_is_closed(whole: Path) -> None:
    file = LmdbFile(whole)
    file.read(0)
    assert _is_mapped(whole)

    del file

    assert not _is_mapped(whole)


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_b_14_looking_at_a_database_leaves_nothing_open(whole: Path) -> None:
    file = LmdbFile(whole)

    assert not _is_mapped(whole)
    assert len(file) == 30


def test_it_pickles_while_it_is_open(whole: Path) -> None:
    file = LmdbFile(whole)
    file.read(0)

    copy = pickle.loads(pickle.dumps(file))

    assert copy.read_raw(3) == file.read_raw(3)
    assert copy.metadata == file.metadata


def test_threads_may_share_it(whole: Path) -> None:
    file = LmdbFile(whole)
    found: list[bool] = []

    def read() -> None:
        found.extend(
            bytes(file.read(position).payload) == payload_of(position) for position in range(30)
        )

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [True] * 240


def test_threads_may_open_what_others_are_closing(whole: Path) -> None:
    errors: list[Exception] = []

    def open_again_and_again() -> None:
        try:
            for position in range(200):
                LmdbFile(whole).read(position % 30)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    threads = [threading.Thread(target=open_again_and_again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    assert not lmdb_environment._opened


@pytest.mark.skipif(
    int(lmdb.__version__.split(".")[0]) < 2,
    reason="lmdb 1 opens a file twice in one process; without lock files both read",
)
def test_a_file_that_the_process_has_open_by_other_means_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", 1)
    theirs = lmdb.open(str(path), subdir=False, readonly=True, lock=False)

    with pytest.raises(ValueError, match=r"x\.lmdb: this process has it open through lmdb itself"):
        LmdbFile(path)

    theirs.close()
    assert len(LmdbFile(path)) == 1


def _read_in_child(file: LmdbFile, connection: Connection) -> None:
    connection.send([len(file.read_raw(position)) for position in range(30)])
    connection.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_b_14_a_child_reads_what_its_parent_has_open(whole: Path, method: str) -> None:
    file = LmdbFile(whole)
    scan = file.scan_raw(range(30))
    expected = [len(next(scan)[1])]
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()

    child = context.Process(target=_read_in_child, args=(file, theirs))
    child.start()
    theirs.close()
    sizes = ours.recv()
    child.join(30)
    expected += [len(raw) for _, raw in scan]

    assert child.exitcode == 0
    assert sizes == expected


def test_b_14_a_child_has_an_environment_of_its_own(whole: Path) -> None:
    file = LmdbFile(whole)
    file.read(0)
    (of_parent,) = lmdb_environment._opened.values()
    reading, writing = os.pipe()

    child = os.fork()
    if child == 0:  # nothing of pytest may run in it
        try:
            file.read(0)
            (of_child,) = lmdb_environment._opened.values()
            os.write(writing, b"own" if of_child is not of_parent else b"parent's")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    answer = os.read(reading, 100)
    os.close(reading)

    assert answer == b"own"
    assert file.read(29).name == "29.jpg"


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    with (
        LmdbWriter(tmp_path / "x.lmdb"),
        pytest.raises(BlockingIOError, match="another process is writing it"),
    ):
        LmdbWriter(tmp_path / "x.lmdb")


def test_a_writer_goes_on_with_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with LmdbWriter(path) as writer:
        for position in range(3):
            writer.put_record(position, pack_record(Record("a", 0, b"bytes")))
        writer.commit()
        writer.put_record(3, pack_record(Record("a", 0, b"lost")))

    with LmdbWriter(path) as writer:
        assert writer.count_records() == 3


@pytest.fixture
def limit_file_size() -> object:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes: int | None) -> None:
        soft = before[0] if num_bytes is None else num_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_disk_that_takes_no_more_is_an_error_and_loses_nothing(
    tmp_path: Path, limit_file_size: Callable[[int | None], None]
) -> None:
    path = tmp_path / "x.lmdb"
    with LmdbWriter(path, commit_bytes=MIB) as writer:
        for position in range(3):
            writer.put_record(position, bytes(MIB))
        limit_file_size(int(2.5 * MIB))
        with pytest.raises(OSError, match="make room and run it again") as caught:
            writer.commit()
    limit_file_size(None)

    assert caught.value.filename == str(path)
    assert caught.value.errno == errno.EFBIG
    with LmdbWriter(path) as writer:
        assert writer.count_records() == 2


def test_without_the_package_its_install_command_is_named(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)

    with pytest.raises(MissingDependencyError, match="pip install lmdb"):
        LmdbFile(whole)


# -- the older system's


def write_older(path: Path, records: list[list[object]], keys: list[bytes] | None) -> Path:
    with (
        lmdb.open(str(path), subdir=False, lock=False, map_size=MIB) as environment,
        environment.begin(write=True) as transaction,
    ):
        for position, record in enumerate(records):
            transaction.put(b"%08d" % position, pickle.dumps(record, -1))
        if keys is not None:
            transaction.put(b"__keys__", pickle.dumps(keys, -1))
    return path


def test_b_09_an_older_database_is_read_only_by_consent(tmp_path: Path) -> None:
    path = write_older(tmp_path / "x.lmdb", [[b"a", 1], [b"b", 0]], [b"00000000", b"00000001"])

    with pytest.raises(ShardFormatError, match="allow_pickle=True"):
        LmdbFile(path)
    file = LmdbFile(path, allow_pickle=True)
    assert [(r.payload, r.label) for r in map(file.read, range(2))] == [(b"a", 1), (b"b", 0)]
    assert file.labels() is None


def test_b_10_an_older_database_without_its_keys_is_refused(tmp_path: Path) -> None:
    path = write_older(tmp_path / "x.lmdb", [[b"a", 1], [b"b", 0]], None)

    with pytest.raises(ShardFormatError, match="no key '__keys__', so the run that wrote it did"):
        LmdbFile(path, allow_pickle=True)


def test_keys_of_an_older_database_may_be_others(tmp_path: Path) -> None:
    path = write_older(tmp_path / "x.lmdb", [[b"a", 1], [b"b", 0]], [b"00000001", b"00000000"])

    file = LmdbFile(path, allow_pickle=True)

    assert [file.parse(*pair).label for pair in file.scan_raw(range(2))] == [0, 1]


def test_a_scan_that_the_garbage_collector_ends_ends_in_silence(whole: Path) -> None:
    file = LmdbFile(whole)
    for readahead in (False, True):
        file.readahead = readahead
        scan = file.scan_raw(range(30))
        next(scan)
        cycle: list[Any] = [scan, file]
        cycle.append(cycle)

    del file, scan, cycle
    gc.collect()  # what is raised in there is a warning, which is an error here

    assert not _is_mapped(whole)
    assert len(LmdbFile(whole).read_raw(0))


def test_a_child_may_end_a_scan_of_its_parent_in_silence(whole: Path) -> None:
    reading, writing = os.pipe()
    scan = LmdbFile(whole).scan_raw(range(30))
    next(scan)

    child = os.fork()
    if child == 0:  # nothing of pytest may run in it
        try:
            scan.close()  # pyright: ignore[reportAttributeAccessIssue]: it is a generator
            os.write(writing, b"closed")
        except BaseException as error:
            os.write(writing, repr(error).encode())
            raise
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    answer = os.read(reading, 1000)
    os.close(reading)

    assert answer == b"closed"
    assert len(list(scan)) == 29
