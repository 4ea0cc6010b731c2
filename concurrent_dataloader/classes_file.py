"""What a classes file says: ids by class or by the number of an image, as JSON or as lines."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import orjson

from concurrent_dataloader.errors import ClassesFormatError


class ClassEntry(NamedTuple):
    """What a classes file says of a class, or of an image."""

    id: int
    name: str | None


def read_entries(path: Path) -> tuple[dict[str, ClassEntry], bool]:
    """Read what a file says, by class or image number as text; tells whether it is by number."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such classes file; write it with"
            " `concurrent-dataloader index --classes-output`"
        ) from error
    if path.suffix == ".txt":
        return _read_lines(path, raw), True
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ClassesFormatError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg};"
            " expected a JSON object of classes"
        ) from error
    if not isinstance(content, dict) or not content:
        got = "an empty object" if content == {} else f"a JSON {type(content).__name__}"
        raise ClassesFormatError(
            f'{path}: got {got}, expected {{"n01440764": {{"id": 1, "name": "tench"}}, ...}}'
            ' or {"1": 490, ...}'
        )
    table = cast("dict[str, object]", content)
    entries = {value: _read_entry(path, value, given) for value, given in table.items()}
    by_number = all(value.isascii() and value.isdigit() for value in entries)
    return entries, by_number and not any(isinstance(given, dict) for given in table.values())


def _read_entry(path: Path, value: str, given: object) -> ClassEntry:
    name = None
    number = given
    if isinstance(given, dict):
        fields = cast("dict[str, object]", given)
        number, name = fields.get("id"), fields.get("name")
    if isinstance(number, str) and number.isascii() and number.isdigit():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ClassesFormatError(
            f"{path}, entry {value!r}: got id {number!r}, expected an integer from 0 on"
        )
    if name is not None and not isinstance(name, str):
        raise ClassesFormatError(f"{path}, entry {value!r}: got name {name!r}, expected a string")
    return ClassEntry(number, name)


def _read_lines(path: Path, raw: bytes) -> dict[str, ClassEntry]:
    entries: dict[str, ClassEntry] = {}
    for number, line in enumerate(raw.split(), start=1):
        if not line.isdigit():
            raise ClassesFormatError(
                f"{path}, line {number}: got {line.decode(errors='replace')!r}, expected a class id"
            )
        entries[str(number)] = ClassEntry(int(line), None)
    if not entries:
        raise ClassesFormatError(f"{path}: got an empty file, expected a class id on each line")
    return entries


def key_by_image_number(
    entries: dict[str, ClassEntry], number_base: int | None, where: str
) -> dict[str, ClassEntry]:
    """Key entries by the number in the image's name, which counts from 1."""
    numbers = {int(value): entry for value, entry in entries.items()}
    if len(numbers) != len(entries):
        raise ClassesFormatError(f"{where}: an image number stands there twice, such as 1 and 01")
    low, high = min(numbers), max(numbers)
    if number_base is None:
        if low > 1 or high - low + 1 != len(numbers):
            raise ClassesFormatError(
                f"{where}: image numbers go from {low} to {high} with gaps, which does not tell"
                " whether the image whose name says 1 is 0 or 1 there; give number_base=0 or"
                " number_base=1"
            )
        number_base = low
    return {str(number + 1 - number_base): entry for number, entry in numbers.items()}
