"""Annotations of images in XML, in the layout of Pascal VOC as ImageNet's: one file an image."""

from __future__ import annotations

import os
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.boxes import NoBoxesError
from concurrent_dataloader.devkit import stem_of
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.index import Index

AUTO_BOXES = "auto"
"""Stands for the bounding boxes that the layout of Kaggle has."""

NO_FILE = -1
"""The row of a sample that has no file."""

_AMBIGUOUS = -2
_MAX_XML_BYTES = 1 << 20
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Annotation(NamedTuple):
    """What an XML file says of an image."""

    width: float
    height: float
    objects: tuple[tuple[str, tuple[float, ...]], ...]
    """Class, and xmin, ymin, xmax, ymax in pixels, of each."""


def parse_annotation(raw: bytes, where: str) -> Annotation:
    """Read an image's annotation in the layout of Pascal VOC, as ImageNet's.

    Files with a document type, which might define entities, are refused: nothing is expanded, and
    nothing is fetched.

    Args:
        raw: The content.
        where: What errors call the file.

    Raises:
        ShardFormatError: It is none.
    """
    reader = _AnnotationReader(where)
    if len(raw) > _MAX_XML_BYTES:
        raise reader.damage(f"got {len(raw)} bytes, expected {_MAX_XML_BYTES} at most")
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = reader.refuse_doctype
    parser.StartElementHandler = reader.start
    parser.CharacterDataHandler = reader.text
    parser.EndElementHandler = reader.end
    try:
        parser.Parse(raw, True)
        width, height = (float(reader.values[name]) for name in ("width", "height"))
        objects = tuple(
            (found.get("name", ""), tuple(float(found[corner]) for corner in _CORNERS))
            for found in reader.objects
        )
    except (expat.ExpatError, KeyError, ValueError) as error:
        if isinstance(error, ShardFormatError):
            raise
        raise reader.damage(f"{type(error).__name__}: {error}") from error
    if objects and not (width > 0 and height > 0):
        raise reader.damage(f"got size {width:g} x {height:g}, expected that of the image")
    return Annotation(width, height, objects)


class _AnnotationReader:
    """Takes size and objects from the events of a parser."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._path: list[str] = []
        self._text: list[str] = []
        self.values: dict[str, str] = {}
        self.objects: list[dict[str, str]] = []

    def damage(self, what: str) -> ShardFormatError:
        return ShardFormatError(
            f"{self._where}: no annotation in XML ({what}); expected size and objects with bndbox"
        )

    def refuse_doctype(self, *declared: object) -> None:
        raise self.damage("it has a document type, which is refused")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        self._text.clear()
        if self._path[1:] == ["object"]:
            self.objects.append({})

    def text(self, piece: str) -> None:
        self._text.append(piece)

    def end(self, name: str) -> None:
        value = "".join(self._text).strip()
        match self._path[1:]:
            case ["size", ("width" | "height") as side]:
                self.values[side] = value
            case ["object", "name"]:
                self.objects[-1]["name"] = value
            case ["object", "bndbox", corner] if corner in _CORNERS:
                self.objects[-1][corner] = value
            case _:
                pass
        self._path.pop()
        self._text.clear()


def relative_boxes(annotation: Annotation) -> tuple[Box, ...]:
    """Give the boxes of an annotation relative to its image.

    Corners are put in order, and what lies outside of the image is cut off, since ImageNet's own
    files have both.
    """
    boxes: list[Box] = []
    for _, (xmin, ymin, xmax, ymax) in annotation.objects:
        across = sorted(min(1.0, max(0.0, x / annotation.width)) for x in (xmin, xmax))
        down = sorted(min(1.0, max(0.0, y / annotation.height)) for y in (ymin, ymax))
        boxes.append(Box(across[0], down[0], across[1], down[1]))
    return tuple(boxes)


def match_annotations(names: Index, files: Index, where: str) -> NDArray[np.int64]:
    """Find for each sample the XML file of its name, else the only one of its file name.

    Args:
        names: The samples.
        files: The XML files.
        where: What errors call the place of the files.

    Returns:
        The position of each sample's in ``files``, (N,); `NO_FILE` where it has none.

    Raises:
        NoBoxesError: No file belongs to any sample.
    """
    by_path: dict[str, int] = {}
    by_stem: dict[str, int] = {}
    for row, name in enumerate(files.keys()):
        by_path[os.path.splitext(name)[0]] = row
        stem = stem_of(name)
        by_stem[stem] = _AMBIGUOUS if stem in by_stem else row
    rows = np.full(len(names), NO_FILE, np.int64)
    for position, name in enumerate(names.keys()):
        row = by_path.get(os.path.splitext(name)[0])
        if row is None:
            row = by_stem.get(stem_of(name), NO_FILE)
        rows[position] = max(row, NO_FILE)
    if not (rows != NO_FILE).any():
        raise NoBoxesError(
            f"{where}: no XML file belongs to any of the {len(names)} samples, the first of"
            f" which is {names.key(0)!r}; check the names"
        )
    return rows
