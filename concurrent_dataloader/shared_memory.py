"""Shared memory of torch's that leaves nothing behind where it cannot be had."""

from __future__ import annotations

import contextlib
import os
import re

import torch

_FOLDER = "/dev/shm"
_NAME_IN_ERROR = re.compile(r"</(torch_[^/>]+)>")


def reserve(num_bytes: int) -> torch.UntypedStorage:
    """Reserve zeros that processes can share, in all of which they are the same bytes.

    Raises:
        RuntimeError: There is not so much.
    """
    try:
        return torch.UntypedStorage._new_shared(num_bytes)
    except RuntimeError as error:
        remove_name(error)
        raise


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
