"""Samples in shards by position: each is a byte range, and near ones travel in one request."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from typing_extensions import Buffer, override

from concurrent_dataloader.boxes import BoxLookup, merge
from concurrent_dataloader.datasets._boxes import as_item
from concurrent_dataloader.datasets._sample_contents import (
    BoxedImage,
    PickedFields,
    SampleContents,
    SampleName,
)
from concurrent_dataloader.datasets._shard_labels import choose_labels, find_space, renumber
from concurrent_dataloader.datasets.baked import Transform, match_baked, skip_baked
from concurrent_dataloader.datasets.contract import BytesKind, SampleLocation
from concurrent_dataloader.datasets.fields import FieldDecoder
from concurrent_dataloader.datasets.indexed import (
    MISSING_LABEL,
    Decode,
    IndexedDataset,
)
from concurrent_dataloader.datasets.labelled import DecodedImage, SampleMetadata
from concurrent_dataloader.errors import ChecksumError, LoaderError
from concurrent_dataloader.formats.crc32c import IS_FAST, check_crc, crc32c
from concurrent_dataloader.formats.fields import (
    IMAGE_FIELDS,
    is_image_field,
    is_label_field,
    split_alternatives,
)
from concurrent_dataloader.index import choose_positions
from concurrent_dataloader.label_rules import LabelRule
from concurrent_dataloader.labels import Classes, LabelSpace
from concurrent_dataloader.ranges import ByteRange, cover, merge_near
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores.base import Store

MAX_GAP_BYTES = 1 << 16
"""Bytes read for nothing rather than asking twice: less than a request costs in bytes at 10 ms."""

MAX_REQUEST_BYTES = 8 << 20
"""Longest read of several samples; as long as a request that is repeated whole may be."""


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
        boxes: BoxLookup | bool = False,
        missing_box: float | None = None,
        baked_steps: Sequence[str] = (),
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
            boxes: Whether items are ``((image, box), label)``, with the box that each sample has
                in its ``json`` member, or its record; as `IndexedDataset` says, and whole samples
                are read then. Or the boxes of all samples of the index, by position.
            missing_box: Each side of the box of an image that has none; as in `IndexedDataset`.
            baked_steps: What was done to the images before they were packed, as
                ``("Resize(256)", "CenterCrop(224)")``. Where the transform begins with just these,
                they are left out of it, and a line is logged: see `baked.skip_baked`.
            max_gap_bytes: Longest gap between two samples that one request reads over.
            max_request_bytes: Longest request for several samples.
            compare_checksums: Whether what was read is compared with the checksums of the index,
                where it has some; some 5 us for 100 kB. By default where the compiled part of
                google-crc32c is installed, which warns of its absence.
            index_name: What errors call the index, such as its file.

        Raises:
            ValueError: An argument cannot be used, or contradicts the index or another one.
            IndexFormatError: The index is empty.
            UnknownClassError: A sample belongs to a class that is not among ``classes``.
        """
        if max_gap_bytes < 0:
            raise ValueError(f"max_gap_bytes: got {max_gap_bytes}, expected 0 or more")
        if max_request_bytes < 1:
            raise ValueError(f"max_request_bytes: got {max_request_bytes}, expected 1 or more")
        if isinstance(fields, str) or (fields is not None and not fields):
            raise ValueError(f"fields: got {fields!r}, expected a tuple such as ('jpg;png', 'cls')")
        if not all(map(split_alternatives, fields or ())):
            raise ValueError(f"fields: got {fields!r}, expected at least one name in each")
        if boxes is not False and fields is not None:
            raise ValueError("boxes: got them together with fields, expected one of the two")
        limited = index.limit(limit, sample_seed)
        chosen = choose_positions(len(index), limit, sample_seed)
        given = None if isinstance(boxes, bool) else boxes
        if given is not None and chosen is not None:
            given = given.select(chosen)
        super().__init__(
            limited.names,
            store,
            transform=transform,
            target_transform=target_transform,
            decode=decode,
            missing_label=missing_label,
            with_metadata=with_metadata,
            boxes=given,
            missing_box=missing_box,
            index_name=index_name,
        )
        self.baked_steps = tuple(baked_steps)
        self.skipped_steps: tuple[str, ...] = ()
        self.set_transform(transform)
        self.shard_index = limited
        self.fields = None if fields is None else tuple(fields)
        self._reads_boxes = boxes is True
        self._reads_samples = fields is not None or self._reads_boxes
        self.max_gap_bytes = max_gap_bytes
        self.max_request_bytes = max_request_bytes
        # Records have CRCs of their own, which decoding compares.
        self._compares = compare_checksums and limited.crcs is not None and index.kind == "tar"
        self._decoder = FieldDecoder(decode, raw_size)
        if classes is None and label_rule is not None:
            classes = Classes.from_keys(index.names.keys(), label_rule=label_rule)
        space = find_space(index, label_space, index_name)
        self.classes, self._labels = choose_labels(
            index, limited, classes, space, by_key=label_rule is not None, where=index_name
        )

    @override
    def set_transform(self, transform: Transform | None) -> None:
        """Replace the transform, less what is baked in. Workers that have started keep the old."""
        self.skipped_steps = match_baked(transform, self.baked_steps).skipped
        self.transform = skip_baked(transform, self.baked_steps)

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
        return index.extent_crc(position) if self._reads_samples else index.payload_crc(position)

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
            else:
                self._fetch_beside(position)
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
            else:
                await self._fetch_beside_async(position)
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
        byte_range = index.extent(position) if self._reads_samples else index.payload(position)
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
            shard, byte_range, self._sample_name(position).key, self._kind_of_bytes(position)
        )

    def _kind_of_bytes(self, position: int) -> BytesKind:
        if not self._decodes_images:
            return "bytes"
        if self.shard_index.kind == "tfrecord":
            return "tfrecord"
        if self._reads_samples:
            return "tar"
        is_file = self._sample_name(position).field.rpartition(".")[2] in IMAGE_FIELDS
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
        if isinstance(content, PickedFields):
            return DecodedImage(content, None, metadata)
        beside = self._find_beside(position)
        if isinstance(content, BoxedImage):
            content, boxes = content
            beside = (as_item(merge(boxes), self._missing_box),)
        return DecodedImage(content, self.label(position), metadata, beside)

    @override
    def apply_transform(self, decoded: DecodedImage) -> Any:
        """Transform images and labels, and make the item of them."""
        content = decoded.image
        if not isinstance(content, PickedFields):
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
        index, name = self.shard_index, self._sample_name(position)
        if index.kind == "tar" and not self._reads_samples:
            return self._decoder.decode_image(name.field, raw)
        # Made anew each time: data sets that were pickled before it was there do not have it.
        contents = SampleContents(self._decoder, self.fields, self._reads_boxes)
        label = None if self._labels is None else self.label(position)
        if index.kind == "tar":
            return contents.decode_tar(name, raw, label)
        return contents.decode_record(name, raw, index.payload(position).start, label)

    def _sample_name(self, position: int) -> SampleName:
        return SampleName.of(self.key(position))

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
            self._labels = renumber(self._labels, source, label_space)
        self.classes = converted


def _hand_out(request: _Request, body: Buffer, parts: list[Buffer]) -> None:
    view = memoryview(body).cast("B")
    for number, part in zip(request.numbers, request.parts, strict=True):
        parts[number] = view[part]
