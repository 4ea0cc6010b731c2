"""How a key names its class: the rules, and the functions that they stand for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

LabelRule = str | Mapping[str, str]
"""How a key names its class.

- ``"parent"``: its last folder, at any depth: ``a/b/n01440764/x.JPEG``.
- ``"prefix"``: its file name up to the first underscore: ``n01440764_10026.JPEG``.
- ``"number"``: the last digits of its file name: ``ILSVRC2012_val_00000001.JPEG`` is ``1``.
- ``"regex:PATTERN"``: the first group of the pattern, searched in the whole key.
- a mapping from each key to its class.
"""


def _parent(key: str) -> str:
    parts = key.rsplit("/", 2)
    return parts[-2] if len(parts) > 1 else ""


def _prefix(key: str) -> str:
    return key[key.rfind("/") + 1 :].partition("_")[0]


_LAST_DIGITS = re.compile(r"0*(\d+)\D*$")


def _number(key: str) -> str:
    name = key[key.rfind("/") + 1 :]
    stem, dot, _ = name.rpartition(".")
    found = _LAST_DIGITS.search(stem if dot else name)
    return found[1] if found else ""


def _by_pattern(pattern: re.Pattern[str], key: str) -> str:
    found = pattern.search(key)
    return (found[1] or "") if found else ""


def _by_map(mapping: Mapping[str, str], key: str) -> str:
    return mapping.get(key, "")


def check_label_rule(rule: LabelRule) -> None:
    """Raise unless a class can be found by this rule.

    Raises:
        ValueError: There is no such rule, or its pattern is none.
    """
    class_finder(rule)


def class_finder(rule: LabelRule) -> Callable[[str], str]:
    """Give the function that a rule stands for: of a key its class, ``""`` if it names none.

    It pickles.

    Raises:
        ValueError: As in `check_label_rule`.
    """
    if isinstance(rule, Mapping):
        return functools.partial(_by_map, dict(rule))
    if rule.startswith("regex:"):
        try:
            pattern = re.compile(rule.removeprefix("regex:"))
        except re.error as error:
            raise ValueError(f"label_rule: got {rule!r}, no regular expression: {error}") from error
        if not pattern.groups:
            raise ValueError(
                f"label_rule: got {rule!r}, expected a group in parentheses for the class"
            )
        return functools.partial(_by_pattern, pattern)
    finders = {"parent": _parent, "prefix": _prefix, "number": _number}
    if rule not in finders:
        raise ValueError(
            f"label_rule: got {rule!r}, expected 'parent', 'prefix', 'number', 'regex:PATTERN'"
            " or a mapping from key to class"
        )
    return finders[rule]


def rule_name(rule: LabelRule) -> str:
    """Name a rule for a person."""
    return repr(rule) if isinstance(rule, str) else f"map of {len(rule)} keys"
