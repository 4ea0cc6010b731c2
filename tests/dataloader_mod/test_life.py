"""Ways to end: errors, signals, Ctrl-C, no memory. The error is told, and nothing is left."""

from __future__ import annotations

import concurrent.futures
import contextlib
import faulthandler
import fcntl
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import IterableDataset

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.cache import CachedStore, DiskCache
from concurrent_dataloader.testing import Fault, ObjectServer
from tests.dataloader_mod import doubles, life_program
from tests.leftovers import Script, nothing_left

SECONDS = 8.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
"""In which a worker's death is to be told; torch looks every 5 s where no signal tells it."""


@pytest.fixture(autouse=True)
def _made_only_once() -> None:
    """Start a worker before anything is counted: Python and torch keep some things for good."""
    for method in ("fork", "forkserver"):
        context: Any = torch.multiprocessing.get_context(method)
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
        process.close()


def read(loader: Any) -> str:
    """Read an epoch that fails; gives the error as text, so that nothing of it is held."""
    try:
        for _ in loader:
            pass
    except Exception as error:  # noqa: BLE001 - whatever it is
        return "\n".join([type(error).__name__, str(error), *getattr(error, "__notes__", [])])
    raise AssertionError("the epoch came to its end, expected an error")


# ---- a worker dies


class Deadly(doubles.StagedSquares):
    """Ends its worker in the transform of one sample."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(40)
        self.signal_number = signal_number

    def apply_transform(self, decoded: int) -> Any:
        if decoded == 9:
            # pytest's handlers write down all threads while these run, which may crash by itself.
            faulthandler.disable()
            # By another process: torch's workers take a SIGTERM of their parent for its good-bye.
            subprocess.run(["kill", f"-{self.signal_number}", str(os.getpid())], check=True)
            signal.pause()
        return super().apply_transform(decoded)


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM", "SIGABRT", "SIGBUS"])
def test_a_worker_that_a_signal_kills_is_named_with_it(name, fetch_impl):
    number = signal.Signals[name]
    begun = time.monotonic()

    with nothing_left():
        told = read(DataLoader(Deadly(number), batch_size=4, num_workers=2, fetch_impl=fetch_impl))

    assert time.monotonic() - begun < SECONDS
    assert told.startswith("RuntimeError")
    assert "worker (pid" in told
    assert f"was killed by {name}" in told


def end_connection(iterator):
    """Have the queue of batches end as when its sender dies while it hands memory over."""

    def end():
        raise EOFError

    iterator._worker_result_queue._recv_bytes = end


@pytest.mark.parametrize("dies_after_s", [0.0, 0.3])
def test_a_worker_that_is_dead_only_after_its_connection_has_ended_is_named(dies_after_s):
    def train():
        iterator: Any = iter(DataLoader(doubles.StagedSquares(40), batch_size=4, num_workers=2))
        next(iterator)
        end_connection(iterator)
        killer = threading.Timer(dies_after_s, iterator._workers[1].kill)
        killer.start()
        told = read(iterator)
        killer.join()
        return told

    with nothing_left():
        told = train()

    assert told.startswith("RuntimeError")
    assert "worker 1 (pid" in told
    assert "was killed by SIGKILL" in told


def test_to_the_thread_that_pins_a_dead_workers_message_is_none():
    def train():
        iterator: Any = iter(DataLoader(doubles.StagedSquares(40), batch_size=4, num_workers=2))
        next(iterator)
        end_connection(iterator)
        iterator._workers[1].kill()
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            read_by_thread = threads.submit(iterator._worker_result_queue.get, timeout=5.0)
            with contextlib.suppress(RuntimeError):  # torch's handler of dead children
                concurrent.futures.wait([read_by_thread])
            told = read_by_thread.exception()
        read(iterator)
        return type(told)

    with nothing_left():
        told = train()

    assert told is queue.Empty


def test_a_connection_that_ends_while_all_workers_live_is_told_as_it_is():
    def train():
        iterator: Any = iter(DataLoader(doubles.StagedSquares(40), batch_size=4, num_workers=2))
        next(iterator)
        end_connection(iterator)
        return read(iterator)

    with nothing_left():
        told = train()

    assert told.startswith("EOFError")


class UnequalShares(IterableDataset):
    """One worker has more than a pipe holds, and waits to send it; the other has nothing."""

    def __init__(self, may_send: Any) -> None:
        self.may_send = may_send

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        if info is not None and info.id == 0:
            assert self.may_send.wait(60)
            yield "x" * (4 << 20)


def test_a_worker_that_came_to_its_end_is_none_that_died_in_mid_message():
    may_send = multiprocessing.get_context("fork").Event()
    iterator: Any = iter(DataLoader(UnequalShares(may_send), batch_size=None, num_workers=2))
    sender, ended = (psutil.Process(worker.pid) for worker in iterator._workers)
    reader = iterator._worker_result_queue._reader
    receive = reader._recv
    num_stalls = []

    def send_when_the_other_has_ended():
        with contextlib.suppress(psutil.NoSuchProcess):
            while ended.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        may_send.set()

    def receive_slowly(num_bytes):
        if num_bytes > 1 << 20:
            sender.suspend()
            threading.Timer(1.5, sender.resume).start()
            num_stalls.append(num_bytes)
        return receive(num_bytes)

    reader._recv = receive_slowly
    watching = threading.Thread(target=send_when_the_other_has_ended)
    watching.start()

    sizes = [len(text) for text in iterator]

    watching.join(60)
    assert sizes == [4 << 20]
    assert len(num_stalls) == 1


class HandedOver(pickle.Unpickler):
    """Collects the sockets of worker processes that a message names."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.sockets: list[str] = []

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name == "rebuild_storage_fd":
            return lambda _, handle, size: self.sockets.append(handle._id[0])
        if global_name.startswith("rebuild"):
            return lambda *_: None
        return super().find_class(module_name, global_name)


