"""Classes as a file of the user's lists or maps them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import orjson

from concurrent_dataloader.devkit import GroundTruth
from concurrent_dataloader.errors import ClassesFormatError
from concurrent_dataloader.index import Index
from concurrent_dataloader.label_rules import LabelRule, class_finder
from concurrent_dataloader.labelling import (
    ClassTable,
    table_of_ids,
    table_of_names,
)
from concurrent_dataloader.labels import LabelSpace, convert_ids, imagenet_classes

# What a map may go by, in the order in which it is tried: class folder, file name, file name
# without ending, whole name.
_RULES = ("parent", r"regex:([^/]+)$", r"regex:([^/]+?)(?:\.[^./]*)?$", r"regex:(?s)^(.*)$")
_TRIED_NAMES = 1000
_WNID = re.compile(r"n\d{8}")


def parse_class_map(raw: bytes, where: str, id_base: int | None) -> ClassTable | GroundTruth:
    """Read a map or a list of classes.

    Known are JSON objects from class, or file name, to id, to ``{"id": ..., "name": ...}``, or to a
    class's name; JSON objects from image number to id; JSON lists, and text files, of classes in
    the order of their labels.

    Args:
        raw: The content.
        where: What errors call the file.
        id_base: Lowest possible id, 0 or 1; None: found out.

    Raises:
        ClassesFormatError: It is none of these.
    """
    begin = raw.lstrip()[:1]
    if begin not in (b"{", b"["):
        return table_of_names(_parse_lines(raw, where), where)
    try:
        content: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ClassesFormatError(
            f"{where}, line {error.lineno}, column {error.colno}: {error.msg}; expected JSON"
        ) from error
    if not content:
        raise ClassesFormatError(f"{where}: is empty, expected classes")
    if isinstance(content, list):
        entries = cast("list[object]", content)
        if not all(isinstance(entry, str) for entry in entries):
            raise ClassesFormatError(f"{where}: expected a list of strings, the classes")
        return table_of_names(cast("list[str]", entries), where)
    return _parse_object(cast("dict[str, object]", content), where, id_base)


def find_rule(names: Index, table: ClassTable) -> LabelRule:
    """Find out whether a map goes by class folder or by file name; the former if by neither."""
    for rule in _RULES:
        value_of = class_finder(rule)
        tried = (names.key(position) for position in range(min(_TRIED_NAMES, len(names))))
        if any(value_of(name) in table.labels for name in tried):
            return rule
    return _RULES[0]


def _parse_lines(raw: bytes, where: str) -> list[str]:
    try:
        lines = [line.strip() for line in raw.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ClassesFormatError(f"{where}: no text ({error}), expected a class a line") from error
    if not lines:
        raise ClassesFormatError(f"{where}: is empty, expected a class a line")
    if all(line.isdigit() for line in lines):
        raise ClassesFormatError(
            f"{where}: holds numbers, expected the name of a class on each line; give the classes"
            " of images in their order as ground_truth"
        )
    first = [line.split()[0] for line in lines]
    return first if all(_WNID.fullmatch(word) for word in first) else lines


def _parse_object(
    content: dict[str, object], where: str, id_base: int | None
) -> ClassTable | GroundTruth:
    values = {name: _parse_value(name, value, where) for name, value in content.items()}
    if all(isinstance(value, str) for value in values.values()):
        given = cast("dict[str, str]", values)
        classes = table_of_names(sorted(set(given.values())), where)
        labels = {name: classes.labels[value] for name, value in given.items()}
        return classes._replace(labels=labels)
    if mixed := [name for name, value in values.items() if isinstance(value, str)]:
        raise ClassesFormatError(
            f"{where}, entry {mixed[0]!r}: got {values[mixed[0]]!r} beside ids, expected ids only"
        )
    ids = cast("dict[str, int]", values)
    if all(name.isascii() and name.isdigit() for name in ids) and not any(
        isinstance(value, dict) for value in content.values()
    ):
        return _by_number(ids, where)
    return _of_imagenet(ids, where, id_base) or table_of_ids(ids, where, id_base)


def _parse_value(name: str, value: object, where: str) -> int | str:
    if isinstance(value, Mapping):
        value = cast("Mapping[str, object]", value).get("id")
    if isinstance(value, str) and value:
        return int(value) if value.isascii() and value.isdigit() else value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ClassesFormatError(
        f"{where}, entry {name!r}: got {value!r}, expected an id from 0 on, or a class's name"
    )


def _by_number(ids: dict[str, int], where: str) -> GroundTruth:
    by_number = {int(name): str(number) for name, number in ids.items()}
    first = min(by_number)
    if first > 1 or sorted(by_number) != list(range(first, first + len(ids))):
        raise ClassesFormatError(
            f"{where}: image numbers go from {first} to {max(by_number)}, expected all from 0 or 1"
            " on"
        )
    return GroundTruth(where, tuple(by_number[number] for number in sorted(by_number)), None)


def _of_imagenet(ids: dict[str, int], where: str, id_base: int | None) -> ClassTable | None:
    """Find out in which of ImageNet's spaces the ids are, if in any."""
    places = {entry.wnid: place for place, entry in enumerate(imagenet_classes(), start=1)}
    if not all(name in places for name in ids):
        return None
    for space in (LabelSpace.ILSVRC2012_ID, LabelSpace.SORTED_WNID, LabelSpace.TF_BUILDER):
        known = {
            wnid: convert_ids(place, LabelSpace.ILSVRC2012_ID, space)
            for wnid, place in places.items()
        }
        if id_base in (None, space.first_id) and all(known[n] == ids[n] for n in ids):
            labels = {name: number - space.first_id for name, number in ids.items()}
            return ClassTable(
                where, labels, tuple(sorted(known, key=known.__getitem__)), space.value
            )
    return None
