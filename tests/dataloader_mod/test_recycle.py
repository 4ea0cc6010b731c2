"""Batches in shared memory that is used again, and never too early."""

import collections
import dataclasses
import gc
import logging
import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data

from concurrent_dataloader.dataloader_mod import loans
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.dataloader_mod.recycle import RecyclingQueue, SlotPool
from tests.dataloader_mod import doubles
from tests.dataloader_mod.conftest import is_same, read_epochs
from tests.leftovers import nothing_left

NUM_FLOATS = 30_000
"""So many that a batch is larger than what travels inside a message."""


class Constant(doubles.StagedSquares):
    """Each sample is filled with its position, so that memory that was used again is seen."""

    def __init__(self, num_samples):
        super().__init__(num_samples, NUM_FLOATS)

    def apply_transform(self, decoded):
        return torch.full((NUM_FLOATS,), float(decoded)), decoded


def read_and_keep(keep, num_samples=200, num_workers=1, **settings):
    """Keep something of each batch; give pairs of labels and what was kept."""
    loader = DataLoader(Constant(num_samples), batch_size=4, num_workers=num_workers, **settings)
    kept = []
    for images, labels in loader:
        kept.append((labels.tolist(), keep(images)))
        del images
    return kept


KEEPERS = {
    "the batch": lambda images: images,
    "a slice": lambda images: images[1:3, 5:9],
    "a row": lambda images: images[2],
    "a numpy array": lambda images: images.numpy(),
    "a view of a numpy array": lambda images: images.numpy()[::2, 7:],
    "the bare storage": lambda images: images.untyped_storage(),
    "a twin by DLPack": torch.from_dlpack,
    "what autograd saved": lambda images: (
        (images * torch.ones(1, requires_grad=True)).grad_fn._saved_self
    ),
    "a memoryview": lambda images: memoryview(images.numpy()),
    "a transposed view": lambda images: images.t(),
}


def rows_of(kept):
    """The values of a kept thing as rows by position, whatever it is."""
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.empty(0, dtype=torch.float32).set_(kept)[: 4 * NUM_FLOATS]
    kept = np.asarray(kept.detach() if isinstance(kept, torch.Tensor) else kept).ravel()
    whole = kept.astype(np.int64)
    assert np.array_equal(whole, kept)
    return np.flatnonzero(np.bincount(whole)).tolist()


@pytest.mark.parametrize("keeper", KEEPERS)
def test_memory_is_not_used_again_while_it_is_referred_to_by(keeper):
    kept = read_and_keep(KEEPERS[keeper])

    assert len(kept) == 50
    for labels, thing in kept:
        assert set(rows_of(thing)) <= {float(label) for label in labels}
        assert rows_of(thing)


def test_memory_is_used_again_once_nothing_refers_to_it():
    loader = DataLoader(Constant(400), batch_size=4, num_workers=1)

    addresses = {images.data_ptr() for images, _ in loader}

    # Two finished, one in the making, and one with its successor in the loop's hands.
    assert len(addresses) <= 6


def test_torch_itself_uses_fresh_memory_each_time():
    """So that the test above would see it if ours did."""
    loader = torch.utils.data.DataLoader(Constant(40), batch_size=4, num_workers=1)
    kept = [images for images, _ in loader]

    assert len({images.data_ptr() for images in kept}) == 10


def test_batches_that_another_thread_holds_stay_as_they_are():
    held: collections.deque = collections.deque()
    wrong = []
    done = threading.Event()

    def check():
        while not done.is_set() or held:
            if held:
                labels, images = held.popleft()
                if not torch.equal(images[:, 0], labels.float()):
                    wrong.append(labels)

    thread = threading.Thread(target=check)
    thread.start()
    for images, labels in DataLoader(Constant(600), batch_size=4, num_workers=2):
        while len(held) > 3:
            pass
        held.append((labels, images))
    done.set()
    thread.join()

    assert wrong == []


def test_labels_can_be_kept_without_the_images():
    loader = DataLoader(Constant(400), batch_size=4, num_workers=1)
    all_labels = []
    addresses = set()
    for images, labels in loader:
        all_labels.append(labels)
        addresses.add(images.data_ptr())

    assert torch.cat(all_labels).tolist() == list(range(400))
    assert len(addresses) <= 6


