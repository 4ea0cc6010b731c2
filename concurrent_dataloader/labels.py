"""Which class a sample belongs to, and in which of the numberings in use.

A label is an int from 0 on. A classes file gives each class an id, which may count from 0 or from 1
and may follow one of several orders of ImageNet's classes; `LabelSpace` says which, `Classes.load`
finds it out or is told, and `Classes.converted` goes from one to another.
"""

from __future__ import annotations

import difflib
import enum
import functools
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
import orjson
from numpy.typing import NDArray

from concurrent_dataloader.classes_file import key_by_image_number, read_entries
from concurrent_dataloader.errors import ClassesFormatError, UnknownClassError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.label_rules import LabelRule, class_finder, rule_name

# Source: the first lines of ILSVRC2012_validation_ground_truth.txt, ILSVRC2012 development kit.
_VALIDATION_HEAD = (490, 361, 171, 822, 297, 482, 13, 704, 599, 164)


class LabelSpace(enum.Enum):
    """What a class id means."""

    SORTED_WNID = "sorted_wnid"
    """0 to 999 in the order of the WordNet ids: torchvision's ImageFolder and all its weights."""
    ILSVRC2012_ID = "ilsvrc2012_id"
    """1 to 1000 in the order of the development kit, where n02119789 (kit fox) is 1."""
    ILSVRC2012_VALIDATION = "ilsvrc2012_validation"
    """1 to 1000, the same ids, as the lines of the validation ground truth, by image number."""
    TF_BUILDER = "tf_builder"
    """1 to 1000: the order of the WordNet ids after a background class 0, as in TFRecord shards."""
    CUSTOM = "custom"
    """Ids of the user's own, without relation to the others."""

    @property
    def first_id(self) -> int:
        """Lowest id; of `CUSTOM`, that of the labels themselves, 0."""
        return 0 if self in (LabelSpace.SORTED_WNID, LabelSpace.CUSTOM) else 1


class ImagenetClass(NamedTuple):
    """One of the 1000 classes of ILSVRC2012."""

    wnid: str
    name: str


@functools.cache
def imagenet_classes() -> tuple[ImagenetClass, ...]:
    """Give the 1000 classes in the order of `LabelSpace.ILSVRC2012_ID`.

    Source: the development kit of ILSVRC2012, as map_clsloc.txt; two names are made distinct.
    """
    table = resources.files("concurrent_dataloader").joinpath("imagenet_classes.txt")
    lines = table.read_text(encoding="utf-8").splitlines()
    return tuple(ImagenetClass(*line.split(" ")) for line in lines)


@overload
def convert_ids(ids: int, source: LabelSpace, target: LabelSpace) -> int: ...
@overload
def convert_ids(
    ids: NDArray[np.integer[Any]], source: LabelSpace, target: LabelSpace
) -> NDArray[np.int64]: ...
def convert_ids(
    ids: int | NDArray[np.integer[Any]], source: LabelSpace, target: LabelSpace
) -> int | NDArray[np.int64]:
    """Turn ImageNet class ids of one space into those of another.

    Args:
        ids: Ids as ``source`` counts them, from 0 or from 1.
        source: What they are.
        target: What they are to be.

    Raises:
        ValueError: An id is out of range, or a space is `LabelSpace.CUSTOM`.
    """
    given = np.asarray(ids, np.int64)
    if given.size and not source.first_id <= given.min() <= given.max() < source.first_id + 1000:
        outside = (given < source.first_id) | (given >= source.first_id + 1000)
        raise ValueError(
            f"class id: got {int(given[outside].flat[0])}, expected {source.first_id} to"
            f" {source.first_id + 999} in {source.value}"
        )
    converted = _from_ilsvrc(target)[_to_ilsvrc(source)[given - source.first_id]]
    return int(converted) if isinstance(ids, int) else converted


def _order() -> NDArray[np.int64]:
    """For each place in the order of WordNet ids, the place in the development kit's."""
    return np.argsort(np.array([entry.wnid for entry in imagenet_classes()]))


