"""Batches as the parent has them: arrays over a worker's slots, which it gives back (`recycle`)."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import torch

_FREE, _LENT, _RETIRED = 0, 1, 2

_HEADER_BYTES = 64
"""The state's byte, and what keeps the data behind it aligned to a cache line."""


def _map_storage(storage: torch.UntypedStorage) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


class _Loan(np.ndarray[Any, Any]):
    """The parent's view of a slot; lives as long as anything that uses its memory."""


class _LiveLoan:
    """What the finaliser of a loan needs to know."""

    def __init__(self, memory: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.memory = memory
        self.pid = os.getpid()
        self.is_retired = False

    def give_back(self) -> None:
        # In a child that was forked meanwhile the loan is only a copy, and not its to give back.
        if os.getpid() == self.pid:
            _live_loans.discard(self)
            self.memory[0] = _RETIRED if self.is_retired else _FREE


# Mapped slots by the worker's token and their number. Guarded by `_lock`, as the hook is; the set
# of live loans is only added to and discarded from, which finalisers may do at any time.
_arenas: dict[str, dict[int, np.ndarray[Any, np.dtype[np.uint8]]]] = {}
_tokens: dict[int, str] = {}
"""The latest token of a worker, by its process."""
_live_loans: set[_LiveLoan] = set()
_lock = threading.Lock()
_has_fork_hooks = False


def _unpack(data: bytes, token: str, dropped: list[int]) -> Any:
    batch = pickle.loads(data)  # from our own worker, as all that comes through torch's queue
    for number in dropped:
        _arenas.get(token, {}).pop(number, None)
    return batch


def _open_loan(
    token: str, worker_pid: int, number: int, storage: torch.UntypedStorage | None
) -> _Loan:
    """Borrow a slot of a worker until nothing refers to the array, or to a view of it, any more."""
    if storage is not None:
        with _lock:
            arena = _arenas.get(token)
            if arena is None:
                arena = _begin_arena(token, worker_pid)
            arena[number] = _map_storage(storage)
    memory = _arenas[token][number]
    loan = memory[_HEADER_BYTES:].view(_Loan)
    live = _LiveLoan(memory)
    _live_loans.add(live)
    weakref.finalize(loan, live.give_back).atexit = False
    return loan


def _begin_arena(token: str, worker_pid: int) -> dict[int, np.ndarray[Any, np.dtype[np.uint8]]]:
    global _has_fork_hooks
    if not _has_fork_hooks and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_retire_live_loans, after_in_child=_forget_all)
        _has_fork_hooks = True
    _arenas[token] = {}
    _tokens[worker_pid] = token
    for process in multiprocessing.active_children():
        if process.pid == worker_pid:
            # torch's iterator owns the process object; with it goes the memory.
            weakref.finalize(process, _arenas.pop, token, None).atexit = False
    return _arenas[token]


def forget_worker(worker_pid: int) -> None:
    """Give up the slots of a worker that has ended; one that died first has no finaliser for it."""
    _arenas.pop(_tokens.pop(worker_pid, ""), None)


def _retire_live_loans() -> None:
    """Before a fork: what a child may see from now on is never written to again."""
    for live in list(_live_loans):
        live.is_retired = True


def _forget_all() -> None:
    global _lock
    _lock = threading.Lock()
    _arenas.clear()
    _tokens.clear()
    _live_loans.clear()


def _rebuild_tensor(
    home: _Loan | bytearray,
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset_bytes: int,
) -> torch.Tensor:
    num_elements = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) == 0:
        return torch.empty_strided(size, stride, dtype=dtype)
    flat = torch.frombuffer(home, dtype=dtype, count=num_elements, offset=offset_bytes)
    return flat.as_strided(size, stride)