def test_a_batch_that_a_forked_child_sees_is_not_written_to_again():
    context = multiprocessing.get_context("fork")
    iterator = iter(DataLoader(Constant(400), batch_size=4, num_workers=1))
    images, labels = next(iterator)
    go, answer = context.Event(), context.SimpleQueue()

    def look(images):
        go.wait(30)
        answer.put(torch.equal(images[:, 0], labels.float()))

    child = context.Process(target=look, args=(images,))
    child.start()
    del images
    for _ in range(60):
        next(iterator)
    go.set()

    assert answer.get() is True
    child.join()


def test_a_child_that_drops_a_batch_does_not_give_it_back():
    context = multiprocessing.get_context("fork")
    iterator = iter(DataLoader(Constant(400), batch_size=4, num_workers=1))
    images, labels = next(iterator)

    def drop():
        nonlocal images
        del images
        gc.collect()

    child = context.Process(target=drop)
    child.start()
    child.join()
    for _ in range(60):
        next(iterator)

    assert torch.equal(images[:, 0], labels.float())


@dataclasses.dataclass
class Sample:
    pixels: torch.Tensor
    name: str


def collate_to_objects(samples):
    images = torch.stack([image for image, _ in samples])
    return {
        "channels last": images.view(4, 3, 100, 100).to(memory_format=torch.channels_last),
        "object": Sample(images * 2, "twice"),
        "twins": [images, images.view(-1)],
        "part": images[1],
        "gradient": torch.ones(20_000, requires_grad=True),
        "sparse": torch.eye(3).to_sparse(),
        "numpy": images.numpy().copy(),
        "nothing": torch.empty(0, 3),
        "half": images.to(torch.bfloat16),
        "flags": images > 1,
    }


def test_whatever_a_collate_function_gives_arrives():
    images = torch.stack([torch.full((NUM_FLOATS,), float(position)) for position in range(4)])

    batch = next(
        iter(DataLoader(Constant(4), batch_size=4, num_workers=1, collate_fn=collate_to_objects))
    )

    expected: dict[str, Any] = collate_to_objects([(image, 0) for image in images])
    for name in ("channels last", "part", "nothing", "half", "flags", "gradient"):
        assert is_same(batch[name].detach(), expected[name].detach()), name
    assert batch["channels last"].is_contiguous(memory_format=torch.channels_last)
    assert batch["object"].name == "twice"
    assert torch.equal(batch["object"].pixels, images * 2)
    assert batch["gradient"].requires_grad
    assert torch.equal(batch["sparse"].to_dense(), torch.eye(3))
    assert np.array_equal(batch["numpy"], images.numpy())
    batch["twins"][0][2, 5] = -1.0
    assert batch["twins"][1][2 * NUM_FLOATS + 5] == -1.0


