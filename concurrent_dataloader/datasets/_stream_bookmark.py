"""Where a stream is, as it tells its loader, and where it goes on, as it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from concurrent_dataloader.datasets import _rest, _stream_state
from concurrent_dataloader.datasets._rest import Part
from concurrent_dataloader.datasets._shard_reader import ShardReader
from concurrent_dataloader.datasets._split import Reader
from concurrent_dataloader.datasets._stream_place import Epoch, EpochCounter, Place
from concurrent_dataloader.datasets._stream_plan import StreamPlan
from concurrent_dataloader.datasets.contract import ReaderState


class Iteration(NamedTuple):
    """Whose iteration it is, and what it reads."""

    epoch: Epoch
    reader: Reader
    part: Part | None


class Bookmark:
    """Keeps how far a stream is in this process. Pickles, but for the iteration that runs."""

    def __init__(self, plan: StreamPlan, place: Place, epochs: EpochCounter) -> None:
        """Take over what the stream, too, works with; all three are the stream's own."""
        self._plan = plan
        self._place = place
        self._epochs = epochs
        self._running: tuple[ShardReader, Iteration] | None = None
        self._last: Iteration | None = None
        self._state: dict[str, Any] | None = None
        # What was loaded, until a reader is known that goes on there.
        self._loaded: list[dict[str, Any]] | None = None

    # -- an iteration

    def begin(self) -> tuple[Iteration, dict[str, Any] | None]:
        """Find out which iteration begins: the next one, or the one that was loaded.

        Returns:
            With it, what `ShardReader` takes to go on; None: it begins at the begin.

        Raises:
            ValueError: What was loaded is not of such a stream, or not all of it.
        """
        reader = self._place.find_reader()
        loaded = self._settle(reader)
        position, part = None, None
        if loaded is not None and _stream_state.resumes(loaded):
            self._check_state(loaded, reader)
            self._epochs.notice_set()
            position, epoch = loaded["reader"], Epoch(*loaded["epoch"])
            part = None if loaded["part"] is None else Part(*loaded["part"])
        else:
            epoch = self._epochs.next(reader.world_size)
        self._state = None
        return Iteration(epoch, reader, part), position

    def follow(self, shard_reader: ShardReader, iteration: Iteration) -> None:
        """Have the state from now on be that of this reader."""
        self._running = (shard_reader, iteration)

    def leave(self, shard_reader: ShardReader, *, is_over: bool) -> None:
        """Keep where a reader stands, before it is closed, unless another one was followed."""
        if self._running is not None and self._running[0] is shard_reader:
            iteration = self._running[1]
            self._state = None if is_over else self.state_dict()
            self._running, self._last = None, iteration if is_over else None

    # -- its state

    def state_dict(self) -> dict[str, Any]:
        """Say how far the iteration is; as of `StreamedShards`."""
        if self._running is not None:
            shard_reader, iteration = self._running
            return self._describe(iteration, shard_reader.state())
        loaded = self._settle(self._place.find_reader(), keep=True)
        if loaded is not None and _stream_state.resumes(loaded):
            return self._take_over(loaded)
        if self._state is not None:
            return self._state
        if self._epochs.notice_set(before_it=True):
            self._last = self._loaded = None
        elif loaded is not None:
            return self._take_over(loaded)
        return self._describe(self._last, None)

    def _describe(
        self, iteration: Iteration | None, position: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Describe an iteration; without a position one that is over, None before the first."""
        reader = self._place.find_reader() if iteration is None else iteration.reader
        part = None if iteration is None else iteration.part
        return {
            "version": _stream_state.VERSION,
            "made_for": self._plan.describe(reader),
            "first_epoch": self._epochs.first,
            "iteration": self._epochs.iteration,
            "epoch": None if iteration is None else list(iteration.epoch),
            "part": None if part is None else list(part),
            "reader": position,
            "is_over": iteration is not None and position is None,
        }

    def _take_over(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put this reader into a state that is for any of several, or was another's."""
        made_for, mine = state["made_for"], self._plan.describe(self._place.find_reader())
        if _stream_state.resumes(state) and _stream_state.saved_by(state) is not None:
            return state
        return {
            **state,
            "made_for": made_for | {name: mine[name] for name in _stream_state.FREE_SETTINGS},
        }

    # -- going on

    def load(
        self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]], expected: str
    ) -> None:
        """Let the next iteration go on there; as of `StreamedShards`.

        Args:
            state_dict: A state, or a list of them.
            expected: The class whose states they are to be, for errors.
        """
        given = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
        if not given:
            raise ValueError("state_dict: got no state, expected one or more")
        self._loaded = [_stream_state.read_state(each, expected) for each in given]
        self._epochs.pass_over_set()
        self._running = self._last = self._state = None
        self._epochs.go_on_at(self._loaded[0]["first_epoch"], self._loaded[0]["iteration"])

    def _settle(self, reader: Reader, *, keep: bool = False) -> dict[str, Any] | None:
        """Find the state in which a reader goes on; None: nothing was loaded.

        Args:
            reader: Who goes on.
            keep: Whether the iteration does not begin yet.
        """
        if self._loaded is None:
            return None
        state: dict[str, Any]
        mine = [each for each in self._loaded if _stream_state.saved_by(each) in (None, reader)]
        if _stream_state.are_between_epochs(self._loaded):
            state = (mine or self._loaded)[0]
        elif len(mine) == 1:
            state = mine[0]
            if state["is_over"] and _stream_state.number_of(state) == max(
                map(_stream_state.number_of, self._loaded)
            ):
                # Others have not come to the end of this epoch: nothing is left for this one.
                state = {**state, "part": list(Part(_rest.NOTHING, False)), "is_over": False}
        else:
            state = dict(self.merge(_stream_state.find_readers(self._loaded)))
        self._loaded = [state] if keep else None
        self._epochs.go_on_at(state["first_epoch"], state["iteration"])
        return state

    def merge(self, readers: Sequence[ReaderState]) -> Mapping[str, Any]:
        """Part the rest of an epoch anew; as of `StreamedShards`."""
        place = self._place.find_rank()
        _stream_state.check_version([each.state for each in readers])
        stands = [_stream_state.describe_stand(each) for each in readers]
        self._check_can_part(stands)
        _stream_state.check_complete([each.reader for each in stands], place)
        is_shared = stands[0].reader.world_size != place[1]
        chosen = [
            (stand, saved.state)
            for stand, saved in zip(stands, readers, strict=True)
            if is_shared or stand.reader.rank == place[0]
        ]
        chosen.sort(key=lambda each: each[0].reader)
        _stream_state.check_same_epoch([stand for stand, _ in chosen])
        for _, state in chosen:
            self._check_settings(state, leaving_out=_stream_state.FREE_SETTINGS)
        begun = [(stand, state) for stand, state in chosen if stand.epoch is not None]
        settings = self._plan.describe(self._place.find_reader())
        merged: dict[str, Any] = {
            "version": _stream_state.VERSION,
            "made_for": {
                name: settings[name] for name in settings if name not in _stream_state.FREE_SETTINGS
            },
            "first_epoch": chosen[0][1]["first_epoch"],
            "iteration": chosen[0][1]["iteration"],
            "epoch": None,
            "part": None,
            "reader": None,
            "is_over": False,
        }
        if not begun:
            return merged  # nothing was delivered: the epoch begins
        stand, state = begun[0]
        assert stand.epoch is not None
        owed = [self._find_owed(each, Epoch(*stand.epoch)) for each, _ in chosen]
        part = Part(_rest.pack(_rest.find_left(owed)), is_shared)
        return merged | {
            "first_epoch": state["first_epoch"],
            "iteration": state["iteration"],
            "epoch": list(stand.epoch),
            "part": list(part),
        }

    def _check_can_part(self, stands: Sequence[_stream_state.Stand]) -> None:
        if self._plan.table is None:
            reader = stands[0].reader
            raise ValueError(
                f"{self._plan.where()}: no index of byte ranges, expected one to part the rest of "
                f"an epoch among other ranks or workers than the {reader.world_size} of "
                f"{reader.num_workers} in the state; let it come to its end with as many, and "
                "write an index with `concurrent-dataloader index` for the epochs after it"
            )

    def _find_owed(
        self, stand: _stream_state.Stand, epoch: Epoch
    ) -> tuple[_rest.Intervals, _rest.Intervals]:
        """Give what a reader was to give, and what of it it owes."""
        assert self._plan.table is not None
        segments = self._plan.plan(
            stand.reader, Epoch(*(stand.epoch or epoch)), stand.part, stand.batch_size
        )
        planned, owed = _rest.find_owed(self._plan.table, segments, stand.position)
        return planned, owed[:0] if stand.is_over else owed

    def _check_state(self, state: Mapping[str, Any], reader: Reader) -> None:
        is_of_one = _stream_state.saved_by(state) is not None
        self._check_settings(
            state, reader, leaving_out=() if is_of_one else _stream_state.FREE_SETTINGS
        )

    def _check_settings(
        self,
        state: Mapping[str, Any],
        reader: Reader | None = None,
        *,
        leaving_out: Sequence[str],
    ) -> None:
        saved, mine = state["made_for"], self._plan.describe(reader or self._place.find_reader())
        for name, value in mine.items():
            if name not in leaving_out and saved.get(name) != value:
                raise ValueError(
                    f"state_dict: got one made with {name} {saved.get(name)!r}, expected {value!r};"
                    " load it into a data set and a loader that are made alike"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what runs."""
        return {**self.__dict__, "_running": None}
