"""The processes that train together: where this one stands, and what it draws by."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from concurrent_dataloader.training.arguments import Args


class Place(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int
    world_size: int
    num_local: int
    device: torch.device
    local_rank: int = 0
    node: int = 0
    num_nodes: int = 1


@contextlib.contextmanager
def join_processes(local_rank: int, args: Args) -> Generator[Place]:
    """Choose the device and meet the other processes, under torchrun or by the example's flags."""
    by_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if by_torchrun:
        words = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
        rank, world_size, num_local, local_rank = (int(os.environ[word]) for word in words)
        node = int(os.environ.get("GROUP_RANK", rank // num_local))
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", world_size // num_local))
    else:
        num_local = max(args.num_gpus, 1) if args.multiprocessing_distributed else 1
        node, num_nodes = max(args.rank, 0), max(args.world_size, 1)
        rank, world_size = node * num_local + local_rank, num_nodes * num_local
    device = torch.device("cpu")
    if args.num_gpus:
        device = torch.device("cuda", local_rank if args.gpu is None else args.gpu)
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = args.dist_backend if args.num_gpus else "gloo"
        url = "env://" if by_torchrun else args.dist_url
        dist.init_process_group(backend, url, world_size=world_size, rank=rank)
    try:
        yield Place(rank, world_size, num_local, device, local_rank, node, num_nodes)
        if world_size > 1:
            # gloo's threads must have let go of the last tensors when they are joined, which is
            # done under the interpreter's lock; torch 2.6 hung here once in four runs.
            dist.barrier()
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def settle_seed(args: Args, place: Place, known: int | None) -> int:
    """Take the seed that was given, a checkpoint's, or one that the first process draws for all.

    cuDNN is deterministic if one was given, and as fast as can be otherwise.
    """
    torch.backends.cudnn.deterministic = args.seed is not None
    torch.backends.cudnn.benchmark = args.seed is None
    if args.seed is not None and args.num_gpus and place.rank == 0:
        print("--seed: cuDNN is deterministic, which makes runs equal, and slower")
    seed = known if args.seed is None else args.seed
    if seed is not None:
        return seed
    drawn = torch.tensor(random.SystemRandom().randrange(2**31), device=place.device)
    if place.world_size > 1:
        dist.broadcast(drawn, src=0)
    return int(drawn)


def seed_epoch(seed: int, epoch: int, place: Place) -> None:
    """Let all that is random in an epoch follow from the seed, the epoch and the process.

    So the epoch after a resume is that of an uninterrupted run, with no generator to be saved.
    """
    words = np.random.SeedSequence([seed, epoch + 1, place.rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))
