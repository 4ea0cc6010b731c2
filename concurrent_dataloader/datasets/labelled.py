"""What datasets of ``(image, label)`` share: the last stage, and how their items are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from typing_extensions import override

from concurrent_dataloader.datasets.contract import StagedDataset


class SampleMetadata(NamedTuple):
    """Where a sample came from."""

    key: str
    size_bytes: int
    """Size of what was fetched; -1 where that is not known without fetching it."""

    source: str
    """The store's name for the object, such as ``s3://bucket/key``; holds no secret."""

    shard: str = ""
    """Key of the shard that holds it; empty where the object is the sample."""

    start: int = 0
    """First byte of it that was read."""

    stop: int = -1
    """Byte after the last one that was read; -1 for the end of the object."""


class DecodedImage(NamedTuple):
    """A sample before its transforms."""

    image: Any
    label: int | None
    """None: the item has none."""

    metadata: SampleMetadata | None
    """None: the item has none."""

    beside: tuple[Any, ...] = ()
    """What stands beside the image in the item: its box, where boxes were asked for."""


class LabelledDataset(StagedDataset[DecodedImage, Any]):
    """A dataset whose items are ``(image, label)``, with a transform for each of the two.

    With boxes, they are ``((image, box), label)``; the transform is given the image alone. To crop
    by the box, override `apply_transform`, which has it in ``decoded.beside``.
    """

    def __init__(
        self,
        transform: Callable[[Any], Any] | None,
        target_transform: Callable[[int], Any] | None,
    ) -> None:
        self.transform = transform
        self.target_transform = target_transform

    @override
    def apply_transform(self, decoded: DecodedImage) -> Any:
        """Transform an image and its label, and make the item of them."""
        image, label, metadata, beside = decoded
        if self.transform is not None:
            image = self.transform(image)
        if beside:
            image = (image, *beside)
        if label is None:
            return image if metadata is None else (image, metadata)
        target = label if self.target_transform is None else self.target_transform(label)
        return (image, target) if metadata is None else (image, target, metadata)

    def set_transform(self, transform: Callable[[Any], Any] | None) -> None:
        """Replace the transform. Workers that have started keep the one before."""
        self.transform = transform

    def set_target_transform(self, target_transform: Callable[[int], Any] | None) -> None:
        """Replace the transform of labels. Workers that have started keep the one before."""
        self.target_transform = target_transform
