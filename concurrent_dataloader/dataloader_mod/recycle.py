"""Batches in shared memory that is used again.

torch's loader collates each batch into fresh shared memory, and pays for every page of it: 0.5 ms
of CPU for an image of 224 x 224 floats (benchmarking: loader_epoch ram). Here a worker keeps a few
slots of shared memory, collates into one that is free, and sends only its number:

```text
worker                                      parent
SlotPool.lend -> slot, state LENT
collate into it, pack  --(slot number)-->   _open_loan: an array over the mapped slot, a tensor over
                                            that ... the batch, its views, numpy arrays, autograd's
                                            savings ...
state FREE             <--(one byte)---     the array's finaliser, once nothing refers to it any
more
```

The byte lies in the slot itself, so that giving back needs no queue, lock or thread, and may happen
in any thread and inside the garbage collector. A slot's memory goes to the parent with the first
batch in it, by torch's own way of sharing a storage, and the parent keeps it mapped as long as the
worker's process object lives; hence there is no name in the file system, and nothing to remove.

What cannot travel like that goes torch's way: other kinds of tensors, those that share memory
already, and what finds no free slot because the user keeps the batches. Small tensors travel inside
the message, so that keeping all labels of an epoch does not keep the images. So do all where shared
memory is short: slower, but a container with 64 MiB of it, Docker's default, loads.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import pickle
import secrets
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from concurrent_dataloader import shared_memory
from concurrent_dataloader.dataloader_mod import torch_internals
from concurrent_dataloader.dataloader_mod.dataset_state import WorkerWatch
from concurrent_dataloader.dataloader_mod.loans import (
    _FREE,
    _HEADER_BYTES,
    _LENT,
    _RETIRED,
    _map_storage,
    _open_loan,
    _rebuild_tensor,
    _unpack,
)

log = logging.getLogger(__name__)

_MAX_INLINE_BYTES = 65536
"""Tensors up to this size travel in the message: a pipe's buffer on Linux."""

_PAGE_BYTES = 4096


