"""``metadata.json``: what a packed data set holds, how it was made, and how to check it.

It lies beside the shards, for all splits, and is written last: where it is missing, a run did not
finish. The keys at its top level are those of an older system, whose files are read too (they have
no ``splits``):

```text
train_length, validation_length ...      samples of each split; the split "val" counts as validation
format                                   "img" for image files, "tensor", or "raw"
shuffle, seed                            of the split train, else of the first one; seed: null if
                                         not shuffled
train_transform_pipeline ...             steps that are baked in, such as "Resize(256)"
image_quality                            of the JPEG encoder; null if it did not run
checksum                                 see `checksum`; null unless all shards have MD5s
version, label_space, classes, splits    this library's; a split is the JSON of `SplitMetadata`
```
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

import orjson
from typing_extensions import Buffer

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.files import write_whole

VERSION = 1

Payload = Literal["file", "jpeg", "tensor", "raw", "ppm"]
"""What a shard holds of an image.

- ``"file"``: the file as it was.
- ``"jpeg"``: JPEG, encoded anew.
- ``"tensor"``: its pixels, (3, H, W) uint8, in the container that ``torch.load`` reads.
- ``"raw"``: its pixels, (H, W, 3) uint8, and nothing else; all images have the same size.
- ``"ppm"``: the same after a header that says the size, as a PPM file.
"""

_FORMATS = {"file": "img", "jpeg": "img", "ppm": "img", "tensor": "tensor", "raw": "raw"}
_OLD_NAMES = {"val": "validation"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardMetadata:
    """A shard of a split."""

    name: str
    """Relative to the folder of metadata.json."""

    num_samples: int
    size_bytes: int
    md5: str | None = None
    """Of the whole file, in hex; None where it was not asked for."""

    crc32c: str | None = None
    """Of the whole file, in hex; None in sets of before it was computed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitMetadata:
    """A split: its shards, and how they were made."""

    num_samples: int
    shards: tuple[ShardMetadata, ...] | None = None
    """In their order; None where the writer did not say."""

    kind: Literal["tar", "tfrecord"] = "tar"
    payload: Payload = "file"
    image_size: tuple[int, int] | None = None
    """Height and width of every image of ``payload`` "raw"; None otherwise."""

    image_quality: int | None = None
    """Of the JPEG encoder, 0 to 100; None if images were not encoded."""

    transforms: tuple[str, ...] = ()
    """Steps that are baked in, such as ``Resize(256)``; a loader is to leave them out."""

    function: str | None = None
    """``module:function`` that each file went through first."""

    shuffle: bool = False
    seed: int | None = None
    """Of the permutation; None if not shuffled, or not known."""

    key_style: str | None = None
    pattern: str | None = None
    """Of the shards' names."""

    boxes: bool = False
    """Whether bounding boxes are there."""

    label_base: int = 0
    """What the records call the first class; in tar shards always 0."""

    label_space: str | None = None
    """A `LabelSpace`'s value where the classes are ImageNet's; None where that is not known."""

    classes: tuple[str, ...] | None = None
    """Name of each class in the order of the labels; None where they are not known."""

    fingerprint: str | None = None
    """Stands for source and settings: two runs with the same one write the same bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """What a packed data set holds."""

    splits: Mapping[str, SplitMetadata]
    """By name, such as "train" and "val"."""

    checksum: str | None = None
    """As the file says; `find_checksum` tells what it should be."""

    version: int | None = VERSION
    """None for a file of the older system."""

    def find_checksum(self) -> str | None:
        """Compute the checksum of all shards that are listed; None where one has no MD5."""
        digests: list[str] = []
        for split in self.splits.values():
            if split.shards is None:
                return None
            for shard in split.shards:
                if shard.md5 is None:
                    return None
                digests.append(shard.md5)
        return checksum(digests)

    def with_split(self, name: str, split: SplitMetadata | None) -> Metadata:
        """Give a copy in which a split was put, replaced, or left out (None); checksum anew."""
        splits = dict(self.splits)
        splits.pop(name, None)
        if split is not None:
            splits[name] = split
        copy = Metadata(splits=dict(sorted(splits.items())))
        return dataclasses.replace(copy, checksum=copy.find_checksum())

    def to_bytes(self) -> bytes:
        """Give the content of the file."""
        content: dict[str, Any] = {}
        for name, split in self.splits.items():
            content[f"{_OLD_NAMES.get(name, name)}_length"] = split.num_samples
        for name, split in self.splits.items():
            old_name = _OLD_NAMES.get(name, name)
            content[f"{old_name}_transform_pipeline"] = list(split.transforms)
        if self.splits:
            main = self.splits.get("train") or next(iter(self.splits.values()))
            content |= {
                "format": _FORMATS[main.payload],
                "shuffle": main.shuffle,
                "seed": main.seed,
                "image_quality": main.image_quality,
                "label_space": main.label_space,
                "classes": main.classes,
            }
        content |= {
            "checksum": self.checksum,
            "version": VERSION,
            "splits": {name: dataclasses.asdict(split) for name, split in self.splits.items()},
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        write_whole(Path(path), [self.to_bytes()])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file.

        Raises:
            FileNotFoundError: There is none.
            IndexFormatError: It is not one of these.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: no such file, expected the metadata of packed data; check the folder, or"
                " finish writing it with `concurrent-dataloader shard`"
            ) from error
        return cls.from_bytes(raw, str(path))

    @classmethod
    def from_bytes(cls, raw: Buffer, where: str) -> Self:
        """Read the content of a file.

        Args:
            raw: The content.
            where: What errors call it.

        Raises:
            IndexFormatError: It is not one of these, or of a later version.
        """
        try:
            content = orjson.loads(bytes(raw))
            if not isinstance(content, dict):
                raise TypeError(f"got a JSON {type(content).__name__}, expected an object")
            table = cast("dict[str, Any]", content)
            version = table.get("version")
            if version not in (None, VERSION):
                raise ValueError(f"got version {version!r}, expected {VERSION}")
            splits = _read_old(table) if version is None else _read_splits(table)
            return cls(splits=splits, checksum=table.get("checksum"), version=version)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IndexFormatError(
                f"{where}: no metadata of packed data ({type(error).__name__}: {error}); write it"
                " anew with `concurrent-dataloader shard`, or update the library"
            ) from error


def checksum(md5_digests: Iterable[str]) -> str:
    """Put the MD5s of files, in hex, together: the MD5 of all of them, sorted, without separators.

    So the older system checks a folder. Names do not count; `ShardMetadata` has them.
    """
    joined = "".join(sorted(md5_digests)).encode("ascii")
    return hashlib.md5(joined, usedforsecurity=False).hexdigest()


def _read_splits(table: dict[str, Any]) -> dict[str, SplitMetadata]:
    splits: dict[str, SplitMetadata] = {}
    for name, fields in table["splits"].items():
        shards = fields["shards"]
        size = fields["image_size"]
        classes = fields["classes"]
        known = {field.name for field in dataclasses.fields(SplitMetadata)}
        given: dict[str, Any] = {key: value for key, value in fields.items() if key in known}
        given |= {
            "shards": None if shards is None else tuple(ShardMetadata(**shard) for shard in shards),
            "image_size": None if size is None else (int(size[0]), int(size[1])),
            "transforms": tuple(fields["transforms"]),
            "classes": None if classes is None else tuple(classes),
        }
        splits[name] = SplitMetadata(**given)
        _check_split(name, splits[name])
    return splits


def _check_split(name: str, split: SplitMetadata) -> None:
    if split.payload not in _FORMATS or split.kind not in ("tar", "tfrecord"):
        raise ValueError(f"split {name!r}: got payload {split.payload!r}, kind {split.kind!r}")
    if split.shards is not None:
        total = sum(shard.num_samples for shard in split.shards)
        if total != split.num_samples:
            raise ValueError(
                f"split {name!r}: its shards hold {total} samples, and it says {split.num_samples}"
            )


def _read_old(table: dict[str, Any]) -> dict[str, SplitMetadata]:
    """Read the older layout: lengths, and settings that all splits share."""
    splits: dict[str, SplitMetadata] = {}
    for key, length in table.items():
        name, ending, rest = key.partition("_length")
        if not ending or rest or not isinstance(length, int):
            continue
        steps = table.get(f"{name}_transform_pipeline", table.get("transform_pipeline", ()))
        payload: Payload = "tensor" if table.get("format") == "tensor" else "jpeg"
        splits[name] = SplitMetadata(
            num_samples=length,
            payload=payload,
            image_quality=table.get("image_quality") if payload == "jpeg" else None,
            transforms=tuple(steps),
            shuffle=bool(table.get("shuffle", False)),
            seed=table.get("seed"),
            key_style="index",
            pattern=f"{name}-%06d.tar",
        )
    if not splits:
        raise ValueError("got no '..._length' of a split")
    return splits
