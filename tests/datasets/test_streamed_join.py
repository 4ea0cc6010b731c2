"""Ranks with different numbers of batches train under torch's ``Join``."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.datasets.shards import write_shards

REPOSITORY = Path(__file__).parents[2]
COUNTS = [10, 7, 0, 13, 20, 21, 8]
TOTAL = sum(COUNTS)

TRAIN = """
import json, sys

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from concurrent_dataloader import DataLoader, StreamedShards

folder, output, num_workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # what DDP makes alike
stream = StreamedShards(folder, decode=len, shuffle=True, seed=1, uneven="exact")
loader = DataLoader(stream, batch_size=3, num_workers=num_workers)
model = DistributedDataParallel(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
epochs, num_batches = [], []
for epoch in range(2):
    stream.set_epoch(epoch)
    seen = []
    with Join([model]):
        for sizes, labels in loader:
            optimizer.zero_grad()
            model(sizes[:, None] / 1000.0).square().mean().backward()
            optimizer.step()
            seen.append(labels.tolist())
    num_batches.append((len(seen), len(loader) if stream.has_index else None))
    epochs.append([label for batch in seen for label in batch])
weights = [parameter.tolist() for parameter in model.parameters()]
with open(f"{output}/{rank}.json", "w") as file:
    json.dump({"epochs": epochs, "num_batches": num_batches, "weights": weights}, file)
dist.destroy_process_group()
"""


def start_rank(
    stack: contextlib.ExitStack, folder: Path, rank: int, meeting: dict[str, str], *arguments: str
) -> subprocess.Popen[str]:
    """Start a rank of two, which does not outlive the test: another one may wait for ever."""
    shards, num_workers = arguments
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, shards, str(folder), num_workers],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            **meeting,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": "2",
        },
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has_index", "num_workers"),
    [
        (True, 2),
        pytest.param(True, 0, marks=pytest.mark.grid),
        pytest.param(False, 0, marks=pytest.mark.grid),
    ],
    ids=str,
)
def test_136_ranks_that_differ_by_a_batch_train_on_each_sample_once_by_join(
    tmp_path: Path, has_index: bool, num_workers: int
) -> None:
    """79 samples on two ranks in batches of 3: 14 batches and 13; without an index more apart."""
    folder = write_shards(tmp_path / "shards", COUNTS, with_index=has_index)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    with contextlib.ExitStack() as stack:
        running = [
            start_rank(stack, tmp_path, rank, meeting, str(folder), str(num_workers))
            for rank in range(2)
        ]
        said = [process.communicate(timeout=100)[0] for process in running]

    assert [process.returncode for process in running] == [0, 0], said
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(2):
        assert sorted(label for rank in ranks for label in rank["epochs"][epoch]) == list(
            range(TOTAL)
        )
        if has_index:
            assert [rank["num_batches"][epoch] for rank in ranks] == [[14, 14], [13, 13]]
    assert len({rank["num_batches"][0][0] for rank in ranks}) == 2
    assert ranks[0]["epochs"][0] != ranks[0]["epochs"][1]
    weights = [torch.tensor(rank["weights"][0]) for rank in ranks]
    assert torch.equal(*weights)
