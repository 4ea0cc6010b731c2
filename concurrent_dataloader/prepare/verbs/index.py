"""``index``: list the samples of a bucket or a folder and write an index file."""

from __future__ import annotations

import argparse
from pathlib import Path

from concurrent_dataloader.index import PACK_ABOVE_KEYS, packed_path
from concurrent_dataloader.labels import Classes, check_label_rule
from concurrent_dataloader.prepare.index import (
    IMAGE_SUFFIXES,
    check_object_url,
    find_samples,
    upload,
)
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    count_progress,
    store_opener,
)

DESCRIPTION = (
    "List the samples of a bucket or a folder and write an index file: a JSON list of keys, sorted."
    f" One of more than {PACK_ABOVE_KEYS} keys is packed as well."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help="s3://bucket[/prefix], or a folder")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="index file to write (required)"
    )
    parser.add_argument(
        "--suffix",
        type=_suffixes,
        default=",".join(IMAGE_SUFFIXES),
        metavar="LIST",
        help="endings of the samples, parted by commas; '' takes every object"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore-case",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether .jpeg also takes .JPEG (default: --ignore-case)",
    )
    parser.add_argument(
        "--relative",
        action="store_true",
        help="write keys relative to SOURCE, as for a folder, so that the same index serves a copy"
        " elsewhere (default: relative to the bucket)",
    )
    parser.add_argument(
        "--classes-output",
        type=Path,
        metavar="FILE",
        help="also write a classes file: the classes that occur, numbered from 0 on in the order of"
        " their names (default: none is written)",
    )
    parser.add_argument(
        "--label-rule",
        default="parent",
        metavar="RULE",
        help="how a key names its class, for --classes-output: parent (its last folder), prefix"
        " (its file name up to the first '_'), or regex:PATTERN (the first group)"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--upload",
        metavar="URL",
        help="put the index into a bucket, under exactly this name, s3://bucket/key (default: do"
        " not)",
    )
    parser.add_argument(
        "--classes-upload",
        metavar="URL",
        help="put the classes file of --classes-output into a bucket likewise (default: do not)",
    )
    add_store_options(parser)


def _suffixes(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check(options: argparse.Namespace) -> None:
    """Raise for what would fail only after the listing, which may take minutes."""
    if options.classes_upload is not None and options.classes_output is None:
        raise ValueError("--classes-upload: there is nothing to put; give --classes-output too")
    outputs = {"--output": options.output, "--classes-output": options.classes_output}
    for flag, path in outputs.items():
        if path is not None and path.is_dir():
            raise ValueError(f"{flag}: {path} is a folder, expected the name of a file")
    if options.classes_output is not None:
        if options.classes_output.absolute() == options.output.absolute():
            raise ValueError(
                f"--classes-output: got {options.classes_output}, which --output is too; "
                "expected another file"
            )
        check_label_rule(options.label_rule)
    for url in (options.upload, options.classes_upload):
        if url is not None:
            check_object_url(url)


def run(options: argparse.Namespace) -> None:
    """List, and write what was asked for."""
    _check(options)
    open_root = store_opener(options)
    with count_progress(f"listing {options.source}") as on_progress:
        index = find_samples(
            options.source,
            open_root,
            suffixes=options.suffix,
            ignore_case=options.ignore_case,
            relative=options.relative,
            on_progress=on_progress,
        )
    index.save_json(options.output)
    print(f"{options.output}: {len(index)} samples")
    if len(index) > PACK_ABOVE_KEYS:
        packed = packed_path(options.output)
        index.save_packed(packed, json_path=options.output)
        print(f"{packed}: packed")
    if options.upload is not None:
        upload(options.output, options.upload, open_root)
        print(f"{options.upload}: uploaded")
    if options.classes_output is not None:
        classes = Classes.from_keys(index.keys(), label_rule=options.label_rule)
        classes.save_json(options.classes_output)
        print(f"{options.classes_output}: {classes.count} classes")
        if options.classes_upload is not None:
            upload(options.classes_output, options.classes_upload, open_root)
            print(f"{options.classes_upload}: uploaded")
