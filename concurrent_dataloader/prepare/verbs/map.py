"""``map``: put every sample of a set of shards through a function."""

from __future__ import annotations

import argparse
import os
import sys

from concurrent_dataloader.prepare.map import map_shards
from concurrent_dataloader.prepare.metadata import ShardMetadata
from concurrent_dataloader.prepare.reshard import SplitAt
from concurrent_dataloader.prepare.shard_set import OpenRoot
from concurrent_dataloader.prepare.verbs._bar import show_progress
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    check_processes,
    store_opener,
)
from concurrent_dataloader.prepare.verbs.distribute import splits_there

DESCRIPTION = (
    "Call a function for every sample of a set of tar shards, and write what it gives into new"
    " shards with the same names. It gets the key and the content by field, as in"
    " ('n01/1', {'jpg': b'...', 'cls': b'0'}), and gives the new content, a list of several"
    " samples, or None to drop the sample."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("source", metavar="SHARDS", help="folder of shards, or s3://bucket/prefix")
    parser.add_argument("target", metavar="TARGET", help="folder, or s3://bucket/prefix, to write")
    parser.add_argument(
        "--function",
        required=True,
        metavar="MODULE:FUNCTION",
        help="function to call, from the working directory or the Python path (required)",
    )
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="split to take, such as train; may be given again (default: all, each by itself)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="shards worked on at once; the result is the same (default: the number of cores,"
        " %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what the target holds of the split first (default: refuse)",
    )
    add_store_options(parser)


def run(options: argparse.Namespace) -> None:
    """Map each split."""
    check_processes(options)
    open_root = store_opener(options)
    if os.getcwd() not in sys.path:  # where users have their module; an installed command lacks it
        sys.path.append(os.getcwd())
    splits: list[str] = options.split or splits_there(options.source, open_root)
    for split in splits:
        _map(options, split, open_root)


def _map(options: argparse.Namespace, split: str, open_root: OpenRoot) -> None:
    with show_progress(f"mapping {split}", "shards", None, log_every=1) as progress:

        def report(shard: ShardMetadata, num_shards: int) -> None:
            progress.advance(
                f"{shard.name} of {num_shards}: {shard.num_samples} samples,"
                f" {shard.size_bytes} bytes"
            )

        result = map_shards(
            SplitAt(options.source, split),
            options.target,
            options.function,
            open_root=open_root,
            num_processes=options.processes,
            overwrite=options.overwrite,
            on_shard=report,
        )
    num_shards = len(result.shards or ())
    print(f"{options.target}: {split}, {result.num_samples} samples in {num_shards} shards")
