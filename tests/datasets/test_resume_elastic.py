"""What is left of a streamed epoch goes on over other ranks and workers, each sample once."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data._utils import worker as torch_worker

from concurrent_dataloader import DataLoader, ErrorBudget
from concurrent_dataloader.datasets import _rest
from concurrent_dataloader.datasets._split import Uneven
from concurrent_dataloader.datasets.streamed import ReadSettings, StreamedShards
from concurrent_dataloader.stores._memory import MemoryStore
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.shard_doubles import pack_tars
from tests.datasets.shards import write_shards
from tests.datasets.test_resume_streamed import count_bytes, through_a_file
from tests.datasets.test_streamed import write_records

COUNTS = [10, 7, 0, 13, 20, 21, 8]
TOTAL = sum(COUNTS)
_NO_DATASET: Any = None

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# -- without processes: any reader, told who it is as torch tells workers


class Team(NamedTuple):
    """How many read, and how far they come: a share of what they have."""

    world_size: int
    num_workers: int
    batch_size: int | None
    depths: tuple[float, ...]

    def depth(self, number: int) -> float:
        return self.depths[number % len(self.depths)]


@contextlib.contextmanager
def as_worker(worker: int, num_workers: int) -> Generator[None]:
    info: Any = torch_worker.WorkerInfo(
        id=worker, num_workers=num_workers, seed=70 + worker, dataset=_NO_DATASET
    )
    torch_worker._worker_info = info
    try:
        yield
    finally:
        torch_worker._worker_info = None


def pack(counts: Sequence[int]) -> tuple[MemoryStore, dict[str, Any]]:
    numbers = itertools.count()
    bodies, index = pack_tars(
        {
            f"train-{shard:06d}.tar": [
                (
                    f"{number:05d}",
                    {"jpg": b"%0*d" % (900 * (number % 3), number), "cls": b"%d" % number},
                )
                for number in itertools.islice(numbers, count)
            ]
            for shard, count in enumerate(counts)
        }
    )
    return MemoryStore(bodies), {"shards": sorted(bodies), "index": index}


def read_number(raw: Any) -> int:
    return int(bytes(raw))


def read_some(
    stream: StreamedShards, batch_size: int | None, depth: float
) -> tuple[list[int], dict[str, Any], int]:
    """Read whole batches, such a share of all; give what came, and what is left after them."""
    labels: list[int] = []
    states = [stream.state_dict()]
    samples = iter(stream)
    for read, label in samples:
        assert read == label
        labels.append(label)
        states.append(stream.state_dict())
    wanted = round(depth * len(labels))
    taken = wanted - wanted % (batch_size or 1)
    if wanted == len(labels):
        return labels, stream.state_dict(), len(labels)
    return labels[:taken], states[taken], len(labels)


def play(
    counts: Sequence[int], teams: Sequence[Team], *, uneven: Uneven = "exact", **arguments: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Have an epoch read by one team after another; give what each got, and each had before it."""
    store, shards = pack(counts)
    states: list[dict[str, Any]] = []
    got: list[list[int]] = []
    shares: list[list[int]] = []
    for team in teams:
        if states and all(state["is_over"] for state in states):
            break  # what follows is the next epoch
        labels: list[int] = []
        after: list[dict[str, Any]] = []
        per_rank = [0] * team.world_size
        places = itertools.product(range(team.world_size), range(team.num_workers))
        for number, (rank, worker) in enumerate(places):
            with as_worker(worker, team.num_workers):
                stream = StreamedShards(
                    **shards,
                    store=store,
                    decode=read_number,
                    rank=rank,
                    world_size=team.world_size,
                    batch_size=team.batch_size,
                    uneven=uneven,
                    reading=ReadSettings(num_open=3),
                    **arguments,
                )
                stream.set_epoch(3)
                if states:
                    stream.load_state_dict(random.Random(number).sample(states, len(states)))
                mine, state, num_mine = read_some(stream, team.batch_size, team.depth(number))
            labels += mine
            after.append(through_a_file(state))
            per_rank[rank] += num_mine
        states = after
        got.append(labels)
        shares.append(per_rank)
    return got, shares


def teams_of(max_depth: float = 1.0) -> st.SearchStrategy[Team]:
    return st.builds(
        Team,
        st.integers(1, 4),
        st.integers(1, 3),
        st.none() | st.integers(1, 5),
        st.lists(st.floats(0, max_depth), min_size=1, max_size=4).map(tuple),
    )


