"""What decides on the order: asked again for what was delivered, or put where it was.

A sampler is replayed: its generators are put back, and it is asked for all that was delivered. One
that has ``state_dict`` and ``load_state_dict``, or whose iterator has them, is put into its state
instead, as ``torchdata``'s ``StatefulDataLoader`` does it: the sampler before it is made an
iterator, the iterator then. It is asked for batches ahead of what the training loop takes, so its
state is read after each answer, and the one that belongs to the last batch taken is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from concurrent_dataloader.dataloader_mod import torch_internals
from concurrent_dataloader.dataloader_mod.dataset_state import describe_unread
from concurrent_dataloader.dataloader_mod.resume import (
    EpochState,
    freeze,
    is_stateful,
    read_generators,
    thaw,
    write_generators,
)
from concurrent_dataloader.datasets.contract import ElasticStream


def find_generators(loader: Any) -> list[torch.Generator]:
    """Find the generators of the user's own that decide on the order."""
    samplers = (loader, loader.sampler, loader.batch_sampler)
    inner = getattr(loader.batch_sampler, "sampler", None)
    found = [getattr(each, "generator", None) for each in (*samplers, inner)]
    return [
        each
        for number, each in enumerate(found)
        if isinstance(each, torch.Generator) and not any(each is other for other in found[:number])
    ]


def find_place(loader: Any) -> tuple[int, int]:
    """Find the rank that this loader reads for, and the number of ranks."""
    sampler = _find_distributed(loader)
    if sampler is not None:
        return sampler.rank, sampler.num_replicas
    if is_elastic(loader):
        return loader.dataset.find_place()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_elastic(loader: Any) -> bool:
    """Tell whether the rest of an epoch can be parted anew by the dataset."""
    is_stream = loader._dataset_kind == torch_internals.DatasetKind.Iterable
    return is_stream and isinstance(loader.dataset, ElasticStream)


def count_samples(loader: Any) -> int | None:
    """Give the length of a map-style dataset; None if it has none, or is iterable."""
    is_map = loader._dataset_kind == torch_internals.DatasetKind.Map
    return len(loader.dataset) if is_map and hasattr(loader.dataset, "__len__") else None


def _find_distributed(loader: Any) -> DistributedSampler[Any] | None:
    for each in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(each, DistributedSampler):
            return each
    return None


def name_sampler(loader: Any) -> str | None:
    """Name what kind of sampler is asked again for what was delivered, as a loader's state has it.

    None for those that are not compared: one that is put into a state of its own, a
    ``DistributedSampler``, and one that makes the batches itself.
    """
    sampler: Any = loader._index_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    elif loader.batch_size is None and loader.batch_sampler is not None:
        return None
    is_map = loader._dataset_kind == torch_internals.DatasetKind.Map
    if not is_map or is_stateful(sampler) or isinstance(sampler, DistributedSampler):
        return None
    # A list of positions and a range of them may stand for each other.
    name = type(sampler).__name__ if isinstance(sampler, Sampler) else "a plain iterable"
    if type(sampler) is RandomSampler or type(sampler) is WeightedRandomSampler:
        name += f"(replacement={sampler.replacement}, num_samples={sampler.num_samples})"
    return name


def tell_batch_size(dataset: Any, batch_size: int) -> None:
    """Tell an iterable dataset that wants to know which batches are made of its samples."""
    if isinstance(dataset, IterableDataset):
        set_batch_size = getattr(dataset, "set_batch_size", None)
        if callable(set_batch_size):
            set_batch_size(batch_size)


def describe_between_epochs(loader: Any) -> EpochState:
    """Say what the next epoch's order follows from, as far as the user gave it to the loader."""
    dataset = describe_unread(loader.dataset) if loader.num_workers == 0 else None
    return EpochState(
        generators=[generator.get_state() for generator in find_generators(loader)],
        sampler=Order(loader, EpochState(), resumes=False).read(),
        datasets={} if dataset is None else {0: dataset},
        batch_size=loader.batch_size,
        place=find_place(loader),
    )


def describe_unasked(loader: Any, state: EpochState) -> EpochState:
    """Say with which draws an epoch's sampler will begin that was not asked yet.

    Without workers it is asked with the first batch, after torch drew a seed for workers, and
    whatever the training loop drew; with workers it was asked at once.
    """
    is_map = loader._dataset_kind == torch_internals.DatasetKind.Map
    if state.first is not None or not is_map:
        return state
    generators = [generator.get_state() for generator in find_generators(loader)]
    return dataclasses.replace(state, first=read_generators(), first_generators=generators)


