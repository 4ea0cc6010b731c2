"""``readspeed``: measure how fast an LMDB database is read, front to back and at random."""

from __future__ import annotations

import argparse
from pathlib import Path

from concurrent_dataloader.formats.lmdb_file import LmdbFile, find_data_file
from concurrent_dataloader.prepare.lmdb import (
    ReadSpeed,
    drop_from_page_cache,
    measure_random,
    measure_sequential,
)

DESCRIPTION = (
    "Read an LMDB database in the order of its records, then in a random one, and print records and"
    " megabytes (of 10^6 bytes) a second of both. On a disk on which a seek is dear they are far"
    " apart; in memory, hardly. What is in memory is forgotten before each unless --keep-cache is"
    " given; that works as long as no other process reads the database."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the database")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="how long to read in each order, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the random order (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-cache",
        action="store_true",
        help="also count what is in memory already (default: forget it first)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read databases of an older system, which are pickles or msgpack (default: do"
        " not)",
    )


def run(options: argparse.Namespace) -> None:
    """Measure, and print a line for each order and one that compares them."""
    if not options.seconds > 0:
        raise ValueError(f"--seconds: got {options.seconds}, expected more than 0")
    speeds: dict[str, ReadSpeed] = {}
    for name, readahead in (("sequential", True), ("random", False)):
        if not options.keep_cache:
            drop_from_page_cache(find_data_file(options.path))
        file = LmdbFile(options.path, readahead=readahead, allow_pickle=options.allow_pickle)
        if not len(file):
            raise ValueError(f"{options.path}: no records, so there is nothing to measure")
        speeds[name] = (
            measure_sequential(file, seconds=options.seconds)
            if readahead
            else measure_random(file, seconds=options.seconds, seed=options.seed)
        )
        file.close()
        _print(name, speeds[name])
    ratio = speeds["sequential"].records_per_s / speeds["random"].records_per_s
    print(f"sequential is {ratio:.2f} times as fast as random")


def _print(name: str, speed: ReadSpeed) -> None:
    print(
        f"{name:<10} {speed.records_per_s:10.1f} records/s {speed.megabytes_per_s:10.1f} MB/s"
        f"  ({speed.num_records} records in {speed.elapsed_s:.2f} s)"
    )