def test_a_worker_says_nothing_of_a_parent_that_hangs_up(capfd):
    iterator: Any = iter(DataLoader(doubles.StagedSquares(40), batch_size=4, num_workers=1))
    results = iterator._worker_result_queue
    raw = results._recv_bytes()
    message = HandedOver(raw)
    message.load()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as half_way:
            half_way.connect(message.sockets[0])

    pickle.loads(raw)  # may still be taken over
    iterator.close()
    assert not capfd.readouterr().err


def exit_at_once(worker_id):
    os._exit(3)


def test_a_worker_that_exits_is_named_with_its_status():
    begun = time.monotonic()

    with nothing_left():
        told = read(
            DataLoader(doubles.StagedSquares(8), num_workers=1, worker_init_fn=exit_at_once)
        )

    assert time.monotonic() - begun < SECONDS
    assert "worker (pid" in told
    assert "exited with status 3" in told


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_a_worker_killed_while_it_sends_a_large_batch_is_named(where):
    told = []

    def train():
        loader = DataLoader(
            life_program.LargeMessages(400),
            batch_size=4,
            num_workers=1,
            collate_fn=life_program.take_as_they_are,
        )
        iterator: Any = iter(loader)
        next(iterator)
        worker = psutil.Process(iterator._workers[0].pid)
        wait_until_blocked(iterator)
        try:
            worker.kill()
            for _ in iterator:
                pass
        except RuntimeError as error:
            told.append(str(error))

    with nothing_left():
        if where == "main thread":
            train()
        else:
            thread = threading.Thread(target=train, daemon=True)
            with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD, in this thread
                thread.start()
                thread.join(2 * SECONDS)
            thread.join(2 * SECONDS)
            assert not thread.is_alive(), "it waits for the rest of the batch"

    assert told
    assert "worker (pid" in told[0]


def wait_until_blocked(iterator):
    """Wait until the pipe to the parent is full, so that a batch is sent in part."""
    deadline = time.monotonic() + 20
    seen = -1
    while True:
        file = iterator._worker_result_queue._reader.fileno()
        now = waiting_bytes(file)
        if now == seen and now >= 60_000:
            return
        assert time.monotonic() < deadline, f"only {now} bytes wait"
        seen = now
        time.sleep(0.05)


