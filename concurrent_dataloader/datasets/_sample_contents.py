"""What becomes of the bytes of a sample of a shard: an image, its boxes, or some of its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from typing_extensions import Buffer

from concurrent_dataloader.boxes import parse_boxes
from concurrent_dataloader.datasets.fields import FieldDecoder
from concurrent_dataloader.errors import SampleDecodeError, ShardFormatError
from concurrent_dataloader.formats.example import parse_example
from concurrent_dataloader.formats.fields import LABEL_FIELD, Box, find_field, is_label_field
from concurrent_dataloader.formats.tar import parse_sample, split_name
from concurrent_dataloader.formats.tfrecord import parse_image_example, parse_record


class SampleName(NamedTuple):
    """A sample's name in the index, parted."""

    key: str

    field: str
    """That of the payload; empty where the name has none."""

    @classmethod
    def of(cls, name: str) -> SampleName:
        """Part a name; one without a field is a key."""
        parts = split_name(name)
        return cls(name, "") if parts is None else cls(*parts)


class PickedFields(NamedTuple):
    """Decoded fields of a sample, and which transform each takes."""

    names: tuple[str, ...]
    values: tuple[Any, ...]


class BoxedImage(NamedTuple):
    """A decoded image, and the boxes that its sample holds."""

    image: Any
    boxes: tuple[Box, ...]


class SampleContents(NamedTuple):
    """What is wanted of samples. Pure: the same bytes give the same."""

    decoder: FieldDecoder

    fields: tuple[str, ...] | None
    """Each with its alternatives; None: the image."""

    has_boxes: bool
    """Whether the boxes come with the image."""

    def decode_tar(
        self, name: SampleName, raw: Buffer, label: int | None
    ) -> PickedFields | BoxedImage:
        """Decode the fields, or the image and its boxes, of a whole sample of a tar.

        Args:
            name: As the index has it.
            raw: Of its members, with their headers.
            label: What the index says; None: ``cls`` is what the sample says.

        Raises:
            SampleDecodeError: A field is not what its name says, or none is there.
            ShardFormatError: It is no sample, or not the one of the index.
        """
        contents = parse_sample(raw, "sample").fields
        if not self.has_boxes:
            return self._pick(name, contents, self.decoder.decode, label)
        if name.field not in contents:
            raise ShardFormatError(
                f"sample {name.key!r}: no field {name.field!r}, it has "
                f"{', '.join(sorted(contents))}; the index is that of other shards, write it anew"
            )
        held = find_field("json", contents)
        boxes = () if held is None else parse_boxes(contents[held], f"field {held!r}")
        return BoxedImage(self.decoder.decode_image(name.field, contents[name.field]), boxes)

    def decode_record(self, name: SampleName, raw: Buffer, start: int, label: int | None) -> Any:
        """Decode the image, that and its boxes, or the fields of a record of a TFRecord file.

        Args:
            name: As the index has it.
            raw: The record.
            start: Where it begins in the file, for errors.
            label: As of `decode_tar`.

        Raises:
            SampleDecodeError: A field is not what its name says, or none is there.
            ShardFormatError: It is no record, or a CRC does not fit.
        """
        payload = parse_record(raw, "record", start=start)
        # The label is that of the index; what the record counts from matters to who made it only.
        example = parse_image_example(payload, label_base=0, num_classes=None)
        image = example.encoded
        if self.fields is None:
            decoded = self.decoder.decode_image(name.field, image)
            return BoxedImage(decoded, example.boxes) if self.has_boxes else decoded
        contents: dict[str, Any] = dict(parse_example(payload))
        contents |= dict.fromkeys((name.field, "jpg", "jpeg", "png", "img"), image)

        def decode_field(field: str, content: Any) -> Any:
            return content if "/" in field else self.decoder.decode(field, content)

        return self._pick(name, contents, decode_field, label)

    def _pick(
        self,
        sample: SampleName,
        contents: Mapping[str, Any],
        decode: Callable[[str, Any], Any],
        label: int | None,
    ) -> PickedFields:
        names: list[str] = []
        values: list[Any] = []
        present = set(contents) if label is None else {*contents, LABEL_FIELD}
        for wanted in self.fields or ():
            name = find_field(wanted, present)
            if name is None:
                raise SampleDecodeError(
                    f"sample {sample.key!r}: no field {wanted!r}, it has "
                    f"{', '.join(sorted(present))}; ask for one of these"
                )
            names.append(name)
            if is_label_field(name) and label is not None:
                values.append(label)
            else:
                values.append(decode(name, contents[name]))
        return PickedFields(tuple(names), tuple(values))
