"""``lmdb``: write samples to an LMDB database, one file, for disks on which a seek is dear."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import get_args

from concurrent_dataloader.formats.lmdb_record import Order
from concurrent_dataloader.formats.lmdb_writer import DEFAULT_MAP_BYTES
from concurrent_dataloader.prepare.lmdb import (
    DEFAULT_CONCURRENCY,
    database_name,
    write_lmdb,
)
from concurrent_dataloader.prepare.nesting import refuse_target_in_samples
from concurrent_dataloader.prepare.plan import shuffle_positions
from concurrent_dataloader.prepare.source import check_same_classes
from concurrent_dataloader.prepare.sources import SampleTable
from concurrent_dataloader.prepare.verbs._bar import show_progress
from concurrent_dataloader.prepare.verbs._common import add_store_options, check_at_least
from concurrent_dataloader.prepare.verbs._config import (
    BOOL,
    INT,
    SIZE,
    TEXT,
    Kind,
    add_config_option,
    apply_config,
    list_of,
    one_of,
    parse_size,
)
from concurrent_dataloader.prepare.verbs._source import (
    SOURCE_KINDS,
    add_source_options,
    check_apart,
    check_source_options,
    is_sample,
    open_samples,
    parse_splits,
    print_left_out,
    write_strays,
)

DESCRIPTION = (
    "Write the samples of SOURCE to TARGET/ILSVRC-SPLIT.lmdb, one database a split: files as they"
    " are, with their names and labels. SOURCE is a folder, a bucket, an index, a tar, a tar of"
    " class tars, tar or TFRecord shards, or ImageNet as Kaggle or torchvision lays it out. The"
    " same seed gives the same records in the same order. A run that was stopped goes on when the"
    " command is given again; a database has its name only when it is complete."
)

CALLED_IN_MESSAGES = {"concurrency": "readers", "map_bytes": "map_size", "split": "splits"}

_SPLIT = "{split}"

KINDS: dict[str, Kind] = {
    "splits": list_of(parse_splits),
    "name": TEXT,
    "order": one_of(*get_args(Order)),
    "seed": INT,
    "readers": INT,
    "map_size": SIZE,
    "scratch": TEXT,
    "endpoint_url": TEXT,
    "credentials": TEXT,
    "region": TEXT,
    "anonymous": BOOL,
    "client": TEXT,
    **SOURCE_KINDS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help="where the samples are")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write to")
    parser.add_argument(
        "--splits",
        "--split",
        type=parse_splits,
        default=("train",),
        metavar="LIST",
        help="split to write, or several, parted by commas, as train,val: each from its part of"
        " SOURCE if that has parts (default: train)",
    )
    parser.add_argument(
        "--name",
        default=database_name(_SPLIT),
        metavar="NAME",
        help=f"name of the database, in which {_SPLIT} stands for the split (default: %(default)s)",
    )
    parser.add_argument(
        "--order",
        choices=get_args(Order),
        help="whether records stand in a random order, or in that of SOURCE (default: shuffled for"
        " train, list for others)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the random order (default: %(default)s)",
    )
    parser.add_argument(
        "--readers",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help="samples read at once (default: %(default)s)",
    )
    parser.add_argument(
        "--map-size",
        type=parse_size,
        default=DEFAULT_MAP_BYTES,
        metavar="SIZE",
        help="address space to begin with, as 1GiB; it grows by itself, and the file is no larger"
        " than what is in it (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="for archives that are unpacked (default: the system's)",
    )
    add_source_options(parser)
    add_store_options(parser)
    add_config_option(parser, KINDS)


def run(options: argparse.Namespace) -> None:
    """Write each split."""
    apply_config(options, KINDS)
    check_at_least(options, readers=1, map_size=1)
    check_source_options(options)
    shuffle_positions(0, options.seed)  # raises for a seed that cannot be
    if options.boxes is not None:
        raise ValueError(
            f"--boxes: got {options.boxes!r}, but LMDB records hold no boxes; leave it out, or"
            " write shards with `concurrent-dataloader shard`"
        )
    if options.map_size is None:
        raise ValueError("--map-size: got none, expected a size such as 64MiB; it grows by itself")
    paths = {
        split: options.target / options.name.replace(_SPLIT, split) for split in options.splits
    }
    if len(set(paths.values())) < len(paths):
        raise ValueError(
            f"--name: got {options.name!r}, which is the same for {', '.join(paths)}; let it hold"
            f" {_SPLIT}"
        )
    refuse_target_in_samples(
        options.source,
        str(options.target),
        splits=options.splits,
        is_taken=any(is_sample(options, path.name) for path in paths.values()),
    )
    with contextlib.ExitStack() as stack:
        sources: dict[str, SampleTable] = {}
        for split in paths:
            source = open_samples(options, options.source, split)
            sources[split] = stack.enter_context(contextlib.closing(source))
        check_apart(options.source, sources)
        write_strays(options, sources.values())
        check_same_classes(sources)
        for split, path in paths.items():
            _write(options, sources[split], split, path)


def _write(options: argparse.Namespace, source: SampleTable, split: str, path: Path) -> None:
    order: Order = options.order or ("shuffled" if split == "train" else "list")
    with show_progress(str(path), "records", len(source)) as progress:
        written = write_lmdb(
            source,
            path,
            split=split,
            order=order,
            seed=options.seed,
            concurrency=options.readers,
            map_bytes=options.map_size,
            on_record=progress.advance,
        )
    found = f", {written.num_found} of them there already" if written.num_found else ""
    num_classes = "no classes" if source.classes is None else f"{len(source.classes)} classes"
    print(
        f"{path}: {written.num_records} records{found}, {num_classes}, {written.size_bytes} bytes"
    )
    print_left_out(options, source)
