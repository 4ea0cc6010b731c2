"""Byte ranges of objects."""

from typing import NamedTuple


class ByteRange(NamedTuple):
    """Part of an object: bytes ``start`` up to, not including, ``stop``."""

    start: int
    stop: int