class _Slot:
    """A stretch of shared memory in the worker: one byte of state, then room for one tensor."""

    def __init__(self, number: int, capacity_bytes: int) -> None:
        self.number = number
        self.capacity_bytes = capacity_bytes
        self.storage = shared_memory.reserve(_HEADER_BYTES + capacity_bytes)
        self.memory = _map_storage(self.storage)
        self.is_known = False
        """Whether the parent has got the storage."""

    def view(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Make a contiguous tensor at the slot's beginning."""
        stride = torch.empty(shape, device="meta").stride()
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(self.storage, _HEADER_BYTES // dtype.itemsize, shape, stride)


class _Inline:
    """The bytes of a small storage; an object, so that two tensors over it go on sharing it."""

    def __init__(self, data: bytes) -> None:
        self.data = data


class SlotPool:
    """The slots of one worker. Used in the worker's main thread only."""

    def __init__(self, num_batches: int, max_batches: int) -> None:
        """Begin without a slot.

        Args:
            num_batches: Slots for so many batches are made before any is used again, so that memory
                has its full size after as many batches, and not at some later peak.
            max_batches: Slots are made for so many batches at most.
        """
        self._num_batches = num_batches
        self._max_batches = max_batches
        self._token = secrets.token_hex(8)
        self._slots: dict[int, _Slot] = {}
        self._by_address: dict[int, _Slot] = {}
        self._num_made = 0
        # Slots lent since the last message; those that it does not name are free again.
        self._pending: list[_Slot] = []
        self._max_pending = 1
        self._dropped: list[int] = []
        self.is_short = False
        """Whether there was no shared memory when it was last asked for."""

        self._is_shortage_told = False

    def lend(self, num_bytes: int) -> _Slot | None:
        """Find or make a slot of at least this size; None if all are in use."""
        best: _Slot | None = None
        best_bytes = float("inf")
        for slot in list(self._slots.values()):
            state = slot.memory[0]
            if state == _RETIRED:
                self._drop(slot)
            elif state == _FREE and num_bytes <= slot.capacity_bytes < best_bytes:
                best, best_bytes = slot, slot.capacity_bytes
        is_growing = len(self._slots) < self._num_batches * self._max_pending
        if is_growing or (best is None and self._make_room()):
            capacity_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES - _HEADER_BYTES
            if capacity_bytes < num_bytes:
                capacity_bytes += _PAGE_BYTES
            best = self._make(capacity_bytes) or best
        if best is not None:
            best.memory[0] = _LENT
            self._pending.append(best)
            self._max_pending = max(self._max_pending, len(self._pending))
        return best

    def _make(self, capacity_bytes: int) -> _Slot | None:
        try:
            slot = _Slot(self._num_made, capacity_bytes)
        except RuntimeError as error:
            self.note_shortage(error, capacity_bytes)
            return None
        self.is_short = False
        self._num_made += 1
        self._slots[slot.number] = slot
        self._by_address[slot.storage.data_ptr()] = slot
        return slot

    def note_shortage(self, error: RuntimeError, num_bytes: int | None = None) -> None:
        """Have tensors travel in the message from now on, and tell so once."""
        self.is_short = True
        shared_memory.remove_name(error)
        if not self._is_shortage_told:
            self._is_shortage_told = True
            wanted = "" if num_bytes is None else f" of {num_bytes / 2**20:.4g} MiB"
            log.warning(
                "no shared memory for a tensor%s: %s (%s); batches without a place there are "
                "copied through a pipe, which costs time; give it more (docker run --shm-size=2g "
                "or --ipc=host), or use smaller batches, fewer workers or a smaller batch_pool",
                wanted,
                error,
                shared_memory.describe(),
            )

    def _make_room(self) -> bool:
        """Say whether one more slot may be made; one that is free but too small makes way."""
        if len(self._slots) < self._max_batches * self._max_pending:
            return True
        free = [slot for slot in self._slots.values() if slot.memory[0] == _FREE]
        if not free:
            return False
        self._drop(min(free, key=lambda slot: slot.capacity_bytes))
        return True

    def _drop(self, slot: _Slot) -> None:
        del self._slots[slot.number]
        del self._by_address[slot.storage.data_ptr()]
        if slot.is_known:
            self._dropped.append(slot.number)

    def pack(self, data: Any) -> _Packed:
        """Pickle a batch, with its tensors in slots. What it raises, pickling raised.

        Slots that were lent and are not part of the batch are free again, also on failure.
        """
        buffer = io.BytesIO()
        packer = _Packer(buffer, self)
        try:
            packer.dump(data)
        except BaseException:
            packer.sent.clear()
            raise
        finally:
            for slot in self._pending:
                if slot.number not in packer.sent:
                    slot.memory[0] = _FREE
            self._pending.clear()
        for slot in packer.sent.values():
            slot.is_known = True
        dropped, self._dropped = self._dropped, []
        return _Packed(buffer.getbuffer(), self._token, dropped)

    def find(self, storage: torch.UntypedStorage) -> _Slot | None:
        """Find the slot that a storage is the memory of."""
        return self._by_address.get(storage.data_ptr())

    def describe(self, slot: _Slot) -> tuple[Any, ...]:
        """Say how the parent opens a slot; the memory itself goes along the first time."""
        return self._token, os.getpid(), slot.number, None if slot.is_known else slot.storage


class _Packer(ForkingPickler):
    """Pickles as torch's queues do, but for plain tensors in private memory or in a slot."""

    def __init__(self, buffer: io.BytesIO, pool: SlotPool) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self._pool = pool
        # By storage; each is kept, so that no other can be taken for it.
        self._homes: dict[int, tuple[_Slot | _Inline, torch.UntypedStorage]] = {}
        self.sent: dict[int, _Slot] = {}

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            return self._reduce_tensor(obj)
        if kind is _Slot:
            return _open_loan, self._pool.describe(obj)
        if kind is _Inline:
            return bytearray, (obj.data,)
        return NotImplemented

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        if not is_plain(tensor) or tensor.requires_grad:
            return NotImplemented
        home = self._find_home(tensor)
        if home is None:
            return NotImplemented
        offset = tensor.storage_offset() * tensor.itemsize
        if isinstance(home, _Slot):
            self.sent[home.number] = home
            if self._pool.find(tensor.untyped_storage()) is home:
                offset -= _HEADER_BYTES
        return _rebuild_tensor, (
            home,
            tensor.dtype,
            tuple(tensor.size()),
            tensor.stride(),
            offset,
        )

    def _find_home(self, tensor: torch.Tensor) -> _Slot | _Inline | None:
        """Find where the tensor's memory travels; None for torch's way."""
        storage = tensor.untyped_storage()
        slot = self._pool.find(storage)
        if slot is not None:
            return slot
        num_bytes = storage.nbytes()
        # A tensor that is a part of something larger keeps its neighbours with torch; so does ours.
        if storage.is_shared() or num_bytes == 0:
            return None
        if num_bytes != tensor.numel() * tensor.itemsize:
            shared_memory.check_room(num_bytes)
            return None
        home, _ = self._homes.get(storage._cdata, (None, None))
        if home is None:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage)
            if num_bytes <= _MAX_INLINE_BYTES:
                home = _Inline(raw.numpy().tobytes())
            else:
                home = self._pool.lend(num_bytes)
                if home is not None:
                    home.view(torch.uint8, (num_bytes,)).copy_(raw)
                elif self._pool.is_short:
                    home = _Inline(raw.numpy().tobytes())
                else:
                    shared_memory.check_room(num_bytes)
                    return None
            self._homes[storage._cdata] = home, storage
        return home


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is dense memory on the CPU, read as it lies there."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


class _Packed:
    """A batch that is pickled already, so that torch's queue only has to copy it."""

    def __init__(self, data: memoryview, token: str, dropped: list[int]) -> None:
        self._data = data
        self._token = token
        self._dropped = dropped

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (bytes(self._data), self._token, self._dropped)


class RecyclingQueue:
    """The data queue of a worker: packs a batch into slots before torch's queue takes it.

    Packing happens in the worker's main thread, so that a batch that cannot be pickled is an error
    of its own and not, as with torch's, lost in a background thread.
    """

    def __init__(
        self, target: Any, pool: SlotPool, worker_id: int, watch: WorkerWatch | None = None
    ) -> None:
        """Stand before a queue.

        Args:
            target: torch's queue.
            pool: Where batches are packed.
            worker_id: For messages.
            watch: Its changes are sent before the batch that made them; None: nobody wants them.
        """
        self._target = target
        self._pool = pool
        self._worker_id = worker_id
        self._watch = watch

    def put(self, item: tuple[Any, Any]) -> None:
        """Send ``(number, batch)``; a signal or an error of torch's passes as it is."""
        number, data = item
        try:
            packed = self._pack(data)
        except Exception:  # noqa: BLE001 - goes to the training loop, as all errors of a worker
            if isinstance(data, torch_internals.ExceptionWrapper):
                # Its class is known to this process only; its words and traceback are text.
                packed: Any = data
                packed.exc_type = RuntimeError
            else:
                packed = self._wrap_error()
        try:
            states = None if self._watch is None else self._watch.read(number)
        except Exception:  # noqa: BLE001 - likewise: a state_dict of the user's
            states, packed = None, self._wrap_error("saving its dataset's state")
        if states is not None:
            self._target.put((states, None))
        self._target.put((number, packed))

    def _pack(self, data: Any) -> _Packed:
        try:
            return self._pool.pack(data)
        except RuntimeError as error:
            if self._pool.is_short or not shared_memory.is_shortage(error):
                raise
            self._pool.note_shortage(error)
        return self._pool.pack(data)

    def _wrap_error(self, doing: str = "sending its batch") -> Any:
        where = f"in DataLoader worker process {self._worker_id}, {doing}"
        return torch_internals.ExceptionWrapper(where=where)

    def send_error(self, error: Exception, item: tuple[Any, Any]) -> None:
        """Send the error of the queue's own thread, such as no memory, in place of the batch."""
        try:
            raise error
        except Exception:  # noqa: BLE001 - goes to the training loop
            self._target.put((item[0], self._wrap_error()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def collate_into(pool: SlotPool) -> Any:
    """Make torch's ``default_collate``, but that large tensors go into slots of ``pool``."""
    collate_fn_map = dict(torch_internals.default_collate_fn_map)
    if collate_fn_map.get(torch.Tensor) is not torch_internals.collate_tensor_fn:
        return torch_internals.default_collate  # the user has put something else there
    collate_fn_map[torch.Tensor] = functools.partial(_collate_tensors, pool)
    return functools.partial(torch_internals.collate, collate_fn_map=collate_fn_map)


def _collate_tensors(pool: SlotPool, batch: list[torch.Tensor], *, collate_fn_map: Any) -> Any:
    first = batch[0]
    if not is_plain(first) or first.requires_grad:
        return torch_internals.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)
    num_bytes = first.numel() * first.itemsize * len(batch)
    if num_bytes <= _MAX_INLINE_BYTES:
        return torch.stack(batch, 0)
    slot = pool.lend(num_bytes)
    if slot is None and not pool.is_short:
        try:
            shared_memory.check_room(num_bytes)
            return torch_internals.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)
        except RuntimeError as error:
            if not shared_memory.is_shortage(error):
                raise
            pool.note_shortage(error, num_bytes)
    if slot is None:
        return torch.stack(batch, 0)
    return torch.stack(batch, 0, out=slot.view(first.dtype, (len(batch), *first.size())))
