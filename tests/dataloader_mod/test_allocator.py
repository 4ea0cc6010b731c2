"""What memory a worker has: what it keeps of freed one, and what it copies of its parent's."""

import functools
import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from concurrent_dataloader import DataLoader
from tests.leftovers import REPOSITORY

_NUM_BLOCKS = 256  # more than glibc would keep by itself at most: 64 MiB
_BLOCK_BYTES = 600_000  # of 147 pages


def write_num_page_faults(file: Path, _: int) -> None:
    """Allocate a batch and free it at once, a few times, and write how often a page was new."""
    num_faults = 0
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        blocks = [bytearray(b"x") * _BLOCK_BYTES for _ in range(_NUM_BLOCKS)]
        num_faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
        del blocks
    file.write_text(str(num_faults))


def count_page_faults_per_block(folder: Path) -> float:
    """Count those of the last time, in a worker."""
    file = folder / "num_page_faults"
    write = functools.partial(write_num_page_faults, file)
    data = torch.utils.data.TensorDataset(torch.zeros(4))
    # Not forked: a worker that is has the thresholds and the free memory of this process, too.
    list(DataLoader(data, num_workers=1, worker_init_fn=write, multiprocessing_context="spawn"))
    return int(file.read_text()) / _NUM_BLOCKS


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_worker_keeps_the_memory_of_a_batch_for_the_next(tmp_path: Path) -> None:
    assert count_page_faults_per_block(tmp_path) < 5


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=0")],
)
def test_what_the_environment_says_of_the_allocator_stays(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    assert count_page_faults_per_block(tmp_path) > 100


def read_private_bytes() -> int:
    """Memory that no other process has."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE)))


def write_growth(file: Path, _: int) -> None:
    """Collect garbage, and write how much memory became this process's own by that."""
    before = read_private_bytes()
    gc.collect()
    file.write_text(str(read_private_bytes() - before))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_collection_in_a_worker_copies_nothing_of_its_parent(tmp_path: Path) -> None:
    of_parent = [[number] for number in range(300_000)]  # 26 MB that a collection looks at
    file = tmp_path / "growth"
    data = torch.utils.data.TensorDataset(torch.zeros(4))
    write = functools.partial(write_growth, file)

    list(DataLoader(data, num_workers=1, worker_init_fn=write, multiprocessing_context="fork"))

    assert int(file.read_text()) < 5e6
    del of_parent


SCRIPT_WITH_A_CYCLE = """
import os
import torch
from concurrent_dataloader import DataLoader
from tests.leftovers import REPOSITORY

class Loud:
    def __init__(self):
        self.itself = self
    def __del__(self):
        os.write(1, f"freed in {__name__}\\n".encode())

loud = Loud()
if __name__ == "__main__":
    data = torch.utils.data.TensorDataset(torch.zeros(4))
    list(DataLoader(data, num_workers=2, multiprocessing_context="spawn"))
"""


def test_what_a_spawned_worker_began_with_is_freed_at_its_end(tmp_path: Path) -> None:
    """Libraries complain of what is not; nanobind did, of triton's objects."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT_WITH_A_CYCLE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    ended = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=100
    )

    assert ended.stdout.count("freed in __mp_main__") == 2, ended.stderr
