"""A loader of ImageNet from LMDB databases, as an older system had it: one line in a script.

``train_loader = ImagenetLoader("train", batch_size=256, num_workers=4)``
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets._split import Uneven
from concurrent_dataloader.datasets.indexed import Decode
from concurrent_dataloader.datasets.lmdb import DEFAULT_CACHE_RECORDS, SequentialLmdb
from concurrent_dataloader.formats.lmdb_file import LmdbFile

ROOT_VARIABLE = "IMAGENET"
"""Environment variable that names the folder of the databases; the older system's."""

# Source: torchvision's reference training script for ImageNet.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImagenetLoader:
    """Batches of ``ILSVRC-train.lmdb`` or ``ILSVRC-val.lmdb``, read from front to back.

    An epoch is one ``for`` loop over it, and holds each sample once, the last batch included. Each
    epoch is shuffled in its own way, the same for the same seed whatever the number of workers.
    """

    def __init__(
        self,
        mode: str,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        batch_size: int = 256,
        shuffle: bool | None = None,
        num_workers: int = 4,
        cache: int = DEFAULT_CACHE_RECORDS,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        cuda: bool = False,
        pin_memory: bool = False,
        root: str | os.PathLike[str] | None = None,
        path: str | os.PathLike[str] | LmdbFile | None = None,
        decode: Decode = "pillow",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        allow_pickle: bool = False,
        **loader_options: Any,
    ) -> None:
        """Look at a database; workers start with the first epoch.

        Args:
            mode: "train" or "val", or another split: which database of ``root`` to read.
            transform: Makes a tensor of an RGB image of Pillow. None: for "train" a random crop of
                224 pixels and a random flip, else a crop of 224 pixels from the centre of the image
                resized to 256; both normalised as torchvision's weights want it.
            target_transform: Makes the target of the label.
            batch_size: Samples of a batch.
            shuffle: Whether to shuffle within the cache; None: for "train" only.
            num_workers: Processes that read and decode; 0: this one does.
            cache: Records that are held in memory at once, over all workers; each of several may
                hold a batch more.
            collate_fn: As torch's.
            drop_last: Whether to leave out the last batch if it is not full.
            cuda: Whether to give batches on the current CUDA device.
            pin_memory: Whether batches lie in pinned memory; with ``cuda`` they always do before.
            root: Folder of the databases; None: what the environment variable IMAGENET names.
            path: A database by its own name; ``root`` is then not looked at.
            decode: As in `LmdbDataset`; with another than "pillow" there is no default transform.
            seed: Of the shuffle; 0 to 2**32 - 1.
            rank: Which of the processes that train together this is; None: asked of
                torch.distributed, 0 if it is not initialised.
            world_size: How many there are; likewise.
            uneven: As in `SequentialLmdb`.
            allow_pickle: Also read databases of the older system; as in `LmdbFile`.
            loader_options: What else `DataLoader` takes, such as ``persistent_workers``.

        Raises:
            ValueError: A setting is out of its range, no folder is named, or there is no CUDA.
            FileNotFoundError: There is no such database.
            ShardFormatError: It is cut short, not complete, empty, or none of ours.
            MissingDependencyError: lmdb is not installed.
        """
        if cuda and not torch.cuda.is_available():
            raise ValueError("cuda: got True, but torch sees no CUDA device; leave it out")
        if transform is None and decode == "pillow":
            transform = _default_transform(mode)
        world = _find_world(rank, world_size)
        self.mode = mode
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cuda = cuda
        self.dataset = SequentialLmdb(
            _find_path(mode, root) if path is None else path,
            batch_size=batch_size,
            shuffle=mode == "train" if shuffle is None else shuffle,
            transform=transform,
            target_transform=target_transform,
            decode=decode,
            cache=cache,
            seed=seed,
            drop_last=drop_last,
            rank=world[0],
            world_size=world[1],
            uneven=uneven,
            allow_pickle=allow_pickle,
        )
        self.loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            drop_last=drop_last,
            pin_memory=pin_memory or cuda,
            **loader_options,
        )
        self._epoch = 0

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return self.dataset.num_batches

    def __iter__(self) -> Iterator[Any]:
        """Begin the next epoch."""
        self.dataset.set_epoch(self._epoch)
        self._epoch += 1
        batches = iter(self.loader)
        return map(_to_cuda, batches) if self.cuda else batches

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins next, as after a resume; they count from 0 by themselves.

        Raises:
            ValueError: It is below 0 or above 2**32 - 1.
        """
        self.dataset.set_epoch(epoch)
        self._epoch = epoch


Loader = ImagenetLoader
"""The older system's other name for it."""


def _default_transform(mode: str) -> Callable[[Any], Any]:
    from torchvision import transforms

    geometry: list[Any] = (
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        if mode == "train"
        else [transforms.Resize(256), transforms.CenterCrop(224)]
    )
    return transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)])


def _find_path(mode: str, root: str | os.PathLike[str] | None) -> Path:
    folder = os.environ.get(ROOT_VARIABLE) if root is None else root
    if not folder:
        raise ValueError(
            f"root: got None, and the environment variable {ROOT_VARIABLE} is not set; expected the"
            f" folder of ILSVRC-{mode}.lmdb"
        )
    return Path(folder).expanduser() / f"ILSVRC-{mode}.lmdb"


def _find_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"rank, world_size: got {rank} and {world_size}, expected both, or neither"
        )
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _to_cuda(batch: Any) -> Any:
    """Copy the tensors of a batch, however deep they lie, to the current CUDA device."""
    if isinstance(batch, torch.Tensor):
        return batch.to("cuda", non_blocking=True)
    if isinstance(batch, dict):
        fields = cast("dict[Any, Any]", batch)
        return {name: _to_cuda(part) for name, part in fields.items()}
    if isinstance(batch, list | tuple):
        return [_to_cuda(part) for part in cast("list[Any]", batch)]
    return batch
