"""Where an epoch stands, and how to go on from there, in another process too.

An epoch's order follows from the random generators as they were when its sampler began; so these
are kept, and the sampler is asked again for what was delivered already, which is not fetched. A
sampler that has a state of its own is put into it instead (`order.py`). A worker's random
transforms follow from its own generators; it sends their state with each batch that changed it, and
the worker that takes its place begins with the state after the last that was taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import random
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch

# Not as np.random, which numpy imports when it is first used: a worker that is forked while another
# thread of the parent does so would wait for ever for that import to end.
from numpy import random as numpy_random

VERSION = 2

GeneratorStates = Mapping[str, Any]
"""States of the three global generators, as tensors, numbers and lists only."""


def read_generators() -> GeneratorStates:
    """Read the states of the global generators of torch, ``random`` and numpy."""
    _, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy_random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "random": (list(words), gauss),
        "numpy": (str(name), [int(key) for key in keys], position, has_gauss, cached),
    }


def write_generators(states: GeneratorStates) -> None:
    """Put the global generators into states that `read_generators` gave."""
    words, gauss = states["random"]
    name, keys, position, has_gauss, cached = states["numpy"]
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(words), gauss))
    numpy_random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextlib.contextmanager
def generators_at(states: GeneratorStates | None) -> Generator[None]:
    """Have the global generators in these states for a while; None changes nothing."""
    if states is None:
        yield
        return
    before = read_generators()
    write_generators(states)
    try:
        yield
    finally:
        write_generators(before)


def is_stateful(part: Any) -> bool:
    """Tell whether it has a state of its own, by torchdata's convention."""
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def freeze(state: Any) -> bytes | None:
    """Keep a state as it is now, whatever its owner does to it later; None stays None."""
    return None if state is None else pickle.dumps(state, pickle.HIGHEST_PROTOCOL)


def thaw(frozen: bytes | None) -> Any:
    """Give back what `freeze` was given, in this process or in a worker of it."""
    return None if frozen is None else pickle.loads(frozen)


