"""What each process reads of a split, in which order, and in how many steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.utils.data
from typing_extensions import override

from concurrent_dataloader.dataloader_mod.elastic import ElasticDistributedSampler
from concurrent_dataloader.dataloader_mod.settings import OnError
from concurrent_dataloader.datasets import (
    MemoryCachedDataset,
    ShardDataset,
    StreamedShards,
    shards_of_instance,
    skip_baked,
)
from concurrent_dataloader.datasets.baked import match_baked
from concurrent_dataloader.errors import MissingIndexError
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.stores import DiskCache
from concurrent_dataloader.training.arguments import Args
from concurrent_dataloader.training.processes import Place

Loader = torch.utils.data.DataLoader[Any]


class BareStream(StreamedShards):
    """Shards without an index, whose transform leaves out what is baked in, as `ShardDataset`'s."""

    skipped_steps: tuple[str, ...] = ()
    """Those that the transform leaves out."""

    @override
    def set_transform(self, transform: Callable[[Any], Any] | None) -> None:
        """Replace the transform, less what is baked in."""
        self.skipped_steps = match_baked(transform, self.baked_steps).skipped
        super().set_transform(skip_baked(transform, self.baked_steps))


def open_bare_stream(
    args: Args, split: str, transform: Any, classes_file: Path | None, error: MissingIndexError
) -> StreamedShards:
    """Stream the shards of a split that have no index: each reader takes whole ones.

    ``error`` is what opening them with an index came to. It is raised again unless they are to be
    streamed; a classes file of the split is a ValueError, since there is nothing to label by it.
    """
    if not args.stream:
        raise MissingIndexError(f"{error}; or give --stream, which needs none") from error
    if classes_file is not None:
        raise ValueError(
            f"--classes-file: {classes_file}: labels are those in the shards where they have no"
            " index, expected --classes instead, or an index"
        ) from error
    location, cache = error.location, None
    if args.cache_dir is not None:
        limit = {} if args.cache_limit is None else {"limit_bytes": int(args.cache_limit * 1e9)}
        cache = DiskCache(args.cache_dir, **limit)
    is_train, is_own_folder = split == "train", location.rstrip("/").endswith(f"/{split}")
    stream = BareStream(
        location,
        split=None if is_own_folder else split,  # pyright: ignore[reportArgumentType]: one of two
        transform=transform,
        decode=args.decoder,
        shuffle=is_train,
        seed=args.seed,
        uneven="exact",
        length=args.epoch_images if is_train else None,
        endpoint_url=(args.use_cache and args.cache_endpoint_url) or args.endpoint_url,
        credentials=args.s3_credential_file,
        anonymous=args.anonymous,
        cache=cache,
    )
    space = LabelSpace.CUSTOM if stream.classes is None else stream.classes.label_space
    if space is LabelSpace.ILSVRC2012_ID or space is LabelSpace.ILSVRC2012_VALIDATION:
        raise ValueError(
            f"--stream: {location}: the classes count as {space.value}, and are converted by an "
            "index only; write one with `concurrent-dataloader index`"
        )
    stream.set_transform(transform)  # what is baked in is known by now
    return stream


def fit_bare_stream(stream: StreamedShards, place: Place, batch_size: int) -> StreamedShards:
    """Tell a stream its batches; refuse processes without a shard before anything is trained."""
    if stream.num_shards < place.world_size:
        raise ValueError(
            f"--stream: got {stream.num_shards} shards without an index for {place.world_size} "
            f"processes in {stream}, expected one for each; write an index with "
            "`concurrent-dataloader index`"
        )
    stream.set_batch_size(batch_size)
    return stream


