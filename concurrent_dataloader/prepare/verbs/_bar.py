"""A progress bar on a terminal, lines now and then in a log; and lines beside it that stay."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import NamedTuple

_LOG_EVERY = 20_000


class Progress(NamedTuple):
    """How a long command tells how far it is."""

    advance: Callable[[], None]
    """One thing more is done."""

    say: Callable[[str], None]
    """Print a line on stderr that stays."""


@contextlib.contextmanager
def show_progress(what: str, unit: str, total: int | None) -> Generator[Progress]:
    """Show how many things are done: in place on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _in_log(what, unit, total)
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

        yield Progress(lambda: bar.advance(task), say)


def _in_log(what: str, unit: str, total: int | None) -> Progress:
    count = 0
    of_all = "" if total is None else f" of {total}"

    def advance() -> None:
        nonlocal count
        count += 1
        if count % _LOG_EVERY == 0:
            print(f"{what}: {count}{of_all} {unit} so far", file=sys.stderr)

    return Progress(advance, lambda line: print(line, file=sys.stderr))
