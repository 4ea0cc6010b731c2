"""What a user may write; `test_typing.py` has pyright look at it, strictly. It is not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Buffer, override

from benchmarking.misc.init_benchmarking import get_dataset
from concurrent_dataloader import (
    DataLoader,
    Index,
    S3Dataset,
    ScratchDataset,
    StagedDataset,
    open_dataset,
    open_store,
)
from concurrent_dataloader.errors import KeyNotFoundError, LoaderError, StoreUnavailableError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Credentials, RetryPolicy, Store
from concurrent_dataloader.testing import Fault, ObjectServer

Sample = tuple[Tensor, int]


class Recordings(StagedDataset[Tensor, Sample]):
    """A data set of a user's own, in three stages."""

    def __init__(self, store: Store, keys: list[str]) -> None:
        self._store = store
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    @override
    def fetch(self, position: int) -> Buffer:
        return self._store.get(self._keys[position])

    @override
    async def fetch_async(self, position: int) -> Buffer:
        return await self._store.get_async(self._keys[position])

    @override
    def decode(self, position: int, raw: Buffer) -> Tensor:
        return torch.frombuffer(bytearray(raw), dtype=torch.float32)

    @override
    def apply_transform(self, decoded: Tensor) -> Sample:
        return decoded + torch.rand(1), len(decoded)


class Squares(Dataset[Sample]):
    """A plain data set."""

    @override
    def __getitem__(self, index: int) -> Sample:
        return torch.tensor(index**2), index

    def __len__(self) -> int:
        return 100


def train(loader: DataLoader[Sample]) -> float:
    """Take each batch once."""
    total = 0.0
    for images, labels in loader:
        total += float(images.sum()) + float(labels.sum())
    return total


def main() -> None:
    """Use all that is public."""
    store = open_store(
        "s3://recordings/2024",
        client="aiohttp",
        credentials=Credentials("key", "secret"),
        endpoint_url="http://127.0.0.1:9000",
        retry=RetryPolicy(max_attempts=3),
    )
    assert_type(store, Store)
    assert_type(store.get("a", ByteRange(0, 10)), Buffer)

    recordings = Recordings(store, ["a", "b"])
    assert_type(recordings[0], Sample)
    loader = DataLoader(
        recordings,
        batch_size=2,
        shuffle=True,
        num_workers=2,
        fetch_impl="asyncio",
        num_fetch_workers=64,
        batch_pool=4,
    )
    assert_type(loader, DataLoader[Sample])
    train(loader)
    train(DataLoader(Squares(), batch_size=None))

    index = Index.load(Path("indexes/train.json"))
    assert_type(index.key(0), str)
    assert_type(len(index.limit(10, sample_seed=1)), int)

    transform: Callable[[Any], Tensor] = torch.as_tensor
    images = S3Dataset("imagenet", "train.json", limit=3000, transform=transform)
    images.set_transform(None)
    assert_type(images.label(0), int | None)
    assert_type(ScratchDataset("photos").key(0), str)
    found = open_dataset("s3://imagenet/val", split="val")
    found.set_transform(transform)
    assert_type(len(found), int)
    assert_type(get_dataset("scratch", "val", data_path="photos"), Any)

    with ObjectServer(faults=[Fault("slow_down", rate=0.1)]) as server:
        server.put_objects("photos", {"a": b"1"})
        server.set_latency(median_s=0.1, sigma=0.3)
        assert_type(server.endpoint_url, str)

    try:
        store.get("absent")
    except KeyNotFoundError as error:
        assert_type(error.filename, Any)
    except StoreUnavailableError:
        raise
    except LoaderError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
