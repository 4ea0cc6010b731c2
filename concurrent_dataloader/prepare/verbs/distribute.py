"""``distribute``: cut the shards that are left over into equal parts, one for each instance."""

from __future__ import annotations

import argparse
import contextlib
import sys

from concurrent_dataloader.distribution import Part
from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.prepare.distribute import (
    check_distribution,
    check_instances,
    distribute,
)
from concurrent_dataloader.prepare.shard_set import OpenRoot, find_splits
from concurrent_dataloader.prepare.verbs._bar import show_progress
from concurrent_dataloader.prepare.verbs._common import add_store_options, store_opener

DESCRIPTION = (
    "Cut the shards that N instances cannot share evenly into N equal parts, below"
    " distributed/N-instances/ beside them, so that no sample is skipped. The shards stay as they"
    " are. Parts that are there and belong to the shards are left alone, others are made anew."
    " `imagenet.py --stream --instances` and concurrent_dataloader.datasets.shards_of_instance read"
    " them."
)

CALLED_IN_MESSAGES = {"num_instances": "instances"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "shards", metavar="SHARDS", help="folder of the shards, or s3://bucket/prefix"
    )
    parser.add_argument(
        "-n",
        "--instances",
        type=int,
        nargs="+",
        required=True,
        metavar="N",
        help="number of instances, 2 or more, and no more than there are samples (else a warning);"
        " several side by side may be asked for (required)",
    )
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="split to distribute, such as train; may be given again (default: all that are there)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if parts are missing or out of date (default: write them)",
    )
    add_store_options(parser)


def run(options: argparse.Namespace) -> int:
    """Distribute each split for each number of instances."""
    for count in options.instances:
        check_instances(count)
    open_root = store_opener(options)
    splits: list[str] = options.split or splits_there(options.shards, open_root)
    work = [(split, count) for split in splits for count in options.instances]
    if options.check:
        return _check(options.shards, work, open_root)
    for split, count in work:
        _distribute(options.shards, split, count, open_root)
    return 0


def _distribute(location: str, split: str, count: int, open_root: OpenRoot) -> None:
    written: list[Part] = []
    with show_progress(f"{split}, {count} instances", "parts", count, log_every=1) as progress:

        def report(part: Part) -> None:
            written.append(part)
            progress.advance(f"{part.name}: {part.num_samples} samples, {part.size_bytes} bytes")

        manifest = distribute(location, count, split, open_root=open_root, on_part=report)
    whole = (len(manifest.shards) - manifest.num_remainder) // count
    print(
        f"{location}: {split} for {count} instances: {whole} whole shards and a part each"
        f"{'' if written else ', already there'}"
    )
    num_empty = sum(not part.num_samples for part in manifest.parts)
    if not whole and num_empty:
        print(
            f"warning: {location}: {num_empty} of {count} instances have no sample, since {split}"
            f" has only {count - num_empty}; give -n {count - num_empty} or fewer",
            file=sys.stderr,
        )


def _check(location: str, work: list[tuple[str, int]], open_root: OpenRoot) -> int:
    status = 0
    for split, count in work:
        wrong = check_distribution(location, count, split, open_root=open_root)
        print(f"{location}: {split} for {count} instances: {wrong or 'OK'}")
        status = status if wrong is None else 1
    return status


def splits_there(location: str, open_root: OpenRoot) -> list[str]:
    """Give the splits that have shards.

    Raises:
        FileNotFoundError: There are none.
    """
    with contextlib.closing(open_root(location)) as store:
        splits = find_splits(store)
    if not splits:
        raise KeyNotFoundError(
            f"{location}: no shards, expected files such as train-000000.tar; check the folder"
        )
    return splits
