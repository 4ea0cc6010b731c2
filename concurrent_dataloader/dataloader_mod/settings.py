"""How far ahead a loader fetches, and with what: arguments checked, defaults chosen."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from torch.utils.data import IterableDataset

from concurrent_dataloader.dataloader_mod.failures import OnError
from concurrent_dataloader.dataloader_mod.resume import GeneratorStates
from concurrent_dataloader.stores.base import Store

FetchImpl = Literal["threaded", "asyncio", "vanilla"]

DEFAULT_NUM_FETCH_WORKERS = 128
"""Samples in flight per worker.

One core decodes and augments about 350 photographs a second, so at 200 ms latency 70 are on their
way at any time; the rest covers the slow tail of the latency, which holds back what comes after it,
since order is kept (benchmarking: loader_epoch).
"""

MAX_CHOSEN_FETCH_WORKERS = 256
"""Samples in flight per worker where stores find that more are of use than the default: small
objects that take no time to decode."""

_MIN_BATCH_POOL = 2
_ENVIRONMENT_PREFIX = "CONCURRENT_DATALOADER_"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FetchSettings:
    """What a worker is told. Pickles to workers that are spawned."""

    fetch_impl: FetchImpl = "threaded"

    num_fetch_workers: int = DEFAULT_NUM_FETCH_WORKERS
    """Samples in flight per worker, unless stores find that fewer or more are of use."""

    max_fetch_workers: int | None = None
    """To how many stores may raise it; None: the number is fixed, and no store has a say."""

    batch_pool: int = 4
    """Batches begun beyond the one that is being assembled, per worker."""

    max_batch_pool: int | None = None
    """As many where more samples are in flight than `num_fetch_workers`; None: no more."""

    prefetch_factor: int = 2
    """Batches that a worker may finish before the first of them is taken, torch's default."""

    takes_counted: bool = False
    """Whether the parent says when it takes a batch.

    Our loader does, since it sends index lists further ahead than finished batches may pile up.
    torch's own sends no more than ``prefetch_factor``, which bounds them by itself.
    """

    on_error: OnError = "raise"
    """What becomes of a sample that fails."""

    timeout_s: float = 0.0
    """How long a batch may be waited for; 0: without end."""

    sends_states: bool = False
    """Whether each batch is preceded by how the worker stands; our loader wants it."""

    base_seed: int | None = None
    """In place of torch's, when an epoch is resumed."""

    generators: Mapping[int, GeneratorStates] = dataclasses.field(
        default_factory=dict[int, GeneratorStates]
    )
    """States that the global generators of a worker begin with, when an epoch is resumed."""

    dataset: bytes | None = None
    """Where the datasets of workers begin that `datasets` does not know."""

    datasets: Mapping[int, bytes] = dataclasses.field(default_factory=dict[int, bytes])
    """Where the dataset of a worker goes on, when an epoch is resumed."""


def check_dataset(dataset: Any) -> None:
    """Refuse what torch's loader could not read, before it fails with the first batch.

    Raises:
        TypeError: It has neither positions nor is it an ``IterableDataset``; or it is a name.
    """
    is_name = isinstance(dataset, str | os.PathLike)
    has_items = hasattr(type(dataset), "__getitem__")
    has_batches = not isinstance(dataset, type) and hasattr(dataset, "__getitems__")
    if isinstance(dataset, IterableDataset) or (not is_name and (has_items or has_batches)):
        return
    got, advice = type(dataset).__name__, "give it __getitem__ and __len__, or derive it from one"
    if is_name:
        advice = "open it with open_dataset(...), or StreamedShards(...) to read front to back"
    elif isinstance(dataset, type):
        got, advice = f"the class {dataset.__name__}", "make one of it by calling it"
    elif isinstance(dataset, Store):
        got = f"a store ({got}), which gives bytes by key"
        advice = (
            "open a dataset of what it holds: open_dataset(URL) takes the arguments of open_store, "
            "IndexedDataset and StreamedShards take the store"
        )
    raise TypeError(
        f"dataset: got {got}, expected a dataset with positions, or a torch.utils.data."
        f"IterableDataset; {advice}"
    )


def check_fetch_impl(fetch_impl: object, where: str = "fetch_impl") -> FetchImpl:
    """Give back a known word, else raise ValueError."""
    if fetch_impl not in get_args(FetchImpl):
        raise ValueError(
            f"{where}: got {fetch_impl!r}, expected 'threaded', 'asyncio' or 'vanilla'"
        )
    return cast(FetchImpl, fetch_impl)


MAX_NUM_FETCH_WORKERS = 4096
"""More threads than this in a process are a mistake in typing."""


MAX_BATCH_POOL = 4096
"""More batches than this begun ahead would hold all memory before the first one comes."""


def check_count(value: object, minimum: int, where: str, maximum: int = 2**31) -> int:
    """Give back a whole number within the bounds, else raise TypeError or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{where}: got {value!r}, expected None or a whole number")
    count = int(cast(int, value))
    if count < minimum:
        raise ValueError(f"{where}: got {count}, expected {minimum} or more")
    if count > maximum:
        raise ValueError(f"{where}: got {count}, expected {maximum} or fewer")
    return count


def choose_batch_pool(num_fetch_workers: int, batch_size: int | None) -> int:
    """Choose how many batches to begin ahead.

    Twice as many samples are begun as may be in flight, so that a slow one at the head does not
    leave the others without work; and always two batches, since the next ones are begun only
    between batches.

    Args:
        num_fetch_workers: Samples in flight per worker.
        batch_size: Samples of a batch; None if it is not known, 1 without automatic batching.
    """
    if batch_size is None:
        return _MIN_BATCH_POOL
    return max(_MIN_BATCH_POOL, -(-2 * num_fetch_workers // max(1, batch_size)))


def read_environment(environment: Mapping[str, str] = os.environ) -> FetchSettings:
    """Read the settings for workers of torch's own loader, whose loop a user replaced by ours.

    Variables: ``CONCURRENT_DATALOADER_FETCH_IMPL``, ``..._NUM_FETCH_WORKERS``, ``..._BATCH_POOL``.

    Raises:
        ValueError: A variable is set to what its argument would not take.
    """

    def read_count(name: str, minimum: int, default: int, maximum: int = 2**31) -> int:
        text = environment.get(_ENVIRONMENT_PREFIX + name)
        if text is None:
            return default
        if not text.strip().isdigit():
            raise ValueError(
                f"{_ENVIRONMENT_PREFIX}{name}: got {text!r}, expected a whole number; "
                "unset it for the default"
            )
        return check_count(int(text), minimum, _ENVIRONMENT_PREFIX + name, maximum)

    name = _ENVIRONMENT_PREFIX + "FETCH_IMPL"
    return FetchSettings(
        fetch_impl=check_fetch_impl(environment.get(name, "threaded"), name),
        num_fetch_workers=read_count(
            "NUM_FETCH_WORKERS", 1, DEFAULT_NUM_FETCH_WORKERS, MAX_NUM_FETCH_WORKERS
        ),
        max_fetch_workers=(
            None
            if _ENVIRONMENT_PREFIX + "NUM_FETCH_WORKERS" in environment
            else MAX_CHOSEN_FETCH_WORKERS
        ),
        batch_pool=read_count("BATCH_POOL", 0, FetchSettings().batch_pool, MAX_BATCH_POOL),
    )
