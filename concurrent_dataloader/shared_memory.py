"""Shared memory of torch's that leaves nothing behind where it cannot be had."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys

import torch
from torch.multiprocessing import get_sharing_strategy

_FOLDER = "/dev/shm"
_NAME_IN_ERROR = re.compile(r"</(torch_[^/>]+)>")


def reserve(num_bytes: int) -> torch.UntypedStorage:
    """Reserve zeros that processes can share, in all of which they are the same bytes.

    Raises:
        RuntimeError: There is not so much.
    """
    check_room(num_bytes)
    try:
        storage = torch.UntypedStorage._new_shared(num_bytes)
    except RuntimeError as error:
        remove_name(error)
        raise
    _claim_pages(storage)
    return storage


def check_room(num_bytes: int) -> None:
    """Raise as torch would if there is not so much to be had just now.

    torch 2.6 only sets a size, and whoever writes to what is not there is killed by SIGBUS; 2.15
    asks for the memory. What others take meanwhile is not seen.

    Raises:
        RuntimeError: There is less.
    """
    try:
        system = os.statvfs(_FOLDER)
    except OSError:
        return
    free_bytes = system.f_bavail * system.f_frsize
    if system.f_blocks and free_bytes < num_bytes:
        raise RuntimeError(
            f"unable to reserve {num_bytes} bytes of shared memory: {free_bytes} are free"
        )


def _claim_pages(storage: torch.UntypedStorage) -> None:
    """Have the system find the memory now, for the reason in `check_room`."""
    if sys.platform != "linux" or get_sharing_strategy() != "file_descriptor":
        return
    descriptor, num_bytes = storage._share_fd_cpu_()  # torch's own, which it keeps
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise RuntimeError(
                f"unable to reserve {num_bytes} bytes of shared memory: {error.strerror}"
            ) from error


def is_shortage(error: RuntimeError) -> bool:
    """Say whether torch could have no shared memory; it has no class for that."""
    return "unable to" in str(error) and any(
        word in str(error) for word in ("shared memory", "shm", "mmap", "resize file")
    )


def remove_name(error: RuntimeError) -> None:
    """Remove the name of what could not be had, which torch leaves in the file system then."""
    for name in _NAME_IN_ERROR.findall(str(error)):
        with contextlib.suppress(OSError):
            os.unlink(f"{_FOLDER}/{name}")


def describe() -> str:
    """Say how much there is."""
    try:
        system = os.statvfs(_FOLDER)
    except OSError:
        return f"{_FOLDER} cannot be asked for its size"
    size_mib, free_mib = (
        blocks * system.f_frsize / 2**20 for blocks in (system.f_blocks, system.f_bavail)
    )
    return f"{_FOLDER} has {size_mib:.4g} MiB, of which {free_mib:.4g} MiB are free"
