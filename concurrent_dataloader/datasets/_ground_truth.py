"""The classes of ImageNet's flat validation images, as a file says that lies beside them."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator

from concurrent_dataloader.datasets._places import is_local, local_path
from concurrent_dataloader.devkit import (
    DEVKIT,
    GROUND_TRUTH,
    TRUTH_NAMES,
    VAL_BASE,
    parse_ground_truth,
    parse_meta,
    read_devkit,
    stem_of,
)
from concurrent_dataloader.errors import AccessDeniedError, ClassesFormatError, KeyNotFoundError
from concurrent_dataloader.index import Index
from concurrent_dataloader.labelling import Labelling, convert, label_by_truth
from concurrent_dataloader.labels import Classes, LabelSpace, imagenet_classes
from concurrent_dataloader.stores import Store

_KAGGLE_VAL = "/Data/CLS-LOC/val"


def is_flat_validation(index: Index) -> bool:
    """Tell whether samples are validation images of ImageNet, all in one folder."""
    first = index.key(0)
    if not stem_of(first).startswith(VAL_BASE):
        return False
    folder = first.rpartition("/")[0]
    return all(key.rpartition("/")[0] == folder for key in index.keys())  # noqa: SIM118 - no dict


def find_validation_classes(
    index: Index,
    root: str,
    open_root: Callable[[str], Store],
    known: Classes | None,
    missing_label: int | None,
) -> Classes | None:
    """Give the classes of flat validation images by the ground truth that lies in or above them.

    Args:
        index: The images, as `is_flat_validation` takes them.
        root: What its keys are relative to.
        open_root: Opens the store at a path or URL.
        known: Those of another split, whose labels are to be taken; None: ImageNet's.
        missing_label: That of images without classes, of which -1 is warned of.

    Returns:
        None where there is no such file, and no classes are known.

    Raises:
        ClassesFormatError: There is no such file, but classes are known; or it is none.
        MissingDependencyError: It is the archive of the development kit, and scipy not installed.
        StoreError: The place cannot be read.
    """
    inner = index.key(0).rpartition("/")[0]
    folders = list(_folders(f"{root}/{inner}" if inner else root))
    for folder in folders:
        store = open_root(folder)
        for name in TRUTH_NAMES:
            try:
                raw = bytes(store.get(name))
            except (KeyNotFoundError, AccessDeniedError):  # some refuse what is not there
                continue
            return _make_classes(index, name, raw, store.describe(name), known)
    missing = (
        f"{folders[0]}: a flat folder of ImageNet's validation images, and none of"
        f" {', '.join(TRUTH_NAMES)} in {' or '.join(folders)}"
    )
    what = "put one there, or give the .txt as classes_file"
    if known is not None:
        raise ClassesFormatError(f"{missing}, to find the classes given by; {what}")
    if missing_label is not None:
        warnings.warn(
            f"{missing}: each label is {missing_label}; {what}; missing_label=None gives images"
            " without labels",
            stacklevel=4,
        )
    return None


def _folders(folder: str) -> Iterator[str]:
    """Give the folder and the one above it; of Kaggle's layout, those at its top."""
    if is_local(folder):
        folder = os.path.abspath(local_path(folder))
    num_above = 1
    if folder.endswith(_KAGGLE_VAL):
        num_above = 4
    top = folder.find("://") + 3 if "://" in folder else 0
    for number in range(num_above + 1):
        if number in (0, 1) or number >= 3:
            yield folder or "/"
        above = folder[top:].rpartition("/")[0]
        if not above and top:
            return
        folder = folder[:top] + above


def _make_classes(
    index: Index, name: str, raw: bytes, where: str, known: Classes | None
) -> Classes:
    meta = None
    if name == DEVKIT:
        kit = read_devkit(io.BytesIO(raw), where)
        raw, meta = kit[GROUND_TRUTH], parse_meta(kit["meta.mat"], where)
    truth = parse_ground_truth(raw, where)
    labelling = label_by_truth(index, truth, meta, is_whole=False)
    if labelling.label_space is not None:
        labelling = convert(labelling, LabelSpace.SORTED_WNID)
    rule = _map_keys(index, labelling)
    if known is not None:
        return known.with_label_rule(rule)
    long_names = dict(imagenet_classes())
    return Classes(
        {value: label for label, value in enumerate(labelling.classes)},
        label_rule=rule,
        names={
            label: long_names.get(value, value) for label, value in enumerate(labelling.classes)
        },
        label_space=LabelSpace(labelling.label_space or LabelSpace.CUSTOM),
        where=where,
    )


def _map_keys(index: Index, labelling: Labelling) -> dict[str, str]:
    numbered = zip(index.keys(), labelling.labels.tolist(), strict=True)
    return {key: labelling.classes[label] for key, label in numbered if label >= 0}
