"""Samples in shards by position: each is a byte range, and near ones travel in one request."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from concurrent_dataloader.datasets._metadata import name_classes
from concurrent_dataloader.datasets.contract import BytesKind, SampleLocation
from concurrent_dataloader.datasets.fields import FieldDecoder
from concurrent_dataloader.datasets.indexed import (
    MISSING_LABEL,
    Decode,
    IndexedDataset,
)
from concurrent_dataloader.datasets.labelled import DecodedImage, SampleMetadata
from concurrent_dataloader.errors import (
    ChecksumError,
    LoaderError,
    MissingDependencyError,
    SampleDecodeError,
    UnknownClassError,
)
from concurrent_dataloader.formats.crc32c import IS_FAST, check_crc, crc32c
from concurrent_dataloader.formats.fields import (
    IMAGE_FIELDS,
    LABEL_FIELD,
    find_field,
    is_image_field,
    is_label_field,
)
from concurrent_dataloader.formats.tar import parse_sample, split_name
from concurrent_dataloader.labels import Classes, LabelRule, LabelSpace, convert_ids
from concurrent_dataloader.ranges import ByteRange, cover, merge_near
from concurrent_dataloader.shard_index import NO_LABEL, ShardIndex
from concurrent_dataloader.stores.base import Store

MAX_GAP_BYTES = 1 << 16
"""Bytes read for nothing rather than asking twice: less than a request costs in bytes at 10 ms."""

MAX_REQUEST_BYTES = 8 << 20
"""Longest read of several samples; as long as a request that is repeated whole may be."""


class _Fields(NamedTuple):
    """Decoded fields of a sample, and which transform each takes."""

    names: tuple[str, ...]
    values: tuple[Any, ...]


class _Request(NamedTuple):
    """One read for several samples of a shard."""

    key: str
    byte_range: ByteRange
    numbers: list[int]
    parts: list[slice]


class ShardDataset(IndexedDataset):
    """A map-style dataset over the samples of tar or TFRecord shards; items as of single files.

    It knows each sample's byte range from a `ShardIndex`, so that any order costs the same. Where
    samples that are begun together lie near each other in one shard, as when reading in order, one
    request brings them all (`plan_requests`, `fetch_many`).
    """

    _keys_are_paths = False

    def __init__(
        self,
        index: ShardIndex,
        store: Store,
        classes: Classes | None = None,
        *,
        fields: Sequence[str] | None = None,
        limit: int | None = None,
        sample_seed: int | None = None,
        label_rule: LabelRule | None = None,
        label_space: LabelSpace | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        decode: Decode = "pillow",
        raw_size: tuple[int, int] | None = None,
        missing_label: int | None = MISSING_LABEL,
        with_metadata: bool = False,
        max_gap_bytes: int = MAX_GAP_BYTES,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        compare_checksums: bool = IS_FAST,
        index_name: str = "the index of shards",
    ) -> None:
        """Join an index of shards and the store that holds them.

        Args:
            index: Which samples exist, in which bytes of which shard.
            store: Where the shards are.
            classes: Those of another split, so that both have the same labels. Where the index has
                labels and knows its classes by name, names are matched; where it has no labels,
                the keys tell.
            fields: Which fields make an item, such as ``("jpg;png;jpeg", "cls", "json")``: of
                alternatives the first that is present. ``cls`` is the label where the index has
                one. Whole samples are read then. None: items are ``(image, label)``.
            limit: Number of samples; the first ones, or a sample by ``sample_seed``.
            sample_seed: Draws the limited samples from the whole index.
            label_rule: How a key names its class, instead of the labels of the index.
            label_space: What the labels of the index mean, where it does not say.
            transform: Of images, as in `IndexedDataset`; may be random.
            target_transform: Of labels.
            decode: As in `IndexedDataset`. Tensors (``pth``) and raw pixels become what images do;
                with None, every field stays bytes.
            raw_size: Height and width of images without a header (``rgb``, ``raw``, and ``img``
                of just so many bytes); None: they are squares, of ``img`` 256 x 256.
            missing_label: The label where there is none; when None, items are then images alone.
            with_metadata: Whether items have a `SampleMetadata` as last element, with shard and
                byte range.
            max_gap_bytes: Longest gap between two samples that one request reads over.
            max_request_bytes: Longest request for several samples.
            compare_checksums: Whether what was read is compared with the checksums of the index,
                where it has some; some 5 us for 100 kB. By default where the compiled part of
                google-crc32c is installed, which warns of its absence.
            index_name: What errors call the index, such as its file.

        Raises:
            ValueError: An argument cannot be used, or contradicts the index.
            IndexFormatError: The index is empty.
            UnknownClassError: A sample belongs to a class that is not among ``classes``.
        """
        if max_gap_bytes < 0:
            raise ValueError(f"max_gap_bytes: got {max_gap_bytes}, expected 0 or more")
        if max_request_bytes < 1:
            raise ValueError(f"max_request_bytes: got {max_request_bytes}, expected 1 or more")
        if index.kind == "tfrecord":
            _import_tfrecord()
        if isinstance(fields, str) or (fields is not None and not fields):
            raise ValueError(f"fields: got {fields!r}, expected a tuple such as ('jpg;png', 'cls')")
        limited = index.limit(limit, sample_seed)
        super().__init__(
            limited.names,
            store,
            transform=transform,
            target_transform=target_transform,
            decode=decode,
            missing_label=missing_label,
            with_metadata=with_metadata,
            index_name=index_name,
        )
        self.shard_index = limited
        self.fields = None if fields is None else tuple(fields)
        self.max_gap_bytes = max_gap_bytes
        self.max_request_bytes = max_request_bytes
        # Records have CRCs of their own, which decoding compares.
        self._compares = compare_checksums and limited.crcs is not None and index.kind == "tar"
        self._decoder = FieldDecoder(decode, raw_size)
        space = _find_space(index, label_space, index_name)
        if classes is None and label_rule is not None:
            classes = Classes.from_keys(index.names.keys(), label_rule=label_rule)
        if classes is not None:
            self.classes, by_key = classes, label_rule is not None
            self._labels = _match_labels(limited, classes, space, by_key=by_key, where=index_name)
        else:
            self.classes = _name_classes(index, space)
            self._labels = limited.labels

    # -- requests

    @override
    def fetch(self, position: int) -> Buffer:
        """Read the raw bytes of the sample at ``position``, and compare them with its checksum.

        Bytes that do not fit it are read once more.

        Raises:
            ChecksumError: They do not fit it again: the shard, or what lies between, is damaged.
            StoreError: The store does not give them.
        """
        raw = super().fetch(position)
        if self._is_changed(position, raw):
            raw = super().fetch(position)
            self._refuse_changed(position, raw)
        return raw

    @override
    async def fetch_async(self, position: int) -> Buffer:
        """Read as `fetch` does, without blocking the event loop."""
        raw = await super().fetch_async(position)
        if self._is_changed(position, raw):
            raw = await super().fetch_async(position)
            self._refuse_changed(position, raw)
        return raw

    def _expected_crc(self, position: int) -> int | None:
        if not self._compares:
            return None
        index = self.shard_index
        return index.payload_crc(position) if self.fields is None else index.extent_crc(position)

    def _is_changed(self, position: int, raw: Buffer) -> bool:
        expected = self._expected_crc(position)
        return expected is not None and crc32c(raw) != expected

    def _refuse_changed(self, position: int, raw: Buffer) -> None:
        expected = self._expected_crc(position)
        assert expected is not None, "only what has a checksum is changed"
        try:
            check_crc(raw, expected, self._source(position), self._index_name)
        except ChecksumError as error:
            raise self._explain(error, position) from error

    @override
    def plan_requests(self, positions: Sequence[int]) -> list[list[int]]:
        """Put samples that lie near each other in one shard together, as `merge_near` does. Pure.

        Returns:
            Groups of indices into ``positions``, in the order of their first members.
        """
        located = [self._locate(position) for position in positions]
        by_shard: dict[str, list[int]] = collections.defaultdict(list)
        for number, (key, _) in enumerate(located):
            by_shard[key].append(number)
        groups: list[list[int]] = []
        for numbers in by_shard.values():
            merged = merge_near(
                [located[number][1] for number in numbers],
                max_gap_bytes=self.max_gap_bytes,
                max_length_bytes=self.max_request_bytes,
            )
            groups.extend([numbers[place] for place in group] for group in merged)
        return sorted(groups)

    @override
    def fetch_many(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read the samples of a group by one request, in the order given.

        Positions that are no group of `plan_requests` cost a request for each group among them.
        The parts share memory. One that does not fit its checksum is read again, by itself.

        Raises:
            ChecksumError: As `fetch`.
            StoreError: The store does not give them.
        """
        parts: list[Buffer] = [b""] * len(positions)
        for request in self._requests(positions):
            try:
                body = self.store.get(request.key, request.byte_range)
            except LoaderError as error:
                raise self._explain(error, positions[request.numbers[0]]) from error
            _hand_out(request, body, parts)
        for number, position in enumerate(positions):
            if self._is_changed(position, parts[number]):
                parts[number] = self.fetch(position)
        return parts

    @override
    async def fetch_many_async(self, positions: Sequence[int]) -> Sequence[Buffer]:
        """Read as `fetch_many` does, without blocking the event loop."""
        parts: list[Buffer] = [b""] * len(positions)
        for request in self._requests(positions):
            try:
                body = await self.store.get_async(request.key, request.byte_range)
            except LoaderError as error:
                raise self._explain(error, positions[request.numbers[0]]) from error
            _hand_out(request, body, parts)
        for number, position in enumerate(positions):
            if self._is_changed(position, parts[number]):
                parts[number] = await self.fetch_async(position)
        return parts

    def _requests(self, positions: Sequence[int]) -> list[_Request]:
        requests: list[_Request] = []
        for numbers in self.plan_requests(positions):
            located = [self._locate(positions[number]) for number in numbers]
            whole = cover([byte_range for _, byte_range in located])
            parts = [slice(start - whole.start, stop - whole.start) for _, (start, stop) in located]
            requests.append(_Request(located[0][0], whole, numbers, parts))
        return requests

    @override
    def _locate(self, position: int) -> tuple[str, ByteRange]:
        """Give the shard's key, and the bytes to read of it."""
        index = self.shard_index
        byte_range = index.payload(position) if self.fields is None else index.extent(position)
        return index.shard_of(position).name, byte_range

    @override
    def size_bytes(self, position: int) -> int:
        """Give the size of what is fetched for a sample."""
        _, (start, stop) = self._locate(position)
        return stop - start

    @override
    def metadata(self, position: int) -> SampleMetadata:
        """Say where the sample at ``position`` is, without asking the store."""
        shard, (start, stop) = self._locate(position)
        source = self.store.describe(shard)
        return SampleMetadata(self.key(position), stop - start, source, shard, start, stop)

    @override
    def locate_sample(self, position: int) -> SampleLocation:
        """Say in which bytes of which shard the sample lies, without asking the store."""
        shard, byte_range = self._locate(position)
        return SampleLocation(
            shard, byte_range, self._sample_key(position), self._kind_of_bytes(position)
        )

    def _kind_of_bytes(self, position: int) -> BytesKind:
        if not self._decodes_images:
            return "bytes"
        if self.shard_index.kind == "tfrecord":
            return "tfrecord"
        if self.fields is not None:
            return "tar"
        is_file = self._payload_field(position).rpartition(".")[2] in IMAGE_FIELDS
        return "payload" if is_file else "bytes"

    # -- decoding

    @override
    def decode(self, position: int, raw: Buffer) -> DecodedImage:
        """Decode an image, or the fields asked for, and look up the label.

        Raises:
            SampleDecodeError: Bytes are not what their field's name says.
            ShardFormatError: They are no sample, or a record's CRC does not fit: the shard is
                damaged, or the index is another's.
        """
        metadata = self.metadata(position) if self._with_metadata else None
        content = self._decode_image(position, raw)
        label = None if isinstance(content, _Fields) else self.label(position)
        return DecodedImage(content, label, metadata)

    @override
    def apply_transform(self, decoded: DecodedImage) -> Any:
        """Transform images and labels, and make the item of them."""
        content = decoded.image
        if not isinstance(content, _Fields):
            return super().apply_transform(decoded)
        item = tuple(map(self._transform_field, content.names, content.values))
        return item if decoded.metadata is None else (*item, decoded.metadata)

    def _transform_field(self, name: str, value: Any) -> Any:
        if is_label_field(name):
            return value if self.target_transform is None else self.target_transform(value)
        if is_image_field(name) and self.transform is not None:
            return self.transform(value)
        return value

    @override
    def _decode_content(self, position: int, raw: Buffer) -> Any:
        if self.shard_index.kind == "tfrecord":
            return self._decode_record(position, raw)
        if self.fields is None:
            return self._decoder.decode_image(self._payload_field(position), raw)
        return self._pick(position, parse_sample(raw, "sample").fields, self._decoder.decode)

    def _decode_record(self, position: int, raw: Buffer) -> Any:
        tfrecord = _import_tfrecord()
        payload = tfrecord.parse_record(
            raw, "record", start=self.shard_index.payload(position).start
        )
        field = self._payload_field(position)
        # The label is that of the index; what the record counts from matters to who made it only.
        example = tfrecord.parse_image_example(payload, label_base=0, num_classes=None)
        image = example.encoded
        if self.fields is None:
            return self._decoder.decode_image(field, image)
        contents: dict[str, Any] = dict(tfrecord.parse_example(payload))
        contents |= dict.fromkeys((field, "jpg", "jpeg", "png", "img"), image)
        if self._labels is not None:
            contents[LABEL_FIELD] = b""  # `_pick` takes the label of the index

        def decode_field(name: str, content: Any) -> Any:
            return content if "/" in name else self._decoder.decode(name, content)

        return self._pick(position, contents, decode_field)

    def _pick(
        self, position: int, contents: dict[str, Any], decode: Callable[[str, Any], Any]
    ) -> _Fields:
        names: list[str] = []
        values: list[Any] = []
        for wanted in self.fields or ():
            name = find_field(wanted, contents)
            if name is None:
                raise SampleDecodeError(
                    f"sample {self._sample_key(position)!r}: no field {wanted!r}, it has "
                    f"{', '.join(sorted(contents))}; ask for one of these"
                )
            names.append(name)
            if is_label_field(name) and self._labels is not None:
                values.append(self.label(position))
            else:
                values.append(decode(name, contents[name]))
        return _Fields(tuple(names), tuple(values))

    def _payload_field(self, position: int) -> str:
        parts = split_name(self.key(position))
        return "" if parts is None else parts[1]

    def _sample_key(self, position: int) -> str:
        name = self.key(position)
        parts = split_name(name)
        return name if parts is None else parts[0]

    @override
    def _source(self, position: int) -> str:
        shard, (start, stop) = self._locate(position)
        return f"{self.store.describe(shard)} [{start}, {stop}) {self.key(position)!r}"

    # -- labels

    @override
    def convert_labels(self, label_space: LabelSpace) -> None:
        """Number ImageNet's classes as in another label space, such as torchvision's weights do.

        Raises:
            ValueError: There are no classes, or they are not known to be ImageNet's.
        """
        if self.classes is None:
            raise ValueError(f"{self._index_name}: no classes, expected ImageNet's to convert them")
        source = self.classes.label_space
        converted = self.classes.converted(label_space)
        if self._labels is not None:
            self._labels = _convert(self._labels, source, label_space)
        self.classes = converted


