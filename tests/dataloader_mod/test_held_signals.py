"""Ctrl-C while workers are forked."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from concurrent_dataloader.dataloader_mod.held_signals import HeldSignals

PROGRAM = """
import json, multiprocessing, os, signal, sys
import torch
from concurrent_dataloader import DataLoader

num_forks = 0

def interrupt():
    global num_forks
    num_forks += 1
    if num_forks == fork:
        signal.raise_signal(signal.SIGINT)

fork, persistent = json.loads(sys.argv[1])
# Here Python would drop what a handler raises: as it does in those of its own modules.
os.register_at_fork(after_in_parent=interrupt)
data = torch.utils.data.TensorDataset(torch.arange(12))
loader = DataLoader(
    data, 4, num_workers=2, multiprocessing_context="fork", persistent_workers=persistent
)
num_epochs = 0
try:
    while num_forks <= 4 and num_epochs < 4:
        assert torch.cat([batch for batch, in loader]).tolist() == list(range(12))
        num_epochs += 1
except KeyboardInterrupt:
    print("interrupted in epoch", num_epochs)
loader.close()
print(len(multiprocessing.active_children()), "workers left")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.fixture
def held():
    """Signals that are heeded again whatever the test does."""
    signals = HeldSignals()
    yield signals
    signals.forget()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fork", "persistent", "epoch"), [(1, False, 0), (2, True, 0), (3, False, 1)]
)
def test_ctrl_c_in_the_fork_of_a_worker_ends_the_epoch(fork, persistent, epoch) -> None:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([fork, persistent])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert process.stderr == ""
    assert process.stdout.splitlines() == [
        f"interrupted in epoch {epoch}",
        "0 workers left",
        "True",
    ]


def test_a_signal_is_heeded_later_and_the_handler_is_the_old_one(held: HeldSignals) -> None:
    held.hold()
    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        held.heed()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    held.heed()  # once only


def test_a_handler_of_the_programs_own_is_run_once_for_each_signal(held: HeldSignals) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        held.hold()
        signal.raise_signal(signal.SIGTERM)
        assert received == []
        held.heed()
        assert received == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_each_signal_is_heeded_though_the_first_handler_raises(held: HeldSignals) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        held.hold()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            held.heed()
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_fork_forgets_what_its_parent_heeds(held: HeldSignals) -> None:
    held.hold()
    signal.raise_signal(signal.SIGINT)

    held.forget()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    held.heed()


def test_a_signal_that_is_ignored_stays_so(held: HeldSignals) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        held.hold()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        held.heed()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_held(held: HeldSignals) -> None:
    thread = threading.Thread(target=held.hold)
    thread.start()
    thread.join()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
