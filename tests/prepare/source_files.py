"""Small sets of images in every form that a source may have; tars made by Python's tarfile."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.prepare.source import Source

COMPRESS = {".tar.gz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}


def encode_image(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (color % 256, color * 7 % 256, 128)).save(file, "PNG")
    return file.getvalue()


IMAGES: dict[str, bytes] = {
    name: encode_image(number)
    for number, name in enumerate(
        ["cat/b.png", "cat/a.PNG", "Dog/1.jpg", "Dog/10.JPEG", "Dog/2.jpeg", "emu/ü 1.webp"]
    )
}
"""By name, in no order; the endings say nothing of the format."""

SORTED = ["Dog/1.jpg", "Dog/10.JPEG", "Dog/2.jpeg", "cat/a.PNG", "cat/b.png", "emu/ü 1.webp"]
LABELS = [0, 0, 0, 1, 1, 2]


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def make_tar(files: Mapping[str, bytes], others: Sequence[tarfile.TarInfo] = ()) -> bytes:
    """A tar of files, after members that are none."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info in others:
            tar.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make_link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "../elsewhere"
    return info


def make_tar_of_tars(files: Mapping[str, bytes]) -> bytes:
    """As ILSVRC2012_img_train.tar: a tar for each class, of its images without folder."""
    classes: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        folder, _, base = name.rpartition("/")
        classes.setdefault(folder, {})[base] = content
    return make_tar({f"{name}.tar": make_tar(members) for name, members in classes.items()})


def read_all(
    source: Source,
) -> list[tuple[str, int | None, int | None, bytes, tuple[Box, ...]]]:
    return [
        (
            source.name(position),
            source.label(position),
            source.size_bytes(position),
            bytes(source.read(position)),
            tuple(source.boxes(position)),
        )
        for position in range(len(source))
    ]


def names_of(source: Source) -> list[str]:
    return [source.name(position) for position in range(len(source))]


def labels_of(source: Source) -> list[int | None]:
    return [source.label(position) for position in range(len(source))]


def put_all(source: Source, result: Any) -> None:
    """Read all in another process."""
    result.put(read_all(source))
    source.close()
