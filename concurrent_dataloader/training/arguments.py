"""The flags of the trainer: their names, their defaults, and which go together."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

Args = argparse.Namespace


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


def add_store_arguments(add: Callable[..., Any]) -> None:
    """Add those that say how a bucket is reached, and where to keep what was read."""
    add("--endpoint-url", help="of an S3-compatible store")
    add("--s3-credential-file", type=Path, help="JSON; the standard AWS chain when absent")
    add("--anonymous", action="store_true", help="sign no request: for public buckets")
    add("--use-cache", action="store_true", help="read through --cache-endpoint-url")
    add("--cache-endpoint-url", help="of an HTTP cache in front of the store")
    add("--cache-dir", type=Path, help="folder of this machine to keep in what was read")
    add("--cache-limit", type=at_least_zero, help="the most it may take, in GB (10^9 bytes)")


def add_own_arguments(add: Callable[..., Any], datasets: Sequence[str]) -> None:
    """Add those of this trainer: where the images are, how they are loaded, and the recipe."""
    add("--dataset", choices=datasets, default="auto", help="what lies there; auto: found out")
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
    add_store_arguments(add)
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


def check_schedule(args: Args, num_steps: int | None) -> None:
    """Refuse a rate that changes from step to step where nobody knows how many steps there are."""
    is_smooth = args.warmup_epochs > 0 or args.scheduler in ("cosine", "exponential")
    if num_steps is None and is_smooth:
        raise ValueError(
            f"--scheduler, --warmup-epochs: the rate changes within an epoch, and nothing beside "
            f"the shards of {args.data} says how many images it has; give --epoch-images"
        )


def read_arguments(
    argv: Sequence[str] | None, *, description: str, datasets: Sequence[str]
) -> Args:
    """Read the command line; exits with status 2 where it is wrong.

    Args:
        argv: The words; those of this process when None.
        description: A line for ``--help``.
        datasets: Words that ``--dataset`` takes; "auto" is one of them.

    Returns:
        The flags by name, with ``num_gpus`` that may be used and the ``start_method`` of workers.
    """
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [DATA] [FLAGS]; --help lists them",
        allow_abbrev=False,
    )
    add_example_arguments(parser.add_argument)
    add_own_arguments(parser.add_argument, datasets)
    args = parser.parse_args(argv)
    if None not in (args.data, args.data_flag) and args.data != args.data_flag:
        parser.error(f"argument --data: got {args.data_flag}, and {args.data} before, expected one")
    args.data = args.data or args.data_flag or "imagenet"
    delattr(args, "data_flag")
    if args.arch not in torchvision.models.list_models(torchvision.models):
        parser.error(f"argument -a/--arch: got {args.arch!r}, expected a model of torchvision")
    check_places(parser, args)
    is_url = "://" in args.data
    if args.anonymous and args.s3_credential_file is not None:
        parser.error("argument --anonymous: signs nothing, expected no --s3-credential-file")
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