def waiting_bytes(file):
    return struct.unpack("i", fcntl.ioctl(file, termios.FIONREAD, bytes(4)))[0]


# ---- no memory


def allow_little_memory(worker_id):
    now_bytes = psutil.Process().memory_info().vms
    most_bytes = now_bytes + (1 << 29)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


class ActsAtNine(doubles.StagedSquares):
    """Does something in one stage of one sample."""

    def __init__(self, stage: str, act: Callable[[], object]) -> None:
        super().__init__(40)
        self.stage = stage
        self.act = act

    def _act(self, stage: str, position: int) -> None:
        if (stage, position) == (self.stage, 9):
            self.act()

    def fetch(self, position: int) -> bytes:
        self._act("fetch", position)
        return super().fetch(position)

    async def fetch_async(self, position: int) -> bytes:
        self._act("fetch", position)
        return await super().fetch_async(position)

    def decode(self, position: int, raw: Any) -> int:
        self._act("decode", position)
        return super().decode(position, raw)

    def apply_transform(self, decoded: int) -> Any:
        self._act("transform", decoded)
        return super().apply_transform(decoded)


def want_four_gibibytes():
    return bytearray(1 << 32)


@pytest.mark.parametrize("stage", ["fetch", "decode", "transform"])
def test_memory_that_is_refused_is_an_error_that_names_the_position(stage):
    with nothing_left():
        told = read(
            DataLoader(
                ActsAtNine(stage, want_four_gibibytes),
                batch_size=4,
                num_workers=2,
                num_fetch_workers=4,
                worker_init_fn=allow_little_memory,
            )
        )

    assert told.startswith("MemoryError")
    assert "position 9" in told


def collate_greedily(samples):
    return torch.zeros(1 << 30)


def test_memory_that_is_refused_to_a_batch_is_an_error():
    with nothing_left():
        told = read(
            DataLoader(
                doubles.StagedSquares(8),
                batch_size=4,
                num_workers=1,
                num_fetch_workers=4,
                worker_init_fn=allow_little_memory,
                collate_fn=collate_greedily,
            )
        )

    assert told.startswith("RuntimeError")
    assert "memory" in told


# ---- an exception, wherever it comes from


class BrokenError(Exception):
    pass


def break_down(*_):
    raise BrokenError("broken on purpose")


class BrokenSampler:
    def __iter__(self):
        yield from range(9)
        raise BrokenError("broken on purpose")

    def __len__(self):
        return 40


class BrokenStream(IterableDataset[int]):
    def __iter__(self):
        yield from range(9)
        raise BrokenError("broken on purpose")


BROKEN: dict[str, dict[str, Any]] = {
    "fetch": {"dataset": lambda: ActsAtNine("fetch", break_down)},
    "decode": {"dataset": lambda: ActsAtNine("decode", break_down)},
    "transform": {"dataset": lambda: ActsAtNine("transform", break_down)},
    "collate": {"collate_fn": break_down},
    "worker_init_fn": {"worker_init_fn": break_down},
    "sampler": {"sampler": BrokenSampler()},
    "iterable data set": {"dataset": BrokenStream},
}


@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize(("place", "num_workers"), [(p, n) for p in BROKEN for n in (0, 2)])
def test_an_exception_is_raised_once_and_nothing_is_left(place, num_workers, fetch_impl):
    if place == "worker_init_fn" and num_workers == 0:
        pytest.skip("torch calls it in workers only")
    settings = {"num_workers": num_workers, "fetch_impl": fetch_impl, **BROKEN[place]}
    make_dataset = settings.pop("dataset", lambda: doubles.StagedSquares(40))

    with nothing_left():
        told = read(DataLoader(make_dataset(), batch_size=4, **settings))

    assert told.startswith("BrokenError")
    assert "broken on purpose" in told


def break_with_a_class_of_its_own(*_):
    class LocalError(Exception):
        pass

    raise LocalError("broken on purpose")


