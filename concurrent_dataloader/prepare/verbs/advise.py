"""``advise``: how many shards, and how large."""

from __future__ import annotations

import argparse
import re

from concurrent_dataloader.prepare.advise import GB, Advice, Amount, advise, measure
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    check_at_least,
    count_progress,
    store_opener,
)

DESCRIPTION = (
    "Say how many shards to make and how large, and why. Sizes are in bytes, or in kB, MB, GB and"
    " TB, where 1 GB is 10^9 bytes."
)

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="folder or s3://bucket/prefix whose images, or tar or TFRecord shards, are counted"
        " (default: see --bytes)",
    )
    parser.add_argument(
        "--bytes",
        type=parse_bytes,
        metavar="SIZE",
        help="size of all samples, such as 150GB (default: that of SOURCE)",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="how many there are (default: those in SOURCE)"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes that train (default: 1)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=4,
        metavar="N",
        help="workers of the loader of each rank (default: 4)",
    )
    add_store_options(parser)


def parse_bytes(text: str) -> int:
    """Read ``150GB``, ``1.5e11`` or the like."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([kmgt]?b?)\s*", text.lower())
    try:
        if found is None:
            raise ValueError("no number with a unit")
        unit = found[2] if found[2].endswith("b") or not found[2] else f"{found[2]}b"
        return int(float(found[1]) * _UNITS[unit])
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected such as 150GB") from error


def run(options: argparse.Namespace) -> None:
    """Count if need be, and print the advice."""
    check_at_least(options, bytes=1, samples=1, ranks=1, workers=0)
    amount = _find_amount(options)
    advice = advise(amount, options.ranks, options.workers)
    samples = "" if amount.num_samples is None else f", {amount.num_samples} samples"
    print(f"{format_bytes(amount.num_bytes)}{samples}")
    print(describe(advice, is_tfrecord=amount.is_tfrecord))


def _find_amount(options: argparse.Namespace) -> Amount:
    if options.source is None:
        if options.bytes is None:
            parser: argparse.ArgumentParser = options.parser
            parser.error("got neither SOURCE nor --bytes, expected one of them")
        return Amount(options.bytes, options.samples)
    with count_progress(f"listing {options.source}") as on_progress:
        found = measure(options.source, open_root=store_opener(options), on_progress=on_progress)
    return Amount(
        found.num_bytes if options.bytes is None else options.bytes,
        found.num_samples if options.samples is None else options.samples,
        found.is_tfrecord,
    )


def describe(advice: Advice, *, is_tfrecord: bool = False) -> str:
    """Say it in lines."""
    count = "" if advice.max_count is None else f", {advice.max_count} samples each"
    if advice.last_count != advice.max_count:
        count += f" but {advice.last_count} in the last"
    how = f"--maxcount {advice.max_count}" if advice.max_count else f"--shards {advice.num_shards}"
    verb = "shard" if advice.max_count else "reshard"
    if is_tfrecord and not advice.max_count:
        verb, how = "shard", f"--maxsize {advice.shard_bytes}"
    lines = [
        f"recommended: {advice.num_shards} shards of {format_bytes(advice.shard_bytes)}{count}",
        *(f"- {reason}" for reason in advice.reasons),
        f"as in: concurrent-dataloader {verb} SOURCE TARGET {how}",
    ]
    return "\n".join(lines)


def format_bytes(num_bytes: int) -> str:
    """Say a size in the largest unit of which it has one at least; 1 GB is 10^9 bytes."""
    for unit in ("TB", "GB", "MB", "kB"):
        size = _UNITS[unit.lower()]
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"
