from __future__ import annotations

import threading

import pytest

from concurrent_dataloader.stores import open_store
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.base import PerProcess
from tests.stores.contract import OBJECTS, WritableStoreContract


class TestMemoryStore(WritableStoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore(OBJECTS, "name")


def test_one_name_is_one_store() -> None:
    first, second = open_store("memory://test-shared"), open_store("memory://test-shared")

    assert first is second
    assert open_store("memory://test-other") is not first


def test_a_repr_does_not_hold_the_objects() -> None:
    assert "0123456789" not in repr(MemoryStore(OBJECTS))


def test_a_value_is_dropped_while_another_one_is_being_opened() -> None:
    """The collector may find the first in a thread that the opening of the second waits for."""
    dropped: list[str] = []
    forgotten = [PerProcess(lambda: "value", dropped.append)]
    forgotten[0].get()

    def open_value() -> str:
        thread = threading.Thread(target=forgotten.clear)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()
        return "other"

    other = PerProcess(open_value, dropped.append)

    assert other.get() == "other"
    assert dropped == ["value"]
