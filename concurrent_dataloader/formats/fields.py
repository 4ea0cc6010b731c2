"""Fields of packed samples: what their names say; how labels, JSON and boxes are written.

Names are as `tar.split_name` gives them: what follows the first dot, in lower case. Of a name with
more dots, ``ü.1.jpg``, the field is ``1.jpg``, and its last part says what it is, as to the
webdataset package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson
from typing_extensions import Buffer

from concurrent_dataloader.errors import SampleDecodeError

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "img", "pgm", "tif", "tiff")
"""Image files. ``img`` may be of any format."""

RAW_FIELDS = ("rgb", "raw")
"""Pixels alone: height x width x 3 bytes, without a header."""

ANY_FIELD = "img"
"""An image file of any format, or pixels alone, which a size tells: see `ANY_FIELD_SIZE`."""

ANY_FIELD_SIZE = (256, 256)
"""Height and width of pixels in ``img`` fields where nothing says another one: an older system's
converter calls them so."""

TENSOR_FIELD = "pth"
"""A uint8 tensor as ``torch.save`` writes it."""

LABEL_FIELD = "cls"
"""An ASCII decimal."""

MAX_LABEL = 2**63 - 1
"""The largest that a tensor of integers holds."""


class Box(NamedTuple):
    """A bounding box, relative to the image: 0 is its left or upper side, 1 the other."""

    x1: float
    y1: float
    x2: float
    y2: float


def split_alternatives(wanted: str) -> tuple[str, ...]:
    """Give the names in ``"jpg; png"``, in lower case and without spaces; none where it has none.

    They are in the order in which they are to be tried.
    """
    return tuple(name for part in wanted.lower().split(";") if (name := part.strip()))


def find_field(wanted: str, fields: Iterable[str]) -> str | None:
    """Give the first of the alternatives ``"jpg;png;jpeg"`` that is present, or None.

    Where none is, the one field counts whose last part is among them, such as ``v2.jpg`` of a name
    with dots; of several, none does, since they are several samples of which only that is known.
    """
    present, alternatives = list(fields), split_alternatives(wanted)
    exact = next((name for name in alternatives if name in present), None)
    if exact is not None:
        return exact
    fitting = [name for name in present if name.rpartition(".")[2] in alternatives]
    return fitting[0] if len(fitting) == 1 else None


def find_label_field(fields: Iterable[str]) -> str | None:
    """Tell which field of a sample is its class: ``cls``, or the one that ends so; None: none.

    Raises:
        SampleDecodeError: Several end so.
    """
    present = list(fields)
    field = find_field(LABEL_FIELD, present)
    several = [] if field else [name for name in present if is_label_field(name)]
    if several:
        raise SampleDecodeError(
            f"cls: got {' and '.join(several)}, expected one; names of samples end at their first "
            "dot: write the shards anew without dots in them"
        )
    return field


def is_label_field(field: str) -> bool:
    """Tell whether a field holds a class."""
    return field.rpartition(".")[2] == LABEL_FIELD


def find_payload_field(fields: Sequence[str]) -> str | None:
    """Tell which field of a sample is its image, or else its content; None if it has but labels."""
    for name in (*IMAGE_FIELDS, *RAW_FIELDS, TENSOR_FIELD):
        if name in fields:
            return name
    last_parts = {field.rpartition(".")[2]: field for field in reversed(fields)}
    images = [last_parts[name] for name in IMAGE_FIELDS if name in last_parts]
    others = [field for field in fields if field not in (LABEL_FIELD, "json", "txt")]
    return next(iter([*images, *others]), None)


def is_image_field(field: str) -> bool:
    """Tell whether a field becomes an image, to which ``transform`` applies."""
    return field.rpartition(".")[2] in (*IMAGE_FIELDS, *RAW_FIELDS, TENSOR_FIELD)


def read_label(content: Buffer) -> int:
    """Read a ``cls`` field.

    Raises:
        SampleDecodeError: It is no decimal from 0 to `MAX_LABEL`.
    """
    text = bytes(content).strip()
    if not text.isdigit():
        raise SampleDecodeError(f"cls: got {text[:20]!r}, expected a decimal such as b'17'")
    digits = text.lstrip(b"0")
    # Looked at first, since `int` refuses to read more than 4,300 digits.
    if len(digits) > len(str(MAX_LABEL)) or int(digits or b"0") > MAX_LABEL:
        raise SampleDecodeError(
            f"cls: got a number of {len(digits)} digits, {digits[:20].decode()}..., expected one "
            f"from 0 to {MAX_LABEL}; number the classes from 0 on"
        )
    return int(digits or b"0")


def read_json(content: Buffer) -> Any:
    """Read a ``json`` field.

    Raises:
        SampleDecodeError: It is no JSON.
    """
    try:
        return orjson.loads(bytes(content))
    except orjson.JSONDecodeError as error:
        raise SampleDecodeError(f"json: {error}, expected JSON") from error
