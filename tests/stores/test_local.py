from __future__ import annotations

import os
import pathlib
import stat

import pytest

from concurrent_dataloader.errors import AccessDeniedError, KeyNotFoundError
from concurrent_dataloader.stores import open_store
from concurrent_dataloader.stores._local import LocalStore
from tests.stores.contract import OBJECTS, WritableStoreContract


def write_objects(folder: pathlib.Path) -> None:
    for key, body in OBJECTS.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


class TestLocalStore(WritableStoreContract):
    @pytest.fixture
    def store(self, tmp_path: pathlib.Path) -> LocalStore:
        write_objects(tmp_path)
        return LocalStore(tmp_path)


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_path_and_a_file_url_open_the_same_folder(tmp_path: pathlib.Path, form: str) -> None:
    write_objects(tmp_path)

    store = open_store(form.format(tmp_path))

    assert store == open_store(tmp_path)
    assert bytes(store.get("ten")) == b"0123456789"


def test_a_file_url_with_a_host_is_an_error() -> None:
    with pytest.raises(ValueError, match="three slashes"):
        open_store("file://folder/x")


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/hostname"])
def test_no_key_leads_out_of_the_folder(tmp_path: pathlib.Path, key: str) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    (tmp_path / "inside").mkdir()
    store = LocalStore(tmp_path / "inside")

    with pytest.raises(KeyNotFoundError):
        store.get(key)
    with pytest.raises(KeyNotFoundError, match="inside the folder"):
        store.put(key, b"y")
    with pytest.raises(KeyNotFoundError, match="inside the folder"):
        store.delete(key)

    assert (tmp_path / "outside").read_bytes() == b"x"


def test_two_dots_inside_a_name_are_allowed(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)

    store.put("a..b", b"x")

    assert bytes(store.get("a..b")) == b"x"


def test_a_put_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    store.put("key", b"old")

    with pytest.raises(TypeError):
        store.put("key", "no buffer")  # pyright: ignore[reportArgumentType]: the point of the test

    assert os.listdir(tmp_path) == ["key"]
    assert bytes(store.get("key")) == b"old"


def test_a_file_that_may_not_be_read_is_access_denied(tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path)
    store.put("key", b"x")
    (tmp_path / "key").chmod(0)
    own = os.geteuid()

    if own == 0:  # root may read anything
        os.seteuid(65534)
    try:
        with pytest.raises(AccessDeniedError, match="key"):
            store.get("key")
    finally:
        os.seteuid(own)


def test_links_are_followed_but_not_in_circles(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")

    keys = [info.key for info in LocalStore(tmp_path).list()]

    assert keys == ["link/file", "real/file"]


def test_a_link_to_nothing_is_listed_and_named_when_it_is_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    store = LocalStore(tmp_path)

    listed = [(info.key, info.size_bytes) for info in store.list()]

    assert listed == [("file", 1), ("link", 0)]
    with pytest.raises(KeyNotFoundError, match="link"):
        store.get("link")


def test_a_fifo_is_no_object(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)

    with pytest.raises(KeyNotFoundError):
        LocalStore(tmp_path).head("fifo")
    assert list(LocalStore(tmp_path).list()) == []


def test_listing_a_folder_that_is_not_there_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(KeyNotFoundError, match="no such folder"):
        list(LocalStore(tmp_path / "none").list())
