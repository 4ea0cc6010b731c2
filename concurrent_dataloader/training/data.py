"""Data around their opening: a copy on this machine, noise in their place, their classes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

from concurrent_dataloader.datasets import StagedDataset, StreamedShards
from concurrent_dataloader.errors import MissingSplitError
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.copy import copy_to_folder
from concurrent_dataloader.stores import open_store
from concurrent_dataloader.training.arguments import Args
from concurrent_dataloader.training.processes import Place

LAYOUT = "train/CLASS/*.jpg and val/CLASS/*.jpg, or shards of these splits"
"""What is expected to lie in the folder or bucket."""

_NOISE_BYTES = 224 * 224 * 3


def locate(args: Args) -> dict[str, Any]:
    """Say where the images lie and through what they are read, as `get_dataset` is told."""
    bucket_name, _, prefix = args.data.removeprefix("s3://").partition("/")
    where: dict[str, Any] = {"data_path": args.data}
    if args.dataset == "s3":
        where = {"bucket_name": bucket_name, "prefix": prefix}
    is_local = args.dataset in ("scratch", "folder", "lmdb") or (
        args.dataset != "s3" and "://" not in args.data
    )
    if args.anonymous and not is_local:
        where["anonymous"] = True
    return {
        **where,
        "endpoint_url": args.endpoint_url,
        "s3_credential_file": args.s3_credential_file,
        "use_cache": args.use_cache or bool(args.cache_dir) or args.cache_limit is not None,
        "cache_endpoint_url": args.cache_endpoint_url if args.use_cache else None,
        "cache_dir": args.cache_dir,
        "cache_limit_bytes": None if args.cache_limit is None else int(args.cache_limit * 1e9),
    }


def copy_data(args: Args, place: Place) -> float:
    """Copy the data to this machine, once for all its processes; gives the seconds it took."""
    began_s = time.perf_counter()
    if place.rank % place.num_local == 0:
        is_bucket_name = args.dataset == "s3" and "://" not in args.data
        open_root = functools.partial(
            open_store,
            credentials=args.s3_credential_file,
            endpoint_url=args.endpoint_url,
            anonymous=args.anonymous,
        )
        url = f"s3://{args.data}" if is_bucket_name else args.data
        report = copy_to_folder(url, args.copy_to, open_root=open_root)
        print(
            f"copied {report.num_copied} files, {report.copied_bytes / 1e6:.1f} MB (10^6 bytes), to"
            f" {args.copy_to} in {report.duration_s:.1f} s; {report.num_skipped} were there"
        )
    if place.world_size > 1:
        dist.barrier()
    args.data = str(args.copy_to)
    args.dataset = "scratch" if args.dataset == "s3" else args.dataset
    return time.perf_counter() - began_s


def open_data(
    args: Args, place: Place, open_split: Callable[[Args, str | None, Any], Any]
) -> tuple[Any, Any]:
    """Open both splits; each may be None: that of training if it is not asked for, or no "val".

    Class folders that lie in no folder of a split are those of training.

    Raises:
        MissingSplitError: There is no other split than one that is not wanted; says what is.
    """

    def tell(text: str) -> None:
        if place.rank == 0:
            print(text, flush=True)

    train = None
    if not args.evaluate:
        try:
            train = open_split(args, "train", None)
        except MissingSplitError as error:
            if error.splits:
                raise _say_layout(error) from error
            train = open_split(args, None, None)
            count = "images" if train.classes is None else f"{train.classes.count} class folders"
            tell(f"no split 'train' in {args.data}: its {count} are taken as that")
    try:
        val = open_split(args, "val", getattr(train, "classes", None))
    except MissingSplitError as error:
        if args.evaluate:
            raise _say_layout(error) from error
        tell(f"no split 'val' in {args.data}: training without validation")
        return train, None
    return train, val


def _say_layout(error: MissingSplitError) -> MissingSplitError:
    """Say what the trainer, which has no flag for a split, expects to find."""
    told = MissingSplitError(f"{str(error).partition(';')[0]}; the trainer expects {LAYOUT}")
    told.splits = error.splits
    return told


class Noise(StagedDataset[Any, Any]):
    """Images of noise, the same at a position each time; they cost no random draw to make.

    Not torchvision's FakeData, which seeds the global generator for each image: in threads, the
    draws of transforms would come from its seeds.
    """

    def __init__(self, size: int, num_classes: int, transform: Callable[[Any], Any]) -> None:
        self.size, self.num_classes, self.transform = size, num_classes, transform
        self.noise = np.random.default_rng(0).bytes(2 * _NOISE_BYTES)

    def __len__(self) -> int:
        return self.size

    def fetch(self, position: int) -> memoryview:
        """Give the pixels at a place that only positions far apart share."""
        start = position % _NOISE_BYTES
        return memoryview(self.noise)[start : start + _NOISE_BYTES]

    def decode(self, position: int, raw: Any) -> tuple[Image.Image, int]:
        """Make an image of 224 x 224, and its label."""
        return Image.frombytes("RGB", (224, 224), bytes(raw)), position % self.num_classes

    def apply_transform(self, decoded: tuple[Image.Image, int]) -> tuple[Any, int]:
        """Transform the image."""
        return self.transform(decoded[0]), decoded[1]


def make_noise(args: Args, split: str, transform: Callable[[Any], Any]) -> Noise:
    """Make up as many images as ImageNet's split has, or as the flags say."""
    size = min({"train": 1_281_167, "val": 50_000}[split], args.dataset_limit or 2**31)
    return Noise(size, args.classes or 1000, transform)


def tell_baked(place: Place, **splits: Any) -> None:
    """Say which steps a split's transform leaves out, since its shards were packed with them."""
    for split, dataset in splits.items():
        steps = getattr(dataset, "skipped_steps", ())
        if steps and place.rank == 0:
            print(f"{split}: without {', '.join(steps)}, which is baked into the shards")


def find_classes(args: Args, dataset: Any, known: list[str] | None) -> list[str]:
    """Find the names of the classes, by label; raise unless they are those of the weights."""
    if args.dummy:
        return [str(label) for label in range(args.classes or 1000)]
    is_bare = isinstance(dataset, StreamedShards)
    if dataset.classes is None and not is_bare:
        raise ValueError(
            f"{args.data}: the images have no classes; expected {LAYOUT}, or give --classes-file"
        )
    if dataset.classes is None and args.classes is None:
        raise ValueError(
            f"{args.data}: neither an index nor metadata.json lies beside the shards to say which "
            "classes there are; give their number by --classes"
        )
    num_known = 0 if dataset.classes is None else dataset.classes.count
    count = args.classes or num_known
    if count < num_known:
        raise ValueError(f"--classes: got {count}, but the data have {num_known}")
    classes = [str(label) for label in range(count)]
    if dataset.classes is not None:
        classes = [dataset.classes.name(label) for label in range(count)]
    if known is not None and known != classes:
        raise ValueError(
            f"--resume: {args.resume}: knows {len(known)} classes, {known[0]!r} first, the data "
            f"{len(classes)}, {classes[0]!r} first; give it the data that it was trained with"
        )
    space = None if dataset.classes is None else dataset.classes.label_space
    if args.pretrained and len(classes) == 1000 and space is not LabelSpace.SORTED_WNID:
        raise ValueError("--pretrained: these 1000 classes are not ImageNet's; leave it out")
    return classes