def _to_ilsvrc(space: LabelSpace) -> NDArray[np.int64]:
    """For each id less the first one, the place in the development kit's order."""
    _refuse_custom(space)
    if space in (LabelSpace.ILSVRC2012_ID, LabelSpace.ILSVRC2012_VALIDATION):
        return np.arange(1000)
    return _order()


def _from_ilsvrc(space: LabelSpace) -> NDArray[np.int64]:
    """For each place in the development kit's order, the id."""
    return np.argsort(_to_ilsvrc(space)) + space.first_id


def _refuse_custom(space: LabelSpace) -> None:
    if space is LabelSpace.CUSTOM:
        raise ValueError(
            "label_space: got 'custom', whose ids have no relation to ImageNet's; declare the space"
            " of the classes file with label_space if they have"
        )


class Classes:
    """The classes of a data set: how a key names one, which label each has, and its name."""

    def __init__(
        self,
        labels: Mapping[str, int],
        *,
        label_rule: LabelRule = "parent",
        names: Mapping[int, str] | None = None,
        label_space: LabelSpace = LabelSpace.CUSTOM,
        id_base: int = 0,
        where: str = "the classes given",
    ) -> None:
        """Take classes as they are; `load` and `from_keys` make them.

        Args:
            labels: Label, from 0 on, by what ``label_rule`` finds in a key.
            label_rule: How a key names its class.
            names: Name of each label, where known.
            label_space: What ``label + id_base`` means.
            id_base: Lowest id of that space.
            where: Names the classes in errors.
        """
        self.label_rule = label_rule
        self.label_space = label_space
        self.id_base = id_base
        self._labels = dict(labels)
        self._names = dict(names or {})
        self._where = where
        self._value_of = class_finder(label_rule)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        label_rule: LabelRule | None = None,
        label_space: LabelSpace | None = None,
        id_base: int | None = None,
        number_base: int | None = None,
    ) -> Self:
        """Read a classes file.

        Three layouts are known: ``{"n01440764": {"id": 449, "name": "tench"}, ...}`` by class,
        ``{"1": 490, "2": 361, ...}`` by image number, and the lines of a ground-truth file,
        ``.txt``, in the order of the images. What is not declared is found out from the content;
        where that does not tell, the error says what to declare.

        Args:
            path: The file.
            label_rule: How a key names its class; for the first layout ``"parent"`` when None, for
                the others ``"number"``.
            label_space: What the ids mean.
            id_base: Lowest possible id, 0 or 1.
            number_base: What the file calls the image whose own number is 1: 0 or 1.

        Raises:
            FileNotFoundError: There is no such file.
            ClassesFormatError: It is no classes file, contradicts what was declared, or does not
                tell what was not declared.
        """
        where = os.fspath(path)
        _check_declared(id_base, number_base, label_space)
        entries, by_number = read_entries(Path(path))
        if label_rule is not None and label_rule != "number":
            by_number = False
        if by_number:
            entries = key_by_image_number(entries, number_base, where)
        ids = {value: entry.id for value, entry in entries.items()}
        space, base = _find_space(ids, by_number, label_space, id_base, where)
        if by_number:
            names = _imagenet_names(space)
        else:
            names = {entry.id - base: entry.name or value for value, entry in entries.items()}
        return cls(
            {value: number - base for value, number in ids.items()},
            label_rule=label_rule or ("number" if by_number else "parent"),
            names=names,
            label_space=space,
            id_base=base,
            where=where,
        )

    @classmethod
    def from_keys(cls, keys: Iterable[str], *, label_rule: LabelRule = "parent") -> Self:
        """Number the classes that occur in ``keys`` from 0 on, in the order of their names.

        The numbers depend on which classes occur, so keep them with the data: `save_json`.

        Raises:
            UnknownClassError: A key names no class.
        """
        value_of = class_finder(label_rule)
        found: set[str] = set()
        for key in keys:
            value = value_of(key)
            if not value:
                raise UnknownClassError(
                    f"{key}: names no class by label_rule {rule_name(label_rule)}; choose another"
                )
            found.add(value)
        values = sorted(found)
        known = dict(imagenet_classes())
        whole = values == sorted(known)
        return cls(
            {value: label for label, value in enumerate(values)},
            label_rule=label_rule,
            names={label: known.get(value, value) for label, value in enumerate(values)},
            label_space=LabelSpace.SORTED_WNID if whole else LabelSpace.CUSTOM,
        )

    @classmethod
    def imagenet(
        cls,
        label_space: LabelSpace = LabelSpace.SORTED_WNID,
        *,
        label_rule: LabelRule = "parent",
    ) -> Self:
        """Give the 1000 classes of ImageNet by WordNet id, without any file."""
        ids = _ids_by_wnid(label_space)
        return cls(
            {wnid: number - label_space.first_id for wnid, number in ids.items()},
            label_rule=label_rule,
            names=_imagenet_names(label_space),
            label_space=label_space,
            id_base=label_space.first_id,
            where=f"ImageNet's classes ({label_space.value})",
        )

    @property
    def count(self) -> int:
        """Number of labels: one more than the highest."""
        return max(self._labels.values()) + 1

    def label_of(self, key: str) -> int:
        """Give the label of a sample, from 0 on.

        Raises:
            UnknownClassError: Its class is not known here.
        """
        label = self._labels.get(self._value_of(key))
        if label is None:
            raise UnknownClassError(self._unknown(key, key))
        return label

    def knows(self, key: str) -> bool:
        """Tell whether a sample has a label."""
        return self._value_of(key) in self._labels

    def labels_of(self, keys: Iterable[str]) -> NDArray[np.int32]:
        """Give the labels of many samples, in their order, at about half a second for a million.

        Raises:
            UnknownClassError: A sample's class is not known here; names the first one.
        """
        labels, value_of = self._labels, self._value_of

        def look_up() -> Iterable[int]:
            for position, key in enumerate(keys):
                label = labels.get(value_of(key))
                if label is None:
                    raise UnknownClassError(self._unknown(key, f"{key} (position {position})"))
                yield label

        return np.fromiter(look_up(), np.int32)

    def name(self, label: int) -> str:
        """Give the name of a label, or its id as text where the classes file has no name for it."""
        return self._names.get(label, str(label + self.id_base))

    def converted(self, target: LabelSpace) -> Self:
        """Give the same classes with the labels of another space, such as torchvision's weights'.

        Raises:
            ValueError: One of the two is `LabelSpace.CUSTOM`.
        """
        if target is self.label_space:
            return self
        present = sorted(set(self._labels.values()))
        ids = convert_ids(np.array(present) + self.id_base, self.label_space, target)
        new = dict(zip(present, (ids - target.first_id).tolist(), strict=True))
        return type(self)(
            {value: new[label] for value, label in self._labels.items()},
            label_rule=self.label_rule,
            names={new[label]: name for label, name in self._names.items() if label in new},
            label_space=target,
            id_base=target.first_id,
            where=self._where,
        )

    def with_label_rule(self, label_rule: LabelRule) -> Self:
        """Give the same classes with the same labels, for keys that name them by another rule."""
        return type(self)(
            self._labels,
            label_rule=label_rule,
            names=self._names,
            label_space=self.label_space,
            id_base=self.id_base,
            where=self._where,
        )

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write ``{"n01440764": {"id": 449, "name": "tench"}, ...}``, whole or not at all."""
        content = {
            value: {"id": label + self.id_base, "name": self.name(label)}
            for value, label in self._labels.items()
        }
        write_whole(Path(path), [orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)])

    def __repr__(self) -> str:
        return f"Classes({self.count} labels, {self.label_space.value}, {self._where!r})"

    def _unknown(self, key: str, where: str) -> str:
        """Say that a key's class is not known; ``where`` is the key, with its position if known."""
        value = self._value_of(key)
        near = difflib.get_close_matches(value, self._labels, 3)
        others = (rule for rule in ("parent", "prefix", "number") if rule != self.label_rule)
        fitting = [rule for rule in others if class_finder(rule)(key) in self._labels]
        return (
            f"{where}: got class {value!r} by label_rule {rule_name(self.label_rule)}, expected"
            f" one of the {len(self._labels)} in {self._where}"
            + (f" (near: {', '.join(map(repr, near))})" if near else "")
            + "; "
            + (f"try label_rule={fitting[0]!r}" if fitting else "add it there, or drop the sample")
        )


