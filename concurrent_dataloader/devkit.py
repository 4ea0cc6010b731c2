"""Facts about the original archives of ImageNet (ILSVRC2012), and the files of its development kit.

No network is needed: what is not in the kit comes with the library.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from concurrent_dataloader.errors import (
    ClassesFormatError,
    MissingDependencyError,
    ShardFormatError,
)
from concurrent_dataloader.formats.tar import check_name

NUM_CLASSES = 1000
"""Ids above are inner nodes of WordNet: `meta.mat` holds 1860 synsets."""

VAL_BASE = "ILSVRC2012_val_"
TEST_BASE = "ILSVRC2012_test_"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KAGGLE_SOLUTION = "LOC_val_solution.csv"
TRUTH_NAMES = (
    KAGGLE_SOLUTION,
    GROUND_TRUTH,
    f"data/{GROUND_TRUTH}",
    f"{DEVKIT.removesuffix('.tar.gz')}/data/{GROUND_TRUTH}",
    DEVKIT,
)
"""What the classes of a flat folder of validation images may lie in, in or above the folder."""

ARCHIVE_MD5: Mapping[str, str] = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
"""MD5 of the original archives, as their publisher names them."""

_CHUNK_BYTES = 4 << 20
_MAX_DEVKIT_FILE_BYTES = 64 << 20
_LAST_DIGITS = re.compile(r"^(.*?)(\d+)$")


class GroundTruth(NamedTuple):
    """Class ids or names of images, as a file lists them."""

    where: str
    """Names the file."""

    by_number: tuple[str, ...] | None
    """Of image 1, 2, ...; None if the file goes by name."""

    by_stem: Mapping[str, str] | None
    """By file name without folder and ending; None if the file goes by number."""

    @property
    def values(self) -> Iterable[str]:
        """All ids or names."""
        if self.by_number is not None:
            return self.by_number
        return (self.by_stem or {}).values()

    @property
    def has_ids(self) -> bool:
        """Whether the values are numbers."""
        return all(value.isascii() and value.isdigit() for value in self.values)


class ImageNumber(NamedTuple):
    """What is left and right in ``ILSVRC2012_val_00000001``."""

    base: str
    number: int


def check_archive(
    file: BinaryIO, name: str, where: str, *, md5_by_name: Mapping[str, str] = ARCHIVE_MD5
) -> None:
    """Compare an original archive with its published MD5; reads it whole.

    Args:
        file: The archive, at its begin.
        name: Its original file name.
        where: What errors call it.
        md5_by_name: The published ones.

    Raises:
        ValueError: There is no checksum for this name.
        ShardFormatError: It is not the original.
    """
    expected = md5_by_name.get(name)
    if expected is None:
        raise ValueError(
            f"{where}: no checksum is known for {name!r}, expected one of"
            f" {', '.join(md5_by_name)}; leave the check out"
        )
    md5 = hashlib.md5(usedforsecurity=False)
    while chunk := file.read(_CHUNK_BYTES):
        md5.update(chunk)
    if md5.hexdigest() != expected:
        raise ShardFormatError(
            f"{where}: got MD5 {md5.hexdigest()}, expected {expected} as of the original archive;"
            " fetch it anew"
        )


def parse_image_number(name: str) -> ImageNumber | None:
    """Part a file name into what comes before its last digits, and these; None if there are none.

    ``val/ILSVRC2012_val_00000001.JPEG`` gives ``("ILSVRC2012_val_", 1)``.
    """
    found = _LAST_DIGITS.match(stem_of(name))
    return None if found is None else ImageNumber(found[1], int(found[2]))


def stem_of(name: str) -> str:
    """Give a file name without folder and ending."""
    base = name[name.rfind("/") + 1 :]
    stem, dot, _ = base.rpartition(".")
    return stem if dot else base


# -- meta.mat


def parse_meta(raw: bytes, where: str) -> dict[str, int]:
    """Read the ILSVRC2012_ID of each WordNet id from the content of a ``meta.mat``.

    Inner nodes of WordNet, with ids above 1000, are there as well: classifying takes the others.

    Args:
        raw: The content.
        where: What errors call the file.

    Raises:
        ClassesFormatError: It is no such file, or an id is no number, or stands there twice.
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependencyError(
            f"{where}: {error}; install it with `pip install scipy`"
        ) from error
    try:
        content: Any = loadmat(io.BytesIO(raw), squeeze_me=True, variable_names=["synsets"])
        synsets = np.atleast_1d(content["synsets"])
        pairs = [(str(row["WNID"]), _exact_id(row["ILSVRC2012_ID"])) for row in synsets]
    except Exception as error:  # scipy raises whatever comes on content that is not MATLAB's
        raise ClassesFormatError(
            f"{where}: no table of synsets with WNID and ILSVRC2012_ID"
            f" ({type(error).__name__}: {error}); expected the meta.mat of the development kit"
        ) from error
    ids = dict(pairs)
    if len(ids) != len(pairs) or len(set(ids.values())) != len(pairs):
        raise ClassesFormatError(f"{where}: a WNID or an ILSVRC2012_ID stands there twice")
    return ids


