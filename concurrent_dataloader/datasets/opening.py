"""Find the index, the classes and the store of a data set: in a bucket, or in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from concurrent_dataloader.datasets._boxes import BoxSource, look_up_boxes
from concurrent_dataloader.datasets._ground_truth import (
    find_validation_classes,
    is_flat_validation,
)
from concurrent_dataloader.datasets._places import IMAGE_SUFFIXES
from concurrent_dataloader.datasets.indexed import Decode, IndexedDataset
from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.files import fetch_file_if_missing
from concurrent_dataloader.index import Index
from concurrent_dataloader.label_rules import LabelRule
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.stores import CredentialsFile, Store, WritableStore, open_store
from concurrent_dataloader.stores.address import check_bucket
from concurrent_dataloader.stores.cache import uncached
from concurrent_dataloader.stores.credentials import Split

_TOP_FOLDER = "regex:^([^/]+)/"


class S3Dataset(IndexedDataset):
    """Images in a bucket, one object each."""

    def __init__(
        self,
        bucket_name: str,
        index_file: str | os.PathLike[str] | None = None,
        classes_file: str | os.PathLike[str] | None = None,
        *,
        endpoint_url: str | None = None,
        s3_credential_file: str | os.PathLike[str] | None = None,
        prefix: str = "",
        limit: int | None = None,
        sample_seed: int | None = None,
        classes: Classes | None = None,
        label_rule: LabelRule | None = None,
        split: Split | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        decode: Decode = "pillow",
        missing_label: int | None = -1,
        with_metadata: bool = False,
        boxes: BoxSource | None = None,
        missing_box: float | None = None,
        **store_options: Any,
    ) -> None:
        """Open the images of a bucket. The first sample makes the first request, but for a listing.

        Args:
            bucket_name: The bucket.
            index_file: JSON list of keys below ``prefix``. Downloaded if it is missing and the
                credentials file says from where. Without one, all images below ``prefix``.
            classes_file: JSON object of classes, likewise. Without one, and without ``classes``,
                the classes that occur are numbered from 0 in the order of their names: by the top
                folder below ``prefix`` in a listing, as torchvision's ImageFolder does, else by the
                parent folder. An index whose keys lie in one folder, or in none, has no labels. But
                flat validation images of ImageNet have the classes that a ground truth, solution or
                development kit says which lies in their folder or above it.
            endpoint_url: Of an S3-compatible service; AWS's own when None.
            s3_credential_file: JSON file; the standard AWS chain when None.
            prefix: Folder of the bucket that keys are relative to.
            limit: Number of samples; the first ones, or a sample by ``sample_seed``.
            sample_seed: Draws the limited samples from the whole index, the same for the same seed.
            classes: Those of another split, so that both have the same labels.
            label_rule: How a key names its class, where the default is not it.
            split: Which URLs of the credentials file to take: those for "train", "val" or "test".
            transform: As in `IndexedDataset`, like all that follow.
            target_transform: Makes the item's second element of the label.
            decode: A decoder's name, a pure function of the raw bytes, or None for the bytes.
            missing_label: Label where there are no classes; when None, items are images alone.
            with_metadata: Whether items have a `SampleMetadata` as last element.
            boxes: Bounding boxes, a ``.csv`` table ``name,x1,y1,x2,y2`` relative to the image as
                path or URL, or ``{name: [(x1, y1, x2, y2), ...]}``; rows are found by the image's
                key, its file name, or that without its ending, and several are united. Or a folder
                or prefix of XML files as of Pascal VOC, an image's by its name without ending;
                "auto": that of Kaggle's layout, in which the images lie. Items are then
                ``((image, box), label)``, as `IndexedDataset` says.
            missing_box: Each side of the box of an image that has none; the box is None when None,
                which cannot be collated, while ``math.nan`` can.
            store_options: What else `open_store` takes, such as ``client="aiohttp"``, ``region`` or
                ``anonymous=True``.

        Raises:
            FileNotFoundError: A file is missing, and nothing says where it can be had.
            IndexFormatError: The index is malformed or empty, or the listing is.
            ClassesFormatError: The classes file is malformed.
            ValueError: The boxes are none, or none of them belongs to any image.
            UnknownClassError: A sample's class is not in the classes file.
            CredentialsError: The credentials file cannot be used.
            StoreError: A listing or a download did not succeed.
        """
        check_bucket(bucket_name)
        if s3_credential_file is not None and store_options.get("credentials") is not None:
            raise ValueError(
                "credentials: got them together with s3_credential_file, expected one of the two"
            )
        store_options.setdefault("credentials", s3_credential_file)
        store_options["endpoint_url"] = endpoint_url
        if s3_credential_file is not None:
            urls = CredentialsFile(s3_credential_file).read()
            _download_if_missing(index_file, urls.index_url(split), store_options)
            _download_if_missing(classes_file, urls.classes_url(split), store_options)

        def open_root(url: str) -> Store:
            return open_store(url, **store_options)

        root = f"s3://{bucket_name}/{prefix}".rstrip("/")
        store = open_store(root, **store_options)
        index = _list_images(store, root) if index_file is None else Index.load(index_file)
        classes = _find_classes(
            index,
            classes,
            classes_file,
            label_rule,
            missing_label,
            root=root,
            open_root=lambda url: uncached(open_root(url)),
            is_listed=index_file is None,
        )
        super().__init__(
            index.limit(limit, sample_seed),
            store,
            classes,
            index_name=f"the listing of {root}" if index_file is None else os.fspath(index_file),
            transform=transform,
            target_transform=target_transform,
            decode=decode,
            missing_label=missing_label,
            with_metadata=with_metadata,
            boxes=look_up_boxes(
                boxes, index, open_root, root=root, limit=limit, sample_seed=sample_seed
            ),
            missing_box=missing_box,
        )


S3_Dataset = S3Dataset


class ScratchDataset(IndexedDataset):
    """Images in a folder, one file each; without an index, the same items as ImageFolder's."""

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        index_file: str | os.PathLike[str] | None = None,
        classes_file: str | os.PathLike[str] | None = None,
        *,
        limit: int | None = None,
        sample_seed: int | None = None,
        classes: Classes | None = None,
        label_rule: LabelRule | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        decode: Decode = "pillow",
        missing_label: int | None = -1,
        with_metadata: bool = False,
        boxes: BoxSource | None = None,
        missing_box: float | None = None,
    ) -> None:
        """Open the images of a folder.

        Args:
            data_path: The folder that keys are relative to.
            index_file: JSON list of keys. Without one, the folder is walked: its sub-folders are
                the classes, as for torchvision's ImageFolder; images that lie in the folder itself
                count only if it has no sub-folders, and then have no labels.
            classes_file: JSON object of classes, as in `S3Dataset`.
            limit: Number of samples; the first ones, or a sample by ``sample_seed``.
            sample_seed: Draws the limited samples from the whole index, the same for the same seed.
            classes: Those of another split, so that both have the same labels.
            label_rule: How a key names its class, where the default is not it.
            transform: As in `IndexedDataset`, like all that follow.
            target_transform: Makes the item's second element of the label.
            decode: A decoder's name, a pure function of the raw bytes, or None for the bytes.
            missing_label: Label where there are no classes; when None, items are images alone.
            with_metadata: Whether items have a `SampleMetadata` as last element.
            boxes: Bounding boxes, a ``.csv`` table ``name,x1,y1,x2,y2`` relative to the image as
                path or URL, or ``{name: [(x1, y1, x2, y2), ...]}``; rows are found by the image's
                key, its file name, or that without its ending, and several are united. Or a folder
                or prefix of XML files as of Pascal VOC, an image's by its name without ending;
                "auto": that of Kaggle's layout, in which the images lie. Items are then
                ``((image, box), label)``, as `IndexedDataset` says.
            missing_box: Each side of the box of an image that has none; the box is None when None,
                which cannot be collated, while ``math.nan`` can.

        Raises:
            FileNotFoundError: The folder or a file is missing, or a class's folder has no image.
            IndexFormatError: The index is malformed or empty, or the folder has no image.
            ClassesFormatError: The classes file is malformed.
            ValueError: The boxes are none, or none of them belongs to any image.
            UnknownClassError: A sample's class is not in the classes file.
        """
        root = Path(data_path).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give the root of the images")
        index = _walk_images(root) if index_file is None else Index.load(index_file)
        classes = _find_classes(
            index,
            classes,
            classes_file,
            label_rule,
            missing_label,
            root=str(root),
            open_root=open_store,
            is_listed=index_file is None,
        )
        super().__init__(
            index.limit(limit, sample_seed),
            open_store(root),
            classes,
            index_name=f"the images below {root}" if index_file is None else os.fspath(index_file),
            transform=transform,
            target_transform=target_transform,
            decode=decode,
            missing_label=missing_label,
            with_metadata=with_metadata,
            boxes=look_up_boxes(
                boxes, index, open_store, root=str(root), limit=limit, sample_seed=sample_seed
            ),
            missing_box=missing_box,
        )


