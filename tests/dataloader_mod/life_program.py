"""A training job that a test interrupts or kills; run it as a process of its own."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import IndexedDataset
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores import open_store
from tests.dataloader_mod.doubles import StagedSquares, Stalling

BATCH_SIZE = 4
STALLS_IN_BATCH = 10
KEYS = [f"{number:04}" for number in range(400)]

CODE = "from tests.dataloader_mod.life_program import main; main()"


class LargeMessages(StagedSquares):
    """Samples that travel inside the message, and are larger than a pipe holds."""

    def apply_transform(self, decoded: int) -> Any:
        return bytes(300_000)


def take_as_they_are(samples: list[Any]) -> list[Any]:
    """Collate nothing."""
    return samples


def open_data(data: dict[str, str]) -> Any:
    """Open the data set that the test names."""
    if data["kind"] == "stalls":
        return Stalling(1000, STALLS_IN_BATCH * BATCH_SIZE)
    if data["kind"] == "large":
        return LargeMessages(1000)
    client: Any = data["client"]
    store = open_store(
        "s3://bucket",
        client=client,
        credentials=data["credentials"],
        cache=data.get("cache"),
    )
    return IndexedDataset(Index.from_keys(KEYS), store, decode=None)


def main() -> None:
    """Read an epoch with the settings of the command line, and say which batch has come."""
    settings = json.loads(sys.argv[1])
    data = settings.pop("data")
    stops_after = settings.pop("stops_after", None)
    loader = DataLoader(
        open_data(data),
        batch_size=BATCH_SIZE,
        num_workers=settings.pop("num_workers", 2),
        collate_fn=None if data["kind"] == "stalls" else take_as_they_are,
        **settings,
    )
    for number, _ in enumerate(loader):
        print("batch", number, flush=True)  # noqa: T201 - the test reads it
        if number == stops_after:
            signal.pause()
