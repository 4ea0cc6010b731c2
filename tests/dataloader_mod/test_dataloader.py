"""What users meet: arguments, errors, shutdown, and torch's loader beside ours."""

import gc
import json
import operator
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest
import torch
import torch.utils.data

from concurrent_dataloader import open_store
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.errors import DeadlineError, KeyNotFoundError, LoaderError
from tests.dataloader_mod import doubles
from tests.dataloader_mod.conftest import is_same, read_epochs, seed_all
from tests.leftovers import find_shared_memory, list_shared_memory


class OnlyBatches:
    """What torch reads though it has no ``__getitem__``."""

    def __len__(self):
        return 4

    def __getitems__(self, positions):
        return positions


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: open_store(str(path)),
            "got a store (.*), which gives bytes by key, expected",
        ),
        (str, "got str, expected a dataset with positions.*; open it with open_dataset"),
        (lambda path: path, "got PosixPath, expected .*; open it with open_dataset"),
        (lambda _: doubles.PlainSquares, "got the class PlainSquares, expected .* by calling it"),
        (lambda _: OnlyBatches, "got the class OnlyBatches, expected"),
        (lambda _: iter([1, 2]), "got list_iterator, expected .*; give it __getitem__ and"),
        (lambda _: None, "got NoneType, expected a dataset"),
        (lambda _: {1, 2}, "got set, expected a dataset"),
    ],
)
def test_what_is_no_dataset_is_an_error_of_the_constructor(make, message, tmp_path):
    with pytest.raises(TypeError, match=f"^dataset: {message}"):
        DataLoader(make(tmp_path))


