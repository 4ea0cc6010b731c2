"""Copying data sets between stores."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typing_extensions import Buffer

from concurrent_dataloader.errors import StoreError
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.copy import (
    Copied,
    CopyItem,
    copy_objects,
    copy_to_folder,
    items_below,
    items_of_index,
)
from concurrent_dataloader.prepare.parallel import ByteBudget, call_concurrently
from concurrent_dataloader.stores import (
    Credentials,
    RetryPolicy,
    WritableStore,
    open_writable_store,
)
from concurrent_dataloader.testing import Fault, ObjectServer

OBJECTS = {f"train/n{i % 3:08d}/ü {i}.JPEG": bytes([i]) * (i * 100) for i in range(30)}


def open_bucket(server: ObjectServer, url: str) -> WritableStore:
    return open_writable_store(
        url,
        endpoint_url=server.endpoint_url,
        credentials=Credentials(server.access_key, server.secret_key),
        retry=RetryPolicy(max_attempts=2, first_wait_s=0.001),
    )


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_credentials(server: ObjectServer, path: Path) -> Path:
    content = {
        "access_key": server.access_key,
        "secret": server.secret_key,
        "endpoint_url": server.endpoint_url,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def bucket(object_server: ObjectServer) -> ObjectServer:
    object_server.put_objects("data", {**OBJECTS, "train/": b"", "other/x.bin": b"x"})
    return object_server


def test_index_and_objects_travel_between_two_endpoints_with_credentials_of_their_own(
    bucket: ObjectServer,
    make_object_server: Callable[..., ObjectServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_object_server(access_key="other", secret_key="another-secret")
    other.create_bucket("copy")
    named = sorted(OBJECTS)[:20]
    bucket.put_objects("data", {"indexes/small.json": json.dumps(named).encode()})

    status = main(
        [
            *["copy", "s3://data", "s3://copy/pre", "--index", "s3://data/indexes/small.json"],
            *["--credentials", str(write_credentials(bucket, tmp_path / "a.json"))],
            *["--target-credentials", str(write_credentials(other, tmp_path / "b.json"))],
        ]
    )

    assert status == 0
    store = open_bucket(other, "s3://copy/pre")
    found = {info.key: bytes(memoryview(store.get(info.key))) for info in store.list()}
    assert json.loads(found.pop("indexes/small.json")) == named
    assert found == {key: OBJECTS[key] for key in named}
    said = capsys.readouterr()
    assert "20 objects copied" in said.out
    assert "another-secret" not in said.out + said.err


def test_all_below_a_prefix_comes_to_a_folder_without_markers(
    bucket: ObjectServer, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "copy"

    status = main(
        [
            *["copy", "s3://data/train", str(target)],
            *["--credentials", str(write_credentials(bucket, tmp_path / "a.json"))],
        ]
    )

    assert status == 0
    expected = {key.removeprefix("train/"): body for key, body in OBJECTS.items()}
    assert files_below(target) == expected


def test_a_folder_goes_to_a_bucket_with_its_index_under_its_own_name(
    object_server: ObjectServer, tmp_path: Path
) -> None:
    object_server.create_bucket("data")
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.jpg").write_bytes(b"one")
    (folder / "a" / "2.jpg").write_bytes(b"two")
    index = folder / "lists" / "index.json"
    Index.from_keys(["a/2.jpg"]).save_json(index)

    status = main(
        [
            *["copy", str(folder), "s3://data/x", "--index", str(index)],
            *["--target-credentials", str(write_credentials(object_server, tmp_path / "c.json"))],
        ]
    )

    assert status == 0
    keys = [info.key for info in open_bucket(object_server, "s3://data").list()]
    assert keys == ["x/a/2.jpg", "x/lists/index.json"]


def test_a_web_server_is_copied_by_an_index(object_server: ObjectServer, tmp_path: Path) -> None:
    object_server.create_bucket("public", public=True)
    object_server.put_objects("public", {"a/1.jpg": b"one", "a/2.jpg": b"two", "b.jpg": b"x"})
    index = tmp_path / "index.json"
    Index.from_keys(["a/2.jpg", "b.jpg"]).save_json(index)
    target = tmp_path / "copy"

    url = f"{object_server.endpoint_url}/public"
    status = main(["copy", url, str(target), "--index", str(index)])

    assert status == 0
    assert files_below(target) == {
        "a/2.jpg": b"two",
        "b.jpg": b"x",
        "index.json": index.read_bytes(),
    }


def test_a_first_copy_asks_twice_an_object_and_a_second_reads_nothing(
    bucket: ObjectServer, tmp_path: Path
) -> None:
    source = open_bucket(bucket, "s3://data/train")
    target = open_writable_store(tmp_path)
    bucket.reset_counters()

    first = copy_objects(items_below(source), source, target)

    assert (first.num_copied, first.num_skipped, first.num_failed) == (30, 0, 0)
    assert first.copied_bytes == sum(map(len, OBJECTS.values()))
    assert bucket.counters().num_by_method == {"GET": 31}  # with one listing
    bucket.reset_counters()

    second = copy_objects(items_below(source), source, target)

    assert (second.num_copied, second.num_skipped) == (0, 30)
    assert bucket.counters().num_gets == 1


def test_a_copy_that_was_stopped_goes_on_and_mends_what_has_another_size(
    bucket: ObjectServer, tmp_path: Path
) -> None:
    source = open_bucket(bucket, "s3://data/train")
    target = open_writable_store(tmp_path)
    keys = [key.removeprefix("train/") for key in OBJECTS]
    for key in keys[:10]:
        target.put(key, OBJECTS[f"train/{key}"])
    target.put(keys[10], b"cut short")

    report = copy_objects(items_below(source), source, target)

    assert (report.num_copied, report.num_skipped) == (20, 10)
    assert files_below(tmp_path) == {key: OBJECTS[f"train/{key}"] for key in keys}


def test_only_verify_finds_other_content_of_the_same_size(tmp_path: Path) -> None:
    source, target = (open_writable_store(tmp_path / name) for name in ("a", "b"))
    (tmp_path / "b").mkdir()
    source.put("x", b"right")
    target.put("x", b"wrong")
    items = [CopyItem("x", 5)]

    unverified = copy_objects(items, source, target)
    after_unverified = bytes(memoryview(target.get("x")))
    verified = copy_objects(items, source, target, verify=True)

    assert (unverified.num_skipped, after_unverified) == (1, b"wrong")
    assert verified.num_copied == 1
    assert bytes(memoryview(target.get("x"))) == b"right"


def test_each_failure_is_named_the_rest_goes_on_and_the_index_is_left_out(
    bucket: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "i.json"
    Index.from_keys([*sorted(OBJECTS), "train/gone.JPEG", "../escape.JPEG"]).save_json(index)
    bad = sorted(OBJECTS)[5]
    bucket.set_faults([Fault("truncated_body", key_pattern="n00000002/ü 2.JPEG$")])
    target = tmp_path / "copy"
    arguments = ["copy", "s3://data", str(target), "--index", str(index), "--credentials"]
    arguments.append(str(write_credentials(bucket, tmp_path / "c.json")))

    status = main(arguments)

    said = capsys.readouterr()
    assert status == 1
    assert "29 objects copied" in said.out
    assert "3 failed" in said.out
    for key in ("train/gone.JPEG", "../escape.JPEG", "train/n00000002/ü 2.JPEG"):
        assert f"{key}: not copied: " in said.err
    assert bad in files_below(target)
    assert len(files_below(target)) == 29
    assert not (tmp_path / "escape.JPEG").exists()

    bucket.set_faults([])
    Index.from_keys(sorted(OBJECTS)).save_json(index)

    assert main(arguments) == 0
    assert "1 objects copied" in capsys.readouterr().out
    assert files_below(target) == {**OBJECTS, "i.json": index.read_bytes()}


def test_what_describes_a_set_is_copied_last_and_only_if_the_rest_came(
    bucket: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("metadata.json", "train-000000.tar", "train-000001.tar", "train-index.npz")
    bucket.put_objects("data", {f"sets/{name}": name.encode() for name in names})
    bucket.set_faults([Fault("truncated_body", key_pattern="000001.tar$")])
    credentials = write_credentials(bucket, tmp_path / "c.json")
    target = tmp_path / "copy"
    arguments = ["copy", "s3://data/sets", str(target), "--credentials", str(credentials)]

    status = main(arguments)

    assert status == 1
    assert list(files_below(target)) == ["train-000000.tar"]
    said = capsys.readouterr().err
    assert "not copied before all is there: train-index.npz, metadata.json" in said

    bucket.set_faults([])
    seen: list[str] = []
    with (
        contextlib.closing(open_bucket(bucket, "s3://data/sets")) as source,
        contextlib.closing(open_writable_store(target)) as store,
    ):
        report = copy_objects(
            items_below(source), source, store, on_object=lambda copied: seen.append(copied.key)
        )

    assert seen[2:] == ["train-index.npz", "metadata.json"]
    assert (report.num_copied, report.num_skipped, report.held_back) == (3, 1, ())


class LyingStore:
    """A target that loses the end of what it is given, and says so only when it is asked."""

    def __init__(self, inner: WritableStore, *, keeps_size: bool) -> None:
        self._inner = inner
        self._keeps_size = keeps_size
        self.get = inner.get
        self.get_async = inner.get_async
        self.describe = inner.describe
        self.head = inner.head
        self.list = inner.list
        self.delete = inner.delete
        self.close = inner.close

    def put(self, key: str, body: Buffer) -> None:
        whole = bytes(body)
        self._inner.put(key, whole[:-1] + b"?" if self._keeps_size else whole[:-1])


@pytest.mark.parametrize("keeps_size", [False, True])
def test_a_store_that_does_not_keep_what_it_got_is_found_out(
    tmp_path: Path, keeps_size: bool
) -> None:
    source = open_writable_store(tmp_path / "a")
    source.put("x", b"content")
    (tmp_path / "b").mkdir()
    target = LyingStore(open_writable_store(tmp_path / "b"), keeps_size=keeps_size)
    told: list[Copied] = []

    report = copy_objects(
        [CopyItem("x", None)], source, target, verify=keeps_size, on_object=told.append
    )

    assert report.num_failed == 1
    expected = "its content is not" if keeps_size else "got 6 bytes after it was written"
    assert expected in str(told[0].error)


def test_a_large_object_is_read_in_parts(
    object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concurrent_dataloader.prepare.copy._PART_BYTES", 1000)
    body = bytes(range(256)) * 17
    object_server.put_objects("data", {"big": body})
    source = open_bucket(object_server, "s3://data")
    object_server.reset_counters()

    copy_objects([CopyItem("big", len(body))], source, open_writable_store(tmp_path))

    assert object_server.counters().num_gets == 5
    assert (tmp_path / "big").read_bytes() == body


def test_copies_run_at_once_and_no_more_than_asked_for(
    bucket: ObjectServer, tmp_path: Path
) -> None:
    source = open_bucket(bucket, "s3://data/train")
    bucket.set_latency(0.02)
    bucket.reset_counters()

    copy_objects(items_below(source), source, open_writable_store(tmp_path), concurrency=6)

    assert 3 <= bucket.counters().max_in_flight <= 6


def test_a_key_that_an_index_names_twice_is_copied_once() -> None:
    index = Index.from_keys(["b", "a", "b"], [1, 2, 1])

    assert list(items_of_index(index)) == [CopyItem("b", 1), CopyItem("a", 2)]


def test_copy_to_folder_takes_the_time_and_raises_for_what_is_missing(
    bucket: ObjectServer, tmp_path: Path
) -> None:
    def open_root(url: str) -> WritableStore:
        return open_bucket(bucket, url)

    report = copy_to_folder("s3://data/train", tmp_path / "node", open_root=open_root)
    again = copy_to_folder("s3://data/train", tmp_path / "node", open_root=open_root)
    index = tmp_path / "i.json"
    Index.from_keys(["n00000000/ü 0.JPEG", "nothing"]).save_json(index)

    assert report.num_copied == 30
    assert report.duration_s > 0
    assert again.num_skipped == 30
    with pytest.raises(StoreError, match="1 objects could not be copied, the first one is 'noth"):
        copy_to_folder("s3://data/train", tmp_path / "node", index_file=index, open_root=open_root)


def test_copy_to_folder_leaves_out_what_was_distributed(tmp_path: Path) -> None:
    for name in (
        "train-000000.tar",
        "distributed/4-instances/train-000000.tar",
        "distributed/1.jpg",
    ):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"some bytes")

    copy_to_folder(tmp_path / "set", tmp_path / "node")

    copied = {path.relative_to(tmp_path / "node") for path in (tmp_path / "node").rglob("*.*")}
    assert copied == {Path("train-000000.tar"), Path("distributed/1.jpg")}


def test_ctrl_c_ends_a_copy_with_130_and_leaves_whole_files_only(
    bucket: ObjectServer, tmp_path: Path
) -> None:
    bucket.set_bandwidth(connection_bytes_per_s=6000)
    target = tmp_path / "copy"
    command = [sys.executable, "-m", "concurrent_dataloader.prepare", "copy", "s3://data/train"]
    command += [str(target), "--concurrency", "1", "--credentials"]
    command.append(str(write_credentials(bucket, tmp_path / "c.json")))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while len(list(target.rglob("*.JPEG"))) < 4:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()

    assert process.returncode == 130
    assert said == (
        "concurrent-dataloader: interrupted; repeat the command, and it goes on where it stopped\n"
    )
    found = files_below(target)
    assert 3 < len(found) < 30
    for key, body in found.items():
        assert hashlib.md5(body).digest() == hashlib.md5(OBJECTS[f"train/{key}"]).digest()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nowhere", "target"], 1, "nowhere: no such folder"),
        ([".", "http://host/x"], 1, "which can be read only"),
        (["http://localhost:1/x", "target"], 1, "cannot be listed; give an index"),
        (["set", "target", "--index", "no.json"], 1, "no.json: no such index file"),
        (["set", "target", "--concurrency", "0"], 2, "concurrency: got 0, expected 1 or more"),
        (["s3://a/b", "t", "--index", "s3://a/c/i.json", "--anonymous"], 2, "a URL below s3://a/b"),
    ],
)
def test_what_cannot_be_copied_is_one_line(
    arguments: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()

    assert main(["copy", *arguments]) == status

    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_calls_take_items_only_a_little_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = call_concurrently(lambda item: item * 2, items(), 3)
    first = next(results)
    num_taken = len(taken)
    results.close()

    assert first in range(0, 12, 2)
    assert num_taken == 6


def test_an_error_of_a_call_ends_them_all() -> None:
    def call(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    with pytest.raises(ValueError, match="five"):
        list(call_concurrently(call, range(100), 4))


def test_a_budget_lets_one_go_that_is_larger_than_all() -> None:
    budget = ByteBudget(10)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with budget.take(1000):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    second = threading.Event()

    def want() -> None:
        with budget.take(1):
            second.set()

    waiter = threading.Thread(target=want)
    waiter.start()
    was_let_in = second.wait(0.05)
    leave.set()
    holder.join(10)
    waiter.join(10)

    assert not was_let_in
    assert second.is_set()


def test_shards_of_other_data_with_the_same_sizes_are_replaced(tmp_path: Path) -> None:
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-000000.tar").write_bytes(content * 100)
        (tmp_path / name / "train-index.npz").write_bytes(content * 10)

    assert main(["copy", str(tmp_path / "one"), str(tmp_path / "out")]) == 0
    assert main(["copy", str(tmp_path / "two"), str(tmp_path / "out")]) == 0

    assert files_below(tmp_path / "out") == files_below(tmp_path / "two")


def test_shards_that_are_still_being_written_are_not_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / ".unfinished-train").mkdir(parents=True)
    (tmp_path / "set" / ".unfinished-train" / "plan.json").write_text("{}")
    (tmp_path / "set" / "train-000000.tar").write_bytes(b"1")

    assert main(["copy", str(tmp_path / "set"), str(tmp_path / "out")]) == 1

    assert "unfinished run of split 'train'" in capsys.readouterr().err
    assert not files_below(tmp_path / "out")


@pytest.mark.parametrize("target", ["set", "set/deeper"])
def test_a_target_within_the_source_is_refused(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").write_bytes(b"1")

    assert main(["copy", str(tmp_path / "set"), str(tmp_path / target)]) == 1

    assert "the source" in capsys.readouterr().err
    assert files_below(tmp_path / "set") == {"a": b"1"}


def test_a_source_with_nothing_in_it_is_an_error(
    bucket: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()

    assert main(["copy", str(tmp_path / "empty"), str(tmp_path / "out" / "deep")]) == 1

    assert "holds nothing to copy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
