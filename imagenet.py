"""Train and validate an image classifier, from an object store or a local folder.

    python imagenet.py /data/imagenet                       # train/ and val/, with class folders
    python imagenet.py s3://imagenet --endpoint-url http://127.0.0.1:9000
    python imagenet.py /data/imagenet-shards --stream       # tar shards, each read front to back
    torchrun --nnodes 4 ... imagenet.py s3://shards --stream --instances  # each node has its own
    torchrun --nproc-per-node 8 imagenet.py s3://imagenet --amp bf16 --channels-last

The flags of PyTorch's ImageNet example keep their names, meanings and defaults. ``--loader torch``
runs the same job with torch's own loader: the losses are the same, the time is not. The file is
read from top to bottom: settings, data, model, one epoch, validation, checkpoint, main.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from rich import progress
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torchvision.transforms import v2

from benchmarking.misc.init_benchmarking import DATASETS, get_dataset
from concurrent_dataloader import (
    DataLoader,
    ElasticDistributedSampler,
    ShardDataset,
    StagedDataset,
    StreamedShards,
    open_store,
)
from concurrent_dataloader.datasets import MemoryCachedDataset, shards_of_instance, skip_baked
from concurrent_dataloader.errors import LoaderError, MissingIndexError
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.copy import copy_to_folder
from concurrent_dataloader.stores import DiskCache

NOISE_BYTES = 224 * 224 * 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Args = argparse.Namespace
Loader = torch.utils.data.DataLoader[Any]


# --- settings -------------------------------------------------------------------------------------


def at_least(least: int) -> Callable[[str], int]:
    """Make a reader of whole numbers from ``least`` on."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from {least} on")
        return int(text)

    return read


def at_least_zero(text: str) -> float:
    """Read a number that is not negative."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 on")
    return number


def ratio(text: str) -> float:
    """Read a share, from 0 to 1."""
    number = at_least_zero(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 to 1")
    return number


def percentage(text: str) -> float:
    """Read a share in percent, of which something is left."""
    number = at_least_zero(text)
    if not 0 < number <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected more than 0, and at most 100")
    return number


def add_example_arguments(add: Callable[..., Any]) -> None:
    """Add the arguments of PyTorch's ImageNet example."""
    add("data", nargs="?", help="a folder, s3://bucket[/prefix], or a bucket (default: imagenet)")
    add("--data", dest="data_flag", metavar="DATA", help="the same")
    add("-a", "--arch", default="resnet18", help="a model of torchvision")
    add("-j", "--workers", type=at_least(0), default=4, help="processes that load, per node")
    add("--epochs", type=at_least(0), default=90)
    add("--start-epoch", type=at_least(0), default=0, help="from 0; a checkpoint says it better")
    add("-b", "--batch-size", type=at_least(1), default=256, help="images a step, of a node")
    add("--lr", "--learning-rate", dest="lr", type=at_least_zero, default=0.1)
    add("--momentum", type=at_least_zero, default=0.9)
    add("--wd", "--weight-decay", dest="weight_decay", type=at_least_zero, default=1e-4)
    add("-p", "--print-freq", type=at_least(1), default=10, help="steps from line to line")
    add("--resume", type=Path, help="checkpoint to go on from")
    add("-e", "--evaluate", action="store_true", help="validate only")
    add("--pretrained", action="store_true", help="begin with torchvision's weights")
    add("--world-size", type=int, default=-1, help="number of nodes")
    add("--rank", type=int, default=-1, help="number of this node, from 0")
    add("--dist-url", default="tcp://224.66.41.62:23456", help="where processes meet")
    add("--dist-backend", default="nccl", help="gloo is taken where there is no GPU")
    add("--seed", type=at_least(0), help="for runs that are equal; drawn when absent")
    add("--gpu", type=at_least(0), help="number of the only GPU to use")
    add("--no-accel", action="store_true", help="stay on the CPU")
    add("--multiprocessing-distributed", action="store_true", help="start a process per GPU")
    add("--dummy", action="store_true", help="train on noise: needs no data")


def add_own_arguments(add: Callable[..., Any]) -> None:
    """Add those of this trainer: where the images are, how they are loaded, and the recipe."""
    add("--dataset", choices=DATASETS, default="auto", help="what lies there; auto: found out")
    add("--stream", action="store_true", help="read training shards front to back")
    add(
        "--instances",
        action="store_true",
        help="each node: shards, and a part of the rest, of its own",
    )
    add("--percentage", type=percentage, default=100.0, help="how much of each shard to stream")
    add("--epoch-images", type=at_least(1), help="of training, where no index says how many")
    add("--dataset-limit", type=at_least(1), help="images of each split, drawn from all of it")
    add("--index-file", type=Path, help="JSON index of the training images; listed when absent")
    add("--val-index-file", type=Path)
    add("--classes-file", type=Path, help="JSON classes of the training images")
    add("--val-classes-file", type=Path, help="of the validation images, if they have their own")
    add("--classes", type=at_least(1), help="outputs of the model; those of the data when absent")
    add("--endpoint-url", help="of an S3-compatible store")
    add("--s3-credential-file", type=Path, help="JSON; the standard AWS chain when absent")
    add("--use-cache", action="store_true", help="read through --cache-endpoint-url")
    add("--cache-endpoint-url", help="of an HTTP cache in front of the store")
    add("--cache-dir", type=Path, help="folder of this machine to keep in what was read")
    add("--cache-limit", type=at_least_zero, help="the most it may take, in GB (10^9 bytes)")
    add("--memory-cache", type=ratio, help="share of the training images to keep in memory, 0 to 1")
    add("--copy-to", type=Path, help="folder of this machine to copy the data to, and read it from")
    add("--loader", choices=("ours", "torch"), default="ours")
    add("--fetch-impl", choices=("threaded", "asyncio", "vanilla"), default="threaded")
    add("--num-fetch-workers", type=at_least(1), help="images in flight per worker")
    add("--batch-pool", type=at_least(0), help="batches begun ahead per worker")
    add("--on-error", choices=("raise", "skip", "replace"), default="raise", help="of an image")
    add("--quarantine", type=Path, help="file for a line of JSON for each image that failed")
    add("--prefetch-factor", type=at_least(1), help="finished batches per worker")
    add("--pin-memory", action=argparse.BooleanOptionalAction, help="default: where there is a GPU")
    add("--decoder", choices=("pillow", "torchvision"), default="pillow")
    add("--image-size", type=at_least(1), default=224, help="side of the crop in pixels")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--scheduler", choices=("step", "cosine", "exponential", "constant"), default="step")
    add("--lr-step", type=at_least(1), default=30, help="epochs in which the rate falls ...")
    add("--lr-gamma", type=float, default=0.1, help="... to this share")
    add("--warmup-epochs", type=float, default=0.0)
    add("--label-smoothing", type=float, default=0.0)
    add("--checkpoint-steps", type=at_least(1), help="also save each so many steps of an epoch")
    add("--output-base-folder", type=Path, default=Path("runs/imagenet"), help="for results")


