"""Checkpoints: written whole, read without executing anything, gone on from in mid-epoch."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from concurrent_dataloader.training.arguments import Args
from concurrent_dataloader.training.processes import Place
from concurrent_dataloader.training.report import NO_SUMS
from concurrent_dataloader.training.shares import count_steps


def describe_middle(place: Place, loader: Any, num_steps_done: int, sums: Tensor) -> dict[str, Any]:
    """Say where an epoch is: loader and sums of all processes, so each goes on by its own."""
    states: list[Any] = [(loader.state_dict(), sums.tolist())]
    if place.world_size > 1:
        mine, states = states[0], states * place.world_size
        dist.all_gather_object(states, mine)
    loaders, all_sums = map(list, zip(*states, strict=True))
    steps = {"step": num_steps_done, "num_steps": count_steps(loader, place)}
    return {**steps, "loaders": loaders, "sums": all_sums}


def go_on_in_epoch(
    args: Args, place: Place, loader: Any, middle: dict[str, Any]
) -> tuple[int, Tensor]:
    """Let the loader go on in the middle of an epoch; gives the steps that are done, and the sums.

    Among another number of processes what is left is parted anew, and the steps done are those of
    as large a part of the epoch; each has an equal part of the sums.
    """
    if args.loader == "torch" or args.fetch_impl == "vanilla":
        raise ValueError(
            f"--resume: {args.resume} is of the middle of an epoch, where torch's loader cannot "
            "begin; leave out --loader and --fetch-impl"
        )
    states = middle["loaders"]
    loader.load_state_dict(states)
    num_done, num_steps = middle["step"], count_steps(loader, place)
    if num_steps is not None and middle["num_steps"] is not None:
        num_done = round(num_done * num_steps / middle["num_steps"])
    if "sums" not in middle:  # of a checkpoint that was written before these were in it
        return num_done, NO_SUMS
    sums = torch.tensor(middle["sums"], dtype=torch.float64)
    if len(states) == place.world_size:
        return num_done, sums[place.rank]
    measured, times = sums[:, :4].sum(0) / place.world_size, sums[:, 4:6].mean(0)
    return num_done, torch.cat([measured, times, sums.new_tensor([num_done])])


def write_checkpoint(folder: Path, state: dict[str, Any], *, is_best: bool) -> None:
    """Write what a run needs to go on. Readers find the old file or the new one, whole."""
    path, part = (folder / f"checkpoint.{end}" for end in ("pth.tar", "part"))
    torch.save(state, part)
    os.replace(part, path)
    if is_best:
        shutil.copyfile(path, part)
        os.replace(part, path.with_name("model_best.pth.tar"))


def read_checkpoint(path: Path, arch: str) -> dict[str, Any]:
    """Read a checkpoint of ours, or of PyTorch's example; nothing in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("module."): each for name, each in state["state_dict"].items()}
        known = {"arch": state["arch"], "epoch": int(state["epoch"])}
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
        raise ValueError(
            f"--resume: {path}: got no checkpoint of a trainer "
            f"({type(error).__name__} when it was read), expected a checkpoint.pth.tar of this one "
            "or of PyTorch's example"
        ) from error
    if known["arch"] != arch:
        raise ValueError(f"--resume: {path} holds a {known['arch']}, got --arch {arch}")
    return {**state, **known, "state_dict": weights}


def load_published(model: nn.Module, arch: str) -> list[str]:
    """Load torchvision's weights where they fit; gives the names of those that begin anew."""
    weights = torchvision.models.get_model(arch, weights="DEFAULT").state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitting = {name: tensor for name, tensor in weights.items() if tensor.shape == shapes[name]}
    model.load_state_dict(fitting, strict=False)
    return sorted(shapes.keys() - fitting.keys())


def advise_resume(folder: Path, begun_s: float) -> str:
    """Say how to go on with a run that was stopped; another run's checkpoint is not its own."""
    path = folder / "checkpoint.pth.tar"
    if path.exists() and path.stat().st_mtime >= begun_s:
        return f"go on with --resume {path}"
    return "it had written no checkpoint yet"