def take_over(loader: Any, state: EpochState) -> None:
    """Check that an epoch can be had again from this loader; prepare one that has not begun.

    Raises:
        ValueError: The loader is not made as the one whose state it is.
    """
    generators = find_generators(loader)
    if len(generators) != len(state.generators):
        raise ValueError(
            f"load_state_dict: got a state with {len(state.generators)} generators, expected "
            f"{len(generators)} as this loader has; make both alike"
        )
    if state.datasets:
        _check_dataset(loader, state)
        if state.begin is None:
            loader.dataset.load_state_dict(thaw(state.datasets[0])["dataset"])
    order = Order(loader, state, resumes=True)
    if state.sampler is not None:
        order.check_takes_states()
        if state.begin is None:
            order.put_back()
        return
    if state.begin is None:
        order.put_back()
        return
    num_samples = count_samples(loader)
    if None not in (num_samples, state.num_samples) and num_samples != state.num_samples:
        raise ValueError(
            f"dataset: got one of {num_samples} samples, expected {state.num_samples} as in the "
            "state; its order would be another"
        )
    if loader.batch_size != state.batch_size:
        raise ValueError(
            f"batch_size: got {loader.batch_size}, expected {state.batch_size} as in the state; "
            "another one needs a sampler with a state of its own, as ElasticDistributedSampler"
        )
    _check_sampler(loader, state)


def _check_sampler(loader: Any, state: EpochState) -> None:
    """Raise ValueError if a sampler that is asked again would give another order."""
    kind = name_sampler(loader)
    if None not in (kind, state.sampler_kind) and kind != state.sampler_kind:
        raise ValueError(
            f"sampler: got {kind}, expected {state.sampler_kind} as in the state: its order would "
            "be another, so that samples would be left out and others come twice; give shuffle and "
            "sampler as they were"
        )
    place = find_place(loader)
    if _find_distributed(loader) is not None and place[1] != state.place[1]:
        raise ValueError(
            f"sampler: got one for {place[1]} ranks, expected {state.place[1]} as in the state; "
            "only an ElasticDistributedSampler parts the rest of an epoch among others"
        )


def _check_dataset(loader: Any, state: EpochState) -> None:
    has_dataset = any(thaw(each)["dataset"] is not None for each in state.datasets.values())
    if has_dataset and not is_stateful(loader.dataset):
        raise ValueError(
            f"dataset: got {type(loader.dataset).__name__}, which has no load_state_dict, expected "
            "one that has it, as the one whose state this is"
        )
    is_stream = loader._dataset_kind == torch_internals.DatasetKind.Iterable
    place = find_place(loader)
    if state.begin is not None and is_stream and place != state.place:
        raise ValueError(
            "dataset: got an iterable one on rank {} of {}, expected rank {} of {} as in the "
            "state: each rank has a state of its own, which others cannot part; let the "
            "epoch come to its end on as many ranks".format(*place, *state.place)
        )
    # Elastic ones were parted anew, but where one reader goes on in another process.
    is_other = loader.num_workers != state.num_workers and not is_elastic(loader)
    if state.begin is not None and is_other:
        raise ValueError(
            f"num_workers: got {loader.num_workers}, expected {state.num_workers} as in the state: "
            "each worker's dataset has a state of its own, which others cannot part among them; "
            "let the epoch come to its end with as many workers"
        )


