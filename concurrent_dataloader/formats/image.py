"""Decode image bytes: three channels of 8 bits always, the pixels of torchvision's ImageFolder."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args, overload

from PIL import Image
from typing_extensions import Buffer

from concurrent_dataloader.errors import MissingDependencyError, SampleDecodeError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

DecoderName: TypeAlias = Literal["pillow", "torchvision"]
"""Pillow is the reference; torchvision's ``decode_jpeg`` gives a tensor."""

DECODER_NAMES: tuple[DecoderName, ...] = get_args(DecoderName)

# What Pillow's parsers let through when the bytes are malformed. MemoryError is not among them: it
# says nothing about the bytes.
_MALFORMED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Start-of-frame markers: all of 0xC0 to 0xCF but DHT, JPG and DAC.
# Source: ITU-T T.81, table B.1.
_JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TORCHVISION_RGB = 3  # torchvision.io.ImageReadMode.RGB


@overload
def decode_image(raw: Buffer, decoder: Literal["pillow"] = "pillow") -> Image.Image: ...
@overload
def decode_image(raw: Buffer, decoder: Literal["torchvision"]) -> torch.Tensor: ...
@overload
def decode_image(raw: Buffer, decoder: DecoderName) -> Image.Image | torch.Tensor: ...
def decode_image(raw: Buffer, decoder: DecoderName = "pillow") -> Image.Image | torch.Tensor:
    """Decode an image file to RGB.

    Grey, palette, CMYK, RGBA and 16-bit images are converted as Pillow does it. The EXIF
    orientation is not applied, since torchvision's ImageFolder does not either; of an animation
    the first frame is taken.

    Args:
        raw: A whole file, of any format that Pillow knows.
        decoder: "pillow", or "torchvision" for a tensor. The latter decodes grey and
            three-channel JPEG files itself and leaves all others to Pillow.

    Raises:
        SampleDecodeError: The bytes are no image, are cut short, or would fill more memory than
            Pillow's limit against decompression bombs allows.

    Shapes:
        With "torchvision": (3, H, W) uint8, RGB, 0 to 255; channels lie last in memory, as
        torchvision leaves them.
    """
    if decoder == "pillow":
        return _decode_with_pillow(raw)
    return _decode_with_torchvision(raw)


def is_image_file(raw: Buffer) -> bool:
    """Tell by its begin whether Pillow takes it for an image file; it may be damaged."""
    try:
        with Image.open(io.BytesIO(raw)):
            return True
    except Image.UnidentifiedImageError:
        return False


def check_decoder(decoder: str) -> None:
    """Raise unless images can be decoded with ``decoder`` here.

    Raises:
        ValueError: There is no decoder of this name.
        MissingDependencyError: The installed torchvision was built without it.
    """
    if decoder not in DECODER_NAMES:
        raise ValueError(
            f"decode: got {decoder!r}, expected {' or '.join(map(repr, DECODER_NAMES))}, "
            "None for raw bytes, or a function of raw bytes"
        )
    if decoder == "torchvision":
        _jpeg_operator()


def _decode_with_pillow(raw: Buffer) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(raw))
        if image.format == "JPEG":
            # One block instead of Pillow's 64 KiB pieces, each of which it would copy twice.
            image.decodermaxblock = len(memoryview(raw)) + 1
        image.load()
        if image.mode == "RGB":
            return image  # `convert` would copy it
        # Pillow warns of this entry at each conversion, and does not need it for RGB.
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            del image.info["transparency"]
        return image.convert("RGB")
    except _MALFORMED as error:
        raise SampleDecodeError(_describe_failure(raw, error)) from error


def _decode_with_torchvision(raw: Buffer) -> torch.Tensor:
    import numpy as np
    import torch

    if _is_plain_jpeg(raw):
        # A bytearray, since a tensor over bytes that must not be written makes torch warn.
        encoded = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        try:
            return _jpeg_operator()(encoded, _TORCHVISION_RGB, False)
        except RuntimeError:
            pass  # Pillow decides whether the bytes are bad, and says why
    return torch.from_numpy(np.array(_decode_with_pillow(raw)).transpose(2, 0, 1))


@functools.cache
def _jpeg_operator() -> Callable[[torch.Tensor, int, bool], torch.Tensor]:
    """The operator behind ``torchvision.io.decode_jpeg``, which warns at each call from 0.29 on."""
    import torch
    import torchvision  # registers the operator

    try:
        return torch.ops.image.decode_jpeg.default
    except AttributeError as error:
        raise MissingDependencyError(
            f"decode='torchvision': torchvision {torchvision.__version__} has no JPEG decoder; "
            "use decode='pillow'"
        ) from error


class _JpegFrame(NamedTuple):
    """What the frame header says: ITU-T T.81, B.2.2."""

    num_bits: int
    height: int
    width: int
    num_channels: int


def _is_plain_jpeg(raw: Buffer) -> bool:
    """Tell whether torchvision decodes these bytes as Pillow does, without filling all memory."""
    frame = _read_jpeg_frame(memoryview(raw))
    if frame is None or frame.num_bits != 8 or frame.num_channels not in (1, 3):
        return False
    limit = Image.MAX_IMAGE_PIXELS
    return limit is None or 0 < frame.height * frame.width <= limit


def _read_jpeg_frame(view: memoryview) -> _JpegFrame | None:
    at = 2 if bytes(view[:2]) == b"\xff\xd8" else len(view)
    while at + 10 <= len(view) and view[at] == 0xFF:
        marker = view[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _JPEG_FRAME_MARKERS:
            return _JpegFrame(*struct.unpack_from(">BHHB", view, at + 4))
        else:
            at += 2 + (view[at + 2] << 8 | view[at + 3])
    return None


def _describe_failure(raw: Buffer, error: Exception) -> str:
    view = memoryview(raw)
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "no image format begins like that"  # Pillow's text names a BytesIO by its address
    return f"image: got {len(view)} bytes that begin with {bytes(view[:16])!r}: {reason}"
