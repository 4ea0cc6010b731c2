"""``concurrent-dataloader VERB``: finds the verb, prints errors, and sets the exit status."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from concurrent_dataloader import __version__
from concurrent_dataloader.errors import LoaderError
from concurrent_dataloader.prepare.verbs import SUMMARIES

_PROGRAM = "concurrent-dataloader"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; those of the process when None.

    Returns:
        Exit status: 0, or 1 if it did not work, 130 if interrupted. Wrong arguments exit with 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(given[0] if given else "").parse_args(given)
    try:
        return options.run(options) or 0
    except (LoaderError, OSError, ValueError) as error:
        print(f"{_PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Prepare a data set for training.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, summary in SUMMARIES.items():
        verb_parser = verbs.add_parser(name, help=summary)
        if name == verb:
            module = importlib.import_module(f"concurrent_dataloader.prepare.verbs.{name}")
            verb_parser.description = module.DESCRIPTION
            module.add_arguments(verb_parser)
            verb_parser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