def _import_tfrecord() -> ModuleType:
    try:
        from concurrent_dataloader.formats import tfrecord
    except ImportError as error:
        raise MissingDependencyError(
            f"TFRecord: {error}; install it with `pip install google-crc32c`"
        ) from error
    return tfrecord


def _hand_out(request: _Request, body: Buffer, parts: list[Buffer]) -> None:
    view = memoryview(body).cast("B")
    for number, part in zip(request.numbers, request.parts, strict=True):
        parts[number] = view[part]


def _find_space(index: ShardIndex, declared: LabelSpace | None, where: str) -> LabelSpace:
    known = None if index.label_space is None else LabelSpace(index.label_space)
    if declared is not None and known is not None and declared is not known:
        raise ValueError(
            f"label_space: got {declared.value!r}, but {where} says {known.value!r}; leave it out, "
            "and convert_labels() later"
        )
    return declared or known or LabelSpace.CUSTOM


def _name_classes(index: ShardIndex, space: LabelSpace) -> Classes | None:
    """Make classes of what an index says of its labels."""
    labels = index.labels
    if labels is None:
        return None
    return name_classes(index.classes, space, int(labels.max()) + 1)


def _match_labels(
    index: ShardIndex, classes: Classes, space: LabelSpace, *, by_key: bool, where: str
) -> NDArray[np.int32]:
    """Give labels as ``classes`` counts them."""
    labels = index.labels
    if by_key or labels is None:
        return classes.labels_of(index.names.keys())
    if index.classes is not None:
        try:
            return _match_names(labels, index.classes, classes)
        except UnknownClassError:
            if classes.label_rule == "parent":
                raise
            return classes.labels_of(index.names.keys())  # known by number, or file name
    matched = labels
    if LabelSpace.CUSTOM not in (space, classes.label_space):
        matched = _convert(labels, space, classes.label_space)
    if int(matched.max()) >= classes.count:
        raise UnknownClassError(
            f"{where}: got label {int(matched.max())}, expected less than the {classes.count} of "
            "the classes given; give those of this data set"
        )
    return matched


def _match_names(
    labels: NDArray[np.int32], names: Sequence[str], classes: Classes
) -> NDArray[np.int32]:
    table = np.full(len(names) + 1, NO_LABEL, np.int32)  # the last is that of NO_LABEL
    for label in np.unique(labels[labels != NO_LABEL]).tolist():
        # Classes are known by the folder of their samples.
        table[label] = classes.label_of(f"{names[label]}/*")
    return table[labels]


def _convert(
    labels: NDArray[np.int32], source: LabelSpace, target: LabelSpace
) -> NDArray[np.int32]:
    if source is target:
        return labels
    converted = labels.copy()
    is_known = labels != NO_LABEL
    ids = convert_ids(labels[is_known] + source.first_id, source, target)
    converted[is_known] = ids - target.first_id
    return converted
