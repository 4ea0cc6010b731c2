"""What each store must do, whatever it talks to; a store's test class subclasses one of these."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from concurrent_dataloader.errors import ByteRangeError, KeyNotFoundError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import SizedStore, Store, WritableStore

OBJECTS = {
    "ten": b"0123456789",
    "empty": b"",
    "folder/a b+c.jpg": b"a name with a space and a plus",
    "folder/n\u00fcrnberg%20#1?.jpg": b"a name with what URLs treat in a special way",
    "folder.zip": b"sorts between the folder's name and its slash",
    "large": bytes(range(256)) * 1024,
}
"""What the ``store`` fixture of each subclass holds."""


class StoreContract:
    """Reading."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("give a store that holds OBJECTS")

    @pytest.mark.parametrize("key", OBJECTS)
    def test_get_gives_the_whole_object(self, store: Store, key: str) -> None:
        assert bytes(store.get(key)) == OBJECTS[key]

    @pytest.mark.parametrize("key", OBJECTS)
    def test_get_async_gives_the_whole_object(self, store: Store, key: str) -> None:
        assert bytes(asyncio.run(store.get_async(key))) == OBJECTS[key]

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 10), (0, 1), (3, 7), (9, 10), (0, 0), (10, 10)]
    )
    def test_a_range_is_what_slicing_gives(self, store: Store, start: int, stop: int) -> None:
        wanted = ByteRange(start, stop)

        blocking = bytes(store.get("ten", wanted))
        awaited = bytes(asyncio.run(store.get_async("ten", wanted)))

        assert blocking == awaited == b"0123456789"[start:stop]

    @pytest.mark.parametrize(("start", "stop"), [(5, 11), (10, 11), (20, 30)])
    def test_a_range_past_the_end_is_an_error_that_names_the_object(
        self, store: Store, start: int, stop: int
    ) -> None:
        with pytest.raises(ByteRangeError, match="ten"):
            store.get("ten", ByteRange(start, stop))
        with pytest.raises(ByteRangeError, match="ten"):
            asyncio.run(store.get_async("ten", ByteRange(start, stop)))

    @pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 2)])
    def test_a_range_that_is_none_is_a_value_error(
        self, store: Store, start: int, stop: int
    ) -> None:
        with pytest.raises(ValueError, match="byte_range"):
            store.get("ten", ByteRange(start, stop))

    @pytest.mark.parametrize("key", ["missing", "folder", "folder/", ""])
    def test_a_key_without_object_is_an_error_that_is_also_a_file_not_found(
        self, store: Store, key: str
    ) -> None:
        with pytest.raises(KeyNotFoundError) as blocking:
            store.get(key)
        with pytest.raises(KeyNotFoundError):
            asyncio.run(store.get_async(key))

        assert isinstance(blocking.value, FileNotFoundError)
        assert key in str(blocking.value)

    def test_64_threads_share_one_client(self, store: Store) -> None:  # I-21
        keys = list(OBJECTS) * 32

        with ThreadPoolExecutor(64) as threads:
            bodies = list(threads.map(store.get, keys))

        assert [bytes(body) for body in bodies] == [OBJECTS[key] for key in keys]

    def test_64_tasks_share_one_client(self, store: Store) -> None:
        async def fetch_all(keys: list[str]) -> list[bytes]:
            bodies = await asyncio.gather(*(store.get_async(key) for key in keys))
            return [bytes(body) for body in bodies]

        keys = list(OBJECTS) * 11

        assert asyncio.run(fetch_all(keys)) == [OBJECTS[key] for key in keys]

    def test_several_event_loops_read_at_once(self, store: Store) -> None:
        async def fetch_twice() -> bytes:
            await store.get_async("ten")
            return bytes(await store.get_async("ten"))

        with ThreadPoolExecutor(3) as threads:
            futures = [threads.submit(asyncio.run, fetch_twice()) for _ in range(3)]

        assert [future.result() for future in futures] == [b"0123456789"] * 3

    def test_a_cancelled_read_leaves_the_store_usable(self, store: Store) -> None:
        async def cancel_then_read() -> bytes:
            task = asyncio.create_task(store.get_async("large"))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or bytes(task.result()) == OBJECTS["large"]
            return bytes(await store.get_async("ten"))

        assert asyncio.run(cancel_then_read()) == b"0123456789"

    def test_a_closed_store_opens_again_when_it_is_used(self, store: Store) -> None:
        store.get("ten")
        store.close()
        store.close()

        assert bytes(store.get("ten")) == b"0123456789"

    def test_a_used_store_pickles_to_an_equal_one(self, store: Store) -> None:
        store.get("ten")

        twin = pickle.loads(pickle.dumps(store))

        assert twin == store
        assert bytes(twin.get("ten")) == b"0123456789"
        twin.close()

    def test_an_object_is_described_by_its_key(self, store: Store) -> None:
        assert store.describe("folder/x.jpg").endswith("/folder/x.jpg")


class SizedStoreContract(StoreContract):
    """Reading, and asking for sizes."""

    @pytest.mark.parametrize("key", OBJECTS)
    def test_head_gives_the_size(self, store: SizedStore, key: str) -> None:
        assert store.head(key) == (key, len(OBJECTS[key]))

    def test_head_of_a_missing_object_is_an_error(self, store: SizedStore) -> None:
        with pytest.raises(KeyNotFoundError, match="missing"):
            store.head("missing")


class WritableStoreContract(SizedStoreContract):
    """Reading, listing and writing."""

    def test_list_is_sorted_by_key_as_bytes_are(self, store: WritableStore) -> None:
        listed = list(store.list())

        assert [info.key for info in listed] == sorted(OBJECTS, key=str.encode)
        assert all(info.size_bytes == len(OBJECTS[info.key]) for info in listed)

    @pytest.mark.parametrize("prefix", ["folder", "folder/", "folder/a", "t", "none/such", "e"])
    def test_list_finds_what_begins_with_the_prefix(
        self, store: WritableStore, prefix: str
    ) -> None:
        keys = [info.key for info in store.list(prefix)]

        assert keys == sorted(key for key in OBJECTS if key.startswith(prefix))

    @pytest.mark.parametrize("after", ["empty", "folder.zip", "folder/a b+c.jpg", "g", "zzz"])
    def test_list_goes_on_after_a_key(self, store: WritableStore, after: str) -> None:
        keys = [info.key for info in store.list(start_after=after)]

        assert keys == sorted(key for key in OBJECTS if key > after)

    def test_put_writes_and_replaces(self, store: WritableStore) -> None:
        store.put("new/folder/object", b"first")
        store.put("new/folder/object", bytearray(b"second"))
        store.put("ten", memoryview(b"another"))

        assert bytes(store.get("new/folder/object")) == b"second"
        assert bytes(store.get("ten")) == b"another"
        assert store.head("new/folder/object").size_bytes == 6

    def test_put_of_nothing_makes_an_empty_object(self, store: WritableStore) -> None:
        store.put("nothing", b"")

        assert bytes(store.get("nothing")) == b""

    def test_delete_removes_once_and_is_quiet_the_second_time(self, store: WritableStore) -> None:
        store.delete("ten")
        store.delete("ten")

        with pytest.raises(KeyNotFoundError):
            store.get("ten")
