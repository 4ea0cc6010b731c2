"""What becomes of a sample's fields: which are taken, and what items are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from concurrent_dataloader.datasets.fields import FieldDecoder
from concurrent_dataloader.datasets.indexed import Decode
from concurrent_dataloader.errors import LoaderError, SampleDecodeError, ShardFormatError
from concurrent_dataloader.formats.fields import (
    IMAGE_FIELDS,
    LABEL_FIELD,
    RAW_FIELDS,
    TENSOR_FIELD,
    find_field,
    is_image_field,
    is_label_field,
    read_label,
    split_alternatives,
)
from concurrent_dataloader.formats.tar import Sample

KEY_FIELD, SHARD_FIELD = "__key__", "__shard__"
DEFAULT_FIELDS = (";".join((*IMAGE_FIELDS, *RAW_FIELDS, TENSOR_FIELD)), LABEL_FIELD)

Fields = str | Sequence[str] | Mapping[str, str]
"""One field, a tuple of fields, or a dictionary of them by name. A field is alternatives with
semicolons between, of which the first that a sample has is taken; ``__key__`` is the sample's key,
``__shard__`` its shard. Of a field such as ``v2.jpg``, of a name with dots, the last part counts
where no other fits."""

_NAMES = (KEY_FIELD, SHARD_FIELD)


class _Field(NamedTuple):
    name: str | None
    alternatives: tuple[str, ...]


class ItemMaker:
    """Makes an item of a sample's bytes. Pickles if its functions do."""

    def __init__(
        self,
        fields: Fields,
        *,
        decode: Decode,
        raw_size: tuple[int, int] | None,
        decoders: Mapping[str, Callable[[bytes], Any]],
        label_base: int,
        transform: Callable[[Any], Any] | None,
        target_transform: Callable[[int], Any] | None,
    ) -> None:
        """Choose fields and their decoders; arguments as of `StreamedShards`.

        Raises:
            ValueError: There is no field, no such decoder, or no such size.
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
        self._fields = [_Field(name, split_alternatives(text)) for name, text in named]
        if not self._fields or not all(field.alternatives for field in self._fields):
            raise ValueError(f"fields: got {fields!r}, expected at least one name in each")
        self._decoders = dict(decoders)
        self.decodes_images = decode in ("pillow", "torchvision") and not decoders
        """Whether image fields are read as images are stored, and all else as its name says."""
        self._decoder = FieldDecoder(decode, raw_size)
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
            if is_label_field(name) and name not in self._decoders:
                if label is None:
                    label = self._read_label(sample.fields[name])
                return label if self.target_transform is None else self.target_transform(label)
            raw = sample.fields[name]
            if name in self._decoders:
                return self._decoders[name](raw)
            value = self._decoder.decode(name, raw)
            if self.transform is not None and is_image_field(name):
                return self.transform(value)
            return value
        except LoaderError as error:
            raise type(error)(f"{where}: sample {sample.key!r}, field {name!r}: {error}") from error
        except Exception as error:
            error.add_note(f"{where}: sample {sample.key!r}, field {name!r}")
            raise

    def _read_label(self, raw: bytes) -> int:
        label = read_label(raw)
        if label < self._label_base:
            raise SampleDecodeError(
                f"class: got {label}, expected {self._label_base} or more, as label_base says"
            )
        return label - self._label_base


def _find(field: _Field, sample: Sample, label: int | None) -> str | None:
    """Choose among the alternatives of a field the first that a sample has."""
    for name in field.alternatives:
        if name in sample.fields or name in _NAMES or (name == LABEL_FIELD and label is not None):
            return name
    return find_field(";".join(field.alternatives), sample.fields)
