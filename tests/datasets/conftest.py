"""A small set of images in class folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode_image(seed: int, image_format: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, image_format)
    return file.getvalue()


IMAGES: dict[str, bytes] = {
    "cat/1.jpg": encode_image(0),
    "cat/sub-a/2.JPEG": encode_image(1, mode="L"),
    "cat/sub/3.jpeg": encode_image(2, mode="CMYK"),
    "cat-tail/0.png": encode_image(3, "PNG", "RGBA"),
    "cat-tail/9.png": encode_image(4, "PNG", "P"),
    "Dog/5.jpg": encode_image(5),
    "Dog/10.jpg": encode_image(6),
}
"""Names whose order by path is not that by class: '-' sorts before '/'."""


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """The images in the folders of their classes, beside files that are none."""
    root = tmp_path / "images"
    for key, raw in IMAGES.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "loose.jpg").write_bytes(encode_image(7))
    return root
