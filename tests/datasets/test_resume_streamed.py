"""A loader's epoch over streamed shards goes on where it was left."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets.streamed import ReadSettings, StreamedShards
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.shards import write_shards

COUNTS = [10, 7, 0, 13, 20, 21, 8]
TOTAL = sum(COUNTS)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without an index: workers take whole shards, and some end long before others."""
    return write_shards(tmp_path_factory.mktemp("bare"), COUNTS, with_index=False)


def count_bytes(raw: Any) -> int:
    return len(raw)


def add_noise(num_bytes: int) -> torch.Tensor:
    return num_bytes + torch.rand(2)


def make(folder: Path, **settings: Any) -> DataLoader[Any]:
    names = ("shuffle", "seed", "rank", "world_size")
    given: dict[str, Any] = {"shuffle": True, "uneven": "exact"}
    given |= {name: settings.pop(name) for name in names if name in settings}
    dataset = StreamedShards(
        folder,
        decode=count_bytes,
        transform=add_noise,
        shuffle_buffer=12,
        reading=ReadSettings(part_bytes=4096, max_parts=4, num_open=3),
        **given,
    )
    settings = {"batch_size": 4, **settings}
    return DataLoader(dataset, **settings)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def read(batches: Any) -> list[tuple[Any, Any]]:
    return [(noise.tolist(), torch.as_tensor(labels).tolist()) for noise, labels in batches]


def take(loader: DataLoader[Any], count: int) -> tuple[list[Any], Any]:
    taken = read(itertools.islice(loader, count))
    state = through_a_file(loader.state_dict())
    loader.close()
    return taken, state


def go_on(loader: DataLoader[Any], state: Any) -> None:
    loader.load_state_dict(state)
    next(iter(loader))


@pytest.mark.parametrize("source", ["folder", "bare"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 0},
        {"num_workers": 1},
        {"num_workers": 3},
        {"num_workers": 3, "shuffle": False},
        {"num_workers": 2, "drop_last": True},
        {"num_workers": 2, "batch_size": None},
    ],
    ids=str,
)
def test_the_rest_is_that_of_an_uninterrupted_epoch(
    source: str, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    shards = request.getfixturevalue(source)
    torch.manual_seed(1)
    whole = read(make(shards, **settings))
    for cuts in [(1, 7), (len(whole) - 1, 1)]:
        got: list[Any] = []
        state: Any = None
        torch.manual_seed(1)
        for cut in cuts:
            loader = make(shards, **settings)
            if state is not None:
                loader.load_state_dict(state)
            taken, state = take(loader, cut)
            got += taken
            if settings["num_workers"]:  # without, the draws of this process are the caller's
                torch.manual_seed(2)
        loader = make(shards, **settings)
        loader.load_state_dict(state)

        assert [*got, *read(loader)] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_epoch_that_was_set_is_kept_by_workers_that_delivered_nothing(
    folder: Path, num_workers: int
) -> None:
    def make_at(epoch: int | None) -> Any:
        loader: Any = make(folder, num_workers=num_workers)
        if epoch is not None:
            loader.dataset.set_epoch(epoch)
        return loader

    whole = [labels for _, labels in read(make_at(5))]
    taken, state = take(make_at(5), 1)
    resumed = make_at(None)
    resumed.load_state_dict(state)

    assert [labels for _, labels in [*taken, *read(resumed)]] == whole


@pytest.mark.parametrize("num_before", [0, 1])
def test_persistent_workers_go_on_in_a_later_epoch(folder: Path, num_before: int) -> None:
    """Some of the workers have delivered nothing of it when its state is saved."""
    settings: Any = {"num_workers": 3, "persistent_workers": True}
    uninterrupted = make(folder, **settings)
    loader = make(folder, **settings)
    for each in (uninterrupted, loader):
        each.dataset.set_epoch(7)  # pyright: ignore[reportAttributeAccessIssue]: a stream
        torch.manual_seed(3)
        read(itertools.islice(each, 40 if num_before else 3))
    expected = [[labels for _, labels in read(uninterrupted)] for _ in range(2)]
    taken, state = take(loader, num_before)
    resumed = make(folder, **settings)
    resumed.load_state_dict(state)

    got = [labels for _, labels in [*taken, *read(resumed)]]

    assert got == expected[0] != expected[1]
    assert [labels for _, labels in read(resumed)] == expected[1]


def test_ranks_go_on_each_by_itself(folder: Path) -> None:
    got: list[int] = []
    for rank in range(2):
        arguments: Any = {"rank": rank, "world_size": 2, "num_workers": 1}
        taken, state = take(make(folder, **arguments), 3)
        resumed = make(folder, **arguments)
        resumed.load_state_dict(state)
        got += [label for _, labels in [*taken, *read(resumed)] for label in labels]

    assert sorted(got) == list(range(TOTAL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "made with seed 0, expected 8"),
        ({"batch_size": 5}, "batch_size: got 5, expected 4"),
        ({"rank": 0, "world_size": 3}, "state of rank 0 of 2, expected also that of rank 1"),
        ({"rank": 1}, "got the state of rank 0 of 2, expected that of rank 1"),
    ],
    ids=str,
)
def test_the_state_of_others_is_refused(folder: Path, change: Any, message: str) -> None:
    settings: Any = {"num_workers": 2, "rank": 0, "world_size": 2}
    _, state = take(make(folder, **settings), 4)
    other = make(folder, **settings | change)

    with pytest.raises(ValueError, match=message), other:
        go_on(other, state)


@pytest.mark.parametrize("told", [None, 3])
def test_the_loader_tells_its_batch_size(folder: Path, told: int | None) -> None:
    """Only then batches are the same for any number of workers."""
    dataset = StreamedShards(folder, decode=count_bytes, batch_size=told)
    expected = [list(range(start, min(start + 6, TOTAL))) for start in range(0, TOTAL, 6)]

    for num_workers in (0, 1, 3):
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=6, num_workers=num_workers)
        assert [labels.tolist() for _, labels in loader] == expected


def test_bytes_that_were_delivered_are_not_fetched_again(
    object_server: ObjectServer, tmp_path: Path
) -> None:
    write_shards(tmp_path, [400], max_bytes=4000)
    object_server.create_bucket("public", public=True)
    object_server.put_folder("public", tmp_path)
    num_bytes = (tmp_path / "train-000000.tar").stat().st_size

    def open_loader() -> DataLoader[Any]:
        dataset = StreamedShards(
            f"{object_server.endpoint_url}/public/train-000000.tar",
            decode=count_bytes,
            index=None,
            shuffle=True,
            shuffle_buffer=12,
        )
        return DataLoader(dataset, batch_size=10, num_workers=1)

    taken, state = take(open_loader(), 30)
    resumed = open_loader()
    resumed.load_state_dict(state)
    object_server.reset_counters()

    rest = read(resumed)

    labels = [label for _, labels in [*taken, *rest] for label in labels]
    assert sorted(labels) == list(range(400))
    assert object_server.counters().body_bytes_sent < 0.45 * num_bytes