def open_stream(args: Args, shards: Any, place: Place, batch_size: int) -> Any:
    """Make a stream of the shards that were opened for random access: the same, front to back."""
    is_parted = args.instances or args.percentage < 100
    if isinstance(shards, StreamedShards):
        if is_parted:
            raise ValueError(
                "--instances, --percentage: the shards have no index, which tells their samples; "
                "write one with `concurrent-dataloader index`"
            )
        return fit_bare_stream(shards, place, batch_size)
    if not isinstance(shards, ShardDataset):
        raise ValueError(f"--stream: {args.data} holds no shards; leave it out, or write some")
    index, labels = shards.shard_index, shards.labels  # as they were converted
    rank, world_size = place.rank, place.world_size
    if is_parted:
        node, num_nodes = (place.node, place.num_nodes) if args.instances else (0, 1)
        with warnings.catch_warnings():
            if place.rank > 0:
                warnings.simplefilter("ignore")  # the first process says it for all
            own = shards_of_instance(shards, node, num_nodes, percentage=args.percentage)
        index, labels = own.index, None if labels is None else labels[own.positions]
        if args.instances:
            rank, world_size = place.local_rank, place.num_local
    return StreamedShards(
        [shard.name for shard in index.shards],
        store=shards.store,
        index=index,
        shuffle=True,
        seed=args.seed,
        batch_size=batch_size,
        labels=labels,
        transform=shards.transform,
        decode=args.decoder,
        # Nodes have different numbers of images: each is trained on, which `Join` allows.
        uneven="exact" if args.instances else None,
        rank=rank,
        world_size=world_size,
    )


def is_uneven(loader: Loader, place: Place) -> bool:
    """Tell whether processes may have different numbers of batches to train on."""
    dataset = loader.dataset
    is_exact = isinstance(dataset, StreamedShards) and dataset.uneven == "exact"
    return is_exact and place.world_size > 1


def count_steps(loader: Any, place: Place) -> int | None:
    """Count the batches of an epoch in this process.

    Of shards without an index it is about that many, and None where nobody counted the images.
    """
    dataset = loader.dataset
    if not isinstance(dataset, StreamedShards) or dataset.has_index:
        return len(loader)
    if dataset.num_samples is None:
        return None
    return math.ceil(dataset.num_samples / (place.world_size * loader.batch_size))


def take_share(
    args: Args, dataset: Any, place: Place, batch_size: int, *, is_train: bool
) -> tuple[Any, Any]:
    """Give what this process reads of a split, and the sampler of its positions, if any."""
    sampler: Any = None
    if is_train and args.stream:
        dataset = open_stream(args, dataset, place, batch_size)
    elif isinstance(dataset, StreamedShards):  # the other split, without an index
        dataset = fit_bare_stream(dataset, place, batch_size)
    elif not is_train:
        # Not a DistributedSampler, which counts images twice to make all shares equal.
        sampler = range(place.rank, len(dataset), place.world_size)
    else:
        if args.memory_cache:
            try:
                dataset = MemoryCachedDataset(dataset, args.memory_cache)
            except (TypeError, MemoryError) as error:
                raise ValueError(f"--memory-cache: {error}") from error
            if place.rank == 0:
                print(f"training images: {dataset.describe()}")
        # The order of a DistributedSampler; an epoch may go on over other processes.
        ranks = (place.world_size, place.rank)
        sampler = ElasticDistributedSampler(dataset, *ranks, seed=args.seed)
    return dataset, sampler


def choose_on_error(args: Args, place: Place, *, is_train: bool) -> OnError:
    """Say what becomes of bad images of a split."""
    if is_train and place.world_size > 1 and args.on_error == "skip":
        # A process whose batch is left out would leave the others waiting for its gradients.
        raise ValueError("--on-error: got skip for several processes, expected raise or replace")
    if not is_train and args.on_error == "replace":
        return "skip"  # another image's accuracy is not that of the bad one
    return args.on_error


def check_steps_are_even(loader: Loader, place: Place) -> None:
    """Refuse checkpoints between steps of processes that have different numbers of them."""
    if is_uneven(loader, place):
        raise ValueError(
            "--checkpoint-steps: processes that have different numbers of batches are not at the "
            "same step when the first one ends, expected an index, and no --instances"
        )


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to whatever orders the samples, if it wants to know."""
    for part in (loader, loader.dataset, loader.sampler, loader.batch_sampler):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