def are_refused(teams: Sequence[Team]) -> bool:
    """Whether as many readers go on with other batches, which is refused."""
    return any(
        one[:2] == other[:2] and one.batch_size != other.batch_size
        for one, other in itertools.pairwise(teams)
    )


EPOCHS = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
        "teams": st.lists(teams_of(), min_size=1, max_size=3)
        .flatmap(lambda teams: teams_of().map(lambda last: [*teams, last._replace(depths=(1.0,))]))
        .filter(lambda teams: not are_refused(teams)),
        "shuffle": st.booleans(),
        "shuffle_buffer": st.sampled_from([2, 6, 40]),
    }
)


@settings(max_examples=60, deadline=None)
@given(EPOCHS)
def test_n12_each_sample_comes_once_whoever_reads_on(epoch: dict[str, Any]) -> None:
    counts, teams = epoch.pop("counts"), epoch.pop("teams")

    got, shares = play(counts, teams, **epoch)

    assert sorted(itertools.chain(*got)) == list(range(sum(counts)))
    if len(got) == len(teams) and teams[-1].world_size != teams[-2].world_size:
        assert max(shares[-1]) - min(shares[-1]) <= 1


@settings(max_examples=30, deadline=None)
@given(EPOCHS)
def test_n12_what_is_dropped_is_less_than_one_a_rank_each_time(epoch: dict[str, Any]) -> None:
    counts, teams = epoch.pop("counts"), epoch.pop("teams")
    if sum(counts) < 4:
        return

    got, shares = play(counts, teams, uneven="drop", **epoch)

    labels = list(itertools.chain(*got))
    assert len(labels) == len(set(labels))
    assert len(labels) >= sum(counts) - sum(team.world_size - 1 for team in teams)
    if len(got) == len(teams) and teams[-1].world_size != teams[-2].world_size:
        assert len(set(shares[-1])) == 1


@settings(max_examples=30, deadline=None)
@given(EPOCHS)
def test_n12_what_comes_again_is_less_than_one_a_rank_each_time(epoch: dict[str, Any]) -> None:
    counts, teams = epoch.pop("counts"), epoch.pop("teams")

    got, shares = play(counts, teams, uneven="pad", **epoch)

    labels = list(itertools.chain(*got))
    assert set(labels) == set(range(sum(counts)))
    assert len(labels) <= sum(counts) + sum(team.world_size - 1 for team in teams)
    if len(got) == len(teams) and teams[-1].world_size != teams[-2].world_size:
        assert len(set(shares[-1])) == 1


def test_what_was_repeated_on_a_rank_and_delivered_on_another_is_not_left() -> None:
    """Ranks have samples 0 to 3, 4 to 7, and 8, 9, 0 and 1."""
    teams = [Team(3, 1, None, (1.0, 1.0, 0.0)), Team(1, 1, None, (1.0,))]

    got, _ = play([10], teams, uneven="pad")

    assert got == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9]]


# -- with processes, through the loader


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("tars"), COUNTS)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"), (30, 0, 20, 29))


def make(
    shards: Any, num_workers: int, rank: int = 0, world_size: int = 1, **arguments: Any
) -> DataLoader[Any]:
    names = ("batch_size", "on_error", "error_budget", "persistent_workers")
    of_loader: dict[str, Any] = {"batch_size": 4}
    of_loader |= {name: arguments.pop(name) for name in names if name in arguments}
    of_dataset: dict[str, Any] = {
        "decode": count_bytes,
        "shuffle": True,
        "shuffle_buffer": 12,
        "uneven": "exact",
        "reading": ReadSettings(part_bytes=4096, max_parts=4, num_open=3),
        **arguments,
    }
    dataset = StreamedShards(shards, rank=rank, world_size=world_size, **of_dataset)
    return DataLoader(dataset, num_workers=num_workers, **of_loader)


def labels_in(batches: Any) -> list[list[int]]:
    return [torch.as_tensor(labels).tolist() for _, labels in batches]


def take(loader: DataLoader[Any], num_batches: int | None) -> tuple[list[list[int]], Any]:
    taken = labels_in(itertools.islice(loader, num_batches))
    state = through_a_file(loader.state_dict())
    loader.close()
    return taken, state


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.chain(*batches))


