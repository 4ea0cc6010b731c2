"""What scenarios measure: photographs in RAM, in files and in a slow store, and loaders of them.

Every sample is ``(image, position)``: the label of a sample is its position, so that whoever reads
a batch knows which samples are in it.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
import torch.utils.data
from PIL import Image
from torchvision import transforms
from typing_extensions import Buffer, override

from benchmarking.effort import Effort
from benchmarking.measure import Loader, endless_sampler
from benchmarking.photos import make_benchmark_set
from benchmarking.results import Setting
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.dataloader_mod.settings import FetchImpl
from concurrent_dataloader.datasets.contract import StagedDataset
from concurrent_dataloader.datasets.indexed import IndexedDataset
from concurrent_dataloader.index import Index
from concurrent_dataloader.stores import Client, Credentials, open_store
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.stores.base import Store
from concurrent_dataloader.testing import ObjectServer

BUCKET = "photos"
LATENCY_SIGMA = 0.3
NUM_WORKERS = 2
TRANSFORM = "RandomResizedCrop(224), RandomHorizontalFlip, ToTensor, Normalize"


class Photos(NamedTuple):
    """The benchmark set, on disk and in memory."""

    folder: pathlib.Path
    raw: dict[str, bytes]
    """By key, sorted."""

    @property
    def mean_bytes(self) -> float:
        """Mean size of a file."""
        return sum(map(len, self.raw.values())) / len(self.raw)


def read_photos(num_images: int) -> Photos:
    """Make the benchmark set, or find it, and read it."""
    folder = make_benchmark_set(num_images)
    paths = sorted(folder.rglob("*.jpg"))
    return Photos(folder, {str(path.relative_to(folder)): path.read_bytes() for path in paths})


@contextlib.contextmanager
def serve(photos: Photos, median_s: float, sigma: float = LATENCY_SIGMA) -> Generator[ObjectServer]:
    """Serve the photographs from a process of its own, with lognormal latency."""
    with ObjectServer() as server:
        server.put_objects(BUCKET, photos.raw)
        server.set_latency(median_s=median_s, sigma=sigma)
        yield server


def remote_store(server: ObjectServer, client: Client = "obstore", **settings: Any) -> Store:
    """Open the bucket by one of the clients, signed, as a user would.

    Args:
        server: Where the bucket is.
        client: One of those of `open_store`.
        settings: What else `open_store` is told; its defaults otherwise.
    """
    return open_store(
        f"s3://{BUCKET}",
        client=client,
        credentials=Credentials(server.access_key, server.secret_key),
        endpoint_url=server.endpoint_url,
        region=server.region,
        **settings,
    )


def ram_store(photos: Photos) -> Store:
    """Hold the same bytes in this process's memory, which workers inherit."""
    return MemoryStore(photos.raw)


def local_store(photos: Photos) -> Store:
    """Read the same bytes from files, which are in the page cache since they were just read."""
    return open_store(str(photos.folder))


def train_transform() -> Callable[[Any], torch.Tensor]:
    """Augment as everybody does for ImageNet."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def evaluation_transform() -> Callable[[Any], torch.Tensor]:
    """Crop in the centre: the same pixels whoever does it, and when."""
    return transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


class PlainImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """A data set as users write them: ``__getitem__`` opens a file; the label is the position."""

    def __init__(self, paths: list[pathlib.Path]) -> None:
        self._paths = paths
        self._transform = evaluation_transform()

    def __len__(self) -> int:
        """Count the files."""
        return len(self._paths)

    @override
    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        """Read, decode and transform."""
        with Image.open(self._paths[position]) as image:
            return self._transform(image.convert("RGB")), position


class PositionedImages(IndexedDataset):
    """The library's own data set, but that the label of a sample is its position."""

    @override
    def label(self, position: int) -> int:
        """Give the position."""
        return position


def images_of(photos: Photos, store: Store) -> PositionedImages:
    """Join the photographs' index with a store; one class of data set, whatever the store."""
    return PositionedImages(
        index=Index.from_keys(photos.raw),
        store=store,
        transform=train_transform(),
    )


class RawBytes(StagedDataset[tuple[int, int], tuple[int, int]]):
    """Objects that are fetched and counted, not decoded: ``(size in bytes, position)``."""

    def __init__(self, keys: list[str], store: Store) -> None:
        self._keys = keys
        self._store = store

    def __len__(self) -> int:
        """Count the objects."""
        return len(self._keys)

    def fetch(self, position: int) -> Buffer:
        """Read the object."""
        return self._store.get(self._keys[position])

    async def fetch_async(self, position: int) -> Buffer:
        """Read as `fetch` does, without blocking the event loop."""
        return await self._store.get_async(self._keys[position])

    def decode(self, position: int, raw: Buffer) -> tuple[int, int]:
        """Count the bytes."""
        return memoryview(raw).nbytes, position

    def apply_transform(self, decoded: tuple[int, int]) -> tuple[int, int]:
        """Change nothing."""
        return decoded


def torch_loader(
    dataset: Any, effort: Effort, *, num_workers: int = NUM_WORKERS, sampler: Any = None
) -> Loader:
    """Open torch's own loader, with the settings that every side of a comparison has."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=effort.batch_size,
        sampler=endless_sampler(dataset) if sampler is None else sampler,
        num_workers=num_workers,
    )


def our_loader(
    dataset: Any,
    effort: Effort,
    *,
    fetch_impl: FetchImpl = "threaded",
    num_workers: int = NUM_WORKERS,
    num_fetch_workers: int | None = None,
    batch_pool: int | None = None,
    sampler: Any = None,
) -> Loader:
    """Open our loader, with the same settings, and its own at their defaults."""
    return DataLoader(
        dataset,
        batch_size=effort.batch_size,
        sampler=endless_sampler(dataset) if sampler is None else sampler,
        num_workers=num_workers,
        fetch_impl=fetch_impl,
        num_fetch_workers=num_fetch_workers,
        batch_pool=batch_pool,
    )


def describe(photos: Photos, effort: Effort, **more: Setting) -> dict[str, Setting]:
    """List the settings that all rows of loaders share, and those of one row."""
    return {
        "num_images": len(photos.raw),
        "mean_image_bytes": round(photos.mean_bytes),
        "transform": TRANSFORM,
        "order": "shuffled, seed 0",
        "batch_size": effort.batch_size,
        "num_workers": NUM_WORKERS,
        "prefetch_factor": "torch's default",
        "repeats": effort.repeats,
        "seconds": effort.seconds,
        **more,
    }