def _check_declared(
    id_base: int | None, number_base: int | None, label_space: LabelSpace | None
) -> None:
    for name, value in (("id_base", id_base), ("number_base", number_base)):
        if value not in (None, 0, 1):
            raise ValueError(f"{name}: got {value!r}, expected 0 or 1")
    if label_space is None or label_space is LabelSpace.CUSTOM or id_base is None:
        return
    if id_base != label_space.first_id:
        raise ValueError(
            f"id_base: got {id_base}, but the ids of {label_space.value} count from"
            f" {label_space.first_id}; leave one of the two out"
        )


def _ids_by_wnid(space: LabelSpace) -> dict[str, int]:
    ids = _from_ilsvrc(space).tolist()
    return {entry.wnid: number for entry, number in zip(imagenet_classes(), ids, strict=True)}


def _imagenet_names(space: LabelSpace) -> dict[int, str]:
    if space is LabelSpace.CUSTOM:
        return {}
    labels = (_from_ilsvrc(space) - space.first_id).tolist()
    return {label: entry.name for entry, label in zip(imagenet_classes(), labels, strict=True)}


def _known_ids(space: LabelSpace, by_number: bool) -> dict[str, int]:
    """Give ids that a file of this space must have: by WordNet id, or those of the first images."""
    if not by_number:
        return _ids_by_wnid(space)
    return {
        str(number): convert_ids(number_id, LabelSpace.ILSVRC2012_VALIDATION, space)
        for number, number_id in enumerate(_VALIDATION_HEAD, start=1)
    }