class Order:
    """A loader's sampler, and where it stands. One for each iterator of the loader."""

    def __init__(self, loader: Any, state: EpochState, resumes: bool) -> None:
        """Look at a loader; begins nothing.

        Args:
            loader: Whose sampler it is.
            state: Where it is to go on, and where its beginning is written.
            resumes: Whether to go on there.
        """
        # Not the loader itself, which may hold the iterator that holds this: in a ring they would
        # stay until the garbage collector comes, and the workers with them.
        self._loader = weakref.ref(loader)
        self._state = state
        self._resumes = resumes
        is_at_begin = not resumes or state.num_taken == 0
        self._may_be_over = state.sampler is not None and is_at_begin
        self._generators = find_generators(loader)
        self._index_sampler = loader._index_sampler
        self._sampler: Any = self._index_sampler
        self._plain_batches: BatchSampler | None = None
        if type(self._sampler) is BatchSampler:
            self._plain_batches = self._sampler
            self._sampler = self._plain_batches.sampler
        self._is_map = loader._dataset_kind == torch_internals.DatasetKind.Map
        self._iterator: Any = None
        self.is_open = False

    def check_takes_states(self) -> None:
        """Raise ValueError if there is nothing that the sampler's state could be given to."""
        part = "sampler" if thaw(self._state.sampler)["iterator"] is None else "iterator"
        if part == "sampler" and not is_stateful(self._sampler):
            raise ValueError(
                f"sampler: got {type(self._sampler).__name__}, which has no load_state_dict, "
                "expected one that has it, as the one whose state this is"
            )

    def put_back(self) -> None:
        """Put generators and sampler into the state; not the iterator, which is none yet."""
        for generator, before in zip(self._generators, self._state.generators, strict=True):
            generator.set_state(before)
        states = thaw(self._state.sampler)
        if states is not None and states["sampler"] is not None:
            self._sampler.load_state_dict(states["sampler"])

    def begin(self, **fields: Any) -> None:
        """Call right before the sampler is made an iterator.

        Args:
            fields: Of the state, if it begins anew.
        """
        self._iterator, self.is_open = None, False
        if self._resumes:
            self.put_back()
            return
        loader: Any = self._loader()
        assert loader is not None, "it is the loader that begins an epoch"
        self._state.restart(
            begin=read_generators(),
            generators=[generator.get_state() for generator in self._generators],
            sampler=self.read(),
            sampler_kind=name_sampler(loader),
            batch_size=loader.batch_size,
            num_samples=count_samples(loader),
            place=find_place(loader),
            dataset=describe_unread(loader.dataset),
            **fields,
        )

    def open(self, iterator: Any) -> Iterator[Any]:
        """Call before the iterator of the sampler is first asked; ask what this gives instead.

        Raises:
            ValueError: The sampler ends before what was delivered does.
        """
        self.is_open = True
        if self._state.first is None:
            self._state.first = read_generators()
        elif self._resumes:
            write_generators(self._state.first)
        if self._state.first_generators is None:
            self._state.first_generators = [each.get_state() for each in self._generators]
        elif self._resumes:
            for generator, before in zip(
                self._generators, self._state.first_generators, strict=True
            ):
                generator.set_state(before)
        states = thaw(self._state.sampler) if self._resumes else None
        iterator = self._watch(iterator, None if states is None else states["iterator"])
        if self._resumes and states is None and self._is_map:
            self._replay(iterator)
        elif self._may_be_over:
            iterator = self._skip_end(iterator)
        self._resumes = self._may_be_over = False
        return iterator

    def _replay(self, iterator: Iterator[Any]) -> None:
        for number in range(self._state.num_taken):
            if next(iterator, self) is self:
                raise ValueError(
                    f"sampler: got {number} batches, expected {self._state.num_taken} or more, as "
                    "were delivered when the state was saved; make data and sampler alike"
                )

    def _watch(self, iterator: Any, state: Any) -> Iterator[Any]:
        """Keep the sampler's iterator, and put it into its state, if it has one."""
        if self._plain_batches is not None:
            # torch's batches hide the iterator. They have not begun, so others may stand in.
            batches = self._plain_batches
            watched: Any = _Watched(self, self._sampler, state)
            return iter(BatchSampler(watched, batches.batch_size, batches.drop_last))
        self.keep(iterator, state)
        return iterator

    def keep(self, iterator: Any, state: Any) -> None:
        """Keep an iterator of the sampler, and put it into its state unless that is None."""
        self._iterator = iterator if is_stateful(iterator) else None
        if state is None:
            return
        if self._iterator is None:
            raise ValueError(
                f"sampler: got {type(self._sampler).__name__}, whose iterator has no "
                "load_state_dict, expected one that has it, as the one whose state this is"
            )
        self._iterator.load_state_dict(state)

    def _skip_end(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Pass over an epoch without batches: some samplers say after an epoch that it is over."""
        nothing = object()
        first = next(iterator, nothing)
        if first is nothing:
            return self._watch(iter(self._index_sampler), None)
        return itertools.chain([first], iterator)

    def read(self) -> bytes | None:
        """Read the state of the sampler and its iterator; None if neither has one."""
        sampler = self._sampler.state_dict() if is_stateful(self._sampler) else None
        iterator = None if self._iterator is None else self._iterator.state_dict()
        if sampler is None and iterator is None:
            return None
        return freeze({"sampler": sampler, "iterator": iterator})


class _Watched:
    """A sampler that shows its iterator."""

    def __init__(self, order: Order, sampler: Any, state: Any) -> None:
        self._order = order
        self._sampler = sampler
        self._state = state

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._sampler)
        self._order.keep(iterator, self._state)
        return iterator
