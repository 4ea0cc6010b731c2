"""``reshard``: shards of another size, count or order, made of shards."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses

from concurrent_dataloader.prepare.metadata import ShardMetadata
from concurrent_dataloader.prepare.reshard import (
    Resharding,
    ReshardSettings,
    SplitAt,
    open_resharding,
)
from concurrent_dataloader.prepare.verbs._bar import show_progress
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    check_at_least,
    check_processes,
    store_opener,
)
from concurrent_dataloader.prepare.verbs._config import parse_size
from concurrent_dataloader.prepare.verbs.distribute import splits_there

DESCRIPTION = (
    "Write the samples of one or more sets of tar shards into new shards: of another size or count,"
    " merged, cut, shuffled anew. The bytes of samples stay as they are; no two may share a key."
    " A run that was interrupted goes on where it stopped when it is repeated."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SHARDS",
        help="folder of shards, or s3://bucket/prefix; several are taken one after the other",
    )
    parser.add_argument("target", metavar="TARGET", help="folder, or s3://bucket/prefix, to write")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="split to take, such as train; may be given again (default: all, each by itself)",
    )
    parser.add_argument(
        "--target-split",
        metavar="NAME",
        help="put all splits that are taken into this one (default: each stays what it is)",
    )
    parser.add_argument("--maxcount", type=int, metavar="N", help="samples of a shard, at most")
    parser.add_argument(
        "--maxsize",
        type=parse_limit,
        metavar="SIZE",
        help="bytes of a shard, at most, as 3e9, 300MB or 1GiB (default: 3e8, if nothing else is"
        " given)",
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="number of shards, which differ by a sample at most"
    )
    parser.add_argument(
        "--slice",
        type=parse_slice,
        default=(0, None),
        metavar="A:B",
        help="which samples of each split, from 0 on, B not included (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="shuffle all samples by this seed (default: keep the order)",
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="shards written at once (default: 1)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what the target holds of the split first (default: refuse)",
    )
    add_store_options(parser)


def parse_limit(text: str) -> int:
    """Read a size as ``shard`` does; ``none`` is refused, since it would mean the default here."""
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a size such as 3e9, 300MB or 1GiB; for shards of any size "
            "leave it out and give --shards or --maxcount"
        )
    return size


def parse_slice(text: str) -> tuple[int, int | None]:
    """Read ``A:B``, ``A:`` or ``:B``."""
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError("no colon")
        return int(first or 0), int(last) if last else None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected A:B such as 0:1000") from error


def run(options: argparse.Namespace) -> None:
    """Write each split."""
    check_processes(options)
    check_at_least(options, maxcount=1, maxsize=1, shards=1)
    settings = _settings(options)
    open_root = store_opener(options)
    found = {source: splits_there(source, open_root) for source in options.sources}
    wanted: list[str] = options.split or sorted(
        {name for names in found.values() for name in names}
    )
    taken = {
        split: [SplitAt(source, split) for source in options.sources if split in found[source]]
        for split in wanted
    }
    for split, sources in taken.items():
        if not sources:
            raise ValueError(
                f"--split: got {split!r}, expected one of {', '.join(found.popitem()[1])}"
            )
    if options.target_split is not None:
        taken = {options.target_split: [source for sources in taken.values() for source in sources]}
    with contextlib.ExitStack() as stack:
        # What cannot be of one split is told before another is written.
        reshardings = {
            split: stack.enter_context(
                open_resharding(
                    sources,
                    options.target,
                    dataclasses.replace(settings, split=split),
                    open_root=open_root,
                )
            )
            for split, sources in taken.items()
        }
        for split, resharding in reshardings.items():
            _reshard(options, split, resharding)


def _settings(options: argparse.Namespace) -> ReshardSettings:
    start, stop = options.slice
    return ReshardSettings(
        max_count=options.maxcount,
        max_bytes=options.maxsize,
        num_shards=options.shards,
        start=start,
        stop=stop,
        seed=options.seed,
    )


def _reshard(options: argparse.Namespace, split: str, resharding: Resharding) -> None:
    with show_progress(f"writing {split}", "shards", None, log_every=1) as progress:

        def report(shard: ShardMetadata, num_shards: int) -> None:
            progress.advance(
                f"{shard.name} of {num_shards}: {shard.num_samples} samples,"
                f" {shard.size_bytes} bytes"
            )

        result = resharding.write(
            num_processes=options.processes,
            overwrite=options.overwrite,
            on_shard=report,
        )
    num_shards = len(result.shards or ())
    print(f"{options.target}: {split}, {result.num_samples} samples in {num_shards} shards")
