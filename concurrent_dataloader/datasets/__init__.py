"""Data sets: a sample by its position."""

from concurrent_dataloader.datasets.array_windows import WindowDataset, open_windows
from concurrent_dataloader.datasets.baked import skip_baked
from concurrent_dataloader.datasets.contract import StagedDataset
from concurrent_dataloader.datasets.detection import open_dataset
from concurrent_dataloader.datasets.indexed import IndexedDataset
from concurrent_dataloader.datasets.instances import InstanceShards, shards_of_instance
from concurrent_dataloader.datasets.labelled import SampleMetadata
from concurrent_dataloader.datasets.lmdb import LmdbDataset, SequentialLmdb
from concurrent_dataloader.datasets.memory_cache import MemoryCachedDataset
from concurrent_dataloader.datasets.opening import (
    S3_Dataset,
    S3Dataset,
    ScratchDataset,
)
from concurrent_dataloader.datasets.rebatch import Rebatch
from concurrent_dataloader.datasets.shard_opening import open_shards
from concurrent_dataloader.datasets.shards import ShardDataset
from concurrent_dataloader.datasets.streamed import StreamedShards
from concurrent_dataloader.datasets.windows import SlidingWindow

__all__ = [
    "IndexedDataset",
    "InstanceShards",
    "LmdbDataset",
    "MemoryCachedDataset",
    "Rebatch",
    "S3Dataset",
    "S3_Dataset",
    "SampleMetadata",
    "ScratchDataset",
    "SequentialLmdb",
    "ShardDataset",
    "SlidingWindow",
    "StagedDataset",
    "StreamedShards",
    "WindowDataset",
    "open_dataset",
    "open_shards",
    "open_windows",
    "shards_of_instance",
    "skip_baked",
]
