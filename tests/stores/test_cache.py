"""The disk cache, by one process: what is kept, for how long, and what is never served."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import Buffer, override

from benchmarking.cache_crash import count_bytes
from concurrent_dataloader.datasets import S3Dataset, open_dataset
from concurrent_dataloader.errors import KeyNotFoundError, StoreError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import (
    Credentials,
    DiskCache,
    Store,
    WritableStore,
    open_store,
)
from concurrent_dataloader.stores._cache_entry import (
    HEADER_BYTES,
    EntryName,
    Found,
    charge_bytes,
    is_whole,
    name_entry,
    pack_header,
    plan_eviction,
)
from concurrent_dataloader.stores._file_lock import open_lock_file, release, try_lock
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.cache import CachedStore, CachedWritableStore
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.test_shard_opening import write_split
from tests.stores.contract import OBJECTS, WritableStoreContract

BLOCK = 4096
HOUR_S = 3600.0


class CountedStore(MemoryStore):
    """Counts what is read of it."""

    def __init__(self, objects: Mapping[str, bytes], name: str = "") -> None:
        super().__init__(objects, name)
        self.reads: Counter[tuple[str, ByteRange | None]] = Counter()
        self.wait: Callable[[], object] = lambda: None

    @override
    def get(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        self.reads[key, byte_range] += 1
        self.wait()
        return super().get(key, byte_range)

    @override
    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        return await asyncio.to_thread(self.get, key, byte_range)


@pytest.fixture
def inner() -> CountedStore:
    return CountedStore(OBJECTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(inner: CountedStore, folder: Path) -> CachedWritableStore:
    return CachedWritableStore(inner, DiskCache(folder))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("objects-v1/??/*"))


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob("objects-v1/partial/*"))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not come to that"
        threading.Event().wait(0.002)


def grow_older(path: Path, seconds: float) -> None:
    status = path.stat()
    os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


class TestCachedStore(WritableStoreContract):
    @pytest.fixture(params=["empty", "filled", "unusable", "of one object"])
    def store(self, request: pytest.FixtureRequest, folder: Path) -> WritableStore:
        if request.param == "unusable":
            folder.write_bytes(b"a file where the folder should be")
        limit_bytes = 2 * BLOCK if request.param == "of one object" else 10**9
        store = CachedWritableStore(MemoryStore(OBJECTS), DiskCache(folder, limit_bytes))
        if request.param == "filled":
            for key in OBJECTS:
                store.get(key)
            store.get("ten", ByteRange(3, 7))
        return store


class TestCachedFolder(WritableStoreContract):
    @pytest.fixture
    def store(self, folder: Path, tmp_path: Path) -> Store:
        store: Any = open_store(tmp_path / "objects", cache=folder)
        for key, body in OBJECTS.items():
            store.put(key, body)
        return store


# -- what is kept


@pytest.mark.parametrize("byte_range", [None, ByteRange(3, 7)])
def test_what_was_read_is_read_once(
    store: CachedStore, inner: CountedStore, byte_range: ByteRange | None
) -> None:
    bodies = [bytes(store.get("ten", byte_range)) for _ in range(3)]
    bodies.append(bytes(asyncio.run(store.get_async("ten", byte_range))))

    expected = b"0123456789" if byte_range is None else b"3456"
    assert bodies == [expected] * 4
    assert inner.reads == {("ten", byte_range): 1}
    assert store.counts == (3, 1, 0, 1, 0, 0, 0)


def test_an_awaited_read_is_kept_too(store: CachedStore, inner: CountedStore) -> None:
    asyncio.run(store.get_async("large"))

    assert bytes(store.get("large")) == OBJECTS["large"]
    assert inner.reads.total() == 1


def test_each_range_is_an_entry_of_its_own(store: CachedStore, inner: CountedStore) -> None:
    wanted = [None, ByteRange(0, 10), ByteRange(0, 9), ByteRange(1, 10)]

    first, bodies = ([bytes(store.get("ten", one)) for one in wanted] for _ in range(2))

    assert first == bodies
    assert bodies == [b"0123456789", b"0123456789", b"012345678", b"123456789"]
    assert set(inner.reads.values()) == {1}
    assert len(inner.reads) == 4


def test_another_process_run_or_copy_of_the_store_finds_it(
    store: CachedStore, inner: CountedStore, folder: Path
) -> None:
    store.get("ten")
    other = CountedStore({}, inner.describe("").removeprefix("memory://").rstrip("/"))

    assert bytes(CachedStore(other, DiskCache(folder)).get("ten")) == b"0123456789"
    assert not other.reads


def test_a_pickle_holds_the_settings_alone(folder: Path) -> None:
    store = CachedStore(open_store("/data"), DiskCache(folder, 10**6, max_age_s=60), "endpoint")

    twin = pickle.loads(pickle.dumps(store))

    assert twin == store
    assert hash(twin) == hash(store)
    assert repr(folder)[12:-2] in repr(store)


def test_an_error_is_not_kept_and_leaves_nothing(
    store: CachedStore, inner: CountedStore, folder: Path
) -> None:
    with pytest.raises(KeyNotFoundError):
        store.get("a")
    with pytest.raises(KeyNotFoundError):
        asyncio.run(store.get_async("a"))
    assert not unfinished(folder)
    inner.put("a", b"there now")

    assert bytes(store.get("a")) == b"there now"


def test_what_is_put_or_deleted_through_the_store_is_forgotten(store: CachedWritableStore) -> None:
    store.get("ten")
    store.get("ten", ByteRange(3, 7))
    store.put("ten", b"9876543210")

    assert bytes(store.get("ten")) == b"9876543210"
    assert bytes(store.get("ten", ByteRange(3, 7))) == b"6543"
    store.delete("ten")
    with pytest.raises(KeyNotFoundError):
        store.get("ten")


def test_an_old_copy_that_cannot_be_removed_after_a_put_is_an_error(
    store: CachedWritableStore, folder: Path
) -> None:
    store.get("ten")
    ledger = folder / "objects-v1" / "ledger"
    ledger.unlink()
    ledger.mkdir()

    with pytest.raises(StoreError, match="what was kept of an object that was just written stays"):
        store.put("ten", b"new")


def test_an_entry_that_is_too_old_is_fetched_again(inner: CountedStore, folder: Path) -> None:
    store = CachedStore(inner, DiskCache(folder, max_age_s=HOUR_S))
    store.get("ten")
    [entry] = entries(folder)
    grow_older(entry, HOUR_S - 60)
    store.get("ten")
    assert inner.reads.total() == 1
    inner.put("ten", b"has changed")

    grow_older(entry, 61)

    assert bytes(store.get("ten")) == b"has changed"
    assert bytes(store.get("ten")) == b"has changed"
    assert inner.reads.total() == 2


# -- the same object asked for by many


def test_threads_that_want_the_same_object_wait_for_one_download(folder: Path) -> None:
    inner = CountedStore({"a": b"0123456789"})
    store = CachedStore(inner, DiskCache(folder))
    inner.wait = lambda: wait_until(lambda: store.counts.num_waits == 15)

    with ThreadPoolExecutor(16) as threads:
        bodies = list(threads.map(store.get, ["a"] * 16))

    assert bodies == [b"0123456789"] * 16
    assert inner.reads.total() == 1


def test_tasks_that_want_the_same_object_wait_for_one_download(folder: Path) -> None:
    inner = CountedStore({"a": b"0123456789"})
    store = CachedStore(inner, DiskCache(folder))
    inner.wait = lambda: wait_until(lambda: store.counts.num_waits == 15)

    async def fetch_all() -> list[Buffer]:
        return await asyncio.gather(*(store.get_async("a") for _ in range(16)))

    assert asyncio.run(fetch_all()) == [b"0123456789"] * 16
    assert inner.reads.total() == 1


def test_who_waits_awaits_and_the_loop_goes_on(
    store: CachedStore, inner: CountedStore, folder: Path
) -> None:
    store.get("empty")  # makes the folder
    name = name_entry(store._digest("ten"), None).text

    async def fetch() -> list[Buffer]:
        descriptor = open_lock_file(str(folder / "objects-v1" / "partial" / name))
        assert try_lock(descriptor)
        waiting = asyncio.create_task(store.get_async("ten"))
        other = await store.get_async("large")
        assert not waiting.done()
        release(descriptor)
        return [other, await waiting]

    assert asyncio.run(fetch()) == [OBJECTS["large"], OBJECTS["ten"]]
    assert inner.reads["ten", None] == 1


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_download_that_takes_too_long_is_not_waited_for(
    inner: CountedStore, folder: Path, is_awaited: bool
) -> None:
    store = CachedStore(inner, DiskCache(folder, max_wait_s=0.05))
    store.get("empty")
    name = name_entry(store._digest("ten"), None).text
    descriptor = open_lock_file(str(folder / "objects-v1" / "partial" / name))
    assert try_lock(descriptor)

    body = asyncio.run(store.get_async("ten")) if is_awaited else store.get("ten")

    release(descriptor)
    assert bytes(body) == b"0123456789"
    assert store.counts.num_kept == 1
    assert store.counts.num_waits == 1


def test_a_cancelled_read_lets_others_fetch(store: CachedStore, inner: CountedStore) -> None:
    begun, is_over = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        is_over.wait(30)

    async def cancel() -> None:
        task = asyncio.create_task(store.get_async("ten"))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    inner.wait = wait
    loop_thread = threading.Thread(target=lambda: asyncio.run(cancel()))
    loop_thread.start()
    assert begun.wait(30)
    inner.wait = lambda: None

    assert bytes(store.get("ten")) == b"0123456789"
    is_over.set()
    loop_thread.join()


# -- the limit


@pytest.mark.parametrize("limit_bytes", [BLOCK, 10 * BLOCK, 37 * BLOCK + 1])
def test_the_limit_holds_and_the_cache_is_used(folder: Path, limit_bytes: int) -> None:
    objects = {str(number): bytes(number * 97 % 12_000) for number in range(300)}
    store = CachedStore(MemoryStore(objects), DiskCache(folder, limit_bytes))

    held: list[int] = []
    for key, body in objects.items():
        assert bytes(store.get(key)) == body
        if int(key) % 7 == 0:
            held.append(count_bytes(folder))

    assert max(held) <= limit_bytes
    assert max(held) > 0.6 * limit_bytes
    assert store.counts.num_evicted > 100
    assert not unfinished(folder)


def test_what_was_used_longest_ago_goes_first(folder: Path) -> None:
    objects = {str(number): bytes(BLOCK - HEADER_BYTES) for number in range(11)}
    inner = CountedStore(objects)
    store = CachedStore(inner, DiskCache(folder, 10 * BLOCK))
    for number in range(10):
        store.get(str(number))
        for entry in entries(folder):
            grow_older(entry, HOUR_S)
    store.get("0")

    store.get("10")

    inner.reads.clear()
    for number in (0, 3, 4, 5, 6, 7, 8, 9, 10):
        store.get(str(number))
    assert not inner.reads
    assert store.counts.num_evicted == 2  # one, and a twentieth of the limit to spare


@pytest.mark.slow
def test_of_many_entries_the_old_go_first_though_only_a_sample_is_looked_at(folder: Path) -> None:
    objects = {str(number): b"body" for number in range(2600)}
    inner = CountedStore(objects)
    store = CachedStore(inner, DiskCache(folder, 2500 * BLOCK))
    keys = list(objects)
    for key in keys[:1700]:
        store.get(key)
    for entry in entries(folder):
        grow_older(entry, HOUR_S)

    for key in keys[1700:]:
        store.get(key)

    assert count_bytes(folder) <= 2500 * BLOCK
    assert 100 <= store.counts.num_evicted <= 300
    inner.reads.clear()
    for key in keys[1700:]:
        store.get(key)
    assert not inner.reads


def test_use_is_noted_once_a_minute(store: CachedStore, folder: Path) -> None:
    store.get("ten")
    [entry] = entries(folder)

    def is_noted_after(seconds: float) -> bool:
        grow_older(entry, seconds)
        before = entry.stat()
        store.get("ten")
        # The system notes reads too, in its own way, but only a call sets the time of change.
        assert entry.stat().st_mtime == before.st_mtime
        return entry.stat().st_ctime_ns != before.st_ctime_ns

    assert not is_noted_after(40)
    assert is_noted_after(90)
    assert entry.stat().st_atime > time.time() - 30


def test_a_smaller_limit_holds_when_the_folder_is_opened_anew(folder: Path) -> None:
    objects = {str(number): bytes(BLOCK) for number in range(50)}
    large = CachedStore(MemoryStore(objects), DiskCache(folder, 10**9))
    for key in objects:
        large.get(key)

    CachedStore(MemoryStore(objects), DiskCache(folder, 20 * BLOCK)).get("0")

    assert 0 < count_bytes(folder) <= 20 * BLOCK


def test_an_object_above_the_limit_is_read_and_not_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = CountedStore(OBJECTS)
    store = CachedStore(inner, DiskCache(folder, 10 * BLOCK))

    for _ in range(2):
        assert bytes(store.get("large")) == OBJECTS["large"]
    store.get("ten")

    assert store.counts.num_not_kept == 2
    assert len(entries(folder)) == 1
    assert not unfinished(folder)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "262144 bytes" in caplog.text


@pytest.mark.parametrize("damage", ["removed", "cut", "of another boot"])
def test_the_bytes_are_counted_anew_where_the_ledger_cannot_be_trusted(
    folder: Path, damage: str
) -> None:
    objects = {str(number): bytes(BLOCK) for number in range(30)}
    settings = DiskCache(folder, 40 * BLOCK)
    CachedStore(MemoryStore(objects), settings).get("0")
    for number in range(1, 20):
        CachedStore(MemoryStore(objects), settings).get(str(number))
    ledger = folder / "objects-v1" / "ledger"
    if damage == "removed":
        ledger.unlink()
    elif damage == "cut":
        ledger.write_bytes(ledger.read_bytes()[:100])
    else:
        content = ledger.read_bytes()
        ledger.write_bytes(content[:8] + b"x" * 36 + bytes(len(content) - 44))

    store = CachedStore(MemoryStore(objects), settings)
    for key in objects:
        store.get(key)

    assert count_bytes(folder) <= 40 * BLOCK


# -- what is never served


def flip(position: int) -> Callable[[bytes], bytes]:
    def flip_it(whole: bytes) -> bytes:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        return bytes(damaged)

    return flip_it


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut in the header": lambda whole: whole[: HEADER_BYTES - 1],
    "cut after the header": lambda whole: whole[:HEADER_BYTES],
    "cut by a byte": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"x",
    "zeros": lambda whole: bytes(len(whole)),
    "body of zeros": lambda whole: whole[:HEADER_BYTES] + bytes(len(whole) - HEADER_BYTES),
    "first bit": flip(0),
    "bit of the checksum": flip(9),
    "bit of the length": flip(13),
    "bit of the identity": flip(21),
    "first bit of the body": flip(HEADER_BYTES),
    "last bit": flip(-1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_fetched_again_and_replaced(
    store: CachedStore, inner: CountedStore, folder: Path, damage: str
) -> None:
    store.get("ten")
    [entry] = entries(folder)
    entry.write_bytes(DAMAGES[damage](entry.read_bytes()))

    bodies = [bytes(store.get("ten")), bytes(asyncio.run(store.get_async("ten")))]

    assert bodies == [b"0123456789"] * 2
    assert inner.reads.total() == 2
    assert store.counts.num_wrong == 1


def test_an_entry_under_the_name_of_another_is_not_served(
    store: CachedStore, inner: CountedStore, folder: Path
) -> None:
    store.get("ten", ByteRange(0, 5))
    [entry] = entries(folder)
    store.get("ten", ByteRange(5, 10))
    [other] = [path for path in entries(folder) if path != entry]
    other.write_bytes(entry.read_bytes())

    assert bytes(store.get("ten", ByteRange(5, 10))) == b"56789"
    assert inner.reads["ten", ByteRange(5, 10)] == 2


NAMES = st.builds(
    EntryName,
    st.binary(min_size=20, max_size=20),
    st.integers(0, 2**62),
    st.integers(-1, 2**62),
)


@given(NAMES, st.binary(max_size=200), st.data())
def test_no_flipped_bit_passes(name: EntryName, body: bytes, data: st.DataObject) -> None:
    whole = bytearray(pack_header(name, body) + body)
    assert is_whole(name, bytes(whole[:HEADER_BYTES]), bytes(whole[HEADER_BYTES:]))

    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= 1 << data.draw(st.integers(0, 7))

    assert not is_whole(name, bytes(whole[:HEADER_BYTES]), bytes(whole[HEADER_BYTES:]))


@given(NAMES, NAMES, st.binary(max_size=50))
def test_an_entry_is_that_of_its_own_name_alone(
    name: EntryName, other: EntryName, body: bytes
) -> None:
    assert is_whole(other, pack_header(name, body), body) == (name == other)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99))),
    st.integers(-5, 100),
    st.integers(0, 40),
)
def test_eviction_takes_the_oldest_and_no_more_than_needed(
    files: list[tuple[int, int]], wanted: int, most: int
) -> None:
    sample = [Found(str(number), size, used) for number, (size, used) in enumerate(files)]

    chosen = plan_eviction(sample, wanted, most)

    left = [entry for entry in sample if entry not in chosen]
    freed = sum(entry.charge_bytes for entry in chosen)
    assert all(old.used_ns <= young.used_ns for old in chosen for young in left)
    assert freed >= wanted or not left or len(chosen) == most
    if chosen:
        assert freed - chosen[-1].charge_bytes < wanted
    assert len(chosen) <= most


@given(st.integers(0, 2**40))
def test_a_file_is_charged_by_whole_blocks(file_bytes: int) -> None:
    charge = charge_bytes(file_bytes)

    assert charge % BLOCK == 0
    assert file_bytes <= charge < file_bytes + BLOCK


# -- whose it is


def open_bucket(url: str, folder: Path, endpoint_url: str = "http://one") -> Any:
    credentials = Credentials("ACCESSKEYID", "SECRETACCESSKEY", "SESSIONTOKEN")
    return open_store(url, endpoint_url=endpoint_url, credentials=credentials, cache=folder)


def test_an_object_is_known_by_its_endpoint_bucket_and_full_key(folder: Path) -> None:
    def digest(url: str, key: str, endpoint_url: str = "http://one") -> bytes:
        return open_bucket(url, folder, endpoint_url)._digest(key)

    here = digest("s3://bucket/a", "b/c")

    assert digest("s3://bucket/a/b", "c") == digest("s3://bucket", "a/b/c") == here
    assert digest("s3://bucket/a", "b/c", "http://two") != here
    assert digest("s3://other/a", "b/c") != here
    assert digest("s3://bucket/a", "b/d") != here


ODD_KEYS = [
    "../../../../escaped",
    "..",
    "/escaped",
    "a/../../../escaped",
    "a\0b",
    "~/escaped",
    "%2e%2e/escaped",
    "x" * 5000,
    "\ud800",
    "line\nbreak",
    "partial/x",
    ".",
]


@pytest.mark.parametrize("key", ODD_KEYS)
@pytest.mark.parametrize("byte_range", [None, ByteRange(1, 3)])
def test_no_key_leads_out_of_the_folder(
    tmp_path: Path, folder: Path, key: str, byte_range: ByteRange | None
) -> None:
    store = CachedStore(MemoryStore({key: b"body"}), DiskCache(folder))

    assert [bytes(store.get(key, byte_range)) for _ in range(2)] in ([b"body"] * 2, [b"od"] * 2)

    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    for file in files:
        assert re.fullmatch(r"cache/objects-v1/(ledger|([0-9a-f]{2})/\2[0-9a-f]{38}(\.1-3)?)", file)
    assert store.counts.num_hits == 1


def test_only_the_owner_can_open_what_is_kept(store: CachedStore, folder: Path) -> None:
    store.get("ten")

    modes = {path: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}

    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_a_folder_that_others_can_write_is_neither_read_nor_written(
    store: CachedStore, inner: CountedStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.get("ten")
    (folder / "objects-v1").chmod(0o777)
    twin = CachedStore(inner, DiskCache(folder))

    for _ in range(2):
        assert bytes(twin.get("ten")) == b"0123456789"

    assert inner.reads.total() == 3
    assert len(caplog.records) == 1
    assert "can be written by others" in caplog.text


def test_no_secret_and_no_key_is_on_the_disk(object_server: ObjectServer, folder: Path) -> None:
    object_server.put_objects("photos", {"private-name.jpg": b"body"})
    store = open_store(
        "s3://photos",
        client="http",
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
        cache=DiskCache(folder),
    )

    for _ in range(2):
        assert bytes(store.get("private-name.jpg")) == b"body"

    held = b"".join(
        bytes(path) + (path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    )
    assert b"body" in held
    for word in (object_server.access_key, object_server.secret_key, "private-name", "photos"):
        assert word.encode() not in held
    assert object_server.secret_key not in repr(store)
    assert object_server.counters().num_gets == 1


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_bytes": 0}, "limit_bytes: got 0 bytes"),
        ({"max_age_s": -1.0}, "max_age_s: got -1"),
        ({"max_age_s": float("nan")}, "max_age_s: got nan"),
        ({"max_wait_s": -0.1}, "max_wait_s: got -0.1"),
        ({"max_wait_s": float("inf")}, "max_wait_s: got inf"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiskCache("folder", **settings)


def test_memory_is_not_cached_on_disk(folder: Path) -> None:
    with pytest.raises(ValueError, match="cache: got one for 'memory://a'"):
        open_store("memory://a", cache=folder)


def test_a_folder_alone_means_the_defaults(folder: Path) -> None:
    assert open_bucket("s3://bucket", folder) == open_store(
        "s3://bucket",
        endpoint_url="http://one",
        credentials=Credentials("ACCESSKEYID", "SECRETACCESSKEY", "SESSIONTOKEN"),
        cache=DiskCache(str(folder)),
    )


def test_what_lists_and_writes_still_does(folder: Path) -> None:
    assert isinstance(open_bucket("s3://bucket", folder), WritableStore)
    assert not isinstance(open_store("http://host/folder", cache=folder), WritableStore)


def write_credentials(server: ObjectServer, folder: Path) -> Path:
    path = folder / "credentials.json"
    content = {
        "access_key": server.access_key,
        "secret": server.secret_key,
        "train_index_file_download_url": "s3://meta/train.json",
    }
    path.write_text(json.dumps(content))
    return path


def test_a_data_set_takes_the_cache_and_its_index_is_always_fresh(
    object_server: ObjectServer, folder: Path, tmp_path: Path
) -> None:
    object_server.put_objects("photos", {"a/1.jpg": b"1", "a/2.jpg": b"2"})
    object_server.put_objects("meta", {"train.json": b'["a/1.jpg"]'})

    def open_images(name: str) -> S3Dataset:
        return S3Dataset(
            "photos",
            tmp_path / name,
            split="train",
            s3_credential_file=write_credentials(object_server, tmp_path),
            endpoint_url=object_server.endpoint_url,
            client="http",
            decode=None,
            cache=folder,
        )

    first = open_images("one.json")
    assert first[0][0] == b"1"
    object_server.put_objects("meta", {"train.json": b'["a/1.jpg", "a/2.jpg"]'})
    second = open_images("two.json")
    object_server.reset_counters()

    assert second[0][0] == b"1"
    assert object_server.counters().num_gets == 0
    assert second[1][0] == b"2"


def test_the_index_of_shards_is_always_fresh_and_samples_are_kept(
    object_server: ObjectServer, folder: Path, tmp_path: Path
) -> None:
    write_split(tmp_path / "packed", "train", 5)
    object_server.put_folder("photos", tmp_path / "packed")
    shards = open_dataset(
        "s3://photos",
        endpoint_url=object_server.endpoint_url,
        client="http",
        s3_credential_file=write_credentials(object_server, tmp_path),
        cache=folder,
    )
    assert not entries(folder)

    shards[0]

    assert len(entries(folder)) == 1
    object_server.reset_counters()
    shards[0]
    assert object_server.counters().num_requests == 0
