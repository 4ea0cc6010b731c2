"""A worker's memory: what it keeps of freed one, when it gives it back, and what it copies.

Of allocators only glibc is told, which is the C library of most Linux systems.

Source:
    mallopt(3) and malloc_trim(3) of the Linux man-pages; the numbers of the parameters are those of
    glibc's malloc.h.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import os
import sys
from collections.abc import Callable, Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 512 << 20  # the tensors of a batch: 38 MB for 64 photographs
_MMAP_BYTES = 32 << 20  # the largest to which glibc would come by itself
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def settle_memory(environment: Mapping[str, str] = os.environ) -> None:
    """Do what a worker's memory needs when it begins.

    Frees are as in `keep_freed_memory`. And what is there already is kept out of each collection of
    garbage, which writes to all objects that it looks at: a forked worker would copy those of its
    parent, some 80 MB of torch alone. Cycles that a parent has not collected yet stay for good.
    """
    keep_freed_memory(environment)
    gc.freeze()
    # Python's last collection is to find them: libraries (nanobind's) complain of what it leaves.
    # Workers that were forked end without it.
    atexit.register(gc.unfreeze)


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> None:
    """Have this process keep up to 512 MiB that it freed, for what it allocates next.

    A worker allocates the tensors of a batch and frees all of them at once. By its defaults, glibc
    then gives them back to the system, which has to clear each page when the next batch asks for
    it. The peak stays what it was. Called in workers only, not in a process of the user's own.

    Args:
        environment: Where it says something of the allocator itself (``MALLOC_TRIM_THRESHOLD_``,
            ``MALLOC_MMAP_THRESHOLD_``, or ``GLIBC_TUNABLES`` with ``glibc.malloc``), nothing is
            changed.
    """
    is_told = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    set_option = _find("mallopt")
    if is_told or set_option is None or any(name in environment for name in _VARIABLES):
        return
    # Either one ends glibc's own adjusting of both.
    set_option(_MMAP_THRESHOLD, _MMAP_BYTES)
    set_option(_TRIM_THRESHOLD, _KEPT_BYTES)


def trim_memory() -> None:
    """Give all memory that is free back to the system, fragments as well.

    Bodies of 100 kB and more come and go in many threads, and leave holes: without this, workers go
    on growing over the epochs (benchmarking: memory). Lower thresholds in the allocator would keep
    them small as well, but cost more CPU for each sample than a fetch does.
    """
    trim = _find("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def _find(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
