"""``folders``: sort images into class folders."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from pathlib import Path

from concurrent_dataloader.prepare.copy import Copied
from concurrent_dataloader.prepare.folders import sort_into_folders
from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.made_folders import make_folders
from concurrent_dataloader.prepare.nesting import refuse_target_in_samples
from concurrent_dataloader.prepare.verbs._bar import Progress, show_progress
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    check_at_least,
    store_settings,
)
from concurrent_dataloader.prepare.verbs._source import (
    add_source_options,
    check_source_options,
    open_samples,
    print_left_out,
    write_strays,
)
from concurrent_dataloader.stores import open_writable_store

DESCRIPTION = (
    "Copy the images of SOURCE to TARGET/CLASS/NAME, byte by byte: ImageNet's flat validation"
    " folder or archive sorted by class, or shards taken apart. SOURCE is whatever `shard` takes,"
    " TARGET a folder or s3://bucket/prefix, reached with the same options. What TARGET has with"
    " the same size is skipped, so a run that was stopped goes on when it is started again."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help="where the images are")
    parser.add_argument("target", metavar="TARGET", help="s3://bucket[/prefix], or a folder")
    parser.add_argument(
        "--split", metavar="NAME", help="which part of SOURCE: train, val (default: all of it)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=32,
        metavar="N",
        help="images under way at once (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read each copy back and compare the content (default: compare sizes)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="where a compressed archive is unpacked (default: the system's folder)",
    )
    add_source_options(parser)
    add_store_options(parser)


def run(options: argparse.Namespace) -> int:
    """Copy, and say what became of it."""
    check_at_least(options, concurrency=1)
    check_source_options(options)
    splits = () if options.split is None else (options.split,)
    refuse_target_in_samples(options.source, options.target, splits=splits, is_taken=True)
    with contextlib.ExitStack() as stack:
        source = open_samples(options, options.source, options.split)
        stack.enter_context(contextlib.closing(source))
        write_strays(options, [source])
        if is_folder(options.target):
            folder = Path(options.target.removeprefix("file://")).expanduser()
            stack.enter_context(make_folders(folder))
        target = open_writable_store(options.target, **store_settings(options))
        stack.enter_context(contextlib.closing(target))
        progress = stack.enter_context(
            show_progress(f"sorting into {options.target}", "images", len(source))
        )
        report = sort_into_folders(
            source,
            target,
            concurrency=options.concurrency,
            verify=options.verify,
            on_object=functools.partial(_tell, progress),
        )
    print(
        f"{options.target}: {report.num_copied} images copied to folders of"
        f" {len(source.classes or ())} classes, {report.num_skipped} there already,"
        f" {report.num_failed} failed"
    )
    print_left_out(options, source)
    if report.num_failed:
        print("run it again to copy what failed", file=sys.stderr)
    return 1 if report.num_failed else 0


def _tell(progress: Progress, copied: Copied) -> None:
    if copied.error is not None:
        progress.say(f"{copied.key}: not copied: {' '.join(str(copied.error).split())}")
    progress.advance(copied.key)
