"""What may be done to an image before it is packed, where that is asked for."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import numpy as np
from PIL import Image
from typing_extensions import Buffer

from concurrent_dataloader.errors import SampleDecodeError
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.formats.image import decode_image
from concurrent_dataloader.prepare.metadata import Payload

DEFAULT_QUALITY = 95
"""Of the JPEG encoder: the older systems'."""

STEPS = ("Resize", "CenterCrop")
_STEP = re.compile(rf"({'|'.join(STEPS)})\(\s*([1-9]\d*)\s*\)", re.ASCII)


class Step(NamedTuple):
    """A step of those that torchvision calls so."""

    name: str
    size: int
    """Of the shorter side (Resize), or of both (CenterCrop), in pixels."""

    def __str__(self) -> str:
        return f"{self.name}({self.size})"

    def apply(self, image: Image.Image) -> Image.Image:
        """Give a new image; the pixels are torchvision's."""
        if self.name == "Resize":
            return image.resize(_resized(image.size, self.size), Image.Resampling.BILINEAR)
        return image.crop(_cropped(image.size, self.size))

    def move_box(self, box: Box, size: tuple[int, int]) -> Box | None:
        """Give the box relative to the new image; None if nothing of it is left.

        Args:
            box: Relative to the old image.
            size: Width and height of the old image.
        """
        if self.name == "Resize":
            return box
        left, top, right, bottom = _cropped(size, self.size)
        sides = [
            (side * length - start) / (stop - start)
            for side, length, start, stop in zip(
                box, size * 2, (left, top) * 2, (right, bottom) * 2, strict=True
            )
        ]
        x1, y1, x2, y2 = (min(max(side, 0.0), 1.0) for side in sides)
        return Box(x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def parse_steps(texts: Sequence[str]) -> tuple[Step, ...]:
    """Read steps as ``Resize(256)``.

    Raises:
        ValueError: There is no such step.
    """
    steps: list[Step] = []
    for text in texts:
        found = _STEP.fullmatch(text.strip())
        if found is None:
            known = ", ".join(f"{name}(n)" for name in STEPS)
            raise ValueError(f"step: got {text!r}, expected one of {known} with n of 1 or more")
        steps.append(Step(found[1], int(found[2])))
    return tuple(steps)


def _resized(size: tuple[int, int], short: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _cropped(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Give left, top, right, lower; beyond the image, which Pillow fills with black, if smaller."""
    width, height = size
    left, top = _crop_start(width, side), _crop_start(height, side)
    return left, top, left + side, top + side


def _crop_start(length: int, side: int) -> int:
    if length < side:  # as torchvision pads: the smaller half first
        return -((side - length) // 2)
    return round((length - side) / 2.0)


class Prepared(NamedTuple):
    """What is packed of a sample."""

    content: Buffer
    boxes: Sequence[Box]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to each sample; pure, and a value that pickles.

    Raises:
        ValueError: On making it: settings that do not go together, or no such function.
    """

    payload: Payload = "file"
    steps: tuple[Step, ...] = ()
    quality: int | None = None
    """0 to 100; None: `DEFAULT_QUALITY` where images are encoded."""

    function: str | None = None
    """``module:function``: called first with the bytes of each file, gives others."""

    def __post_init__(self) -> None:
        if self.payload not in get_args(Payload):
            raise ValueError(
                f"payload: got {self.payload!r}, expected one of {', '.join(get_args(Payload))}"
            )
        if self.quality is not None and not 0 <= self.quality <= 100:
            raise ValueError(f"quality: got {self.quality}, expected 0 to 100")
        if self.quality is not None and self.payload != "jpeg":
            raise ValueError(
                f"quality: got {self.quality} with payload {self.payload!r}, expected it with"
                " 'jpeg' only, since nothing else is encoded with one"
            )
        if self.steps and self.payload == "file":
            raise ValueError(
                f"steps: got {self.steps[0]} with payload 'file', which keeps files as they are;"
                " expected payload 'jpeg', 'tensor', 'raw' or 'ppm'"
            )
        if self.payload == "raw" and (not self.steps or self.steps[-1].name != "CenterCrop"):
            raise ValueError(
                "payload: got 'raw' without CenterCrop(n) as the last step, expected it, since all"
                " raw images must have one size"
            )
        if self.function is not None:
            self._call  # noqa: B018 - finds it, or raises

    @property
    def encoder_quality(self) -> int | None:
        """What the JPEG encoder is told; None if it does not run."""
        if self.payload != "jpeg":
            return None
        return DEFAULT_QUALITY if self.quality is None else self.quality

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of all images, where they must be known to read them."""
        return (self.steps[-1].size, self.steps[-1].size) if self.payload == "raw" else None

    @property
    def keeps_bytes(self) -> bool:
        """Whether a sample is packed as it is, so that its size is known beforehand."""
        return self.payload == "file" and self.function is None

    def apply(self, raw: Buffer, boxes: Sequence[Box], name: str) -> Prepared:
        """Do what is to be done to a sample.

        Raises:
            SampleDecodeError: It is no image, or the function raised, or gave no bytes.
        """
        if self.function is not None:
            raw = self._run_function(raw, name)
        if self.payload == "file":
            return Prepared(raw, boxes)
        try:
            image = decode_image(raw)
        except SampleDecodeError as error:
            raise SampleDecodeError(f"{name}: {error}") from error
        for step in self.steps:
            moved = [step.move_box(box, image.size) for box in boxes]
            boxes = [box for box in moved if box is not None]
            image = step.apply(image)
        return Prepared(self._encode(image), boxes)

    def _encode(self, image: Image.Image) -> bytes:
        if self.payload == "raw":
            return image.tobytes()
        if self.payload == "tensor":
            return encode_tensor(np.asarray(image).transpose(2, 0, 1))
        file = io.BytesIO()
        if self.payload == "ppm":
            image.save(file, "PPM")
        else:
            image.save(file, "JPEG", quality=self.encoder_quality)
        return file.getvalue()

    def _run_function(self, raw: Buffer, name: str) -> bytes:
        try:
            content = self._call(bytes(raw))
        except Exception as error:
            raise SampleDecodeError(
                f"{name}: {self.function} raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(content, bytes):
            raise SampleDecodeError(
                f"{name}: {self.function} gave {type(content).__name__}, expected bytes"
            )
        return content

    @functools.cached_property
    def _call(self) -> Callable[[bytes], object]:
        module, colon, path = (self.function or "").partition(":")
        if not colon or not module or not path:
            raise ValueError(f"function: got {self.function!r}, expected 'module:function'")
        try:
            return functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"function: got {self.function!r}, which cannot be imported ({error}); expected"
                " 'module:function' on the Python path"
            ) from error

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def encode_tensor(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """Write an array as the file of a ``torch.uint8`` tensor; torch need not be there.

    ``torch.load(..., weights_only=True)`` reads it. The same array gives the same bytes.

    Source: the container of ``torch.save`` since 1.6: a zip of ``data.pkl``, whose storages stand
    in files of their own, here ``data/0``.
    """
    flat = np.ascontiguousarray(values)
    strides = [stride // flat.itemsize for stride in flat.strides]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("data.pkl", _pickle_tensor(flat.size, flat.shape, strides)),
            ("byteorder", b"little"),
            ("data/0", flat.tobytes()),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return file.getvalue()


def _pickle_tensor(size: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    """Pickle a call of ``torch._utils._rebuild_tensor_v2`` without importing torch."""

    def integer(value: int) -> bytes:
        return pickle.LONG1 + b"\x08" + value.to_bytes(8, "little", signed=True)

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()

    def integers(values: Sequence[int]) -> bytes:
        return pickle.MARK + b"".join(map(integer, values)) + pickle.TUPLE

    storage = pickle.MARK + text("storage") + b"ctorch\nByteStorage\n" + text("0") + text("cpu")
    hooks = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = storage + integer(size) + pickle.TUPLE + pickle.BINPERSID + integer(0)
    arguments += integers(shape) + integers(strides) + pickle.NEWFALSE + hooks
    call = b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + arguments + pickle.TUPLE
    return pickle.PROTO + b"\x02" + call + pickle.REDUCE + pickle.STOP