def check_error_policy(parser: argparse.ArgumentParser, args: Args) -> None:
    """Exit with status 2 if bad images are to be passed over by what cannot do it."""
    passes_over = args.on_error != "raise"
    if passes_over and (args.loader == "torch" or args.fetch_impl == "vanilla"):
        parser.error(
            f"argument --on-error: got {args.on_error}, expected no --loader torch, no --fetch-impl"
            " vanilla with it"
        )
    if args.on_error == "replace" and args.stream:
        parser.error("argument --on-error: got replace, expected skip with --stream")
    if args.quarantine is not None and not passes_over:
        parser.error("argument --quarantine: expected --on-error skip or replace with it")


def check_places(parser: argparse.ArgumentParser, args: Args) -> None:
    """Exit with status 2 if a file cannot be read, or could not be written hours later."""
    if args.resume is not None and args.resume.is_dir():
        parser.error(
            f"argument --resume: {args.resume}: is a folder, expected a checkpoint in it, such as "
            f"{args.resume / 'checkpoint.pth.tar'}"
        )
    if args.resume is not None and not args.resume.is_file():
        parser.error(f"argument --resume: {args.resume}: no such file")
    path: Path | None = args.quarantine
    if path is not None:
        place = path if path.exists() else path.parent
        if path.is_dir() or not (path.parent.is_dir() and os.access(place, os.W_OK)):
            parser.error(
                f"argument --quarantine: {path}: cannot be written, expected a file in a folder "
                "that is there and writable"
            )
    folder: Path | None = args.cache_dir
    if folder is not None:
        folder = folder.expanduser().absolute()
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            parser.error(
                f"argument --cache-dir: {args.cache_dir}: {there} is no folder that can be written,"
                " expected a folder of this machine"
            )


def check_ways_to_read(parser: argparse.ArgumentParser, args: Args) -> None:
    """Refuse ways to read the data that do not go together."""
    if args.stream and (args.dataset not in ("webdataset", "tfrecord", "auto") or args.dummy):
        parser.error(f"argument --stream: got --dataset {args.dataset}, expected shards")
    if args.stream and args.dataset_limit is not None:
        parser.error("argument --stream: reads all shards, expected no --dataset-limit with it")
    for name, is_given in (
        ("--instances", args.instances),
        ("--percentage", args.percentage < 100),
        ("--epoch-images", args.epoch_images is not None),
    ):
        if is_given and not args.stream:
            parser.error(f"argument {name}: is for streams of shards, expected --stream with it")
    if args.memory_cache and (args.stream or args.dummy):
        parser.error("argument --memory-cache: keeps single samples, expected no --stream, --dummy")
    beside_copy = (args.dummy, args.index_file, args.val_index_file, args.cache_dir)
    if args.copy_to is not None and any(beside_copy):
        parser.error(
            "argument --copy-to: copies all of the data, expected no --dummy, no index file, no "
            "--cache-dir"
        )