def _list_images(store: Store, root: str) -> Index:
    if not isinstance(store, WritableStore):
        raise ValueError(f"{root}: cannot be listed; give an index_file")
    listed = Index.from_listing(store.list(), suffixes=IMAGE_SUFFIXES, ignore_case=True)
    return _drop_loose(listed, root)


def _walk_images(root: Path) -> Index:
    """Find what ImageFolder finds, in its order: by class, then by folder, then by name."""
    walked = Index.from_folder(root, suffixes=IMAGE_SUFFIXES, ignore_case=True)
    found = _drop_loose(walked, str(root))
    keys = sorted(found.keys(), key=_imagefolder_order)
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    empty = folders.difference(key.partition("/")[0] for key in keys)
    if empty:
        raise FileNotFoundError(
            f"{root}: no image in class folder {min(empty)!r}, expected one with an ending among "
            f"{', '.join(IMAGE_SUFFIXES)}; remove the folder, which would shift all labels"
        )
    return Index.from_keys(keys)


def _imagefolder_order(key: str) -> tuple[str, str, str]:
    folder, _, name = key.rpartition("/")
    return folder.partition("/")[0], folder, name


def _drop_loose(index: Index, root: str) -> Index:
    """Leave out images that lie beside the folders of the classes, as ImageFolder does."""
    if not len(index):
        raise IndexFormatError(
            f"{root}: no image, expected files that end in one of {', '.join(IMAGE_SUFFIXES)}"
        )
    sorted_in = [position for position, key in enumerate(index.keys()) if "/" in key]
    return index.select(sorted_in) if sorted_in and len(sorted_in) < len(index) else index


