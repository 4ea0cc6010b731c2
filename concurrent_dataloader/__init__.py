"""A drop-in PyTorch DataLoader for data behind latency, and what surrounds it.

The rooms, in the order in which data flows; imports point to the left only:

```text
core_files, errors, ranges, threads, files, packed, shard_names
    <-  stores, formats, index, labels  <-  shard_index  <-  distribution
    <-  datasets  <-  dataloader_mod, prepare  <-  imagenet_loader, training;  testing stands alone
```

``stores`` give bytes by key, ``formats`` turn bytes into samples and back, ``index`` knows which
samples exist, ``shard_index`` where in shards, and ``labels`` which class each belongs to,
``datasets`` join them to samples by position, ``dataloader_mod`` makes batches, ``prepare`` holds
the commands, ``training`` what ``imagenet.py`` needs besides the loader, ``testing`` an object
server with latency and faults. Names below are imported when first used, so that commands start
without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
    from concurrent_dataloader.dataloader_mod.elastic import ElasticDistributedSampler
    from concurrent_dataloader.dataloader_mod.failures import ErrorBudget
    from concurrent_dataloader.datasets import (
        IndexedDataset,
        LmdbDataset,
        S3_Dataset,
        S3Dataset,
        ScratchDataset,
        ShardDataset,
        StagedDataset,
        StreamedShards,
        open_dataset,
    )
    from concurrent_dataloader.imagenet_loader import ImagenetLoader
    from concurrent_dataloader.index import Index
    from concurrent_dataloader.stores import open_store

__version__ = "0.1.0"

__all__ = [
    "DataLoader",
    "ElasticDistributedSampler",
    "ErrorBudget",
    "ImagenetLoader",
    "Index",
    "IndexedDataset",
    "LmdbDataset",
    "S3Dataset",
    "S3_Dataset",
    "ScratchDataset",
    "ShardDataset",
    "StagedDataset",
    "StreamedShards",
    "open_dataset",
    "open_store",
]

_HOMES = {
    "DataLoader": "concurrent_dataloader.dataloader_mod.dataloader",
    "ElasticDistributedSampler": "concurrent_dataloader.dataloader_mod.elastic",
    "ErrorBudget": "concurrent_dataloader.dataloader_mod.failures",
    "Index": "concurrent_dataloader.index",
    "ImagenetLoader": "concurrent_dataloader.imagenet_loader",
    "IndexedDataset": "concurrent_dataloader.datasets",
    "LmdbDataset": "concurrent_dataloader.datasets",
    "S3Dataset": "concurrent_dataloader.datasets",
    "S3_Dataset": "concurrent_dataloader.datasets",
    "ScratchDataset": "concurrent_dataloader.datasets",
    "ShardDataset": "concurrent_dataloader.datasets",
    "StagedDataset": "concurrent_dataloader.datasets",
    "StreamedShards": "concurrent_dataloader.datasets",
    "open_dataset": "concurrent_dataloader.datasets",
    "open_store": "concurrent_dataloader.stores",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