def parse_arguments(argv: Sequence[str] | None = None) -> Args:
    """Read the command line; exits with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        usage="%(prog)s [DATA] [FLAGS]; --help lists them",
        allow_abbrev=False,
    )
    add_example_arguments(parser.add_argument)
    add_own_arguments(parser.add_argument)
    args = parser.parse_args(argv)
    if None not in (args.data, args.data_flag) and args.data != args.data_flag:
        parser.error(f"argument --data: got {args.data_flag}, and {args.data} before, expected one")
    args.data = args.data or args.data_flag or "imagenet"
    delattr(args, "data_flag")
    if args.arch not in torchvision.models.list_models(torchvision.models):
        parser.error(f"argument -a/--arch: got {args.arch!r}, expected a model of torchvision")
    check_places(parser, args)
    is_url = "://" in args.data
    if args.dataset in ("scratch", "folder", "lmdb") and is_url:
        parser.error(f"argument --dataset: got {args.dataset} for {args.data}, expected a folder")
    if args.dataset == "s3" and not is_url and args.data.startswith(("/", ".", "~")):
        parser.error(
            f"argument data: got the folder {args.data} for --dataset s3, expected a bucket"
        )
    if args.checkpoint_steps and (args.loader == "torch" or args.fetch_impl == "vanilla"):
        parser.error("argument --checkpoint-steps: torch's loader keeps no state, expected ours")
    check_ways_to_read(parser, args)
    check_error_policy(parser, args)
    if args.dataset == "auto" and (args.index_file or args.val_index_file or args.use_cache):
        # These belong to images one by one; packed data has an index of its own.
        args.dataset = "s3" if args.data.startswith("s3://") else "scratch"
    args.num_gpus = 0 if args.no_accel else torch.cuda.device_count()
    args.start_method = torch.multiprocessing.get_start_method()
    return args


class Place(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int
    world_size: int
    num_local: int
    device: torch.device
    local_rank: int = 0
    node: int = 0
    num_nodes: int = 1


@contextlib.contextmanager
def join_processes(local_rank: int, args: Args) -> Generator[Place]:
    """Choose the device and meet the other processes, under torchrun or by the example's flags."""
    by_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if by_torchrun:
        words = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
        rank, world_size, num_local, local_rank = (int(os.environ[word]) for word in words)
        node = int(os.environ.get("GROUP_RANK", rank // num_local))
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", world_size // num_local))
    else:
        num_local = max(args.num_gpus, 1) if args.multiprocessing_distributed else 1
        node, num_nodes = max(args.rank, 0), max(args.world_size, 1)
        rank, world_size = node * num_local + local_rank, num_nodes * num_local
    device = torch.device("cpu")
    if args.num_gpus:
        device = torch.device("cuda", local_rank if args.gpu is None else args.gpu)
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = args.dist_backend if args.num_gpus else "gloo"
        url = "env://" if by_torchrun else args.dist_url
        dist.init_process_group(backend, url, world_size=world_size, rank=rank)
    try:
        yield Place(rank, world_size, num_local, device, local_rank, node, num_nodes)
        if world_size > 1:
            # gloo's threads must have let go of the last tensors when they are joined, which is
            # done under the interpreter's lock; torch 2.6 hung here once in four runs.
            dist.barrier()
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def agree_on_seed(args: Args, place: Place) -> int:
    """Take the seed that was given, or one that the first process draws for all."""
    if args.seed is not None:
        return args.seed
    seed = torch.tensor(random.SystemRandom().randrange(2**31), device=place.device)
    if place.world_size > 1:
        dist.broadcast(seed, src=0)
    return int(seed)


def seed_epoch(seed: int, epoch: int, place: Place) -> None:
    """Let all that is random in an epoch follow from the seed, the epoch and the process.

    So the epoch after a resume is that of an uninterrupted run, with no generator to be saved.
    """
    words = np.random.SeedSequence([seed, epoch + 1, place.rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


# --- data -----------------------------------------------------------------------------------------


def copy_data(args: Args, place: Place) -> float:
    """Copy the data to this machine, once for all its processes; gives the seconds it took."""
    began_s = time.perf_counter()
    if place.rank % place.num_local == 0:
        is_bucket_name = args.dataset == "s3" and "://" not in args.data
        open_root = functools.partial(
            open_store, credentials=args.s3_credential_file, endpoint_url=args.endpoint_url
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


class Noise(StagedDataset[Any, Any]):
    """Images of noise, the same at a position each time; they cost no random draw to make.

    Not torchvision's FakeData, which seeds the global generator for each image: in threads, the
    draws of transforms would come from its seeds.
    """

    def __init__(self, size: int, num_classes: int, transform: Callable[[Any], Any]) -> None:
        self.size, self.num_classes, self.transform = size, num_classes, transform
        self.noise = np.random.default_rng(0).bytes(2 * NOISE_BYTES)

    def __len__(self) -> int:
        return self.size

    def fetch(self, position: int) -> memoryview:
        """Give the pixels at a place that only positions far apart share."""
        start = position % NOISE_BYTES
        return memoryview(self.noise)[start : start + NOISE_BYTES]

    def decode(self, position: int, raw: Any) -> tuple[Image.Image, int]:
        """Make an image of 224 x 224, and its label."""
        return Image.frombytes("RGB", (224, 224), bytes(raw)), position % self.num_classes

    def apply_transform(self, decoded: tuple[Image.Image, int]) -> tuple[Any, int]:
        """Transform the image."""
        return self.transform(decoded[0]), decoded[1]


def open_split(args: Args, split: str, classes: Any = None) -> Any:
    """Open the "train" or the "val" images, with the same classes if some are known already."""
    random_crop = [v2.RandomResizedCrop(args.image_size), v2.RandomHorizontalFlip()]
    center_crop = [v2.Resize(round(args.image_size * 256 / 224)), v2.CenterCrop(args.image_size)]
    # Pixels stay bytes up to the device: a quarter of the memory to collate, share and copy.
    last = [v2.PILToTensor()] if args.dummy or args.decoder == "pillow" else []
    transform = v2.Compose([*(random_crop if split == "train" else center_crop), *last])
    if args.dummy:
        size = min({"train": 1_281_167, "val": 50_000}[split], args.dataset_limit or 2**31)
        return Noise(size, args.classes or 1000, transform)
    train = split == "train"
    bucket_name, _, prefix = args.data.removeprefix("s3://").partition("/")
    where = {"data_path": args.data}
    if args.dataset == "s3":
        where = {"bucket_name": bucket_name, "prefix": prefix}
    classes_file = args.classes_file if train else args.val_classes_file
    if classes_file is None and classes is None:
        classes_file = args.classes_file
    try:
        dataset = get_dataset(
            args.dataset,
            split,  # pyright: ignore[reportArgumentType]: one of the two above
            limit=args.dataset_limit,
            sample_seed=0,  # the head of an index that is sorted by class holds few classes
            use_cache=args.use_cache or bool(args.cache_dir) or args.cache_limit is not None,
            cache_endpoint_url=args.cache_endpoint_url if args.use_cache else None,
            cache_dir=args.cache_dir,
            cache_limit_bytes=None if args.cache_limit is None else int(args.cache_limit * 1e9),
            index_file=args.index_file if train else args.val_index_file,
            classes_file=classes_file,
            classes=classes if classes_file is None else None,
            s3_credential_file=args.s3_credential_file,
            endpoint_url=args.endpoint_url,
            transform=transform,
            decode=args.decoder,
            **where,
        )
    except MissingIndexError as error:
        if not args.stream:
            raise MissingIndexError(f"{error}; or give --stream, which needs none") from error
        if classes_file is not None:
            raise ValueError(
                f"--classes-file: {classes_file}: labels are those in the shards where they have no"
                " index, expected --classes instead, or an index"
            ) from error
        return open_bare_stream(args, split, transform, error.location)
    if dataset.classes is not None and dataset.classes.label_space is not LabelSpace.CUSTOM:
        dataset.convert_labels(LabelSpace.SORTED_WNID)  # as torchvision's weights count
    return dataset


def tell_baked(place: Place, **splits: Any) -> None:
    """Say which steps a split's transform leaves out, since its shards were packed with them."""
    for split, dataset in splits.items():
        steps = getattr(dataset, "skipped_steps", ())
        if steps and place.rank == 0:
            print(f"{split}: without {', '.join(steps)}, which is baked into the shards")


def open_bare_stream(args: Args, split: str, transform: Any, location: str) -> StreamedShards:
    """Stream the shards of a split that have no index: each reader takes whole ones."""
    cache = None
    if args.cache_dir is not None:
        limit = {} if args.cache_limit is None else {"limit_bytes": int(args.cache_limit * 1e9)}
        cache = DiskCache(args.cache_dir, **limit)
    is_train, is_own_folder = split == "train", location.rstrip("/").endswith(f"/{split}")
    stream = StreamedShards(
        location,
        split=None if is_own_folder else split,  # pyright: ignore[reportArgumentType]: one of two
        transform=transform,
        decode=args.decoder,
        shuffle=is_train,
        seed=args.seed,
        uneven="exact",
        length=args.epoch_images if is_train else None,
        endpoint_url=(args.use_cache and args.cache_endpoint_url) or args.endpoint_url,
        credentials=args.s3_credential_file,
        cache=cache,
    )
    space = LabelSpace.CUSTOM if stream.classes is None else stream.classes.label_space
    if space is LabelSpace.ILSVRC2012_ID or space is LabelSpace.ILSVRC2012_VALIDATION:
        raise ValueError(
            f"--stream: {location}: the classes count as {space.value}, and are converted by an "
            "index only; write one with `concurrent-dataloader index`"
        )
    stream.set_transform(skip_baked(transform, stream.baked_steps))
    return stream


def fit_bare_stream(stream: StreamedShards, place: Place, batch_size: int) -> StreamedShards:
    """Tell a stream its batches; refuse processes without a shard before anything is trained."""
    if stream.num_shards < place.world_size:
        raise ValueError(
            f"--stream: got {stream.num_shards} shards without an index for {place.world_size} "
            f"processes in {stream}, expected one for each; write an index with "
            "`concurrent-dataloader index`"
        )
    stream.set_batch_size(batch_size)
    return stream


def open_stream(args: Args, shards: Any, place: Place, batch_size: int) -> Any:
    """Make a stream of the shards that were opened for random access: the same, front to back."""
    is_parted = args.instances or args.percentage < 100
    if isinstance(shards, StreamedShards):
        if is_parted:
            raise ValueError(
                "--instances, --percentage: the shards have no index, which tells their samples; "
                "write one with `concurrent-dataloader index`"
            )
        return fit_bare_stream(shards, place, batch_size)
    if not isinstance(shards, ShardDataset):
        raise ValueError(f"--stream: {args.data} holds no shards; leave it out, or write some")
    index, labels = shards.shard_index, shards.labels  # as they were converted
    rank, world_size = place.rank, place.world_size
    if is_parted:
        node, num_nodes = (place.node, place.num_nodes) if args.instances else (0, 1)
        with warnings.catch_warnings():
            if place.rank > 0:
                warnings.simplefilter("ignore")  # the first process says it for all
            own = shards_of_instance(shards, node, num_nodes, percentage=args.percentage)
        index, labels = own.index, None if labels is None else labels[own.positions]
        if args.instances:
            rank, world_size = place.local_rank, place.num_local
    return StreamedShards(
        [shard.name for shard in index.shards],
        store=shards.store,
        index=index,
        shuffle=True,
        seed=args.seed,
        batch_size=batch_size,
        labels=labels,
        transform=shards.transform,
        decode=args.decoder,
        # Nodes have different numbers of images: each is trained on, which `Join` allows.
        uneven="exact" if args.instances else None,
        rank=rank,
        world_size=world_size,
    )


def is_uneven(loader: Loader, place: Place) -> bool:
    """Tell whether processes may have different numbers of batches to train on."""
    dataset = loader.dataset
    is_exact = isinstance(dataset, StreamedShards) and dataset.uneven == "exact"
    return is_exact and place.world_size > 1


def count_steps(loader: Any, place: Place) -> int | None:
    """Count the batches of an epoch in this process.

    Of shards without an index it is about that many, and None where nobody counted the images.
    """
    dataset = loader.dataset
    if not isinstance(dataset, StreamedShards) or dataset.has_index:
        return len(loader)
    if dataset.num_samples is None:
        return None
    return math.ceil(dataset.num_samples / (place.world_size * loader.batch_size))


def take_share(
    args: Args, dataset: Any, place: Place, batch_size: int, *, is_train: bool
) -> tuple[Any, Any]:
    """Give what this process reads of a split, and the sampler of its positions, if any."""
    sampler: Any = None
    if is_train and args.stream:
        dataset = open_stream(args, dataset, place, batch_size)
    elif isinstance(dataset, StreamedShards):  # the other split, without an index
        dataset = fit_bare_stream(dataset, place, batch_size)
    elif not is_train:
        # Not a DistributedSampler, which counts images twice to make all shares equal.
        sampler = range(place.rank, len(dataset), place.world_size)
    else:
        if args.memory_cache:
            try:
                dataset = MemoryCachedDataset(dataset, args.memory_cache)
            except (TypeError, MemoryError) as error:
                raise ValueError(f"--memory-cache: {error}") from error
            if place.rank == 0:
                print(f"training images: {dataset.describe()}")
        # The order of a DistributedSampler; an epoch may go on over other processes.
        ranks = (place.world_size, place.rank)
        sampler = ElasticDistributedSampler(dataset, *ranks, seed=args.seed)
    return dataset, sampler


def make_loader(args: Args, dataset: Any, place: Place, *, is_train: bool) -> Loader:
    """Make the loader of this process's share of a split: ours or torch's."""
    batch_size = max(1, args.batch_size // place.num_local)
    dataset, sampler = take_share(args, dataset, place, batch_size, is_train=is_train)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": math.ceil(args.workers / place.num_local),
        "sampler": sampler,
        "pin_memory": place.device.type == "cuda" if args.pin_memory is None else args.pin_memory,
        "prefetch_factor": args.prefetch_factor,
    }
    if args.loader == "torch":
        return torch.utils.data.DataLoader(dataset, **settings)
    for name in ("fetch_impl", "num_fetch_workers", "batch_pool", "on_error"):
        settings[name] = getattr(args, name)
    if not is_train and args.on_error == "replace":
        settings["on_error"] = "skip"  # another image's accuracy is not that of the bad one
    if is_train and place.world_size > 1 and args.on_error == "skip":
        # A process whose batch is left out would leave the others waiting for its gradients.
        raise ValueError("--on-error: got skip for several processes, expected raise or replace")
    loader = DataLoader(dataset, quarantine_file=args.quarantine, **settings)
    if is_train and args.checkpoint_steps and is_uneven(loader, place):
        raise ValueError(
            "--checkpoint-steps: processes that have different numbers of batches are not at the "
            "same step when the first one ends, expected an index, and no --instances"
        )
    return loader


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to whatever orders the samples, if it wants to know."""
    for part in (loader, loader.dataset, loader.sampler, loader.batch_sampler):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


class Batch(NamedTuple):
    """A batch on the device: images (B, 3, H, W) float32, normalised, and labels (B,) int64."""

    images: Tensor
    labels: Tensor
    wait_s: float
    """How long the loop had nothing to do but wait for it."""


def iter_batches(loader: Loader, args: Args, place: Place) -> Iterator[Batch]:
    """Take an epoch's batches to the device."""
    mean = 255 * torch.tensor(MEAN, device=place.device).view(3, 1, 1)
    std = 255 * torch.tensor(STD, device=place.device).view(3, 1, 1)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    began_s = time.perf_counter()
    for pixels, labels in loader:
        wait_s = time.perf_counter() - began_s
        pixels = pixels.to(place.device, non_blocking=True).contiguous(memory_format=layout)
        labels = labels.to(place.device, non_blocking=True)
        # A copy, also of pixels that are float32 already: the batch is not ours to change.
        images = pixels.to(torch.float32, copy=True)
        yield Batch(images.sub_(mean).div_(std), labels, wait_s)
        began_s = time.perf_counter()


# --- model ----------------------------------------------------------------------------------------


def make_model(args: Args, num_classes: int, place: Place) -> nn.Module:
    """Build the model on the device, with torchvision's weights if asked for."""
    model = torchvision.models.get_model(args.arch, weights=None, num_classes=num_classes)
    if args.pretrained:
        weights = torchvision.models.get_model(args.arch, weights="DEFAULT").state_dict()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        fitting = {name: tensor for name, tensor in weights.items() if tensor.shape == shapes[name]}
        model.load_state_dict(fitting, strict=False)
        if place.rank == 0 and (fresh := shapes.keys() - fitting.keys()):
            print(f"{num_classes} classes, not 1000: {', '.join(sorted(fresh))} begin anew")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(place.device).to(memory_format=layout)


def wrap_model(model: nn.Module, args: Args, place: Place) -> nn.Module:
    """Compile the model, and join it to those of the other processes."""
    wrapped = model
    if place.world_size > 1:
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif args.num_gpus > 1 and args.gpu is None:
        wrapped = nn.DataParallel(model)
    if args.compile:
        wrapped.compile()
    return wrapped


def learning_rate(args: Args, epoch: float) -> float:
    """Rate at a time in epochs from 0: 1.5 is the middle of the second one."""
    if epoch < args.warmup_epochs:
        return args.lr * (0.01 + 0.99 * epoch / args.warmup_epochs)
    if args.scheduler == "cosine":
        return args.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, epoch / args.epochs)))
    steps = {"step": int(epoch) // args.lr_step, "exponential": epoch / args.lr_step}
    return args.lr * args.lr_gamma ** steps.get(args.scheduler, 0)


@dataclasses.dataclass
class Job:
    """What an epoch needs."""

    args: Args
    place: Place
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_loader: Loader | None
    val_loader: Loader
    classes: list[str]
    best_acc1: float
    log: TextIO | None
    """Lines of JSON, of the first process."""
    copy_s: float
    """How long it took to copy the data to this machine."""
    first_step: int
    """Of the first epoch: the steps before it were done when the checkpoint was written."""
    first_sums: Tensor
    """What those steps came to, as `run_split` sums it up."""


# --- one epoch ------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One pass over a split, of all processes together; ``wait_s`` is their mean."""

    loss: float
    acc1: float
    acc5: float
    num_images: int
    time_s: float
    wait_s: float


NO_SUMS = torch.zeros(7, dtype=torch.float64)
"""Of a process in an epoch: the four sums of `measure`, seconds of waiting and in all, steps."""


def measure(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum up a batch: (4,) float64 of loss, right at first, right among five, and images."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    count = torch.full_like(loss, len(labels), dtype=torch.float64)
    return torch.stack([loss.detach() * count, right[:, 0].sum(), right.sum(), count]).cpu()


def run_split(
    job: Job,
    title: str,
    loader: Loader,
    step: Callable[[int, Batch], tuple[Tensor, Tensor]],
    num_epochs_after: int = 0,
    first_step: int = 0,
    first_sums: Tensor = NO_SUMS,
    after_step: Callable[[int, Tensor], None] = lambda i, sums: None,
    joined: contextlib.AbstractContextManager[Any] | None = None,
) -> Result:
    """Take each batch of a split through ``step``, which gives loss and logits; say how it goes.

    ``after_step`` is told the sums so far, which ``first_sums`` takes when an epoch goes on;
    ``joined`` is entered while batches are taken, and no longer.
    """
    place, num_steps = job.place, count_steps(loader, job.place)
    sums, (wait_s, time_before_s, num_before) = first_sums[:4], first_sums[4:].tolist()
    began_s = time.perf_counter() - time_before_s
    columns = ("{task.description}", progress.BarColumn(), "{task.completed} {task.fields[text]}")
    is_silent = place.rank > 0 or not Console().is_terminal
    # No thread to refresh it: workers are forked while it is drawn.
    bars = progress.Progress(*columns, disable=is_silent, auto_refresh=False)
    with contextlib.nullcontext() if is_silent else bars, joined or contextlib.nullcontext():
        bar = bars.add_task(title, total=num_steps, completed=first_step, text="")
        for i, batch in enumerate(iter_batches(loader, job.args, place), first_step):
            # Reading the sums waits for the device: the time outside is a wait for data only.
            batch_sums = measure(*step(i, batch), batch.labels)
            sums, wait_s = sums + batch_sums, wait_s + batch.wait_s
            time_s = time.perf_counter() - began_s
            loss, acc1, acc5 = (sums[:3] / sums[3]).tolist()
            images_per_s = place.world_size * sums[3].item() / time_s
            num_done = i + 1 - first_step + num_before
            left = "?"
            if num_steps is not None:
                num_left = max(0, num_steps - 1 - i) + num_steps * num_epochs_after
                left = format_time(num_left * time_s / num_done)
            text = (
                f"Time {time_s / num_done:.3f} Data {wait_s / num_done:.3f} Loss {loss:.4f} "
                f"Acc@1 {100 * acc1:.2f} Acc@5 {100 * acc5:.2f} {images_per_s:.0f} images/s "
                f"ETA {left}"
            )
            is_told = i % job.args.print_freq == 0 or i + 1 == num_steps
            bars.update(bar, advance=1, text=text, refresh=is_told)
            if place.rank == 0 and is_told:
                record = {"split": title, "step": i, "loss": (batch_sums[0] / batch_sums[3]).item()}
                write_record(job, "step", **record, time_s=time_s, wait_s=wait_s)
                if bars.disable:
                    num_told = "?" if num_steps is None else max(num_steps, i + 1)
                    print(f"{title} [{i + 1}/{num_told}] {text}", flush=True)
            after_step(i, torch.cat([sums, sums.new_tensor([wait_s, time_s, num_done])]))
    totals = torch.cat([sums, sums.new_tensor([wait_s])]).to(place.device)
    if place.world_size > 1:
        dist.all_reduce(totals)
    loss_sum, right1, right5, count, wait_sum = totals.tolist()
    num = max(count, 1)  # none: all of the epoch was done before a resume
    rates = (loss_sum / num, 100 * right1 / num, 100 * right5 / num)
    time_s = time.perf_counter() - began_s
    return Result(*rates, round(count), time_s, wait_sum / place.world_size)


def autocast(job: Job) -> torch.autocast:
    """Compute in the precision that was asked for."""
    dtype = torch.float16 if job.args.amp == "fp16" else torch.bfloat16
    return torch.autocast(job.place.device.type, dtype, enabled=job.args.amp != "off")


def train_epoch(job: Job, loader: Loader, epoch: int, first_step: int) -> Result:
    """Train for one epoch, or for the rest of one; the result is that of the whole."""
    args, num_steps = job.args, count_steps(loader, job.place)
    seed_epoch(args.seed, epoch, job.place)
    set_epoch(loader, epoch)
    job.wrapped.train()

    def step(i: int, batch: Batch) -> tuple[Tensor, Tensor]:
        share = 0.0 if num_steps is None else min(i, num_steps - 1) / num_steps
        for group in job.optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch + share)
        with autocast(job):
            logits = job.wrapped(batch.images)
            loss = nn.functional.cross_entropy(
                logits, batch.labels, label_smoothing=args.label_smoothing
            )
        job.optimizer.zero_grad()
        job.scaler.scale(loss).backward()
        job.scaler.step(job.optimizer)
        job.scaler.update()
        return loss, logits

    def save(i: int, sums: Tensor) -> None:
        is_middle = num_steps is None or i + 1 < num_steps
        if args.checkpoint_steps and (i + 1) % args.checkpoint_steps == 0 and is_middle:
            middle = describe_middle(job, loader, i + 1, sums)
            save_checkpoint(job, epoch, is_best=False, middle=middle)

    num_after = args.epochs - 1 - epoch
    first_sums = job.first_sums if first_step else NO_SUMS
    title = f"Epoch: [{epoch}]"
    # A process that has no batch left takes part in the others' gradients until all have none.
    wrapped: Any = job.wrapped  # of several processes, DistributedDataParallel
    joined = Join([wrapped]) if is_uneven(loader, job.place) else None
    return run_split(job, title, loader, step, num_after, first_step, first_sums, save, joined)


# --- validation -----------------------------------------------------------------------------------


@torch.no_grad()
def validate(job: Job) -> Result:
    """Validate; each image counts once, whatever the number of processes."""
    # Not the wrapped model, which waits for all processes at each batch: one may have fewer.
    job.model.eval()
    if job.place.world_size > 1:
        for buffer in job.model.buffers():  # the running means that are saved
            dist.broadcast(buffer, src=0)

    def step(_: int, batch: Batch) -> tuple[Tensor, Tensor]:
        with autocast(job):
            logits = job.model(batch.images)
            return nn.functional.cross_entropy(logits, batch.labels), logits

    return run_split(job, "Test:", job.val_loader, step)


# --- checkpoint -----------------------------------------------------------------------------------


def describe_middle(job: Job, loader: Any, num_steps_done: int, sums: Tensor) -> dict[str, Any]:
    """Say where an epoch is: loader and sums of all processes, so each goes on by its own."""
    states: list[Any] = [(loader.state_dict(), sums.tolist())]
    if job.place.world_size > 1:
        mine, states = states[0], states * job.place.world_size
        dist.all_gather_object(states, mine)
    loaders, all_sums = map(list, zip(*states, strict=True))
    place = {"step": num_steps_done, "num_steps": count_steps(loader, job.place)}
    return {**place, "loaders": loaders, "sums": all_sums}


def go_on_in_epoch(
    args: Args, place: Place, loader: Any, middle: dict[str, Any]
) -> tuple[int, Tensor]:
    """Let the loader go on in the middle of an epoch; gives the steps that are done, and the sums.

    Among another number of processes what is left is parted anew, and the steps done are those of
    as large a part of the epoch; each has an equal part of the sums.
    """
    if args.loader == "torch" or args.fetch_impl == "vanilla":
        raise ValueError(
            f"--resume: {args.resume} is of the middle of an epoch, where torch's loader cannot "
            "begin; leave out --loader and --fetch-impl"
        )
    states = middle["loaders"]
    loader.load_state_dict(states)
    num_done, num_steps = middle["step"], count_steps(loader, place)
    if num_steps is not None and middle["num_steps"] is not None:
        num_done = round(num_done * num_steps / middle["num_steps"])
    if "sums" not in middle:  # of a checkpoint that was written before these were in it
        return num_done, NO_SUMS
    sums = torch.tensor(middle["sums"], dtype=torch.float64)
    if len(states) == place.world_size:
        return num_done, sums[place.rank]
    measured, times = sums[:, :4].sum(0) / place.world_size, sums[:, 4:6].mean(0)
    return num_done, torch.cat([measured, times, sums.new_tensor([num_done])])


def save_checkpoint(
    job: Job, num_epochs_done: int, is_best: bool, middle: dict[str, Any] | None = None
) -> None:
    """Write what a run needs to go on. Readers find the old file or the new one, whole."""
    if job.place.rank > 0:
        return
    state = {
        "epoch": num_epochs_done,
        "arch": job.args.arch,
        "state_dict": job.model.state_dict(),
        "best_acc1": job.best_acc1,
        "optimizer": job.optimizer.state_dict(),
        "scaler": job.scaler.state_dict(),
        "seed": job.args.seed,
        "classes": job.classes,
        "middle": middle,
    }
    path, part = (job.args.output_base_folder / f"checkpoint.{end}" for end in ("pth.tar", "part"))
    torch.save(state, part)
    os.replace(part, path)
    if is_best:
        shutil.copyfile(path, part)
        os.replace(part, path.with_name("model_best.pth.tar"))


def load_checkpoint(args: Args) -> dict[str, Any]:
    """Read a checkpoint of ours, or of PyTorch's example; nothing in it is executed."""
    try:
        state = torch.load(args.resume, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("module."): each for name, each in state["state_dict"].items()}
        known = {"arch": state["arch"], "epoch": int(state["epoch"])}
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
        raise ValueError(
            f"--resume: {args.resume}: got no checkpoint of a trainer "
            f"({type(error).__name__} when it was read), expected a checkpoint.pth.tar of this one "
            "or of PyTorch's example"
        ) from error
    if known["arch"] != args.arch:
        raise ValueError(f"--resume: {args.resume} holds a {known['arch']}, got --arch {args.arch}")
    return {**state, **known, "state_dict": weights}


# --- main -----------------------------------------------------------------------------------------


def find_classes(args: Args, dataset: Any, known: list[str] | None) -> list[str]:
    """Find the names of the classes, by label; raise unless they are those of the weights."""
    if args.dummy:
        return [str(label) for label in range(args.classes or 1000)]
    is_bare = isinstance(dataset, StreamedShards)
    if dataset.classes is None and not is_bare:
        raise ValueError(f"{args.data}: the images have no classes; give --classes-file")
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


def check_schedule(args: Args, num_steps: int | None) -> None:
    """Refuse a rate that changes from step to step where nobody knows how many steps there are."""
    is_smooth = args.warmup_epochs > 0 or args.scheduler in ("cosine", "exponential")
    if num_steps is None and is_smooth:
        raise ValueError(
            f"--scheduler, --warmup-epochs: the rate changes within an epoch, and nothing beside "
            f"the shards of {args.data} says how many images it has; give --epoch-images"
        )


def set_up(args: Args, place: Place) -> Job:
    """Open the data and build the model, anew or from a checkpoint."""
    state = load_checkpoint(args) if args.resume else {}
    torch.backends.cudnn.deterministic = args.seed is not None
    torch.backends.cudnn.benchmark = args.seed is None
    if args.seed is not None and args.num_gpus and place.rank == 0:
        print("--seed: cuDNN is deterministic, which makes runs equal, and slower")
    args.seed = state.get("seed") if args.seed is None else args.seed
    args.seed = agree_on_seed(args, place)
    seed_epoch(args.seed, -1, place)
    copy_s = 0.0 if args.copy_to is None else copy_data(args, place)
    train = None if args.evaluate else open_split(args, "train")
    val = open_split(args, "val", getattr(train, "classes", None))
    tell_baked(place, train=train, val=val)
    described = val if getattr(train, "classes", None) is None else train
    classes = find_classes(args, described, state.get("classes"))
    model = make_model(args, len(classes), place)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler(place.device.type, enabled=args.amp == "fp16")
    if state:
        model.load_state_dict(state["state_dict"])
        args.start_epoch = state["epoch"]
    if state and not args.evaluate:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state.get("scaler", {}))
    train_loader = None if train is None else make_loader(args, train, place, is_train=True)
    val_loader = make_loader(args, val, place, is_train=False)
    if train_loader is not None:
        check_schedule(args, count_steps(train_loader, place))
    first_step, first_sums = 0, NO_SUMS
    if train_loader is not None and state.get("middle"):
        first_step, first_sums = go_on_in_epoch(args, place, train_loader, state["middle"])
    wrapped, best_acc1 = wrap_model(model, args, place), float(state.get("best_acc1", 0.0))
    log = None
    if place.rank == 0:
        args.output_base_folder.mkdir(parents=True, exist_ok=True)
        log = (args.output_base_folder / "log.jsonl").open("a", buffering=1)
    return Job(
        args,
        place,
        model,
        wrapped,
        optimizer,
        scaler,
        train_loader,
        val_loader,
        classes,
        best_acc1,
        log,
        copy_s,
        first_step,
        first_sums,
    )


def run(local_rank: int, args: Args) -> None:
    """Do the whole job of one process."""
    # One that was spawned would spawn its workers too, each of which would import torch anew.
    torch.multiprocessing.set_start_method(args.start_method, force=True)
    with join_processes(local_rank, args) as place, contextlib.ExitStack() as stack:
        try:
            job = set_up(args, place)
        except (LoaderError, ValueError, OSError) as error:
            print(f"imagenet.py: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        stack.enter_context(job.log or contextlib.nullcontext())
        write_record(job, "settings", **{name: str(value) for name, value in vars(args).items()})
        if job.train_loader is None:
            if place.rank == 0 and not (args.resume or args.pretrained):
                print("warning: neither --resume nor --pretrained: the weights are random")
            tested = validate(job)
            write_record(job, "evaluate", **tested._asdict())
            if place.rank == 0:
                print(
                    f"acc@1 {tested.acc1:.3f} acc@5 {tested.acc5:.3f}, {tested.num_images} images"
                )
            return
        results = [
            run_epoch(job, job.train_loader, epoch)
            for epoch in range(args.start_epoch, args.epochs)
        ]
        if place.rank == 0:
            print_summary(results, job)


def run_epoch(job: Job, loader: Loader, epoch: int) -> tuple[int, Result, Result]:
    """Train for one epoch, validate, and save."""
    is_first = epoch == job.args.start_epoch
    trained = train_epoch(job, loader, epoch, job.first_step if is_first else 0)
    tested = validate(job)
    is_best = tested.acc1 > job.best_acc1
    job.best_acc1 = max(tested.acc1, job.best_acc1)
    save_checkpoint(job, epoch + 1, is_best)
    write_record(job, "epoch", epoch=epoch, train=trained._asdict(), val=tested._asdict())
    return epoch, trained, tested


def print_summary(results: Sequence[tuple[int, Result, Result]], job: Job) -> None:
    """Print a table of the epochs, and what they come to."""
    print("epoch     loss   acc@1  val loss  val acc@1  val acc@5  images/s  waiting     time")
    for epoch, train, val in results:
        print(
            f"{epoch:5} {train.loss:8.4f} {train.acc1:7.2f} {val.loss:9.4f} {val.acc1:10.2f} "
            f"{val.acc5:10.2f} {train.num_images / train.time_s:9.1f} "
            f"{train.wait_s / train.time_s:8.1%} {format_time(train.time_s):>8}"
        )
    time_s = sum(train.time_s for _, train, _ in results) or math.inf
    images_per_s = sum(train.num_images for _, train, _ in results) / time_s
    wait_share = sum(train.wait_s for _, train, _ in results) / time_s
    record = {"images_per_s": images_per_s, "wait_share": wait_share, "copy_s": job.copy_s}
    write_record(job, "summary", best_acc1=job.best_acc1, **record)
    print(
        f"best acc@1 {job.best_acc1:.2f}, {images_per_s:.1f} images/s in training, "
        f"{wait_share:.1%} of the time waiting for data"
        + (f"; {job.copy_s:.1f} s before it to copy the data" if job.copy_s else ""),
        flush=True,
    )


def format_time(time_s: float) -> str:
    """Write a time as hours, minutes and seconds."""
    return f"{int(time_s) // 3600}:{int(time_s) // 60 % 60:02}:{int(time_s) % 60:02}"


def write_record(job: Job, kind: str, **fields: Any) -> None:
    """Add a line to the log."""
    if job.log is not None:
        job.log.write(json.dumps({"kind": kind, **fields}) + "\n")


def advise_resume(args: Args, begun_s: float) -> str:
    """Say how to go on with a run that was stopped; another run's checkpoint is not its own."""
    path = args.output_base_folder / "checkpoint.pth.tar"
    if path.exists() and path.stat().st_mtime >= begun_s:
        return f"go on with --resume {path}"
    return "it had written no checkpoint yet"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; gives the exit status."""
    begun_s = time.time()
    args = parse_arguments(argv)
    try:
        if args.multiprocessing_distributed:
            spawn(run, (args,), max(args.num_gpus, 1))
        else:
            run(0, args)
    except ProcessExitedException as error:
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C; {advise_resume(args, begun_s)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
