"""How samples are packed into shards: what the bytes of the shards depend on."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np

from concurrent_dataloader.formats.fields import RAW_FIELDS, TENSOR_FIELD
from concurrent_dataloader.formats.tar import check_name, split_name
from concurrent_dataloader.prepare.plan import (
    NamePattern,
    shuffle_positions,
    split_by_count,
    split_by_size,
)
from concurrent_dataloader.prepare.steps import Preparation
from concurrent_dataloader.shard_index import ShardKind

KeyStyle = Literal["path", "stem", "index"]
"""What a sample is called in its shard.

- ``"path"``: its path in the source without ending, as ``n01440764/n01440764_10026``.
- ``"stem"``: its file name without ending.
- ``"index"``: its number in the order of writing, of seven digits or more.
"""

DEFAULT_MAX_BYTES = 300_000_000
"""Some 490 shards of ImageNet's training set."""

# Endings that readers would not take for an image; these files are called ``img``.
_OTHER_IMAGES = frozenset({"", "gif", "jfif", "jpe", "pnm", "pbm"})
_PAYLOAD_FIELDS = {"jpeg": "jpg", "tensor": TENSOR_FIELD, "raw": RAW_FIELDS[0], "ppm": "ppm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How a split is packed; what the bytes of its shards depend on, besides the source.

    Raises:
        ValueError: On making it: a value that cannot be, or settings that do not go together.
    """

    split: str = "train"
    kind: ShardKind = "tar"
    pattern: str | None = None
    """Names of the shards; None: ``SPLIT-%06d.tar`` or ``SPLIT-%05d-of-%05d``."""

    seed: int | None = 0
    """Of the permutation of all samples; None: keep the source's order."""

    max_count: int | None = None
    """Samples of a shard; every shard but the last has exactly as many, unless ``max_bytes`` ends
    it before."""

    max_bytes: int | None = DEFAULT_MAX_BYTES
    """Of a shard's file; never exceeded, but by a sample that is larger alone. Sizes that the
    source does not know, or that a preparation changes, cost a first pass over all samples."""

    key_style: KeyStyle = "path"
    key_prefix: str | None = None
    """Stands before each key; None: ``SPLIT-`` for the key style "index", else nothing."""

    field: str | None = None
    """Of the payload, such as ``jpg``; None: the file's ending in lower case."""

    boxes: bool = False
    """Whether each sample gets its bounding boxes: ``{"bbox": [x1, y1, x2, y2]}``, or null. If it
    has several, "bbox" is the smallest box around them, and "bboxes" has them all."""

    preparation: Preparation = dataclasses.field(default_factory=Preparation)

    md5: bool = False
    """Whether the MD5 of each shard is recorded too, which takes four times as long as the rest.
    The older system's checksum of a set is made of them."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ShardKind):
            raise ValueError(f"format: got {self.kind!r}, expected 'tar' or 'tfrecord'")
        if self.key_style not in get_args(KeyStyle):
            styles = ", ".join(get_args(KeyStyle))
            raise ValueError(f"key_style: got {self.key_style!r}, expected one of {styles}")
        if not self.split or self.split.startswith(".") or "/" in self.split or "%" in self.split:
            raise ValueError(f"split: got {self.split!r}, expected a name such as 'train'")
        if self.field is not None and (
            split_name(f"x.{self.field}") != ("x", self.field) or self.field in ("cls", "json")
        ):
            raise ValueError(
                f"field: got {self.field!r}, expected an ending in lower case such as 'jpg', and"
                " neither 'cls' nor 'json'"
            )
        if self.kind == "tfrecord" and self.preparation.payload in ("tensor", "raw"):
            raise ValueError(
                f"payload: got {self.preparation.payload!r} in a TFRecord, expected 'file', 'jpeg'"
                " or 'ppm', since readers take it for an image file"
            )
        shuffle_positions(0, self.seed)
        none = np.zeros(0, np.int64)
        split_by_count(none, self.max_count)
        if self.max_bytes is not None:
            split_by_size(none, none, self.max_bytes)
        self.names.names(1)
        check_name(self.prefix + "x")

    @property
    def names(self) -> NamePattern:
        """The names of the shards."""
        end = "-%06d.tar" if self.kind == "tar" else "-%05d-of-%05d"
        return NamePattern(self.split + end if self.pattern is None else self.pattern)

    @property
    def prefix(self) -> str:
        """What stands before each key."""
        if self.key_prefix is not None:
            return self.key_prefix
        return f"{self.split}-" if self.key_style == "index" else ""

    def key(self, name: str, place: int, digits: int) -> str:
        """Give the key of the sample that is called ``name`` and is written as number ``place``.

        Dots in the last part of a path would begin the field; they become underscores.
        """
        if self.key_style == "index":
            return f"{self.prefix}{place:0{digits}d}"
        folder, slash, base = name.rpartition("/")
        stem = _split_ending(base)[0].replace(".", "_")
        return self.prefix + (stem if self.key_style == "stem" else folder + slash + stem)

    def payload_field(self, name: str) -> str:
        """Give the field of the payload of the sample that is called ``name``."""
        if self.field is not None:
            return self.field
        if self.preparation.payload != "file":
            return _PAYLOAD_FIELDS[self.preparation.payload]
        ending = _split_ending(name)[1].lower()
        return "img" if ending in _OTHER_IMAGES else ending


def _split_ending(name: str) -> tuple[str, str]:
    """Part a name at the last dot of its last part, but for one that it begins with."""
    base = name[name.rfind("/") + 1 :]
    stem, dot, ending = base.rpartition(".")
    if not dot or not stem:
        return name, ""
    return name[: -len(ending) - 1], ending