def test_an_exception_whose_class_cannot_be_sent_arrives_with_its_words():
    with nothing_left():
        told = read(
            DataLoader(
                doubles.StagedSquares(8), num_workers=1, collate_fn=break_with_a_class_of_its_own
            )
        )

    assert "broken on purpose" in told
    assert "break_with_a_class_of_its_own" in told, "the remote traceback is missing"


class Unpinnable:
    """A batch that the pin thread cannot pin."""

    def pin_memory(self):
        raise BrokenError("broken on purpose")


def collate_to_unpinnable(samples):
    return Unpinnable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a device nothing is pinned")
def test_an_exception_of_the_pin_thread_is_raised_and_nothing_is_left():
    with nothing_left():
        told = read(
            DataLoader(
                doubles.StagedSquares(8),
                num_workers=2,
                pin_memory=True,
                collate_fn=collate_to_unpinnable,
            )
        )

    assert "broken on purpose" in told


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_with_pin_memory_a_killed_worker_is_named_too():
    with nothing_left():
        told = read(
            DataLoader(Deadly(signal.SIGKILL), batch_size=4, num_workers=2, pin_memory=True)
        )

    assert "worker (pid" in told


# ---- an epoch is left


def leave_by_break(loader):
    for _ in loader:
        break


def leave_by_close(loader):
    iterator = iter(loader)
    next(iterator)
    loader.close()


def leave_by_with(loader):
    with loader:
        next(iter(loader))


def leave_by_exception(loader):
    with contextlib.suppress(KeyNotFoundError):
        for _ in loader:
            raise KeyNotFoundError("of the training loop")


def leave_in_a_cycle(loader):
    iterator = iter(loader)
    next(iterator)
    iterator.itself = iterator  # only the collector finds it


@pytest.mark.parametrize("is_persistent", [False, True])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_close, leave_by_with, leave_by_exception, leave_in_a_cycle]
)
def test_nothing_is_left_of_an_epoch_that_was_left(leave, fetch_impl, is_persistent):
    with nothing_left():
        # Position 30 never comes: workers are waiting for it when they are told to end.
        leave(
            DataLoader(
                doubles.Stalling(80, 30),
                batch_size=4,
                num_workers=2,
                fetch_impl=fetch_impl,
                persistent_workers=is_persistent,
            )
        )


def test_an_epoch_after_one_that_was_left_is_whole():
    loader = DataLoader(
        doubles.StagedSquares(40), batch_size=4, num_workers=2, persistent_workers=True
    )
    leave_by_break(loader)

    labels = [label for _, labels in loader for label in labels.tolist()]

    assert labels == list(range(40))
    loader.close()


IMPORTS = """
import sys
import concurrent_dataloader.dataloader_mod.dataloader
print("numpy.random" in sys.modules)
"""


def test_what_a_worker_seeds_first_is_imported_before_any_is_forked():
    # Three loaders begun at once in three threads waited for ever: numpy imports it at first use,
    # and a worker that was forked meanwhile had a lock that nobody in it would let go.
    told = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=100
    )

    assert told.stdout == "True\n"


# ---- Ctrl-C, and the job is killed


def start(folder: pathlib.Path, **settings: Any) -> Script:
    temporary = folder / "t"
    temporary.mkdir()
    return Script(life_program.CODE, json.dumps(settings), folder=temporary)


def wait_for_batch(script: Script, number: int) -> None:
    while script.read_line() != f"batch {number}":
        pass


