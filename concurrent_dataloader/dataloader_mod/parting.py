"""Which saved state this loader goes on in, of those of several ranks; and the rest parted anew.

A sampler's rank goes on in its own state. Of a dataset that is an `ElasticStream` the states of all
who read it are merged into one, in which each new reader begins, where there are other ranks or
workers than there were.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from concurrent_dataloader.dataloader_mod import order
from concurrent_dataloader.dataloader_mod.resume import EpochState, freeze, thaw
from concurrent_dataloader.datasets.contract import ReaderState


def read_states(state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[EpochState]:
    """Read the state of one rank, or those of all.

    Raises:
        ValueError: They are none, or not those of all ranks of one run.
        TypeError: It is something else.
    """
    if not isinstance(state_dict, list | tuple):
        return [EpochState.from_dict(state_dict)]  # pyright: ignore[reportArgumentType]: checked there
    states = [EpochState.from_dict(each) for each in state_dict]
    how = "give those of all ranks, saved at the same step, in any order"
    if not states:
        raise ValueError(f"load_state_dict: got an empty list of states; {how}")
    sizes = sorted({state.place[1] for state in states})
    counts = collections.Counter(state.place[0] for state in states)
    missing = [rank for rank in range(sizes[0]) if rank not in counts]
    twice = [rank for rank, times in counts.items() if times > 1]
    for found, what in (
        (sizes if len(sizes) > 1 else [], "states of different numbers of ranks: {}"),
        (missing, "no state of rank {}"),
        (twice, "more than one state of rank {}"),
    ):
        if found:
            named = what.format(", ".join(map(str, found)))
            raise ValueError(
                f"load_state_dict: got {named}, expected one of each rank of {sizes[-1]}; {how}"
            )
    if len({state.begin is None for state in states}) > 1:
        between = [str(state.place[0]) for state in states if state.begin is None]
        raise ValueError(
            f"load_state_dict: got rank {', '.join(between)} between two epochs and others in the "
            f"middle of one, expected all ranks in the same epoch; {how}"
        )
    return states


def choose_state(loader: Any, states: Sequence[EpochState]) -> EpochState:
    """Choose this rank's state, or make that of a rest which is parted anew.

    Raises:
        ValueError: The rest cannot be parted from these states.
    """
    place = order.find_place(loader)
    mine = [state for state in states if state.place == place]
    state = (mine or states)[0]
    has_dataset = state.dataset is not None or bool(state.datasets)
    if state.begin is None or not has_dataset or not order.is_elastic(loader):
        return state
    # Without workers and with one, all is read by one reader.
    if mine and max(1, state.num_workers) == max(1, loader.num_workers):
        return state
    readers = [reader for each in states for reader in _find_readers(each)]
    merged = loader.dataset.merge_states(readers)
    dataset = freeze({"dataset": dict(merged), "iterator": None, "is_over": False})
    return dataclasses.replace(
        state,
        num_taken=0,
        base_seed=None,
        num_workers=loader.num_workers,
        batch_size=loader.batch_size,
        place=place,
        workers={},
        dataset=dataset,
        datasets={},
        next_worker=0,
    )


def _find_readers(state: EpochState) -> list[ReaderState]:
    """Give the dataset's states in all workers of a rank; some may not have given anything."""
    num_workers = max(1, state.num_workers)
    found: list[ReaderState] = []
    for worker in range(num_workers):
        saved = thaw(state.datasets.get(worker, state.dataset))
        found.append(
            ReaderState(saved["dataset"], *state.place, worker, num_workers, saved["is_over"])
        )
    return found
