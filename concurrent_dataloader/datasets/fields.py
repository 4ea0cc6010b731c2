"""Decode the fields of packed samples: images, tensors, raw pixels, labels, JSON."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from typing_extensions import Buffer

from concurrent_dataloader.datasets.indexed import Decode, choose_decode
from concurrent_dataloader.errors import SampleDecodeError
from concurrent_dataloader.formats.fields import (
    ANY_FIELD,
    ANY_FIELD_SIZE,
    LABEL_FIELD,
    RAW_FIELDS,
    TENSOR_FIELD,
    is_image_field,
    read_json,
    read_label,
)
from concurrent_dataloader.formats.image import is_image_file

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W, 3) uint8, RGB."""

# What torch.load lets through for bytes that are no tensor; MemoryError is not among them.
_NO_TENSOR = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
)


class FieldDecoder:
    """Decodes fields by their names; pickles if the decoder of images does."""

    def __init__(self, decode: Decode, raw_size: tuple[int, int] | None = None) -> None:
        """Choose how.

        Args:
            decode: Of images, as `IndexedDataset` takes it; with None, all fields stay bytes.
            raw_size: Height and width of images in `RAW_FIELDS`, and in ``img`` fields that have
                just so many bytes; None: they are squares, in ``img`` fields of 256.

        Raises:
            ValueError: There is no such decoder, or no such size.
            MissingDependencyError: The decoder is not installed.
        """
        if raw_size is not None and min(raw_size) < 1:
            raise ValueError(f"raw_size: got {raw_size}, expected height and width of 1 or more")
        self._decode = decode
        self._decode_raw = choose_decode(decode)
        self._raw_size = raw_size

    def decode_image(self, field: str, content: Buffer) -> Any:
        """Decode the payload of a sample.

        Returns:
            What ``decode`` gives: an RGB image of Pillow, or a (3, H, W) uint8 tensor; tensors and
            raw pixels become the same. A function of the user's own is given the bytes.

        Raises:
            SampleDecodeError: The bytes are not what the field's name says.
        """
        pixels = self._read_headerless(field.rpartition(".")[2], content)
        if pixels is None:
            return self._decode_raw(content)
        if self._decode == "pillow":
            return Image.fromarray(pixels)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def _read_headerless(self, kind: str, content: Buffer) -> Pixels | None:
        """Give the pixels of what is no image file; None where a decoder of images is to try."""
        if not isinstance(self._decode, str):
            return None
        if kind == TENSOR_FIELD:
            return _channels_last(_load_tensor(content))
        if kind in RAW_FIELDS:
            return _read_pixels(content, self._raw_size)
        size = self._raw_size or ANY_FIELD_SIZE
        if kind != ANY_FIELD or memoryview(content).nbytes != math.prod(size) * 3:
            return None
        if self._raw_size is None and is_image_file(content):
            return None
        return _read_pixels(content, size)

    def decode(self, field: str, content: Buffer) -> Any:
        """Decode any field: images, ``cls`` as int, ``json``; others stay bytes.

        Raises:
            SampleDecodeError: The bytes are not what the field's name says.
        """
        if self._decode is None:
            return bytes(content)
        kind = field.rpartition(".")[2]
        if kind == LABEL_FIELD:
            return read_label(content)
        if kind == "json":
            return read_json(content)
        return self.decode_image(field, content) if is_image_field(field) else bytes(content)


def _load_tensor(content: Buffer) -> torch.Tensor:
    """Read a tensor; executes nothing that the bytes ask for."""
    try:
        loaded: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except _NO_TENSOR as error:
        what = " ".join(str(error).split())[:200]
        raise SampleDecodeError(f"pth: {what}; expected a tensor that torch.save wrote") from error
    if not isinstance(loaded, torch.Tensor) or loaded.dtype != torch.uint8:
        got = f"a {loaded.dtype} tensor" if isinstance(loaded, torch.Tensor) else type(loaded)
        raise SampleDecodeError(f"pth: got {got}, expected a uint8 tensor")
    return loaded


def _channels_last(tensor: torch.Tensor) -> Pixels:
    """Give pixels as (H, W, 3)."""
    pixels = tensor.numpy()
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise SampleDecodeError(
            f"pth: got a tensor of shape {tuple(tensor.shape)}, expected (3, H, W) or (1, H, W)"
        )
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _read_pixels(content: Buffer, size: tuple[int, int] | None) -> Pixels:
    raw = np.frombuffer(memoryview(content), np.uint8)
    side = math.isqrt(raw.size // 3)
    height, width = (side, side) if size is None else size
    if height * width * 3 != raw.size or not raw.size:
        wanted = "a square" if size is None else f"{height} x {width}"
        raise SampleDecodeError(
            f"raw pixels: got {raw.size} bytes, expected {wanted} of 3 bytes each; give "
            "raw_size=(height, width)"
        )
    return raw.reshape(height, width, 3).copy()