class GeneratorWatch:
    """Notices, in a worker, when the global generators have changed. Cheap when they have not."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None

    def read_change(self) -> GeneratorStates | None:
        """Give the states if they are not those of the last call."""
        numpy_state: Any = numpy_random.get_state(legacy=True)
        now = (
            torch.get_rng_state().numpy().tobytes(),
            random.getstate(),
            (numpy_state[1].tobytes(), *numpy_state[2:]),
        )
        if now == self._last:
            return None
        self._last = now
        return read_generators()


@dataclasses.dataclass(kw_only=True, slots=True)
class EpochState:
    """How far an epoch is. Its iterator counts in it; the loader keeps it when that goes."""

    num_taken: int = 0
    """Batches that the training loop has got."""

    begin: GeneratorStates | None = None
    """The global generators before the sampler was made into an iterator; None: not begun."""

    first: GeneratorStates | None = None
    """The same before it was first asked, where it is asked later: without workers."""

    generators: list[torch.Tensor] = dataclasses.field(default_factory=list[torch.Tensor])
    """States of `find_generators` when `begin` was read."""

    first_generators: list[torch.Tensor] | None = None
    """The same before the sampler was first asked. In between, torch draws a seed from one of
    them, at another time with workers than without."""

    num_samples: int | None = None
    """Length of a map-style dataset."""

    base_seed: int | None = None
    """torch's, from which workers are seeded."""

    num_workers: int = 0

    batch_size: int | None = None
    """The loader's; batches that are replayed must be as large as they were."""

    place: tuple[int, int] = (0, 1)
    """Rank and number of ranks: only this one's workers draw on with `workers`."""

    sampler: bytes | None = None
    """What the sampler said of itself after the last batch that was taken (`freeze`)."""

    sampler_kind: str | None = None
    """What is replayed (`order.name_sampler`); None where nothing is, or in states of earlier
    releases."""

    workers: dict[int, GeneratorStates] = dataclasses.field(
        default_factory=dict[int, GeneratorStates]
    )
    """The generators of each worker after the last batch of its that was taken."""

    dataset: bytes | None = None
    """Where the main process's dataset stood, for workers of which no batch was taken yet."""

    datasets: dict[int, bytes] = dataclasses.field(default_factory=dict[int, bytes])
    """Where each worker's dataset stood after the last batch of its that was taken; without
    workers that of this process is number 0."""

    next_worker: int = 0
    """Whose batch is the next."""

    def to_dict(self) -> dict[str, Any]:
        """Copy it into a dictionary that ``torch.load(weights_only=True)`` reads."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        fields |= {
            "sampler": thaw(self.sampler),
            "dataset": thaw(self.dataset),
            "workers": dict(self.workers),
            "datasets": {worker: thaw(frozen) for worker, frozen in self.datasets.items()},
        }
        return {"version": VERSION, **fields}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> EpochState:
        """Read what `to_dict` gave.

        Raises:
            ValueError: It is nothing of the kind.
        """
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]: a caller's
            raise TypeError(
                f"load_state_dict: got {type(state).__name__}, expected what state_dict() gave"
            )
        state = {"sampler_kind": None, **state}  # those of earlier releases have none
        if state.get("version") != VERSION or set(state) != {*_FIELDS, "version"}:
            raise ValueError(
                f"load_state_dict: got version {state.get('version')!r} with {sorted(state)}, "
                f"expected version {VERSION} with {sorted(_FIELDS)}; give it what state_dict() gave"
            )
        _check_fields(state)
        made = cls()
        made.restart(**{name: state[name] for name in _FIELDS})
        made.workers, made.place = dict(made.workers), (state["place"][0], state["place"][1])
        made.sampler, made.dataset = freeze(state["sampler"]), freeze(state["dataset"])
        made.datasets = {
            worker: pickle.dumps(each, pickle.HIGHEST_PROTOCOL)
            for worker, each in state["datasets"].items()
        }
        return made

    def restart(self, **fields: Any) -> None:
        """Begin anew, with these fields."""
        fresh = EpochState()
        for name in _FIELDS:
            setattr(self, name, fields.get(name, getattr(fresh, name)))


def _check_fields(state: Mapping[str, Any]) -> None:
    """Refuse what `EpochState.to_dict` cannot have written, where that is easily seen."""
    for name in ("num_taken", "num_workers", "next_worker"):
        value = state[name]
        if not isinstance(value, int) or value < 0:
            raise ValueError(
                f"load_state_dict: {name}: got {value!r}, expected a whole number from 0; give it "
                "what state_dict() gave"
            )
    kinds: dict[str, tuple[type, ...]] = {
        "begin": (Mapping, type(None)),
        "first": (Mapping, type(None)),
        "base_seed": (int, type(None)),
        "sampler_kind": (str, type(None)),
        "place": (tuple, list),
        "workers": (Mapping,),
        "datasets": (Mapping,),
        "generators": (list, tuple),
    }
    for name, kind in kinds.items():
        if not isinstance(state[name], kind):
            raise ValueError(
                f"load_state_dict: {name}: got {type(state[name]).__name__}, expected "
                f"{' or '.join(each.__name__ for each in kind)}; give it what state_dict() gave"
            )


_FIELDS = tuple(each.name for each in dataclasses.fields(EpochState))


class StatesAfter:
    """Sent on the data queue in place of a number: how a worker stands after a batch."""

    def __init__(
        self,
        worker_id: int,
        number: Any,
        generators: GeneratorStates | None,
        dataset: bytes | None,
    ) -> None:
        """Tell what has changed.

        Args:
            worker_id: Of the worker.
            number: Of the batch, or the signal that an epoch begins.
            generators: The global ones; None: as they were.
            dataset: Where it stands (`freeze`); None: where it stood.
        """
        self.worker_id = worker_id
        self.number = number
        self.generators = generators
        self.dataset = dataset


class WorkerStates:
    """Sorts what workers say of themselves: an epoch's state is that of the batches taken."""

    def __init__(self, state: EpochState) -> None:
        self._state = state
        self._after: dict[Any, StatesAfter] = {}
        # After the last batch that came.
        self._generators: dict[int, GeneratorStates] = {}
        self._datasets: dict[int, bytes] = {}

    def go_on(self) -> None:
        """Begin as the epoch's state says."""
        self._generators, self._datasets = dict(self._state.workers), dict(self._state.datasets)

    def receive(self, sent: StatesAfter) -> None:
        """Keep what came before a batch."""
        self._after[sent.number] = sent
        if sent.generators is not None:
            self._generators[sent.worker_id] = sent.generators
        if sent.dataset is not None:
            self._datasets[sent.worker_id] = sent.dataset

    def take(self, task: int, worker_id: int) -> None:
        """Count a batch as taken."""
        self._state.num_taken += 1
        self._state.next_worker = worker_id + 1
        sent = self._after.pop(task, None)
        if sent is not None and sent.generators is not None:
            self._state.workers[worker_id] = sent.generators
        if sent is not None and sent.dataset is not None:
            self._state.datasets[worker_id] = sent.dataset

    def begin_epoch(self) -> None:
        """Forget batches that nobody took."""
        self._after.clear()
        self._state.workers, self._state.datasets = dict(self._generators), dict(self._datasets)