def _find_space(
    ids: dict[str, int],
    by_number: bool,
    declared: LabelSpace | None,
    id_base: int | None,
    where: str,
) -> tuple[LabelSpace, int]:
    """Tell what the ids of a file mean, and from where on they count."""
    if declared is not None and declared is not LabelSpace.CUSTOM:
        _check_space(ids, by_number, declared, where)
        return declared, declared.first_id
    if declared is None:
        of_ids = LabelSpace.ILSVRC2012_VALIDATION if by_number else LabelSpace.ILSVRC2012_ID
        for space in (of_ids, LabelSpace.SORTED_WNID, LabelSpace.TF_BUILDER):
            known = _known_ids(space, by_number)
            relevant = known if by_number else ids
            if id_base in (None, space.first_id) and all(
                value in known and ids.get(value) == known[value] for value in relevant
            ):
                return space, space.first_id
    return LabelSpace.CUSTOM, _find_base(ids, id_base, where)


def _check_space(ids: dict[str, int], by_number: bool, declared: LabelSpace, where: str) -> None:
    last_id = declared.first_id + 999
    known = {} if by_number else _ids_by_wnid(declared)
    for value, number in ids.items():
        expected = known.get(value)
        if not declared.first_id <= number <= last_id or expected not in (None, number):
            wanted = f"{declared.first_id} to {last_id}" if expected is None else str(expected)
            raise ClassesFormatError(
                f"{where}, entry {value!r}: got id {number}, expected {wanted} in"
                f" {declared.value}; declare another label_space"
            )


def _find_base(ids: dict[str, int], declared: int | None, where: str) -> int:
    """Tell whether ids of the user's own count from 0 or from 1."""
    low, high = min(ids.values()), max(ids.values())
    if declared is not None:
        if low < declared:
            raise ClassesFormatError(f"{where}: got id {low}, expected {declared} or more")
        return declared
    if low == 0:
        return 0
    if low == 1 and len(set(ids.values())) == high:
        return 1
    raise ClassesFormatError(
        f"{where}: ids go from {low} to {high}, which does not tell whether they count from 0 or"
        " from 1; give id_base=0 or id_base=1"
    )