STALLS = {"kind": "stalls"}
LAST = life_program.STALLS_IN_BATCH - 1
WAYS = [
    ("fork", "threaded", False),
    ("fork", "asyncio", True),
    ("forkserver", "asyncio", False),
    # Its workers start as those of the server of forks do, but each imports torch for itself.
    pytest.param("spawn", "threaded", True, marks=pytest.mark.grid),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fetch_impl", "is_persistent"), WAYS)
def test_ctrl_c_while_the_store_stalls_ends_everything(tmp_path, method, fetch_impl, is_persistent):
    with start(
        tmp_path,
        data=STALLS,
        multiprocessing_context=method,
        fetch_impl=fetch_impl,
        persistent_workers=is_persistent,
    ) as job:
        wait_for_batch(job, LAST)

        os.killpg(job.process.pid, signal.SIGINT)
        _, complaints = job.finish()

        assert job.process.returncode == -signal.SIGINT
        assert complaints.count("Traceback") == 1, complaints
        assert complaints.rstrip().endswith("KeyboardInterrupt")
        job.check_nothing_left()


def stall(server: ObjectServer, kind: Any, folder: pathlib.Path) -> dict[str, str]:
    """Let one object not come; gives what opens the bucket."""
    server.put_objects("bucket", dict.fromkeys(life_program.KEYS, bytes(1000)))
    stalls = f"{life_program.STALLS_IN_BATCH * life_program.BATCH_SIZE:04}"
    server.set_faults([Fault(kind, key_pattern=stalls)])
    credentials = folder / "credentials.json"
    keys = {"access_key": server.access_key, "secret": server.secret_key}
    credentials.write_text(json.dumps(keys | {"endpoint_url": server.endpoint_url}))
    return {"credentials": str(credentials)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "fetch_impl", "num_workers"),
    [
        ("obstore", "threaded", 2),
        ("obstore", "threaded", 0),
        ("aiohttp", "asyncio", 2),
        ("aiobotocore", "asyncio", 0),
        ("boto3", "asyncio", 2),
    ],
)
@pytest.mark.parametrize("kind", ["stalled_headers", "stalled_body"])
def test_ctrl_c_ends_requests_that_a_server_does_not_answer(
    tmp_path, object_server: ObjectServer, client, fetch_impl, num_workers, kind
):
    data = {"kind": "store", "client": client} | stall(object_server, kind, tmp_path)
    with start(tmp_path, data=data, fetch_impl=fetch_impl, num_workers=num_workers) as job:
        wait_for_batch(job, LAST)

        os.killpg(job.process.pid, signal.SIGINT)
        _, complaints = job.finish()

        assert job.process.returncode == -signal.SIGINT
        assert complaints.rstrip().endswith("KeyboardInterrupt")
        job.check_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "fetch_impl"),
    [("obstore", "threaded"), ("http", "threaded"), ("aiohttp", "asyncio")],
)
def test_what_ctrl_c_leaves_of_a_download_is_gone_once_the_disk_cache_is_opened_anew(
    tmp_path, object_server: ObjectServer, client, fetch_impl
):
    cache = tmp_path / "cache"
    data = {"kind": "store", "client": client, "cache": str(cache)}
    data |= stall(object_server, "stalled_headers", tmp_path)
    with start(tmp_path, data=data, fetch_impl=fetch_impl) as job:
        wait_for_batch(job, LAST)
        assert list(cache.glob("objects-v1/partial/*")), "nothing is being downloaded"

        os.killpg(job.process.pid, signal.SIGINT)
        job.finish()

        job.check_nothing_left()
        # Workers remove it themselves, unless their parent is faster and kills them.
        CachedStore(MemoryStore({"a": b"body"}, "data"), DiskCache(cache)).get("a")
        assert not list(cache.glob("objects-v1/partial/*"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fetch_impl", "is_persistent"), WAYS)
def test_workers_end_when_their_parent_is_killed_while_the_store_stalls(
    tmp_path, method, fetch_impl, is_persistent
):
    with start(
        tmp_path,
        data=STALLS,
        multiprocessing_context=method,
        fetch_impl=fetch_impl,
        persistent_workers=is_persistent,
    ) as job:
        wait_for_batch(job, LAST)

        job.process.kill()

        job.check_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("fetch_impl", ["threaded", "vanilla"])
def test_workers_end_when_their_parent_is_killed_with_batches_half_sent(
    tmp_path, method, fetch_impl
):
    with start(
        tmp_path,
        data={"kind": "large"},
        stops_after=0,
        multiprocessing_context=method,
        fetch_impl=fetch_impl,
    ) as job:
        wait_for_batch(job, 0)

        job.process.kill()

        job.check_nothing_left()
