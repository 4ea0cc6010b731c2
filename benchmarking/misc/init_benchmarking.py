"""The data sets of the benchmarks and the trainer, by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from concurrent_dataloader.datasets import (
    S3Dataset,
    ScratchDataset,
    ShardDataset,
    StagedDataset,
    open_dataset,
    open_shards,
)
from concurrent_dataloader.datasets.detection import open_lmdb_split
from concurrent_dataloader.errors import MissingSplitError
from concurrent_dataloader.stores import CredentialsFile, DiskCache
from concurrent_dataloader.stores.credentials import SPLITS, Split

DATASETS = ("s3", "scratch", "folder", "webdataset", "tfrecord", "lmdb", "auto")
_LOCAL = ("scratch", "folder", "lmdb")
_REMOTE = ("s3://", "http://", "https://")
DEFAULT_BUCKET = "imagenet"


def get_dataset(
    dataset: str,
    dataset_type: Split | None = "val",
    limit: int | None = None,
    use_cache: bool = False,
    index_file: str | os.PathLike[str] | None = None,
    classes_file: str | os.PathLike[str] | None = None,
    s3_credential_file: str | os.PathLike[str] | None = None,
    endpoint_url: str | None = None,
    *,
    bucket_name: str | None = None,
    prefix: str | None = None,
    data_path: str | os.PathLike[str] | None = None,
    cache_endpoint_url: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_limit_bytes: int | None = None,
    **options: Any,
) -> Any:
    """Open one split of a data set.

    Args:
        dataset: "s3", one object for each image; "scratch" or "folder", one file each; packed:
            "webdataset" (tar shards) or "tfrecord", in a folder or a bucket, with their index
            ``train-index.npz``, and "lmdb", ``ILSVRC-train.lmdb`` in a folder; or "auto", what
            `open_dataset` finds there.
        dataset_type: "train", "val" or "test"; items of "test" are images alone where there are no
            classes. None: all that lies there, where it is not parted into splits.
        limit: Number of samples; the first ones, or a sample by ``sample_seed`` of the options.
        use_cache: Read through the caches that are given: ``cache_endpoint_url``, an HTTP cache in
            front of the store, ``cache_dir``, a folder of this machine, or both. They are left
            aside when False.
        index_file: JSON index, with keys from the root of all splits. Without one, the images below
            the folder of the split, ``train/``, ``val/`` or ``test/``, are listed. For shards, an
            index of byte ranges.
        classes_file: JSON classes; as in `S3Dataset` when None.
        s3_credential_file: JSON credentials; the standard AWS chain when None. If it names a URL
            for the split's index or classes file, that is downloaded where it is missing.
        endpoint_url: Of an S3-compatible store.
        bucket_name: That of the credentials file when None, or "imagenet".
        prefix: Folder of the bucket that holds all splits.
        data_path: Folder that holds all splits; of packed data also a URL. None: the bucket.
        cache_endpoint_url: Where the HTTP cache listens.
        cache_dir: Folder to keep in what was read, as `DiskCache` does.
        cache_limit_bytes: The most that it may take; the default of `DiskCache` when None.
        options: What the data set's class takes besides, such as ``transform``.

    Returns:
        An `S3Dataset`, `ScratchDataset`, `ShardDataset` or `LmdbDataset`.

    Raises:
        ValueError: A word is not known, or what it needs was not given.
        LoaderError: The index, the classes or the credentials cannot be used.
        FileNotFoundError: A file or folder is missing; a MissingSplitError if only the split is.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {', '.join(DATASETS)}")
    if dataset_type is not None and dataset_type not in SPLITS:
        raise ValueError(f"dataset_type: got {dataset_type!r}, expected one of {', '.join(SPLITS)}")
    if dataset_type == "test":
        options.setdefault("missing_label", None)
    options |= {"limit": limit, "index_file": index_file, "classes_file": classes_file}
    if dataset in _LOCAL:
        return _open_local(dataset, dataset_type, data_path, use_cache, options)
    if use_cache:
        if data_path is not None and not os.fspath(data_path).startswith(_REMOTE):
            raise ValueError(f"use_cache: got True with the folder {data_path}, expected a URL")
        options["cache"] = _choose_cache(cache_endpoint_url, cache_dir, cache_limit_bytes)
    if bucket_name is None and s3_credential_file is not None:
        bucket_name = CredentialsFile(s3_credential_file).read().bucket_name
    options |= {
        "endpoint_url": (use_cache and cache_endpoint_url) or endpoint_url,
        "s3_credential_file": s3_credential_file,
        "split": dataset_type,
    }
    if dataset == "s3":
        folder = (dataset_type or "") if index_file is None else ""
        return S3Dataset(bucket_name or DEFAULT_BUCKET, prefix=_join(prefix, folder), **options)
    in_bucket = f"s3://{_join(bucket_name or DEFAULT_BUCKET, prefix)}"
    location = in_bucket if data_path is None else os.fspath(data_path)
    if dataset == "auto":
        return open_dataset(location, **options)
    return _check_kind(open_shards(location, **options), dataset)


def _choose_cache(
    endpoint_url: str | None, folder: str | os.PathLike[str] | None, limit_bytes: int | None
) -> DiskCache | None:
    if folder is None and limit_bytes is not None:
        raise ValueError(f"cache_limit_bytes: got {limit_bytes} without cache_dir, expected both")
    if folder is not None:
        return DiskCache(folder) if limit_bytes is None else DiskCache(folder, limit_bytes)
    if endpoint_url is None:
        raise ValueError(
            "use_cache: got True without cache_endpoint_url and cache_dir, expected the address of "
            "an HTTP cache in front of the store, such as 'http://127.0.0.1:6081', or a folder"
        )
    return None


def _open_local(
    dataset: str,
    dataset_type: Split | None,
    data_path: str | os.PathLike[str] | None,
    use_cache: bool,
    options: dict[str, Any],
) -> StagedDataset[Any, Any]:
    if data_path is None:
        raise ValueError(f"data_path: got None, expected the folder of the data set {dataset!r}")
    if use_cache:
        raise ValueError(f"use_cache: got True with dataset {dataset!r}, expected dataset 's3'")
    if dataset == "lmdb":
        return open_lmdb_split(data_path, dataset_type, options)
    folder = (dataset_type or "") if options["index_file"] is None else ""
    root = Path(data_path).expanduser()
    if root.is_dir() and not (root / folder).is_dir():
        error = MissingSplitError(
            f"{root}: has no folder {folder!r} for the split asked for, expected {root / folder}"
        )
        error.splits = tuple(split for split in SPLITS if (root / split).is_dir())
        raise error
    return ScratchDataset(os.path.join(data_path, folder), **options)


def _join(*parts: str | None) -> str:
    return "/".join(part.strip("/") for part in parts if part)


def _check_kind(opened: ShardDataset, dataset: str) -> ShardDataset:
    kind = {"webdataset": "tar", "tfrecord": "tfrecord"}[dataset]
    if opened.shard_index.kind != kind:
        raise ValueError(
            f"dataset: got {dataset!r}, but the shards are of kind {opened.shard_index.kind!r}; "
            "expected 'auto', or the kind that they are"
        )
    return opened
