"""What several verbs share: the arguments of a store, and progress."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, get_args

from concurrent_dataloader.prepare.pool import MAX_PROCESSES
from concurrent_dataloader.stores import Client, WritableStore, open_writable_store

_PLAIN_PROGRESS_OBJECTS = 20_000


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a bucket is reached."""
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


def store_opener(options: argparse.Namespace) -> Callable[[str], WritableStore]:
    """Give the function that opens the store at a URL or a folder with the arguments given."""
    return functools.partial(open_writable_store, **store_settings(options))


def store_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Give what `open_store` takes besides the URL, from the arguments given."""
    return {
        "client": options.client,
        "credentials": options.credentials,
        "endpoint_url": options.endpoint_url,
        "region": options.region,
        "anonymous": options.anonymous,
    }


def check_at_least(options: argparse.Namespace, **least: int) -> None:
    """Raise for a number that is too small, before anything is looked at.

    Args:
        options: The arguments given.
        least: By the option's name, the smallest number that it may be; None is always right.

    Raises:
        ValueError: One is smaller.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}: got {value}, expected {smallest} or more")


def check_processes(options: argparse.Namespace) -> None:
    """Raise for a number of processes that cannot be, before anything is looked at.

    Raises:
        ValueError: It is less than 1, or beyond all reason.
    """
    check_at_least(options, processes=1)
    if options.processes > MAX_PROCESSES:
        raise ValueError(f"processes: got {options.processes}, expected {MAX_PROCESSES} or fewer")


def check_output_files(options: argparse.Namespace, *names: str) -> None:
    """Raise for a file that could not be written after all work, before any.

    The folder of such a file is not made: it is a detail of the command, and a wrong name of it
    should not lead to a report that nobody finds.

    Raises:
        ValueError: It is a folder, or its folder is not there.
    """
    for name in names:
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{name}: got '{path}', a folder, expected the name of a file")
        if not path.parent.is_dir():
            raise ValueError(
                f"{name}: got '{path}', whose folder is not there; make it, or choose another one"
            )


@contextlib.contextmanager
def count_progress(what: str) -> Generator[Callable[[int], None]]:
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
