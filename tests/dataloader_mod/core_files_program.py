"""Says which core files it and its workers may leave; run it as a process of its own."""

from __future__ import annotations

import importlib
import json
import resource
import sys
from typing import Any

import torch.utils.data

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.dataloader_mod.worker import _worker_loop

CODE = "from tests.dataloader_mod.core_files_program import main; main()"

ALLOWED_BYTES = 1 << 20
"""What the main process allows itself."""


def limit_bytes() -> int:
    """Give the size that a core file of this process may have."""
    return resource.getrlimit(resource.RLIMIT_CORE)[0]


class Limits(torch.utils.data.Dataset[int]):
    """The sample is the limit of the process that reads it."""

    def __getitem__(self, position: int) -> int:
        return limit_bytes()

    def __len__(self) -> int:
        return 1


def main() -> None:
    """Read the sample with each start method, and by torch's own loader with our loop in it."""
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (ALLOWED_BYTES, hard_bytes))
    told: dict[str, int] = {}
    for method in ("fork", "spawn", "forkserver"):
        loader: Any = DataLoader(Limits(), num_workers=1, multiprocessing_context=method)
        (batch,) = loader
        told[method] = int(batch)
    torch_worker: Any = importlib.import_module("torch.utils.data._utils.worker")
    torch_worker._worker_loop = _worker_loop
    (batch,) = torch.utils.data.DataLoader(Limits(), num_workers=1)
    told["torch"] = int(batch)
    told["parent"] = limit_bytes()
    json.dump(told, sys.stdout)
