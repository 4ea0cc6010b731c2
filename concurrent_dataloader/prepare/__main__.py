"""``concurrent-dataloader VERB``: parses arguments, prints, and sets the exit status."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import get_args

from concurrent_dataloader import __version__
from concurrent_dataloader.errors import LoaderError
from concurrent_dataloader.index import PACK_ABOVE_KEYS, packed_path
from concurrent_dataloader.labels import Classes, check_label_rule
from concurrent_dataloader.prepare.index import (
    IMAGE_SUFFIXES,
    check_object_url,
    find_samples,
    upload,
)
from concurrent_dataloader.prepare.pack import pack_index
from concurrent_dataloader.stores import Client, open_writable_store

_PROGRAM = "concurrent-dataloader"
_PLAIN_PROGRESS_OBJECTS = 20_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; those of the process when None.

    Returns:
        Exit status: 0, or 1 if it did not work, 130 if interrupted. Wrong arguments exit with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (LoaderError, OSError, ValueError) as error:
        print(f"{_PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Prepare a data set for training.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_index(verbs)
    _add_pack(verbs)
    return parser


def _add_index(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "index",
        help="list a bucket or a folder and write an index",
        description="List the samples of a bucket or a folder and write an index file: a JSON list"
        f" of keys, sorted. One of more than {PACK_ABOVE_KEYS} keys is packed as well.",
    )
    parser.set_defaults(run=_index)
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
    _add_store_options(parser)


def _add_store_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the store")
    group.add_argument(
        "--endpoint-url", metavar="URL", help="of an S3-compatible service (default: AWS's own)"
    )
    group.add_argument(
        "--credentials",
        type=Path,
        metavar="FILE",
        help="JSON file with keys (default: the standard AWS chain)",
    )
    group.add_argument(
        "--region",
        metavar="NAME",
        help="region of the bucket (default: that of the credentials file, of the AWS settings, or"
        " us-east-1)",
    )
    group.add_argument(
        "--anonymous",
        action="store_true",
        help="do not sign requests, for public buckets (default: sign)",
    )
    group.add_argument(
        "--client",
        choices=get_args(Client),
        default="obstore",
        help="library that talks to the bucket (default: %(default)s)",
    )


def _add_pack(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "pack",
        help="pack an index into the form that workers map into memory",
        description="Write INDEX.packed beside a JSON index and read it back. Loading an index of"
        f" more than {PACK_ABOVE_KEYS} keys does the same; do it ahead where several jobs start at"
        " once, or may not write to the folder.",
    )
    parser.set_defaults(run=_pack)
    parser.add_argument("index", type=Path, metavar="INDEX", help="index file, JSON")


def _suffixes(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check_index_options(options: argparse.Namespace) -> None:
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


def _index(options: argparse.Namespace) -> None:
    _check_index_options(options)
    open_root = functools.partial(
        open_writable_store,
        client=options.client,
        credentials=options.credentials,
        endpoint_url=options.endpoint_url,
        region=options.region,
        anonymous=options.anonymous,
    )
    with _progress(f"listing {options.source}") as on_progress:
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


def _pack(options: argparse.Namespace) -> None:
    index = pack_index(options.index)
    print(f"{packed_path(options.index)}: {len(index)} samples, checksum {index.checksum()}")


@contextlib.contextmanager
def _progress(what: str) -> Generator[Callable[[int], None]]:
    """Show a running count: in place on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield functools.partial(_print_count, what)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} objects"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda count: progress.update(task, completed=count)


def _print_count(what: str, count: int) -> None:
    if count % _PLAIN_PROGRESS_OBJECTS == 0 and count:
        print(f"{what}: {count} objects so far", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
