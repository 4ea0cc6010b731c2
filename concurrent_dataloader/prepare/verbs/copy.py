"""``copy``: copy a data set from one store to another."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from pathlib import Path

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.copy import (
    Copied,
    IndexPlace,
    check_sized,
    copy_objects,
    find_items,
    index_key_of_url,
    place_index,
)
from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.made_folders import make_folders
from concurrent_dataloader.prepare.nesting import refuse_target_in_source
from concurrent_dataloader.prepare.verbs._bar import Progress, show_progress
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    check_at_least,
    store_settings,
)
from concurrent_dataloader.stores import Store, WritableStore, open_store, open_writable_store

DESCRIPTION = (
    "Copy the objects that an index names, and the index, or all that lies below SOURCE, to TARGET."
    " Either may be a bucket or a folder. The indexes of shards and metadata.json come last, and"
    " only if all else came. What TARGET has with the same size is skipped, so a copy that was"
    " stopped goes on when it is started again. The options of the store are those of"
    " SOURCE, and of TARGET too unless one of the --target options is given."
)

_TARGET_OPTIONS = ("target_endpoint_url", "target_credentials", "target_region")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "source", metavar="SOURCE", help="s3://bucket[/prefix], http(s)://host/folder, or a folder"
    )
    parser.add_argument("target", metavar="TARGET", help="s3://bucket[/prefix], or a folder")
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="index, a local file or a URL below SOURCE, with keys relative to SOURCE; what it"
        " names is copied, and it comes last (default: copy all that lies below SOURCE)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=32,
        metavar="N",
        help="objects under way at once (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read each copy back and compare the content, also where it was there already"
        " (default: compare sizes)",
    )
    add_store_options(parser)
    group = parser.add_argument_group("the store of TARGET")
    group.add_argument(
        "--target-endpoint-url",
        metavar="URL",
        help="of an S3-compatible service (default: that of SOURCE)",
    )
    group.add_argument(
        "--target-credentials",
        type=Path,
        metavar="FILE",
        help="JSON file with keys (default: those of SOURCE)",
    )
    group.add_argument(
        "--target-region", metavar="NAME", help="region of the bucket (default: that of SOURCE)"
    )


def run(options: argparse.Namespace) -> int:
    """Copy, and say what became of it."""
    check_at_least(options, concurrency=1)
    _refuse_itself(options)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(
            contextlib.closing(open_store(options.source, **store_settings(options)))
        )
        if is_folder(options.target):
            folder = Path(options.target.removeprefix("file://")).expanduser()
            stack.enter_context(make_folders(folder))
        target = stack.enter_context(contextlib.closing(_open_target(options)))
        sized = check_sized(source, options.source)
        index = _find_index(options, source, stack)
        items = find_items(source, options.source, None if index is None else index.path)
        total = None if index is None else len(Index.load(index.path))
        progress = stack.enter_context(
            show_progress(f"copying to {options.target}", "objects", total)
        )
        report = copy_objects(
            items,
            sized,
            target,
            concurrency=options.concurrency,
            verify=options.verify,
            on_object=functools.partial(_tell, progress),
        )
        if index is not None and not report.num_failed:
            target.put(index.key, index.path.read_bytes())
    if not report.num_copied + report.num_skipped + report.num_failed:
        raise KeyNotFoundError(f"{options.source}: holds nothing to copy; check the source")
    megabytes = report.copied_bytes / 1e6
    print(
        f"{options.target}: {report.num_copied} objects copied ({megabytes:.1f} MB of 10^6 bytes), "
        f"{report.num_skipped} there already, {report.num_failed} failed, "
        f"in {report.duration_s:.1f} s"
    )
    if report.num_failed:
        held_back = list(report.held_back) + ([] if index is None else ["the index"])
        left_out = f"; not copied before all is there: {', '.join(held_back)}" if held_back else ""
        print(f"run it again to copy what failed{left_out}", file=sys.stderr)
    elif index is not None:
        print(f"{target.describe(index.key)}: the index")
    return 1 if report.num_failed else 0


def _refuse_itself(options: argparse.Namespace) -> None:
    """Raise for a target in the source, which would have the copies copied."""
    is_elsewhere = any(getattr(options, name) is not None for name in _TARGET_OPTIONS)
    if is_folder(options.target) or not is_elsewhere:
        refuse_target_in_source(options.source, options.target)


def _tell(progress: Progress, copied: Copied) -> None:
    if copied.error is not None:
        progress.say(f"{copied.key}: not copied: {' '.join(str(copied.error).split())}")
    progress.advance(copied.key)


def _open_target(options: argparse.Namespace) -> WritableStore:
    own = {name.removeprefix("target_"): getattr(options, name) for name in _TARGET_OPTIONS}
    if all(value is None for value in own.values()):
        return open_writable_store(options.target, **store_settings(options))
    return open_writable_store(options.target, client=options.client, **own)


def _find_index(
    options: argparse.Namespace, source: Store, stack: contextlib.ExitStack
) -> IndexPlace | None:
    if options.index is None:
        return None
    if "://" not in options.index:
        return place_index(options.index, options.source)
    key = index_key_of_url(options.index, options.source)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder) / Path(key).name
    write_whole(path, [source.get(key)])
    return IndexPlace(path, key)
