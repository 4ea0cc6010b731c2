"""The label of each sample: by a rule alone, or by a rule and what a file says."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.devkit import (
    NUM_CLASSES,
    VAL_BASE,
    GroundTruth,
    ImageNumber,
    leaf_classes,
    parse_image_number,
    stem_of,
)
from concurrent_dataloader.errors import ClassesFormatError, UnknownClassError
from concurrent_dataloader.index import Index
from concurrent_dataloader.label_rules import LabelRule, class_finder
from concurrent_dataloader.labels import LabelSpace, convert_ids, imagenet_classes

OnUnknown = Literal["skip", "error"]

_UNKNOWN = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Labelling:
    """Labels of samples, and what they mean.

    Shapes:
        labels: (N,) int32, from 0 on.
    """

    labels: NDArray[np.int32]
    classes: tuple[str, ...]
    """Name of each class, by label."""

    label_space: str | None
    num_skipped: int = 0

    def select(self, positions: NDArray[np.int64]) -> Labelling:
        """Give those of some samples, in the order given."""
        return dataclasses.replace(self, labels=self.labels[positions])


class ClassTable(NamedTuple):
    """Which label a class has."""

    where: str
    """Names the file that says so."""

    labels: dict[str, int]
    classes: tuple[str, ...]
    label_space: str | None


def label_by_rule(names: Index, rule: LabelRule) -> Labelling:
    """Number the classes that occur from 0 on, in the order of their names, as torchvision does.

    Samples whose name holds no class get -1.
    """
    values, numbers = _find_values(names, class_finder(rule))
    classes = tuple(sorted(value for value in values if value))
    labels = {value: label for label, value in enumerate(classes)}
    return Labelling(_look_up(values, labels)[numbers], classes, space_of(classes))


def label_by_table(names: Index, rule: LabelRule, table: ClassTable) -> Labelling:
    """Look the class of each sample up in a table; samples whose class is not there get -1."""
    values, numbers = _find_values(names, class_finder(rule))
    labels = _look_up(values, table.labels)[numbers]
    return Labelling(labels, table.classes, table.label_space)


def label_by_values(values: list[str], table: ClassTable) -> Labelling:
    """Look up the class of each sample, given in their order; -1 where it is not in the table."""
    return Labelling(_look_up(values, table.labels), table.classes, table.label_space)


def space_of(classes: Sequence[str]) -> str | None:
    """Tell whether classes are ImageNet's by WordNet id, and in which of its orders."""
    by_devkit = [entry.wnid for entry in imagenet_classes()]
    if list(classes) == sorted(by_devkit):
        return LabelSpace.SORTED_WNID.value
    return LabelSpace.ILSVRC2012_ID.value if list(classes) == by_devkit else None


def drop_unknown(
    names: Index, labelling: Labelling, on_unknown: OnUnknown, explain: Callable[[str], str]
) -> NDArray[np.int64] | None:
    """Give the positions of the samples that have a label; None: all have.

    Args:
        names: Of the samples.
        labelling: With -1 for those without a label.
        on_unknown: What is to become of these.
        explain: Says of a name why it has no label.

    Raises:
        UnknownClassError: A sample has no label, and is not to be skipped.
    """
    unknown = np.flatnonzero(labelling.labels == _UNKNOWN)
    if not len(unknown):
        return None
    if on_unknown == "error":
        raise UnknownClassError(explain(names.key(int(unknown[0]))))
    return np.flatnonzero(labelling.labels != _UNKNOWN)


def _find_values(
    names: Index, value_of: Callable[[str], str]
) -> tuple[list[str], NDArray[np.int32]]:
    """Give the values that occur, and for each sample the number of its value."""
    numbers: dict[str, int] = {}
    found = array.array("i")
    for name in names.keys():  # noqa: SIM118 - no dict
        found.append(numbers.setdefault(value_of(name), len(numbers)))
    return list(numbers), np.array(found, np.int32)


def _look_up(values: list[str], labels: dict[str, int]) -> NDArray[np.int32]:
    return np.array([labels.get(value, _UNKNOWN) for value in values], np.int32)


# -- what files say


def table_of_ids(ids: Mapping[str, int], where: str, id_base: int | None = None) -> ClassTable:
    """Give the labels that ids stand for, in their order.

    Args:
        ids: Id of each class.
        where: Names the file.
        id_base: Lowest possible id; None: found out.

    Raises:
        ClassesFormatError: The ids do not tell from where on they count.
    """
    low, high = min(ids.values()), max(ids.values())
    if id_base is None:
        if low not in (0, 1) or (low == 1 and len(set(ids.values())) != high):
            raise ClassesFormatError(
                f"{where}: ids go from {low} to {high}, which does not tell whether they count"
                " from 0 or from 1; give id_base=0 or id_base=1"
            )
        id_base = low
    if low < id_base:
        raise ClassesFormatError(f"{where}: got id {low}, expected {id_base} or more")
    labels = {name: number - id_base for name, number in ids.items()}
    classes = [str(label) for label in range(high - id_base + 1)]
    for name in sorted(labels, reverse=True):
        classes[labels[name]] = name
    return ClassTable(where, labels, tuple(classes), space_of(classes))