def _exact_id(value: Any) -> int:
    """Read an id that is a number, or text such as ``"449"``, all of it."""
    text = str(np.asarray(value).item()).strip()
    number = int(text) if text.isdigit() else float(text)
    if number != int(number) or number < 1:
        raise ValueError(f"got ILSVRC2012_ID {text!r}, expected a whole number from 1 on")
    return int(number)


def leaf_classes(ids: Mapping[str, int]) -> dict[str, int]:
    """Leave out the inner nodes of WordNet, with ids above 1000."""
    return {wnid: number for wnid, number in ids.items() if number <= NUM_CLASSES}


# -- the kit's archive


def read_devkit(file: BinaryIO, where: str) -> dict[str, bytes]:
    """Read ``meta.mat`` and the ground truth from the archive of the development kit.

    Nothing is written to the disk, and no member but these two is read.

    Returns:
        Content by file name without folder.

    Raises:
        ShardFormatError: It is no tar, or a member's name leads out of its folder.
        ClassesFormatError: It does not hold the two.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            for member in archive:
                check_name(member.name)
                name = member.name.rpartition("/")[2]
                if name not in ("meta.mat", GROUND_TRUTH) or not member.isreg():
                    continue
                if member.size > _MAX_DEVKIT_FILE_BYTES:
                    raise ShardFormatError(f"{where}: {member.name!r} has {member.size} bytes")
                content = archive.extractfile(member)
                assert content is not None, "it is a regular file"
                found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ShardFormatError(
            f"{where}: cannot be read as a tar ({error}); fetch it anew"
        ) from error
    if missing := {"meta.mat", GROUND_TRUTH} - found.keys():
        raise ClassesFormatError(
            f"{where}: does not hold {', '.join(sorted(missing))}; expected {DEVKIT}"
        )
    return found


# -- ground truth


def parse_ground_truth(raw: bytes, where: str) -> GroundTruth:
    """Read which class each image of a flat folder is of.

    Known are lines of one class each, in the order of the images' numbers (the development kit);
    lines ``name class`` (as Caffe's ``val.txt``); and Kaggle's ``LOC_val_solution.csv``.

    Args:
        raw: The content.
        where: What errors call the file.

    Raises:
        ClassesFormatError: It is none of these.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClassesFormatError(
            f"{where}: no text ({error}), expected lines of classes"
        ) from error
    if text.startswith("ImageId,"):
        rows = [row for row in csv.reader(io.StringIO(text)) if row][1:]
        pairs = [(row[0], *row[1].split()[:1]) if len(row) == 2 else tuple(row) for row in rows]
    else:
        pairs = [tuple(line.split()) for line in text.splitlines() if line.strip()]
    widths = {len(pair) for pair in pairs}
    if widths == {1}:
        return GroundTruth(where, tuple(pair[0] for pair in pairs), None)
    if widths != {2}:
        raise ClassesFormatError(
            f"{where}: got {'lines of several kinds' if pairs else 'no line'}, expected a class on"
            " each, or a name and a class"
        )
    named = cast("list[tuple[str, str]]", pairs)
    if len(named) > 1 and [value for _, value in named] == [str(n + 1) for n in range(len(named))]:
        raise ClassesFormatError(
            f"{where}: numbers the images, and says no class; expected one such as {GROUND_TRUTH}"
            f" or {KAGGLE_SOLUTION}"
        )
    by_stem = {stem_of(name) if "." in name else name.rpartition("/")[2]: v for name, v in named}
    if len(by_stem) != len(named):
        raise ClassesFormatError(f"{where}: a name stands there twice")
    return GroundTruth(where, None, by_stem)
