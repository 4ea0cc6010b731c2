"""``pack``: pack an index into the form that workers map into memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from concurrent_dataloader.index import PACK_ABOVE_KEYS, packed_path
from concurrent_dataloader.prepare.pack import pack_index

DESCRIPTION = (
    "Write INDEX.packed beside a JSON index and read it back. Loading an index of more than"
    f" {PACK_ABOVE_KEYS} keys does the same; do it ahead where several jobs start at once, or may"
    " not write to the folder."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="index file, JSON")


def run(options: argparse.Namespace) -> None:
    """Pack, and say what was packed."""
    index = pack_index(options.index)
    print(f"{packed_path(options.index)}: {len(index)} samples, checksum {index.checksum()}")
