from __future__ import annotations

import pytest

from concurrent_dataloader.stores import open_store
from concurrent_dataloader.stores._memory import MemoryStore
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