def table_of_names(names: Sequence[str], where: str) -> ClassTable:
    """Give the labels of classes in their order.

    Raises:
        ClassesFormatError: A name stands there twice.
    """
    labels = {name: label for label, name in enumerate(names)}
    if len(labels) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ClassesFormatError(f"{where}: {twice!r} stands there twice, expected each class once")
    return ClassTable(where, labels, tuple(names), space_of(names))


def imagenet_table() -> ClassTable:
    """Give ImageNet's classes by WordNet id, in the order of these."""
    return table_of_names(sorted(entry.wnid for entry in imagenet_classes()), "ImageNet's classes")


def table_of_meta(ids: Mapping[str, int], where: str) -> ClassTable:
    """Give the labels of the leaf classes of a ``meta.mat``, in the order of its ids.

    Raises:
        ClassesFormatError: It holds no leaf class.
    """
    leaves = leaf_classes(ids)
    if not leaves:
        raise ClassesFormatError(f"{where}: holds no class with an id up to {NUM_CLASSES}")
    return table_of_ids(leaves, where, id_base=1)


def convert(labelling: Labelling, target: LabelSpace) -> Labelling:
    """Number the same classes in the order of another label space.

    Raises:
        ValueError: The classes are not ImageNet's.
    """
    if labelling.label_space is None:
        raise ValueError(
            f"label_space: got {target.value!r} for classes that are not ImageNet's, expected None"
        )
    source = LabelSpace(labelling.label_space)
    if source is target:
        return labelling
    ids = convert_ids(np.arange(NUM_CLASSES) + source.first_id, source, target) - target.first_id
    labels = np.where(labelling.labels < 0, labelling.labels, ids[labelling.labels])
    classes = [""] * NUM_CLASSES
    for label, name in zip(ids.tolist(), labelling.classes, strict=True):
        classes[label] = name
    return Labelling(labels.astype(np.int32), tuple(classes), target.value)


def label_by_truth(
    names: Index, truth: GroundTruth, meta: Mapping[str, int] | None, *, is_whole: bool = True
) -> Labelling:
    """Label the images of a flat folder by a ground truth.

    Args:
        names: ``<base>%08d.<ending>``, one image for each line, if the file goes by number.
        truth: What the file says.
        meta: Ids of the development kit; None: those that come with the library, if the images are
            ImageNet's.
        is_whole: Whether each line must have its image, if the file goes by number.

    Raises:
        ClassesFormatError: Images and lines are not as many, or do not belong to each other.
    """
    if truth.by_number is not None:
        numbers = _image_numbers(names, truth, is_whole=is_whole)
        values = [truth.by_number[number - 1] for number in numbers]
    else:
        by_stem = truth.by_stem or {}
        values = [by_stem.get(stem_of(name), "") for name in names.keys()]  # noqa: SIM118 - no dict
    return label_by_values(values, _truth_table(names, truth, meta))


def _image_numbers(names: Index, truth: GroundTruth, *, is_whole: bool) -> list[int]:
    lines = len(truth.by_number or ())
    if is_whole and len(names) != lines:
        raise ClassesFormatError(
            f"{truth.where}: got {lines} lines for {len(names)} images, expected a line for each;"
            " take the whole folder, or the file that belongs to it"
        )
    numbers: list[int] = []
    first: ImageNumber | None = None
    for name in names.keys():  # noqa: SIM118 - no dict
        parts = parse_image_number(name)
        first = first or parts
        if parts is None or first is None or parts.base != first.base:
            base = first.base if first else ""
            raise ClassesFormatError(
                f"{name}: has no number to find its line in {truth.where} by, expected a name such"
                f" as {base or 'ILSVRC2012_val_'}00000001.JPEG"
            )
        numbers.append(parts.number)
    is_fitting = 1 <= min(numbers) <= max(numbers) <= lines
    if not is_fitting or (is_whole and len(set(numbers)) != lines):
        raise ClassesFormatError(
            f"{truth.where}: image numbers go from {min(numbers)} to {max(numbers)}, expected each"
            f" from 1 to {lines}{' once' * is_whole}"
        )
    return numbers


def _truth_table(names: Index, truth: GroundTruth, meta: Mapping[str, int] | None) -> ClassTable:
    """Give the label of each value of a ground truth."""
    distinct = sorted(set(truth.values))
    ours = imagenet_table()
    if not truth.has_ids:
        is_ours = all(value in ours.labels for value in distinct)
        return ours if is_ours else table_of_names(distinct, truth.where)
    ids = {value: int(value) for value in distinct}
    is_imagenet = stem_of(names.key(0)).startswith(VAL_BASE)
    if meta is None and not is_imagenet:
        return table_of_ids(ids, truth.where)
    devkit = [entry.wnid for entry in imagenet_classes()]
    wnids = dict(enumerate(devkit, start=1))
    table = ours
    if meta is not None:
        wnids = {number: wnid for wnid, number in leaf_classes(meta).items()}
        by_id = table_of_meta(meta, truth.where)
        if by_id.label_space is None:
            table = by_id
    elif truth.by_stem is not None:  # Caffe's lists count from 0, in the order of the names
        wnids = dict(enumerate(ours.classes))
    if unknown := [number for number in ids.values() if number not in wnids]:
        raise ClassesFormatError(
            f"{truth.where}: got class id {unknown[0]}, expected {min(wnids)} to {max(wnids)}"
        )
    return table._replace(
        labels={value: table.labels[wnids[number]] for value, number in ids.items()}
    )