def _find_classes(
    index: Index,
    given: Classes | None,
    classes_file: str | os.PathLike[str] | None,
    label_rule: LabelRule | None,
    missing_label: int | None,
    *,
    root: str,
    open_root: Callable[[str], Store],
    is_listed: bool,
) -> Classes | None:
    """Read the classes, or number those that occur; None where the keys name none."""
    if given is None and classes_file is not None:
        given = Classes.load(classes_file, label_rule=label_rule)
    is_known = given is not None and (label_rule is not None or given.knows(index.key(0)))
    if not is_known and label_rule is None and is_flat_validation(index):
        return find_validation_classes(index, root, open_root, given, missing_label)
    if given is not None:
        return given
    if label_rule is not None:
        return Classes.from_keys(index.keys(), label_rule=label_rule)
    if is_listed:
        if "/" not in index.key(0):
            return None
        return Classes.from_keys(index.keys(), label_rule=_TOP_FOLDER)
    # A flat index has one folder, such as "val", or none: that is no class.
    keys = index.keys()
    if len({key.rpartition("/")[0].rpartition("/")[2] for key in keys}) == 1:
        return None
    return Classes.from_keys(index.keys(), label_rule="parent")


def _download_if_missing(
    path: str | os.PathLike[str] | None, url: str | None, store_options: dict[str, Any]
) -> None:
    if path is not None and url is not None:
        folder, _, key = url.rpartition("/")
        # Without a cache: images do not change, lists of them do.
        fetch_file_if_missing(path, uncached(open_store(folder, **store_options)), key)
