"""Samples that an index names and a store holds: one object each."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from concurrent_dataloader.boxes import BoxLookup, merge
from concurrent_dataloader.datasets._annotation_boxes import AnnotationBoxes
from concurrent_dataloader.datasets._boxes import as_item
from concurrent_dataloader.datasets.contract import SampleLocation
from concurrent_dataloader.datasets.labelled import DecodedImage, LabelledDataset, SampleMetadata
from concurrent_dataloader.errors import IndexFormatError, LoaderError
from concurrent_dataloader.formats.image import DecoderName, check_decoder, decode_image
from concurrent_dataloader.index import Index
from concurrent_dataloader.labels import Classes, LabelSpace
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores.base import Store

Decode = DecoderName | Callable[[Buffer], Any] | None
"""From raw bytes to a decoded sample: a decoder's name, a pure function, None for the bytes."""

MISSING_LABEL = -1


class IndexedDataset(LabelledDataset):
    """A map-style dataset over an `Index` and a `Store`; items are ``(image, label)``.

    It pickles if its store, its decoder and its transforms do. No request is made before the first
    sample is asked for, so that workers can still be forked. Positions count from 0, or from the
    end if negative, as those of a list.
    """

    _keys_are_paths = True
    """Whether the store is asked for the index's keys."""

    def __init__(
        self,
        index: Index,
        store: Store,
        classes: Classes | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        decode: Decode = "pillow",
        missing_label: int | None = MISSING_LABEL,
        with_metadata: bool = False,
        boxes: BoxLookup | None = None,
        missing_box: float | None = None,
        index_name: str = "the index",
    ) -> None:
        """Join an index, a store and classes.

        Args:
            index: Which samples exist.
            store: Where their bytes are; any object with the methods of `Store`.
            classes: Which class each sample belongs to; None: the samples have no labels.
            transform: Makes the item's first element of the decoded image; may be random.
            target_transform: Makes the item's second element of the label.
            decode: "pillow" (an RGB image of Pillow), "torchvision" (a uint8 RGB tensor), a pure
                function of the raw bytes, or None for these bytes themselves.
            missing_label: The label when there are no classes; when None, an item is then the image
                alone instead of a pair.
            with_metadata: Whether items have a last element more, a `SampleMetadata`.
            boxes: The bounding boxes of the samples, by position: items are then
                ``((image, box), label)``, a box being a (4,) float32 tensor of x1, y1, x2, y2, from
                0 to 1, and the union where an image has several. Those in XML files are read with
                their images.
            missing_box: Each side of the box of an image that has none. None: it is None, which
                torch's ``default_collate`` refuses; ``math.nan`` gives a tensor, which it takes.
            index_name: What errors call the index, such as its file.

        Raises:
            ValueError: There is no such decoder.
            IndexFormatError: The index is empty, or its keys are absolute paths.
            UnknownClassError: A sample belongs to a class that is not among ``classes``.
            MissingDependencyError: The decoder is not installed.
        """
        if not len(index):
            raise IndexFormatError(f"{index_name}: no samples, expected at least one")
        if self._keys_are_paths and index.key(0).startswith("/"):
            raise IndexFormatError(
                f"{index_name}: got key {index.key(0)!r}, expected keys relative to the root of "
                "the data; write it anew with `concurrent-dataloader index`"
            )
        super().__init__(transform, target_transform)
        self.index = index
        self.store = store
        self.classes = classes
        # An array, not a list: counting references to Python objects would copy every page of it
        # into each forked worker.
        self._labels = None if classes is None else classes.labels_of(index.keys())
        self._decode_raw = choose_decode(decode)
        self._decodes_images = isinstance(decode, str)
        self._missing_label = missing_label
        self._with_metadata = with_metadata
        self._boxes = boxes
        self._missing_box = missing_box
        self._index_name = index_name
        self._choice = random.Random()

    def __len__(self) -> int:
        return len(self.index)

    @override
    def __repr__(self) -> str:
        num_classes = "no" if self.classes is None else self.classes.count
        where = self.store.describe("")
        return f"{type(self).__name__}({len(self)} samples, {num_classes} classes, {where})"

    # -- the three stages

    @override
    def fetch(self, position: int) -> Buffer:
        """Read the raw bytes of the sample at ``position``.

        Raises:
            IndexError: There is no such position.
            StoreError: The store does not give them; says which position of which index asked.
        """
        key, byte_range = self._locate(position)
        try:
            self._fetch_beside(position)
            return self.store.get(key, byte_range)
        except LoaderError as error:
            raise self._explain(error, position) from error

    @override
    async def fetch_async(self, position: int) -> Buffer:
        """Read as `fetch` does, without blocking the event loop."""
        key, byte_range = self._locate(position)
        try:
            await self._fetch_beside_async(position)
            return await self.store.get_async(key, byte_range)
        except LoaderError as error:
            raise self._explain(error, position) from error

    @override
    def decode(self, position: int, raw: Buffer) -> DecodedImage:
        """Decode an image, and look up its label.

        Raises:
            SampleDecodeError: It is no image; says which key, position and index it belongs to.
        """
        metadata = None
        if self._with_metadata:
            metadata = self.metadata(position)._replace(size_bytes=memoryview(raw).nbytes)
        image = self._decode_image(position, raw)
        return DecodedImage(image, self.label(position), metadata, self._find_beside(position))

    # -- around them

    def get_random_item(self) -> Any:
        """Give any sample. Which one is drawn from a generator of the dataset's own."""
        return self[self._choice.randrange(len(self))]

    def key(self, position: int) -> str:
        """Give the key of the sample at ``position``."""
        return self.index.key(position)

    def label(self, position: int) -> int | None:
        """Give the label of the sample at ``position``, without fetching it."""
        return self._missing_label if self._labels is None else int(self._labels[position])

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """The label of each sample, (N,) int32, as for a sampler that weighs classes; or None."""
        return self._labels

    def convert_labels(self, label_space: LabelSpace) -> None:
        """Number ImageNet's classes as in another label space, such as torchvision's weights do.

        Raises:
            ValueError: There are no classes, or they are not ImageNet's.
        """
        if self.classes is None:
            raise ValueError(f"{self._index_name}: no classes, expected ImageNet's to convert them")
        self.classes = self.classes.converted(label_space)
        self._labels = self.classes.labels_of(self.index.keys())

    def size_bytes(self, position: int) -> int | None:
        """Give the size of what is fetched for a sample, as the index says; None if it does not."""
        return self.index.size_bytes(position)

    def metadata(self, position: int) -> SampleMetadata:
        """Say where the sample at ``position`` is, without asking the store."""
        key = self.index.key(position)
        size_bytes = self.size_bytes(position)
        return SampleMetadata(
            key, -1 if size_bytes is None else size_bytes, self.store.describe(key)
        )

    @override
    def locate_sample(self, position: int) -> SampleLocation:
        """Say where the sample at ``position`` lies, without asking the store."""
        return SampleLocation(
            self.key(position), kind="object" if self._decodes_images else "bytes"
        )

    def _locate(self, position: int) -> tuple[str, ByteRange | None]:
        return self.index.key(position), None

    def _fetch_beside(self, position: int) -> None:
        """Read what stands beside the image in the item, where that is in a file of its own."""
        if isinstance(self._boxes, AnnotationBoxes):
            self._boxes.fetch(position)

    async def _fetch_beside_async(self, position: int) -> None:
        if isinstance(self._boxes, AnnotationBoxes):
            await self._boxes.fetch_async(position)

    def _find_beside(self, position: int) -> tuple[Any, ...]:
        """Give what stands beside the image in the item."""
        if self._boxes is None:
            return ()
        return (as_item(merge(self._boxes.boxes(position)), self._missing_box),)

    def _decode_image(self, position: int, raw: Buffer) -> Any:
        try:
            return self._decode_content(position, raw)
        except LoaderError as error:
            raise self._explain(error, position, self._source(position)) from error
        except Exception as error:
            error.add_note(f"{self._source(position)}: {self._place(position)}")
            raise

    def _decode_content(self, position: int, raw: Buffer) -> Any:
        """Decode what was fetched, without a word on where it comes from in errors."""
        return self._decode_raw(raw)

    def _source(self, position: int) -> str:
        """Name for a person where the sample lies."""
        return self.store.describe(self.key(position))

    def _explain(self, error: LoaderError, position: int, source: str | None = None) -> LoaderError:
        """Make an error of the same type that also says which sample it is about."""
        what = str(error) if source is None else f"{source}: {error}"
        return type(error)(f"{what}; {self._place(position)}")

    def _place(self, position: int) -> str:
        return f"it is position {position} of {self._index_name}"


def choose_decode(decode: Decode) -> Callable[[Buffer], Any]:
    """Turn what a caller gave as ``decode`` into a function, which pickles if the caller's does.

    Raises:
        ValueError: There is no decoder of this name.
        TypeError: It is neither a name, nor a function, nor None.
        MissingDependencyError: The decoder is not installed.
    """
    if decode is None:
        return bytes
    if isinstance(decode, str):
        check_decoder(decode)
        return functools.partial(decode_image, decoder=cast(DecoderName, decode))
    if callable(decode):
        return decode
    raise TypeError(f"decode: got {decode!r}, expected a decoder's name, a function or None")