class Growing(doubles.StagedSquares):
    """Samples whose size changes from batch to batch."""

    def apply_transform(self, decoded):
        return torch.full((20_000 + 5_000 * (decoded // 4),), float(decoded)), decoded


def test_batches_of_many_sizes_arrive_and_old_slots_make_way():
    loader = DataLoader(Growing(240), batch_size=4, num_workers=1)
    for images, labels in loader:
        assert torch.equal(images[:, -1], labels.float())
        assert images.shape[1] == 20_000 + 5_000 * (int(labels[0]) // 4)
    [arena] = loans._arenas.values() if loans._arenas else [{}]

    assert len(arena) <= 12


def test_a_pool_gives_no_more_slots_than_it_may():
    pool = SlotPool(1, max_batches=3)

    slots = [pool.lend(100_000) for _ in range(1)]
    pool._pending.clear()  # sent
    slots += [pool.lend(100_000) for _ in range(1)]
    pool._pending.clear()
    slots += [pool.lend(100_000) for _ in range(1)]
    pool._pending.clear()

    assert None not in slots
    assert pool.lend(100_000) is None


def test_a_pool_has_its_usual_size_before_it_uses_a_slot_again():
    pool = SlotPool(3, max_batches=5)
    lent = []
    for _ in range(6):
        lent.append(pool.lend(100_000))
        pool.pack("nothing of it")

    assert len(set(lent[:3])) == 3
    assert set(lent[3:]) <= set(lent[:3])


def test_a_slot_that_was_lent_and_not_sent_is_free_again():
    pool = SlotPool(1, max_batches=2)
    first = pool.lend(100_000)
    assert first is not None

    pool.pack("a batch without it")

    assert pool.lend(100_000) is first


def test_a_failure_to_pickle_frees_the_slots_of_the_batch():
    pool = SlotPool(1, max_batches=1)

    with pytest.raises(TypeError, match="cannot pickle"):
        pool.pack([torch.ones(100_000), threading.Lock()])

    assert pool.lend(100_000) is not None


def forbid_shared_memory(worker_id):
    """Let the system refuse this worker files, as /dev/shm holds, of more than 100 kB."""
    del worker_id
    # Where pytest does not take it away.
    logging.getLogger("concurrent_dataloader").addHandler(
        logging.StreamHandler(open(2, "w", closefd=False))  # noqa: SIM115 - as long as the worker
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("collate_fn", [None, torch.utils.data.default_convert])
def test_batches_arrive_where_there_is_no_shared_memory(capfd, collate_fn):
    settings = {"batch_size": 4, "num_workers": 2, "collate_fn": collate_fn}
    expected = read_epochs(torch.utils.data.DataLoader, Constant(40), 1, **settings)

    with nothing_left():  # torch leaves the names of what it could not have
        batches = read_epochs(
            DataLoader, Constant(40), 1, worker_init_fn=forbid_shared_memory, **settings
        )

    assert is_same(batches, expected)
    batches[0][0][0].fill_(7)  # a batch can be written to
    told = capfd.readouterr().err
    assert told.count("no shared memory for a tensor") == 2, told
    assert "--shm-size" in told


class ForbidLater(Constant):
    """Shared memory is there at first, and then no more, as others use it up."""

    def apply_transform(self, decoded):
        if decoded == 20:
            forbid_shared_memory(0)
        return super().apply_transform(decoded)


def test_shared_memory_that_gives_out_in_the_middle_loses_nothing():
    kept = [(labels, images) for images, labels in DataLoader(ForbidLater(160), 4, num_workers=1)]

    assert len(kept) == 40
    for labels, images in kept:
        assert torch.equal(images[:, 0], labels.float())
        assert torch.equal(images[:, -1], labels.float())


@pytest.mark.slow
def test_a_container_with_little_shared_memory_loads():
    code = (
        "import torch\n"
        "from concurrent_dataloader import DataLoader\n"
        "from tests.dataloader_mod.test_recycle import Constant\n"
        "batches = list(DataLoader(Constant(160), 4, num_workers=2))\n"
        "assert all(torch.equal(images[:, 0], labels.float()) for images, labels in batches)\n"
        "assert sum(len(labels) for _, labels in batches) == 160\n"
    )
    small = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$0" -c "$1"'
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare: needs the right to mount")

    ended = subprocess.run(
        ["unshare", "-m", "bash", "-c", small, sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )

    assert ended.returncode == 0, ended.stderr
    assert "/dev/shm has 2 MiB" in ended.stderr


def test_resident_and_shared_memory_stay_flat_over_epochs():
    loader = DataLoader(Constant(160), batch_size=8, num_workers=2, persistent_workers=True)
    sizes = []
    for _ in range(12):
        for _images, _ in loader:
            pass
        with open(f"/proc/{os.getpid()}/smaps_rollup") as rollup:
            sizes.append(
                sum(int(line.split()[1]) for line in rollup if line.startswith(("Rss", "Shared")))
            )

    assert sizes[-1] <= sizes[3] * 1.05


class CannotBeSent:
    def __reduce__(self):
        raise MemoryError("no memory for the message")


def test_an_error_of_the_queues_own_thread_is_sent_in_place_of_the_batch():
    queue: Any = torch.multiprocessing.get_context("fork").Queue()
    recycling = RecyclingQueue(queue, SlotPool(1, 1), 0)
    queue._on_queue_feeder_error = recycling.send_error

    queue.put((3, CannotBeSent()))  # packed already, as it were

    number, wrapper = queue.get(timeout=20)
    assert number == 3
    with pytest.raises(MemoryError, match="no memory for the message"):
        wrapper.reraise()
    queue.close()
