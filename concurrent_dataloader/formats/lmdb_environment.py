"""LMDB environments: one a file and process, opened safely, closed when nobody reads there."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from concurrent_dataloader.errors import MissingDependencyError, ShardFormatError

if TYPE_CHECKING:
    import lmdb


def import_lmdb() -> Any:
    """Import the client library, which is an extra."""
    try:
        import lmdb
    except ImportError as error:
        raise MissingDependencyError(
            "LMDB databases need the package lmdb, which is not installed; run `pip install lmdb`"
        ) from error
    return lmdb


def explain(where: str, error: Exception) -> str:
    """Say what the client library found wrong, in one line."""
    reason = " ".join(str(error).split()).removeprefix(f"{where}: ")
    return f"{where}: {reason}"


@contextlib.contextmanager
def naming_damage(where: str) -> Generator[None]:
    """Say of what the client library finds wrong in a database which database it is."""
    try:
        yield
    except import_lmdb().Error as error:
        if isinstance(error.__context__, GeneratorExit):
            return  # a scan that a fork has taken along, whose environment the child has closed
        raise ShardFormatError(
            f"{explain(where, error)}; the database is damaged: copy it again, or write it anew"
        ) from error


# -- environments, one a file and process


class _Shared:
    """An environment that is open in this process, and how many leases hold it open."""

    __slots__ = ("environment", "num_leases")

    def __init__(self, environment: lmdb.Environment) -> None:
        self.environment = environment
        self.num_leases = 0


# By device and inode. Guarded by `_opening`, and so is closing: an environment that dies by itself,
# when nothing refers to it any more, is still open to LMDB while another thread finds it gone.
_opened: dict[tuple[int, int], _Shared] = {}
_opening = threading.RLock()


class Lease:
    """Holds an environment open for a file, or for a scan under way, until it dies itself."""

    def __init__(self, key: tuple[int, int], shared: _Shared) -> None:
        self.environment = shared.environment
        shared.num_leases += 1
        weakref.finalize(self, _give_back, key, shared).atexit = False


def _give_back(key: tuple[int, int], shared: _Shared) -> None:
    with _opening:
        shared.num_leases -= 1
        if not shared.num_leases:
            if _opened.get(key) is shared:
                del _opened[key]
            shared.environment.close()


def _close_inherited() -> None:
    """After a fork: a child opens databases itself. Closing its copies leaves the parent's alone.

    Without lock files that is no more than to unmap and to close a descriptor of the child's.
    """
    global _opening
    _opening = threading.RLock()
    for shared in list(_opened.values()):
        shared.environment.close()
    _opened.clear()


os.register_at_fork(after_in_child=_close_inherited)


def open_lease(path: Path, readahead: bool) -> Lease:
    """Open a database, or take part in its environment if this process has it open."""
    data_path = find_data_file(path)
    with _opening:
        while True:
            status = data_path.stat()
            key = status.st_dev, status.st_ino
            shared = _opened.get(key)
            if shared is None:
                shared = _Shared(_open_environment(path, data_path, status.st_size, readahead))
                _opened[key] = shared
            lease = Lease(key, shared)
            # Memory may have been collected in between, and with it the last lease of another.
            if _opened.get(key) is shared:
                return lease


def _open_environment(
    path: Path, data_path: Path, size_bytes: int, readahead: bool
) -> lmdb.Environment:
    lmdb = import_lmdb()
    try:
        environment = lmdb.open(
            os.fspath(path),
            subdir=data_path != path,
            readonly=True,
            create=False,
            lock=False,
            readahead=readahead,
        )
    except (lmdb.Error, OSError) as error:
        _refuse(data_path, size_bytes, error)
    try:
        check_whole(environment, data_path, size_bytes)
    except ShardFormatError:
        environment.close()
        raise
    return environment


def find_data_file(path: Path) -> Path:
    """Give the file that holds a database's data.

    Raises:
        FileNotFoundError: There is none.
    """
    data_path = path / "data.mdb" if path.is_dir() else path
    if not data_path.exists():
        inside = sorted(each.name for each in path.glob("*.lmdb"))
        if inside:
            raise FileNotFoundError(
                f"{path}: a folder of {len(inside)} LMDB databases, expected one; give {inside[0]} "
                "in it, or another one"
            )
        raise FileNotFoundError(
            f"{path}: no such LMDB database; write one with `concurrent-dataloader lmdb`"
        )
    return data_path


def _refuse(path: Path, size_bytes: int, error: Exception) -> NoReturn:
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: may not be read; check its rights") from error
    if "already open in this process" in str(error):
        raise ValueError(
            f"{path}: this process has it open through lmdb itself, and LMDB must not have a file"
            " open twice in one process; close that environment first"
        ) from error
    raise ShardFormatError(
        f"{path}: got {size_bytes} bytes that are no LMDB database ({explain(str(path), error)});"
        " copy it again, or write it anew"
    ) from error


def check_whole(environment: lmdb.Environment, path: Path, size_bytes: int) -> None:
    """Raise if the file ends before its last page; the kernel would kill whoever reads on."""
    pages = environment.info()["last_pgno"] + 1
    expected = pages * environment.stat()["psize"]
    if size_bytes < expected:
        raise ShardFormatError(
            f"{path}: got {size_bytes} bytes, expected {expected} or more; the database was cut"
            " short: copy it again, or write it anew"
        )
