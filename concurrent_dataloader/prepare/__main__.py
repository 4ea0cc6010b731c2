"""``concurrent-dataloader VERB``: finds the verb, prints errors, and sets the exit status."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

from concurrent_dataloader import __version__, core_files
from concurrent_dataloader.errors import LoaderError
from concurrent_dataloader.prepare.verbs import RESUMABLE, SUMMARIES

_PROGRAM = "concurrent-dataloader"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; those of the process when None.

    Returns:
        Exit status: 0, or 1 if it did not work, 130 if interrupted; 2 for an option that cannot be.
        Arguments that cannot be read exit with 2.
    """
    if arguments is None:  # a process of its own
        core_files.forbid()
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = given[0] if given else ""
    try:
        parser = _parser(verb)
    except KeyboardInterrupt:  # while the libraries are imported, which may take seconds
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    options, unknown = parser.parse_known_args(given)
    if unknown:
        options.parser.error(
            f"got {' '.join(unknown)}, which {verb} does not know, expected its own arguments"
        )
    try:
        return options.run(options) or 0
    except LoaderError as error:
        return _fail(_in_options(str(error)))
    except OSError as error:
        return _fail(_describe(error))
    except ValueError as error:
        message, is_option = _name_argument(
            _in_options(str(error)), options.names_of_arguments, given
        )
        return _fail(message, 2 if is_option else 1)
    except KeyboardInterrupt:
        goes_on = verb in RESUMABLE and getattr(options, "resume", True)
        more = "; repeat the command, and it goes on where it stopped" if goes_on else ""
        print(f"{_PROGRAM}: interrupted{more}", file=sys.stderr)
        return 130


def _fail(message: str, status: int = 1) -> int:
    print(f"{_PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _describe(error: OSError) -> str:
    """Say what is wrong with a file: the system's words alone leave open what was expected."""
    if error.filename is None or error.strerror is None:
        return str(error)
    is_file_in_the_way = isinstance(error, FileExistsError | NotADirectoryError) and os.path.isfile(
        error.filename
    )
    if is_file_in_the_way and error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{error.filename}: is a file, expected a folder, or a name that is free"
    advice = {
        errno.EISDIR: ", expected a file; check the path",
        errno.EACCES: "; check who owns it, and its rights",
        errno.EPERM: "; check who owns it, and its rights",
    }.get(error.errno or 0, "")
    # Where the library has said what to do, its words go on after the system's.
    return f"{error.filename}: {error.strerror}{'' if ';' in error.strerror else advice}"


def _name_argument(
    message: str, names_of_arguments: Mapping[str, Sequence[str]], given: Sequence[str]
) -> tuple[str, bool]:
    """Call an argument in a message what the user calls it: ``-n`` for ``num_instances``.

    Returns:
        The message; whether it is about an option.
    """
    name, colon, rest = message.partition(": got ")
    names = names_of_arguments.get(name) if colon else None
    if not names:
        word = message.partition(" ")[0].rstrip(":,")
        options = {each for names in names_of_arguments.values() for each in names}
        return message, word.startswith("-") and word in options
    typed = [each for each in names if _is_typed(each, given)]
    long = [each for each in names if each.startswith("--")]
    called = (typed or long or names)[0]
    return f"{called}: got {rest}", called.startswith("-")


def _is_typed(option: str, given: Sequence[str]) -> bool:
    return any(word.split("=")[0] == option for word in given)


_ADVICE = (
    ("or, for a public bucket, anonymous=True (--anonymous of commands)", "or give --anonymous"),
    ("open the store with anonymous=True", "give --anonymous"),
    ("open it with anonymous=True", "give --anonymous"),
    (", or allow more attempts (RetryPolicy.max_attempts)", ", and run the command again"),
    (
        "give label_rule, class_map or ground_truth, or let samples of unknown classes be skipped",
        "give --label-rule, --class-map or --ground-truth, or --on-unknown skip",
    ),
    (
        "choose another label_rule, or let samples of unknown classes be skipped",
        "choose another --label-rule, or give --on-unknown skip",
    ),
    ("by label_rule ", "by --label-rule "),
)
"""What the library advises to those who write Python, and the same on the command line."""


def _in_options(message: str) -> str:
    for python, options in _ADVICE:
        message = message.replace(python, options)
    return message


_REWORDED = (
    (re.compile(r"invalid float value: (.*)"), r"got \1, expected a number"),
    (re.compile(r"invalid \w+ value: (.*)"), r"got \1, expected a whole number"),
    (re.compile(r"invalid choice: (.*) \(choose from (.*)\)"), r"got \1, expected one of \2"),
)
"""What argparse says in its own way, which may be another one in another release of Python."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line; argparse's list of all options would push it off the screen."""

    def error(self, message: str) -> NoReturn:
        """Print the line, with the command that lists the options, and exit with 2."""
        wrong = message.removeprefix("argument ")
        for pattern, ours in _REWORDED:
            wrong = pattern.sub(ours, wrong)
        self.exit(2, f"{self.prog}: error: {wrong}; see `{self.prog} --help`\n")


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROGRAM, description="Prepare a data set for training.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, summary in SUMMARIES.items():
        verb_parser = verbs.add_parser(name, help=summary)
        if name == verb:
            module = importlib.import_module(f"concurrent_dataloader.prepare.verbs.{name}")
            verb_parser.description = module.DESCRIPTION
            module.add_arguments(verb_parser)
            _refuse_empty_places(verb_parser)
            names = _names_of_arguments(verb_parser, getattr(module, "CALLED_IN_MESSAGES", {}))
            verb_parser.set_defaults(run=module.run, parser=verb_parser, names_of_arguments=names)
    return parser


def _refuse_empty_places(parser: argparse.ArgumentParser) -> None:
    """Have positional arguments refuse ``""``, as of a variable that is not set.

    It would be the working folder, which is to be called ``.``.
    """
    for action in parser._actions:
        if not action.option_strings:
            expected = _PLACES.get(str(action.metavar), "a folder or URL")
            kind = cast("Callable[[str], Any]", action.type or str)
            action.type = functools.partial(_read_place, kind, expected)


_PLACES = {"INDEX": "an index file", "PATH": "a database"}
"""What an argument is, where it is no folder or URL."""


def _read_place(kind: Callable[[str], Any], expected: str, text: str) -> Any:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    if text.lower().rstrip("/") == "s3:":
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a bucket too: s3://bucket")
    return kind(text)


def _names_of_arguments(
    parser: argparse.ArgumentParser, called_in_messages: Mapping[str, str]
) -> dict[str, Sequence[str]]:
    """Give what users call each argument, by the names that the library's messages have for it."""
    names: dict[str, Sequence[str]] = {
        action.dest: action.option_strings or [str(action.metavar or action.dest)]
        for action in parser._actions
    }
    return names | {own: names[dest] for own, dest in called_in_messages.items()}


if __name__ == "__main__":
    sys.exit(main())
