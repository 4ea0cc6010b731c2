"""A progress bar on a terminal, lines now and then in a log; and lines beside it that stay."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import NamedTuple

LOG_EVERY = 20_000
"""For things that are small; for shards it is one."""


class Progress(NamedTuple):
    """How a long command tells how far it is."""

    advance: Callable[[str], None]
    """One thing more is done; its name."""

    say: Callable[[str], None]
    """Print a line on stderr that stays."""


@contextlib.contextmanager
def show_progress(
    what: str, unit: str, total: int | None, *, log_every: int = LOG_EVERY
) -> Generator[Progress]:
    """Show how many things are done: in place on a terminal, else a line now and then.

    Args:
        what: What is being done.
        unit: What is counted, in the plural.
        total: How many there are, if known.
        log_every: After how many a line is due, where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield _in_log(what, unit, total, log_every)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Bar(*columns, TextColumn(unit), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(what, total=total)

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield Progress(lambda name: bar.advance(task), say)


def _in_log(what: str, unit: str, total: int | None, log_every: int) -> Progress:
    count = 0
    of_all = "" if total is None else f" of {total}"

    def advance(name: str) -> None:
        nonlocal count
        count += 1
        if log_every == 1:
            print(f"{what}: {name} ({count}{of_all} {unit})", file=sys.stderr)
        elif count % log_every == 0:
            print(f"{what}: {count}{of_all} {unit} so far", file=sys.stderr)

    return Progress(advance, lambda line: print(line, file=sys.stderr))
