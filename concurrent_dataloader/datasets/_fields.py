"""What becomes of a sample's fields: which are taken, and what each is decoded to."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import orjson

from concurrent_dataloader.datasets.indexed import Decode
from concurrent_dataloader.errors import LoaderError, SampleDecodeError, ShardFormatError
from concurrent_dataloader.formats.image import DecoderName, check_decoder, decode_image
from concurrent_dataloader.formats.tar import Sample

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "img", "pth")
LABEL_FIELD = "cls"
KEY_FIELD, SHARD_FIELD = "__key__", "__shard__"
DEFAULT_FIELDS = (";".join(IMAGE_FIELDS), LABEL_FIELD)

Fields = str | Sequence[str] | Mapping[str, str]
"""One field, a tuple of fields, or a dictionary of them by name. A field is alternatives with
semicolons between, of which the first that a sample has is taken; ``__key__`` is the sample's key,
``__shard__`` its shard."""

_NAMES = (KEY_FIELD, SHARD_FIELD)
_RAW_SIDE = 256
_RAW_BYTES = _RAW_SIDE * _RAW_SIDE * 3


class _Field(NamedTuple):
    name: str | None
    alternatives: tuple[str, ...]


class FieldReader:
    """Makes an item of a sample's bytes. Pickles if its functions do."""

    def __init__(
        self,
        fields: Fields,
        *,
        decode: Decode,
        decoders: Mapping[str, Callable[[bytes], Any]],
        label_base: int,
        transform: Callable[[Any], Any] | None,
        target_transform: Callable[[int], Any] | None,
    ) -> None:
        """Choose fields and their decoders; arguments as of `StreamedShards`.

        Raises:
            ValueError: There is no field, or no such decoder.
            TypeError: ``decode`` is no decoder.
        """
        self._is_single = isinstance(fields, str)
        self._is_mapping = isinstance(fields, Mapping)
        if isinstance(fields, str):
            named: list[tuple[str | None, str]] = [(None, fields)]
        elif isinstance(fields, Mapping):
            named = list(fields.items())
        else:
            named = [(None, field) for field in fields]
        self._fields = [
            _Field(name, tuple(part.strip().lower() for part in text.split(";") if part.strip()))
            for name, text in named
        ]
        if not self._fields or not all(field.alternatives for field in self._fields):
            raise ValueError(f"fields: got {fields!r}, expected at least one name in each")
        self._decoders = dict(decoders)
        self._decode_image = _choose_image_decoder(decode)
        self._decode = decode
        self._label_base = label_base
        self.transform = transform
        self.target_transform = target_transform

    def is_whole(self, sample: Sample, label: int | None) -> bool:
        """Tell whether a sample has all fields."""
        return all(_find(field, sample, label) is not None for field in self._fields)

    def read(self, sample: Sample, label: int | None, where: str) -> Any:
        """Decode and transform the fields of a sample; draws as the transforms do.

        Args:
            sample: Its bytes.
            label: What the index says; None: the sample says it.
            where: What errors call its shard.

        Raises:
            ShardFormatError: It lacks a field.
            SampleDecodeError: A field is not what its name says.
        """
        values: list[Any] = []
        for field in self._fields:
            name = _find(field, sample, label)
            if name is None:
                raise ShardFormatError(
                    f"{where}: sample {sample.key!r} has no field "
                    f"{' or '.join(map(repr, field.alternatives))}, got "
                    f"{', '.join(map(repr, sample.fields))}; name other fields, or let samples be "
                    "left out by missing='skip'"
                )
            values.append(self._read_field(name, sample, label, where))
        if self._is_mapping:
            return {field.name: value for field, value in zip(self._fields, values, strict=True)}
        return values[0] if self._is_single else tuple(values)

    def _read_field(self, name: str, sample: Sample, label: int | None, where: str) -> Any:
        if name in _NAMES:
            return sample.key if name == KEY_FIELD else where
        try:
            if name == LABEL_FIELD and name not in self._decoders:
                if label is None:
                    label = _parse_label(sample.fields[name], self._label_base)
                return label if self.target_transform is None else self.target_transform(label)
            raw = sample.fields[name]
            if name in self._decoders:
                return self._decoders[name](raw)
            if name in IMAGE_FIELDS:
                image = self._read_image(name, raw)
                return image if self.transform is None else self.transform(image)
            if name == "json":
                return _parse_json(raw)
            return raw.decode("utf-8") if name in ("txt", "text") else raw
        except LoaderError as error:
            raise type(error)(f"{where}: sample {sample.key!r}, field {name!r}: {error}") from error
        except Exception as error:
            error.add_note(f"{where}: sample {sample.key!r}, field {name!r}")
            raise

    def _read_image(self, name: str, raw: bytes) -> Any:
        if self._decode is None or callable(self._decode):
            return self._decode_image(raw)
        if name == "pth":
            return _load_tensor(raw)
        if name == "img" and len(raw) == _RAW_BYTES:
            return _read_pixels(raw, self._decode)
        return self._decode_image(raw)


def _find(field: _Field, sample: Sample, label: int | None) -> str | None:
    """Choose among the alternatives of a field the first that a sample has."""
    for name in field.alternatives:
        if name in sample.fields or name in _NAMES or (name == LABEL_FIELD and label is not None):
            return name
    return None


def _choose_image_decoder(decode: Decode) -> Callable[[bytes], Any]:
    if decode is None:
        return bytes
    if isinstance(decode, str):
        check_decoder(decode)
        return functools.partial(decode_image, decoder=cast(DecoderName, decode))
    if callable(decode):
        return decode
    raise TypeError(f"decode: got {decode!r}, expected a decoder's name, a function or None")


def _parse_label(raw: bytes, label_base: int) -> int:
    text = raw.strip()
    if not text.isdigit():
        raise SampleDecodeError(f"class: got {text[:40]!r}, expected a decimal number")
    label = int(text) - label_base
    if label < 0:
        raise SampleDecodeError(
            f"class: got {int(text)}, expected {label_base} or more, since label_base={label_base}"
        )
    return label


def _parse_json(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise SampleDecodeError(f"JSON: {error}; got {raw[:40]!r}") from error


def _read_pixels(raw: bytes, decoder: str) -> Any:
    """Read 256 x 256 pixels without a header, unless they are an image file of just that size."""
    import numpy as np
    from PIL import Image

    try:
        return decode_image(raw, cast(DecoderName, decoder))
    except SampleDecodeError:
        image = Image.frombytes("RGB", (_RAW_SIDE, _RAW_SIDE), raw)
    if decoder == "pillow":
        return image
    import torch

    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def _load_tensor(raw: bytes) -> Any:
    """Load a tensor that ``torch.save`` wrote; nothing else is unpickled."""
    import torch

    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SampleDecodeError(f"tensor: {reason}") from error
