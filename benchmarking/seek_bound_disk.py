"""A disk on which a seek is dear, and reading on is not: what a file costs on it, simulated.

It has one head, which all processes share, and remembers which pages were read, as the kernel's
page cache does. It holds no bytes: they come from where they come from.
"""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import torch

PAGE_BYTES = 4096


class SeekBoundDisk:
    """Lets each reader wait as long as the head would move. Forked and spawned workers share it.

    Reading costs nothing where the head is, and of what was read since all was forgotten.
    """

    def __init__(self, size_bytes: int, *, seek_s: float = 0.008) -> None:
        """Make a disk whose head is at its begin, and nothing of which is in memory.

        Args:
            size_bytes: Of all that is on it.
            seek_s: What it takes to move the head.
        """
        num_pages = -(-size_bytes // PAGE_BYTES)
        self._seek_s = seek_s
        self._lock = multiprocessing.Lock()
        # Guarded by `_lock`: whether each page is in memory; where the head is, and its moves.
        self._in_memory = torch.zeros(num_pages, dtype=torch.bool).share_memory_()
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def num_seeks(self) -> int:
        """How often the head was moved."""
        return int(self._state[1])

    def forget(self) -> None:
        """Keep nothing in memory, as if much else had been read."""
        with self._lock:
            self._in_memory.zero_()

    def read(self, start: int, stop: int) -> None:
        """Wait until bytes ``start`` up to, not including, ``stop`` are in memory."""
        in_memory, state = self._in_memory.numpy(), self._state.numpy()
        first, last = start // PAGE_BYTES, -(-stop // PAGE_BYTES)
        with self._lock:
            is_missing = ~in_memory[first:last]
            edges = np.flatnonzero(np.diff(is_missing, prepend=False, append=False))
            for begin, end in (edges.reshape(-1, 2) + first).tolist():
                if begin != state[0]:
                    # Inside the lock: nobody else can read while the head moves.
                    time.sleep(self._seek_s)
                    state[1] += 1
                state[0] = end
                in_memory[begin:end] = True
