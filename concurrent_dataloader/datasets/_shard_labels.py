"""What the labels in an index of shards mean, and how they are counted as given classes do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.datasets._metadata import name_classes
from concurrent_dataloader.errors import UnknownClassError
from concurrent_dataloader.labels import Classes, LabelSpace, convert_ids
from concurrent_dataloader.shard_index import NO_LABEL, ShardIndex


def find_space(index: ShardIndex, declared: LabelSpace | None, where: str) -> LabelSpace:
    """Tell what the labels of an index mean, by itself or as declared.

    Raises:
        ValueError: It says something else than was declared.
    """
    known = None if index.label_space is None else LabelSpace(index.label_space)
    if declared is not None and known is not None and declared is not known:
        raise ValueError(
            f"label_space: got {declared.value!r}, but {where} says {known.value!r}; leave it out, "
            "and convert_labels() later"
        )
    return declared or known or LabelSpace.CUSTOM


def choose_labels(
    index: ShardIndex,
    limited: ShardIndex,
    classes: Classes | None,
    space: LabelSpace,
    *,
    by_key: bool,
    where: str,
) -> tuple[Classes | None, NDArray[np.int32] | None]:
    """Give the classes that count, and the label of each sample, if any.

    Args:
        index: Of all samples, which say how many classes there are.
        limited: Of the samples that are wanted.
        classes: Those that count; None: those of the index.
        space: What the labels of the index mean.
        by_key: Whether keys say the class, also where the index has labels.
        where: What errors call the index.

    Raises:
        UnknownClassError: A sample belongs to a class that is not among ``classes``.
    """
    if classes is None:
        return _name_classes(index, space), limited.labels
    return classes, _match_labels(limited, classes, space, by_key, where)


def _name_classes(index: ShardIndex, space: LabelSpace) -> Classes | None:
    """Make classes of what an index says of its labels."""
    labels = index.labels
    if labels is None:
        return None
    return name_classes(index.classes, space, int(labels.max()) + 1)


def _match_labels(
    index: ShardIndex, classes: Classes, space: LabelSpace, by_key: bool, where: str
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
        matched = renumber(labels, space, classes.label_space)
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


def renumber(
    labels: NDArray[np.int32], source: LabelSpace, target: LabelSpace
) -> NDArray[np.int32]:
    """Number ImageNet's labels as in another label space; samples without one stay so."""
    if source is target:
        return labels
    converted = labels.copy()
    is_known = labels != NO_LABEL
    ids = convert_ids(labels[is_known] + source.first_id, source, target)
    converted[is_known] = ids - target.first_id
    return converted
