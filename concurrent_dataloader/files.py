"""Files on this machine that are there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from typing_extensions import Buffer


class ReadableStore(Protocol):
    """The part of a store that a download needs."""

    def get(self, key: str) -> Buffer:
        """Read an object whole."""
        ...


def is_link_to_nothing(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a link whose target is not there."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def is_hidden(name: str) -> bool:
    """Tell whether a file, or a folder that holds it, is hidden, or is what macOS leaves."""
    return name.startswith((".", "__MACOSX/")) or "/." in name


def write_whole(path: Path, pieces: Iterable[Buffer]) -> None:
    """Write ``pieces``, one after the other, so that readers see the old file, the new one or none.

    Several processes may write the same path at once: the last one wins. If a piece cannot be made
    or written, the path stays as it was and nothing is left beside it.

    A link stays, and what it points to is written. A pipe, a terminal or another device stays what
    it is and gets the pieces as they come, and so does a file that is this process's output, such
    as ``/dev/stdout``: these may be left with a part of them.

    Args:
        path: File to write; its folder is made if it is not there.
        pieces: Content, in order.

    Raises:
        OSError: The folder cannot be written to, the disk is full, or the path is something that
            no file can be written to: a folder, a disk, a socket. What making a piece raises comes
            as it is.
    """
    failed: list[OSError] = []

    def watched() -> Iterator[Buffer]:
        try:
            yield from pieces
        except OSError as error:
            failed.append(error)
            raise

    try:
        if is_written_as_it_stands(path):
            with open(_open_as_it_stands(path), "wb") as file:
                file.writelines(watched())
            return
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(target, watched())
    except OSError as error:
        if error in failed:  # of a store, for instance, and not of this folder
            raise
        # The name of the temporary file says nothing to whoever asked for this one.
        raise type(error)(
            error.errno, f"{error.strerror}; check the folder and its rights", str(path)
        ) from error


def is_written_as_it_stands(path: Path) -> bool:
    """Tell whether `write_whole` writes to what is there, and so leaves no file to be read again.

    Raises:
        OSError: It can neither be written to nor be replaced.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    if _find_stream(found) is not None:
        return True
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISBLK(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EINVAL, "a disk or a socket, expected a file or a pipe", str(path))
    return not stat.S_ISREG(found.st_mode)


def _find_stream(found: os.stat_result) -> int | None:
    """Give the descriptor of this process's output that a file is, as that of /dev/stdout."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(stream)):
                return stream
    return None


def _open_as_it_stands(path: Path) -> int:
    stream = _find_stream(os.stat(path))
    if stream is None:
        return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    if sys.stdout is not None:
        sys.stdout.flush()  # what was printed before is to stand before
    return os.dup(stream)  # a socket cannot be opened, nor may a file be begun anew


def _write_whole(path: Path, pieces: Iterable[Buffer]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    # Not tempfile: its files are closed to everybody but the owner, and data sets are shared.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def fetch_file_if_missing(path: str | os.PathLike[str], store: ReadableStore, key: str) -> Path:
    """Read ``path`` from a store, unless it is already there.

    A file that is there is never looked at again: remove it to have a newer one.

    Args:
        path: Where the file is to be.
        store: Where it comes from, asked only if the file is missing.
        key: Its name there; a leading slash is no part of it.

    Returns:
        The path, which now exists.

    Raises:
        StoreError: The store does not give it; nothing is written then.
        OSError: It cannot be written.
    """
    path = Path(path)
    if not path.exists():
        write_whole(path, [store.get(key.lstrip("/"))])
    return path
