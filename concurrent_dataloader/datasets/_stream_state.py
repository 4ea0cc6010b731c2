"""What a stream says of itself: whose state it is, how far that reader was, what else is needed."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from concurrent_dataloader.datasets._rest import Part
from concurrent_dataloader.datasets._split import Reader
from concurrent_dataloader.datasets.contract import ReaderState

VERSION = 2

FREE_SETTINGS = (*Reader._fields, "batch_size")
"""What may be another when the rest of an epoch is parted anew."""


class Stand(NamedTuple):
    """How far a reader is in an epoch."""

    reader: Reader

    epoch: tuple[int, int] | None
    """What the order is drawn with; None: it has not begun, and does not know it."""

    part: Part | None
    """None: the whole epoch."""

    position: Mapping[str, Any] | None
    """As of ``ShardReader.state``; None: nothing is read."""

    is_over: bool

    number: int
    """Of the epoch, as this reader counts them."""

    batch_size: int | None


def read_state(state: Mapping[str, Any], expected: str) -> dict[str, Any]:
    """Check that something is a state; those of the first version had no parts."""
    version = state.get("version")
    if version not in (1, VERSION) or "made_for" not in state:
        raise ValueError(f"state_dict: got version {version!r}, expected {VERSION} of a {expected}")
    return {"part": None, "is_over": False, **state}


def check_version(states: Sequence[Mapping[str, Any]]) -> None:
    """Refuse states of which not enough is known to part what is left."""
    for state in states:
        if state["version"] != VERSION:
            raise ValueError(
                f"state_dict: got version {state['version']}, expected {VERSION} to part the rest "
                "of an epoch anew; let it come to its end with as many ranks and workers"
            )


def resumes(state: Mapping[str, Any]) -> bool:
    """Tell whether a state is of the middle of an epoch."""
    return state["reader"] is not None or (state["part"] is not None and not state["is_over"])


def saved_by(state: Mapping[str, Any]) -> Reader | None:
    """Give the reader whose state it is; None: it is for any of a part."""
    made_for = state["made_for"]
    if "worker" not in made_for:
        return None
    return Reader(*(made_for[name] for name in Reader._fields))


def number_of(state: Mapping[str, Any]) -> int:
    """Give the number of the epoch that is under way, or that was the last."""
    return (state["first_epoch"] or 0) + state["iteration"]


def are_between_epochs(states: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether all are of the same moment between two epochs, or before the first."""
    return not any(map(resumes, states)) and len(set(map(number_of, states))) == 1


def find_readers(states: Sequence[Mapping[str, Any]]) -> list[ReaderState]:
    """Find out which of the states between two epochs are of the end of this one."""
    found: list[ReaderState] = []
    numbers = [number_of(each) for each in states]
    for state, number in zip(states, numbers, strict=True):
        reader = saved_by(state) or Reader()
        is_over = state["is_over"] and number == max(numbers)
        found.append(ReaderState(state, *reader, is_over))
    return found


def describe_stand(saved: ReaderState) -> Stand:
    """Tell how far a reader is, of what it said of itself."""
    state = saved.state
    base = (state["first_epoch"] or 0) + state["iteration"]
    reader = Reader(saved.rank, saved.world_size, saved.worker, saved.num_workers)
    batch_size = state["made_for"].get("batch_size")
    epoch = None if state["epoch"] is None else (state["epoch"][0], state["epoch"][1])
    part = None if state["part"] is None else Part(*state["part"])
    if saved.is_over:
        return Stand(reader, epoch, part, None, True, base, batch_size)
    is_fresh = state["reader"] is None and (part is None or state["is_over"])
    if is_fresh:
        return Stand(reader, None, None, None, False, base + 1, batch_size)
    return Stand(reader, epoch, part, state["reader"], False, base, batch_size)


def check_complete(readers: Sequence[Reader], place: tuple[int, int]) -> None:
    """Check that these are all readers of this rank, or of all ranks if they were as many.

    Args:
        readers: Whose states were given.
        place: The rank that goes on, and the number of ranks now.

    Raises:
        ValueError: One is missing, or came twice.
    """
    how = "give the states of all of them, saved at the same step, as a list in any order"
    sizes = sorted({reader.world_size for reader in readers})
    if len(sizes) > 1:
        raise ValueError(
            f"state_dict: got states of {' and of '.join(map(str, sizes))} ranks, expected those "
            f"of one run; {how}"
        )
    rank, world_size = place
    is_mine = sizes[0] == world_size
    got = sorted({reader.rank for reader in readers})
    named = f"state_dict: got the state of rank {', '.join(map(str, got))} of {sizes[0]}, expected"
    wanted = [rank] if is_mine else list(range(sizes[0]))
    missing = [each for each in wanted if each not in got]
    if missing and is_mine:
        raise ValueError(f"{named} that of rank {rank}, which goes on here; {how}")
    if missing:
        raise ValueError(
            f"{named} also that of rank {', '.join(map(str, missing))} to part the rest of the "
            f"epoch among {world_size}; {how}"
        )
    for each in wanted:
        _check_workers([reader for reader in readers if reader.rank == each], how)


def _check_workers(readers: Sequence[Reader], how: str) -> None:
    rank, num_workers = readers[0].rank, readers[0].num_workers
    counts = collections.Counter(reader.worker for reader in readers)
    twice = [worker for worker, times in counts.items() if times > 1]
    if twice or any(reader.num_workers != num_workers for reader in readers):
        raise ValueError(
            f"state_dict: got rank {rank} twice (worker {', '.join(map(str, twice or counts))} "
            f"of it), expected each once; {how}"
        )
    missing = [worker for worker in range(num_workers) if worker not in counts]
    if missing:
        raise ValueError(
            f"state_dict: got the state of worker {', '.join(map(str, counts))} of {num_workers} "
            f"of rank {rank}, expected also that of worker {', '.join(map(str, missing))}; {how}"
        )


def check_same_epoch(stands: Sequence[Stand]) -> None:
    """Check that all are in the same epoch, and in the same part of it.

    Raises:
        ValueError: They are not.
    """
    how = "save all ranks at the same step"
    first = stands[0]
    for each in stands[1:]:
        is_other = first.epoch and each.epoch and first.epoch[0] != each.epoch[0]
        if each.number != first.number or is_other:
            raise ValueError(
                f"state_dict: got rank {first.reader.rank} in epoch {first.number} and rank "
                f"{each.reader.rank} in epoch {each.number}, expected all ranks in the same "
                f"epoch; {how}"
            )
    # What one rank parts among its workers differs from rank to rank.
    shared = [each for each in stands if each.part is None or each.part.is_shared]
    shared = [each for each in shared if not (each.is_over and each.part is None)]
    for each in shared[1:]:
        if each.part != shared[0].part:
            raise ValueError(
                f"state_dict: got rank {shared[0].reader.rank} and rank {each.reader.rank} in "
                "different parts of an epoch, one from before and one from after it was parted "
                f"anew, expected all in the same; {how}"
            )
