"""Arguments of stores and of their policies: of the right type, within bounds, or a clear error."""

from __future__ import annotations

import numbers
import os
import re


def check_number(name: str, value: object, expected: str = "a number") -> None:
    """Raise TypeError unless the value is a number; NaN is one, so that bounds must refuse it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")


def check_whole(name: str, value: object, expected: str = "a whole number") -> None:
    """Raise TypeError unless the value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")


def check_duration(name: str, value_s: object) -> None:
    """Raise unless the value is a number of seconds above 0."""
    check_number(name, value_s, "a number of seconds")
    if isinstance(value_s, numbers.Real) and not float(value_s) > 0:
        raise ValueError(f"{name}: got {value_s} s, expected more than 0 s")


def check_instance(name: str, value: object, expected: type, default: str) -> None:
    """Raise TypeError unless the value is None or of a class; ``default`` says what None means."""
    if value is not None and not isinstance(value, expected):
        article = "an" if expected.__name__[0] in "AEIO" else "a"
        raise TypeError(
            f"{name}: got {value!r}, expected {article} {expected.__name__}, or None for {default}"
        )


def check_cache_folder(name: str, folder: object) -> None:
    """Raise unless the value may be a folder of this machine; it need not be there yet."""
    text = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else folder
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {folder!r}, expected the path of a folder")
    if not text:
        raise ValueError(f"{name}: got '', expected the path of a folder")
    # Of a URL no more than the scheme is shown: the rest may hold a password.
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(
            f"{name}: got a URL ({scheme[0]}...), expected the path of a folder of this machine"
        )


def check_no_file(name: str, folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if there is something in a folder's place that is none."""
    path = os.path.expanduser(folder)
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"{name}: got {os.fspath(path)!r}, which is a file, expected a folder")


def check_scheme(text: str) -> None:
    """Raise ValueError where a URL has lost a slash, and would be taken for a folder's name."""
    damaged = re.match(r"(s3|https?|file|memory):(?!//)/*", text, re.IGNORECASE)
    if damaged is None:
        return
    scheme, rest = damaged[1].lower(), text[damaged.end() :]
    meant = f"{scheme}://{'/' if scheme == 'file' else ''}"
    is_secret = "@" in rest or "?" in rest
    shown = "..." if is_secret else rest
    raise ValueError(
        f"url: got {damaged[0] + shown!r}, did you mean {meant + shown!r}? pathlib.Path takes "
        f"slashes out of URLs; a folder of that name is './{scheme}:...'"
    )