@pytest.mark.parametrize("dataset", [[3, 1], (3, 1), range(2), {0: 3, 1: 1}, torch.arange(4)])
def test_all_that_torch_reads_is_a_dataset(dataset):
    expected = list(torch.utils.data.DataLoader(dataset))

    assert is_same(list(DataLoader(dataset)), expected)
    assert len(list(DataLoader(OnlyBatches(), 2))) == 2  # pyright: ignore[reportArgumentType]: as torch


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"fetch_impl": "async"}, ValueError, "fetch_impl: got 'async', expected 'threaded'"),
        ({"num_fetch_workers": 0}, ValueError, "num_fetch_workers: got 0, expected 1 or more"),
        ({"num_fetch_workers": 2.5}, TypeError, "num_fetch_workers: got 2.5, expected None or a"),
        ({"num_fetch_workers": 10**9}, ValueError, "got 1000000000, expected 4096 or fewer"),
        ({"batch_pool": 10**7}, ValueError, "batch_pool: got 10000000, expected 4096 or fewer"),
        (
            {"error_budget": 5},
            TypeError,
            "got 5, expected an ErrorBudget such as ErrorBudget(count=5)",
        ),
        ({"num_fetch_workers": True}, TypeError, "num_fetch_workers: got True"),
        ({"batch_pool": -1}, ValueError, "batch_pool: got -1, expected 0 or more"),
        ({"num_workers": -1}, ValueError, "num_workers option should be non-negative"),
        ({"prefetch_factor": 2}, ValueError, "prefetch_factor option could only be specified"),
    ],
)
def test_a_wrong_argument_is_an_error_of_the_constructor(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        DataLoader(doubles.PlainSquares(3), **settings)


def test_each_argument_is_stored_under_its_own_name_and_nothing_else_is_public():
    ours = DataLoader(
        doubles.PlainSquares(3), fetch_impl="asyncio", num_fetch_workers=5, batch_pool=2
    )
    theirs = torch.utils.data.DataLoader(doubles.PlainSquares(3))

    extra = {name for name in vars(ours) if not name.startswith("_")} - set(vars(theirs))

    assert {name: getattr(ours, name) for name in extra} == {
        "fetch_impl": "asyncio",
        "num_fetch_workers": 5,
        "batch_pool": 2,
        "on_error": "raise",
        "error_budget": None,
        "quarantine_file": None,
    }


def test_the_class_can_be_subscripted_and_is_a_loader_of_torch():
    assert isinstance(
        DataLoader[tuple[torch.Tensor, int]](doubles.PlainSquares(3)), torch.utils.data.DataLoader
    )


def test_torch_loaders_work_beside_ours():
    dataset = doubles.StagedSquares(30)
    expected = read_epochs(torch.utils.data.DataLoader, dataset, num_workers=2, batch_size=4)
    ours = iter(DataLoader(dataset, num_workers=2, batch_size=4))
    next(ours)

    during = read_epochs(torch.utils.data.DataLoader, dataset, num_workers=2, batch_size=4)
    list(ours)
    after = read_epochs(torch.utils.data.DataLoader, dataset, num_workers=2, batch_size=4)

    assert is_same(during, expected)
    assert is_same(after, expected)


def test_samples_are_fetched_at_the_same_time():
    for num_workers in (0, 1):
        dataset = CountsFetches(64)
        loader = DataLoader(
            dataset, batch_size=8, num_workers=num_workers, num_fetch_workers=16, batch_pool=3
        )
        peak = max(int(batch.max()) for batch in loader)
        assert peak == 16, f"{num_workers} workers"


class CountsFetches(torch.utils.data.Dataset):
    """Gives the number of samples that were being fetched when this one was."""

    def __init__(self, num_samples):
        self.num_samples = num_samples
        self.num_now = 0

    def __len__(self):
        return self.num_samples

    def __getitem__(self, position):
        with _count_lock:
            self.num_now += 1
        time.sleep(0.1)
        seen = self.num_now
        with _count_lock:
            self.num_now -= 1
        return seen


_count_lock = threading.Lock()


class Recording(doubles.StagedSquares):
    """Writes a line for each sample that was begun, and for each that was finished."""

    def __init__(self, num_samples, folder):
        super().__init__(num_samples)
        self.folder = folder

    def fetch(self, position):
        (self.folder / f"begun-{position}").touch()
        return super().fetch(position)

    def apply_transform(self, decoded):
        (self.folder / f"finished-{decoded}").touch()
        return super().apply_transform(decoded)


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def test_no_more_batches_are_finished_than_prefetch_factor_and_begun_than_batch_pool(tmp_path):
    loader = DataLoader(
        Recording(400, tmp_path),
        batch_size=5,
        num_workers=2,
        prefetch_factor=3,
        batch_pool=4,
    )
    iterator = iter(loader)
    next(iterator)

    def count(prefix):
        return len(list(tmp_path.glob(f"{prefix}-*")))

    # One taken, and three finished of each worker; beyond those, four begun of each.
    wait_until(lambda: count("finished") == 5 * (1 + 2 * 3))
    wait_until(lambda: count("begun") == 5 * (1 + 2 * (3 + 4)))
    time.sleep(0.3)  # a bound that is passed later would be none

    assert count("finished") == 35
    assert count("begun") == 75
    del iterator


def test_worker_info_holds_the_dataset_of_the_user():
    loader = DataLoader(ShowsInfo(), batch_size=None, num_workers=2)

    assert list(loader) == ["ShowsInfo of 2 True"] * 4


class ShowsInfo(doubles.PlainSquares):
    def __init__(self):
        super().__init__(4)

    def __getitem__(self, position) -> Any:
        info: Any = torch.utils.data.get_worker_info()
        return f"{type(info.dataset).__name__} of {info.num_workers} {info.dataset is self}"


def change_dataset(worker_id):
    info: Any = torch.utils.data.get_worker_info()
    info.dataset.num_floats = 5 + worker_id


def test_worker_init_fn_may_change_the_dataset():
    loader = DataLoader(
        doubles.StagedSquares(8), batch_size=4, num_workers=2, worker_init_fn=change_dataset
    )

    assert [images.shape[1] for images, _ in loader] == [5, 6]


def fail_to_begin(worker_id):
    raise OSError(f"no disk for worker {worker_id}")


def test_an_error_of_worker_init_fn_reaches_the_training_loop():
    loader = DataLoader(doubles.StagedSquares(8), num_workers=1, worker_init_fn=fail_to_begin)

    with pytest.raises(OSError, match="no disk for worker 0"):
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("stage", ["fetch", "decode", "transform"])
def test_an_error_keeps_its_type_and_names_the_position(stage, fetch_impl, num_workers):
    error = KeyNotFoundError("s3://bucket/key: no such object")
    dataset = doubles.Failing(40, stage, 13, error)
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, fetch_impl=fetch_impl)
    iterator = iter(loader)
    before = [next(iterator) for _ in range(3)]

    with pytest.raises(KeyNotFoundError) as caught:
        next(iterator)

    shown = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "s3://bucket/key: no such object" in shown
    assert "position 13" in shown
    assert [label for _, labels in before for label in labels.tolist()] == list(range(12))
    if num_workers:
        assert "raise self.error" in str(caught.value), "the worker's traceback is missing"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_raises_stop_iteration_does_not_end_the_epoch(num_workers):
    dataset = doubles.Failing(40, "transform", 13, StopIteration())
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers)

    with pytest.raises(RuntimeError, match="position 13 of the data set raised StopIteration"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("stage", ["fetch", "decode", "transform"])
def test_an_error_comes_once_and_the_batches_after_it_can_still_be_had(
    stage, fetch_impl, num_workers
):
    dataset = doubles.Failing(20, stage, 5, LoaderError("gone"))
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, fetch_impl=fetch_impl)
    iterator = iter(loader)

    labels = []
    for _ in range(5):
        try:
            labels.append(next(iterator)[1].tolist())
        except LoaderError:
            labels.append([])

    assert labels == [[0, 1, 2, 3], [], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert next(iterator, None) is None


class Unpicklable:
    def __reduce__(self):
        raise TypeError("a socket cannot be sent")


def collate_to_unpicklable(samples):
    return Unpicklable()


def test_a_batch_that_cannot_be_sent_is_an_error_of_the_training_loop():
    loader = DataLoader(doubles.StagedSquares(4), num_workers=1, collate_fn=collate_to_unpicklable)

    with pytest.raises(TypeError, match="a socket cannot be sent"):
        next(iter(loader))


def test_a_killed_worker_is_named_within_seconds():
    loader = DataLoader(doubles.Stalling(40, 9), batch_size=4, num_workers=2)
    iterator: Any = iter(loader)
    next(iterator)
    killed = iterator._workers[0].pid
    begun = time.monotonic()
    os.kill(killed, signal.SIGKILL)

    with pytest.raises(RuntimeError, match=rf"worker \(pid\(?s?\)? ?{killed}\)"):
        list(iterator)

    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_leaving_early_ends_all_workers_though_a_fetch_stalls(fetch_impl):
    loader = DataLoader(
        doubles.Stalling(80, 11), batch_size=4, num_workers=2, fetch_impl=fetch_impl
    )
    before = children()
    begun = time.monotonic()
    for _ in loader:
        break
    gc.collect()

    assert time.monotonic() - begun < 8
    assert children() <= before


def test_a_timeout_is_an_error_and_not_a_hang():
    loader = DataLoader(doubles.Stalling(8, 1), batch_size=4, num_workers=1, timeout=1)

    with pytest.raises(DeadlineError, match=r"1 of 4 samples of a batch .* position 1; check"):
        next(iter(loader))


def children():
    """Processes of ours; other tests of the session may have some that stay, or are to end yet."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("is_persistent", [False, True])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
def test_nothing_is_left_of_a_loader(fetch_impl, is_persistent):
    process = psutil.Process()
    list(DataLoader(doubles.StagedSquares(8, 30_000), num_workers=1))  # what is made only once
    gc.collect()
    processes, shared_memory = children(), list_shared_memory()
    before = (process.num_fds(), threading.active_count())

    _batch = None
    for num_workers in (0, 2):
        loader = DataLoader(
            doubles.StagedSquares(40, 30_000),
            batch_size=4,
            num_workers=num_workers,
            fetch_impl=fetch_impl,
            persistent_workers=is_persistent and num_workers > 0,
        )
        for _ in range(3):
            for number, _batch in enumerate(loader):
                if number == 2:
                    break
    del loader, _batch
    gc.collect()

    def counts():
        return process.num_fds(), threading.active_count()

    assert children() <= processes
    wait_until(lambda: all(map(operator.le, counts(), before)))
    wait_until(lambda: not find_shared_memory(shared_memory))


ORPHAN_SCRIPT = """
import os, signal, sys
from tests.dataloader_mod.doubles import StagedSquares
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader

loader = DataLoader(StagedSquares(4000, 30_000), batch_size=4, num_workers=2)
iterator = iter(loader)
next(iterator)
print(*[worker.pid for worker in iterator._workers], flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[1] == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
    for _ in iterator:
        pass
"""


@pytest.mark.parametrize("ending", ["kill", "interrupt", "return"])
def test_workers_end_with_their_parent(ending):
    finished = subprocess.run(
        [sys.executable, "-c", ORPHAN_SCRIPT, ending],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    pids = [int(pid) for pid in finished.stdout.split()]

    assert len(pids) == 2, finished.stderr
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


PATCH_SCRIPT = """
import json, os, sys, traceback
import torch.utils.data
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.dataloader_mod.worker import _worker_loop
from tests.dataloader_mod.conftest import is_same, read_epochs
from tests.dataloader_mod.doubles import StagedSquares
from tests.dataloader_mod.test_dataloader import CountsFetches

settings = dict(batch_size=8, shuffle=True, num_workers=2)
before = read_epochs(torch.utils.data.DataLoader, StagedSquares(80, 9000), **settings)

torch.utils.data._utils.worker._worker_loop = _worker_loop

def read():
    theirs = read_epochs(torch.utils.data.DataLoader, StagedSquares(80, 9000), **settings)
    assert is_same(theirs, before)
    assert is_same(read_epochs(DataLoader, StagedSquares(80, 9000), **settings), before)
    loader = torch.utils.data.DataLoader(CountsFetches(64), **settings)
    return f"peak {max(int(batch.max()) for batch in loader)}"

told = []
for variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    try:
        told.append(read())
    except Exception:
        told.append(traceback.format_exc())
    for name in variables:
        del os.environ[name]
print(json.dumps(told))
"""

IN_PLACE_OF_TORCHS: list[tuple[dict[str, str], str]] = [
    ({}, "peak 16"),  # two batches of eight: torch sends no more than prefetch_factor ahead
    ({"CONCURRENT_DATALOADER_NUM_FETCH_WORKERS": "3"}, "peak 3"),
    ({"CONCURRENT_DATALOADER_BATCH_POOL": "0"}, "peak 8"),
    ({"CONCURRENT_DATALOADER_FETCH_IMPL": "vanilla"}, "peak 1"),
    ({"CONCURRENT_DATALOADER_FETCH_IMPL": "asyncio"}, "peak 16"),
    ({"CONCURRENT_DATALOADER_FETCH_IMPL": "async"}, "FETCH_IMPL: got 'async', expected"),
    ({"CONCURRENT_DATALOADER_BATCH_POOL": "-1"}, "BATCH_POOL: got '-1', expected a whole"),
]


@pytest.fixture(scope="module")
def told_in_place_of_torchs():
    """What came of each environment, in one process: its start takes longer than the epochs."""
    environments = [environment for environment, _ in IN_PLACE_OF_TORCHS]
    finished = subprocess.run(
        [sys.executable, "-c", PATCH_SCRIPT, json.dumps(environments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("number", range(len(IN_PLACE_OF_TORCHS)))
def test_our_worker_loop_may_stand_in_for_that_of_torch(number, told_in_place_of_torchs):
    _, expected = IN_PLACE_OF_TORCHS[number]

    assert expected in told_in_place_of_torchs[number]


def test_constructing_and_beginning_wait_for_nothing():
    loader = DataLoader(doubles.Stalling(40, 0), batch_size=4, num_workers=1)

    begun = time.monotonic()
    iterator = iter(loader)

    assert time.monotonic() - begun < 2
    del iterator


def test_an_empty_dataset_without_sampler_draws_gives_no_batch():
    assert list(DataLoader(doubles.StagedSquares(0), batch_size=4, num_workers=2)) == []


def test_the_parent_may_read_before_its_workers_start():
    dataset = doubles.StagedSquares(12)
    seed_all(1)
    dataset[3]

    labels = [
        label for _, batch in DataLoader(dataset, batch_size=4, num_workers=2) for label in batch
    ]

    assert labels == list(range(12))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio", "vanilla"])
def test_closing_ends_everything_at_once_and_iterating_begins_anew(fetch_impl, num_workers):
    before = children()
    num_threads = threading.active_count()
    dataset = doubles.StagedSquares(40, 30_000)
    with DataLoader(
        dataset,
        batch_size=4,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        fetch_impl=fetch_impl,
    ) as loader:
        iterator = iter(loader)
        images, _ = next(iterator)
        kept = images.clone()
        loader.close()

        assert children() <= before
        # torch's queues end their threads without waiting for them.
        wait_until(lambda: threading.active_count() <= num_threads)
        assert torch.equal(images, kept)
        with pytest.raises(RuntimeError, match="the loader was closed"):
            next(iterator)
        assert sum(len(labels) for _, labels in loader) == 40

    assert children() <= before
    loader.close()


def test_a_loader_can_be_pickled():
    loader = DataLoader(doubles.StagedSquares(12), batch_size=4, num_workers=2, batch_pool=1)
    list(loader)

    again = pickle.loads(pickle.dumps(loader))

    assert again.batch_pool == 1
    assert [labels.tolist() for _, labels in again] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


class WaitsForDecode(doubles.StagedSquares):
    """Gives its first sample only when its last one has been decoded; notes what is transformed."""

    def __init__(self):
        super().__init__(8)
        self.decoded_last = threading.Event()
        self.transformed = []

    def fetch(self, position):
        if position == 0:
            assert self.decoded_last.wait(20)
        return super().fetch(position)

    def decode(self, position, raw):
        if position == 7:
            self.decoded_last.set()
        return super().decode(position, raw)

    def apply_transform(self, decoded):
        self.transformed.append(decoded)
        return super().apply_transform(decoded)


def test_samples_that_have_come_are_decoded_while_an_earlier_one_has_not():
    dataset = WaitsForDecode()

    [(_, labels)] = DataLoader(dataset, batch_size=8)

    assert labels.tolist() == list(range(8))
    assert dataset.transformed == list(range(8))
