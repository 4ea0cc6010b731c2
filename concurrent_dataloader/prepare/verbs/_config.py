"""Options from JSON files: ``-c FILE``, as often as one likes; the command line wins."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import orjson

_ON_OFF = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*([kKMGT]i?)?[bB]?\s*")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_NO_LIMIT = "none"


def parse_size(text: str) -> int | None:
    """Read a size as ``3e9``, ``300MB`` or ``1GiB``, in bytes; None for ``none``, no limit.

    Raises:
        ArgumentTypeError: It is no size.
    """
    if text.strip().lower() == _NO_LIMIT:
        return None
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a size such as 3e9, 300MB, 1GiB, or none"
        )
    unit = (found[2] or "").replace("K", "k")
    size = float(found[1]) * (_UNITS | _BINARY_UNITS)[unit]
    if size >= 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected less than 2**63 bytes, or none")
    return round(size)


class Kind(NamedTuple):
    """What a value of a configuration file is to be."""

    expected: str
    read: Callable[[object], object]
    """Gives what the option has on the command line; raises ValueError or TypeError."""


def _read_bool(value: object) -> object:
    if isinstance(value, str):
        value = _ON_OFF.get(value.lower(), value)
    if not isinstance(value, bool):
        raise TypeError
    return value


def _read_int(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _read_text(value: object) -> object:
    if not isinstance(value, str):
        raise TypeError
    return value


def _read_size(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return parse_size(str(value))


BOOL = Kind("true or false", _read_bool)
INT = Kind("an integer", _read_int)
TEXT = Kind("a string", _read_text)
SIZE = Kind("a size in bytes, such as 3e9 or '300MB', or null for no limit", _read_size)


def one_of(*words: str) -> Kind:
    """Give the kind of a string out of a few."""

    def read(value: object) -> object:
        if value not in words:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(words)}", read)


def list_of(parse: Callable[[str], object]) -> Kind:
    """Give the kind of a list of strings, or of one string with commas, as on the command line."""

    def read(value: object) -> object:
        if isinstance(value, list):
            items = cast("list[object]", value)
            if not all(isinstance(item, str) for item in items):
                raise TypeError
            value = ",".join(cast("list[str]", items))
        if not isinstance(value, str):
            raise TypeError
        return parse(value)

    return Kind("a list of strings", read)


class _Default:
    """A default that nobody has given; shown as itself by ``--help``."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(self.value)


def add_config_option(parser: argparse.ArgumentParser, kinds: Mapping[str, Kind]) -> None:
    """Add ``-c``, after all other options; `apply_config` then says what holds.

    Args:
        parser: Of the verb.
        kinds: What each option may be in a file, by name, as ``key_style``.
    """
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="JSON object with options, named as here without dashes before them; may be given"
        " again, later files win, and the command line wins over files (default: none)",
    )
    parser.set_defaults(**{name: _Default(parser.get_default(name)) for name in kinds})


def apply_config(options: argparse.Namespace, kinds: Mapping[str, Kind]) -> None:
    """Put what files say in the place of defaults.

    Raises:
        ValueError: A file is no JSON object, holds an option that is not known, or a wrong value.
        FileNotFoundError: There is no such file.
    """
    given: dict[str, object] = {}
    for path in options.config:
        given |= _read_file(path, kinds)
    for name in kinds:
        value = getattr(options, name)
        if isinstance(value, _Default):
            setattr(options, name, given.get(name, value.value))


def _read_file(path: Path, kinds: Mapping[str, Kind]) -> dict[str, object]:
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: {error.msg}; expected a JSON object of options"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    found: dict[str, object] = {}
    for key, value in cast("dict[str, object]", content).items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise ValueError(
                f"{path}: got the key {key!r}, expected one of {', '.join(sorted(kinds))}"
            )
        try:
            found[name] = kinds[name].read(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            said = f" ({error})" if str(error) else ""
            raise ValueError(
                f"{path}, key {key!r}: got {value!r}, expected {kinds[name].expected}{said}"
            ) from error
    return found