def take_of_all(
    shards: Any,
    num_workers: Sequence[int],
    cuts: Sequence[int | None],
    states: Any,
    **arguments: Any,
) -> tuple[list[int], list[Any]]:
    """Take batches on each rank, from where all ranks of the last team were."""
    got: list[int] = []
    after: list[Any] = []
    for rank, (workers, cut) in enumerate(zip(num_workers, cuts, strict=True)):
        loader = make(shards, workers, rank, len(num_workers), **arguments)
        if states is not None:
            loader.load_state_dict(states)
        taken, state = take(loader, cut)
        got += flat(taken)
        after.append(state)
    return got, after[::-1]


@pytest.mark.parametrize("source", ["tars", "records"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("numbers", [(0, 2, 3), (3, 0, 2), (2, 1, 0), (1, 3, 3)], ids=str)
def test_n12_other_workers_go_on_in_whole_batches(
    source: str, shuffle: bool, numbers: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    shards = request.getfixturevalue(source)
    got: list[list[int]] = []
    state: Any = None
    for num_workers, cut in zip(numbers, (1, 6, None), strict=True):
        loader = make(shards, num_workers, shuffle=shuffle)
        if state is not None:
            loader.load_state_dict(state)
        taken, state = take(loader, cut)
        got += taken

    assert sorted(flat(got)) == list(range(TOTAL))
    assert [len(batch) for batch in got] == [4] * (TOTAL // 4) + [TOTAL % 4]
    assert shuffle != (flat(got) == list(range(TOTAL)))


@pytest.mark.parametrize(
    ("teams", "cuts"),
    [
        ([(2, 2), (1, 1, 1), (2,)], [(3, 1), (2, 0, 1), (None,)]),
        ([(1,), (0, 2), (3, 1, 0, 0)], [(5,), (1, 4), (None,) * 4]),
        ([(0, 0, 1), (1, 0, 0), (2, 2)], [(0, 2, 6), (1, 2, 1), (None, None)]),
    ],
    ids=["2 ranks, 3, 1", "1 rank, 2, 4", "3 ranks, others, 2"],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_n12_other_ranks_go_on_from_the_states_of_all(
    tars: Path, shuffle: bool, teams: Any, cuts: Any
) -> None:
    got: list[int] = []
    states: Any = None
    for num_workers, some in zip(teams, cuts, strict=True):
        taken, states = take_of_all(tars, num_workers, some, states, shuffle=shuffle)
        got += taken

    assert sorted(got) == list(range(TOTAL))


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_with_and_without_one_worker_nothing_is_parted(
    tars: Path, numbers: tuple[int, int]
) -> None:
    expected = labels_in(make(tars, 0, seed=3))
    first = make(tars, numbers[0], seed=3)
    first.dataset.set_epoch(0)  # pyright: ignore[reportAttributeAccessIssue]: a stream
    taken, state = take(first, 5)
    second = make(tars, numbers[1], seed=3)
    second.load_state_dict(state)

    assert [*taken, *labels_in(second)] == expected


def test_as_many_ranks_each_take_their_own_of_a_list(tars: Path) -> None:
    def go_on(give_all: bool) -> list[list[int]]:
        got: list[list[int]] = []
        for rank in range(2):
            torch.manual_seed(rank)
            loader = make(tars, 1, rank, 2)
            loader.load_state_dict(states if give_all else states[1 - rank])
            got += labels_in(loader)
        return got

    _, states = take_of_all(tars, (1, 1), (2, 3), None)

    assert go_on(give_all=True) == go_on(give_all=False)


def test_the_epochs_after_one_that_was_parted_are_whole(tars: Path) -> None:
    first = make(tars, 3)
    first.dataset.set_epoch(4)  # pyright: ignore[reportAttributeAccessIssue]: a stream
    taken, state = take(first, 4)
    loader: Any = make(tars, 2, persistent_workers=True)
    loader.load_state_dict(state)
    rest = labels_in(loader)
    whole: Any = make(tars, 2)
    whole.dataset.set_epoch(5)

    assert sorted(flat([*taken, *rest])) == list(range(TOTAL))
    assert labels_in(loader) == labels_in(whole)
    loader.close()


def test_a_state_of_a_rest_that_was_loaded_and_not_begun_is_the_same_rest(tars: Path) -> None:
    taken, state = take(make(tars, 2), 3)
    for num_workers in (0, 3, 2):
        loader = make(tars, num_workers)
        loader.load_state_dict(state)
        state = through_a_file(loader.state_dict())
    again = make(tars, 1)
    again.load_state_dict(state)
    nothing, state = take(again, 0)
    last = make(tars, 2)
    last.load_state_dict(state)

    assert not nothing
    assert sorted(flat([*taken, *labels_in(last)])) == list(range(TOTAL))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_was_delivered_and_all_is(tars: Path, num_workers: int) -> None:
    loader = make(tars, num_workers)
    loader.dataset.set_epoch(6)  # pyright: ignore[reportAttributeAccessIssue]: a stream
    iter(loader)
    other = make(tars, 3)
    other.load_state_dict(loader.state_dict())
    loader.close()

    assert sorted(flat(labels_in(other))) == list(range(TOTAL))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_workers_that_had_come_to_their_end_owe_nothing(tars: Path, num_workers: int) -> None:
    taken, state = take(make(tars, 2), TOTAL // 4)
    loader = make(tars, num_workers)
    loader.load_state_dict(state)

    assert sorted(flat([*taken, *labels_in(loader)])) == list(range(TOTAL))

    _, state = take(make(tars, 2), TOTAL // 4 + 1)
    loader = make(tars, num_workers)
    loader.load_state_dict(state)
    assert labels_in(loader) == []


def test_another_batch_size_goes_on_with_other_ranks(tars: Path) -> None:
    got, states = take_of_all(tars, (1, 2), (2, 3), None, batch_size=4)
    rest: list[list[int]] = []
    for rank in range(4):
        loader = make(tars, 1, rank, 4, batch_size=3)
        loader.load_state_dict(states)
        mine = labels_in(loader)
        assert all(len(batch) == 3 for batch in mine[:-1])
        assert len(mine) <= len(loader)
        rest += mine

    assert sorted([*got, *flat(rest)]) == list(range(TOTAL))


def test_other_workers_do_not_draw_again_what_was_drawn(tars: Path) -> None:
    def draws(loader: Any, count: int | None) -> set[float]:
        return {float(each) for noise, _ in itertools.islice(loader, count) for each in noise}

    def begin(num_workers: int) -> DataLoader[Any]:
        return make(tars, num_workers, transform=draw)

    torch.manual_seed(1)
    loader = begin(2)
    before = draws(loader, 8)
    other = begin(3)
    other.load_state_dict(loader.state_dict())
    loader.close()

    assert len(before) == 32
    assert not before & draws(other, None)


def draw(_: int) -> torch.Tensor:
    return torch.rand(())


def refuse_some(raw: bytes) -> int:
    if len(raw) % 5 == 0:
        raise ValueError("spoilt")
    return len(raw)


def test_what_was_passed_over_is_not_tried_again(tars: Path) -> None:
    def begin(num_workers: int) -> DataLoader[Any]:
        budget = ErrorBudget(count=TOTAL, share=1.0)
        policy: Any = {"on_error": "skip", "error_budget": budget}
        return make(tars, num_workers, decode=refuse_some, **policy)

    bad = TOTAL - len(flat(labels_in(begin(0))))
    loader = begin(2)
    taken = labels_in(itertools.islice(loader, 8))
    other = begin(3)
    other.load_state_dict(loader.state_dict())
    num_before = loader.error_report().num_failed
    loader.close()

    rest = labels_in(other)

    assert bad > 5
    labels = flat([*taken, *rest])
    assert len(labels) == len(set(labels)) == TOTAL - bad
    assert num_before + other.error_report().num_failed == bad


@pytest.mark.parametrize("num_workers", [0, 3])
def test_bytes_that_were_delivered_are_not_fetched_again(
    object_server: ObjectServer, tmp_path: Path, num_workers: int
) -> None:
    write_shards(tmp_path, [150, 100, 150], max_bytes=4000)
    object_server.create_bucket("public", public=True)
    object_server.put_folder("public", tmp_path)
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))

    def begin(num_workers: int) -> DataLoader[Any]:
        url = f"{object_server.endpoint_url}/public/train-{{000000..000002}}.tar"
        index = tmp_path / "train-index.npz"
        return make(url, num_workers, index=index, batch_size=10)

    taken, state = take(begin(2), 30)
    resumed = begin(num_workers)
    object_server.reset_counters()
    resumed.load_state_dict(state)

    rest = labels_in(resumed)

    assert sorted(flat([*taken, *rest])) == list(range(400))
    assert object_server.counters().body_bytes_sent < 0.4 * num_bytes


# -- what is refused


def test_states_that_do_not_suffice_are_refused_by_name(tars: Path) -> None:
    _, states = take_of_all(tars, (1, 0, 1), (2, 2, 2), None)
    last, middle, first = states
    loader = make(tars, 0, 0, 2)

    for few, words in (
        (first, "got the state of rank 0 of 3, expected also that of rank 1, 2 to part the rest"),
        ([first, last], "no state of rank 1, expected one of each rank of 3; give those of all"),
        ([first, last, middle, last], "more than one state of rank 2"),
        ([], "got an empty list of states"),
    ):
        with pytest.raises(ValueError, match=words):
            loader.load_state_dict(few)


def test_another_ranks_state_alone_is_refused(tars: Path) -> None:
    _, states = take_of_all(tars, (1, 1), (2, 2), None)

    with pytest.raises(ValueError, match="got the state of rank 0 of 2, expected that of rank 1"):
        make(tars, 1, 1, 2).load_state_dict(states[1])


def test_ranks_in_different_epochs_are_refused(tars: Path) -> None:
    def save(rank: int, epoch: int, num_taken: int | None = 2) -> Any:
        loader: Any = make(tars, 1, rank, 2)
        loader.dataset.set_epoch(epoch)
        return take(loader, num_taken)[1]

    loader = make(tars, 0)

    with pytest.raises(ValueError, match="rank 0 in epoch 3 and rank 1 in epoch 4, expected all"):
        loader.load_state_dict([save(0, 3), save(1, 4)])
    with pytest.raises(ValueError, match="rank 0 in epoch 3 and rank 1 in epoch 4, expected all"):
        loader.load_state_dict([save(0, 3), save(1, 4, 0)])
    with pytest.raises(ValueError, match="got rank 1 between two epochs and others in the middle"):
        loader.load_state_dict([save(0, 3), save(1, 3, None)])


def test_states_from_before_and_after_a_new_parting_are_refused(tars: Path) -> None:
    _, before = take_of_all(tars, (1, 1), (2, 2), None)
    _, between = take_of_all(tars, (1, 1, 1), (1, 1, 1), before)
    _, after = take_of_all(tars, (1, 1), (1, 1), between)

    with pytest.raises(ValueError, match="in different parts of an epoch, one from before and one"):
        make(tars, 0).load_state_dict([before[0], after[1]])


def test_without_an_index_it_is_said_what_to_do(tmp_path: Path) -> None:
    bare = write_shards(tmp_path, COUNTS, with_index=False)
    _, state = take(make(bare, 2), 3)

    with pytest.raises(ValueError, match=r"no index of byte ranges.*write an index with"):
        make(bare, 3).load_state_dict(state)


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"shuffle": False}, {"uneven": "pad"}, {"shuffle_buffer": 9}], ids=str
)
def test_another_order_is_refused_by_other_workers_too(tars: Path, change: dict[str, Any]) -> None:
    _, state = take(make(tars, 2), 3)
    (name,) = change

    with pytest.raises(ValueError, match=f"made with {name} .*, expected"):
        make(tars, 3, **change).load_state_dict(state)


@pytest.mark.parametrize("text", ["junk!", "eJw=", _rest.pack(np.array([[70, 99]]))])
def test_a_rest_that_was_changed_is_refused(tars: Path, text: str) -> None:
    _, state = take(make(tars, 2), 3)
    loader = make(tars, 0)
    loader.load_state_dict(state)
    state = loader.state_dict()
    state["dataset"]["dataset"]["part"][0] = text
    other = make(tars, 0)

    other.load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict: part: got"):
        next(iter(other))


# -- intervals


INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8).map(
    lambda pairs: [(start, start + size) for start, size in pairs]
)


def numbers_in(intervals: Any) -> list[int]:
    return sorted({number for start, stop in intervals for number in range(start, stop)})


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    one, other = _rest.unite(some), _rest.unite(others)
    left = _rest.subtract(one, other)

    assert numbers_in(one.tolist()) == numbers_in(some)
    assert numbers_in(left.tolist()) == sorted({*numbers_in(some)} - {*numbers_in(others)})
    assert _rest.count(left) == len(numbers_in(left.tolist()))
    assert _rest.unpack(_rest.pack(left), 50).tolist() == left.tolist()
    ends = left.ravel().tolist()
    assert ends == sorted(set(ends))


def test_a_text_of_what_is_left_is_short() -> None:
    rng = np.random.default_rng(0)
    left = _rest.unite([(int(at), int(at) + 1) for at in rng.integers(0, 10**6, 8000)])

    assert len(_rest.pack(left)) < 4 * len(left)
