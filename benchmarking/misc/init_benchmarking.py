"""The data sets of the benchmarks and the trainer, by name."""

from __future__ import annotations

import os
from typing import Any

from concurrent_dataloader.datasets import IndexedDataset, S3Dataset, ScratchDataset
from concurrent_dataloader.stores import CredentialsFile
from concurrent_dataloader.stores.credentials import SPLITS, Split

DATASETS = ("s3", "scratch")
DEFAULT_BUCKET = "imagenet"


def get_dataset(
    dataset: str,
    dataset_type: Split = "val",
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
    **options: Any,
) -> IndexedDataset:
    """Open one split of a data set.

    Args:
        dataset: "s3" or "scratch", which is a local folder.
        dataset_type: "train", "val" or "test"; items of "test" are images alone where there are no
            classes.
        limit: Number of samples; the first ones, or a sample by ``sample_seed`` of the options.
        use_cache: Read from ``cache_endpoint_url``, an HTTP cache in front of the store.
        index_file: JSON index, with keys from the root of all splits. Without one, the images below
            the folder of the split, ``train/``, ``val/`` or ``test/``, are listed.
        classes_file: JSON classes; as in `S3Dataset` when None.
        s3_credential_file: JSON credentials; the standard AWS chain when None. If it names a URL
            for the split's index or classes file, that is downloaded where it is missing.
        endpoint_url: Of an S3-compatible store.
        bucket_name: That of the credentials file when None, or "imagenet".
        prefix: Folder of the bucket that holds all splits.
        data_path: Folder that holds all splits, for "scratch".
        cache_endpoint_url: Where the HTTP cache listens.
        options: What `S3Dataset` or `ScratchDataset` takes besides, such as ``transform``.

    Raises:
        ValueError: A word is not known, or what it needs was not given.
        LoaderError: The index, the classes or the credentials cannot be used.
        FileNotFoundError: A file or folder is missing.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {', '.join(DATASETS)}")
    if dataset_type not in SPLITS:
        raise ValueError(f"dataset_type: got {dataset_type!r}, expected one of {', '.join(SPLITS)}")
    if dataset_type == "test":
        options.setdefault("missing_label", None)
    options |= {"limit": limit, "index_file": index_file, "classes_file": classes_file}
    folder = dataset_type if index_file is None else ""
    if dataset == "scratch":
        if data_path is None:
            raise ValueError("data_path: got None, expected the folder of the data set 'scratch'")
        if use_cache:
            raise ValueError("use_cache: got True with dataset 'scratch', expected dataset 's3'")
        return ScratchDataset(os.path.join(data_path, folder), **options)
    if use_cache and cache_endpoint_url is None:
        raise ValueError(
            "use_cache: got True without cache_endpoint_url, expected the address of an HTTP cache "
            "in front of the store, such as 'http://127.0.0.1:6081'"
        )
    if bucket_name is None and s3_credential_file is not None:
        bucket_name = CredentialsFile(s3_credential_file).read().bucket_name
    return S3Dataset(
        bucket_name or DEFAULT_BUCKET,
        endpoint_url=cache_endpoint_url if use_cache else endpoint_url,
        s3_credential_file=s3_credential_file,
        prefix="/".join(part.strip("/") for part in (prefix, folder) if part),
        split=dataset_type,
        **options,
    )
