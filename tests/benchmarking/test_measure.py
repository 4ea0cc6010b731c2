import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarking.effort import Effort
from benchmarking.measure import (
    Speed,
    check_same_batches,
    check_same_positions,
    endless_sampler,
    measure_epoch,
    measure_in_turns,
    measure_speed,
)


def make_dataset(offset: int = 0) -> TensorDataset:
    positions = torch.arange(10)
    return TensorDataset(torch.rand(10, 3, generator=torch.manual_seed(0)) + offset, positions)


def open_loader(dataset: TensorDataset, seed: int = 0, num_workers: int = 0) -> DataLoader[object]:
    return DataLoader(
        dataset, batch_size=2, sampler=endless_sampler(dataset, seed), num_workers=num_workers
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_worker_delivers_its_warm_up_and_one_round_at_least(num_workers: int) -> None:
    loader = open_loader(make_dataset(), num_workers=num_workers)

    speed = measure_speed(loader, seconds=0.0, num_warm_up_batches=3)

    num_batches = (3 + 1) * max(1, num_workers)
    assert speed.positions == list(
        itertools.islice(endless_sampler(make_dataset()), 2 * num_batches)
    )
    assert speed.images_per_s > 0
    assert speed.server_cpu_ms_per_image == 0


def test_the_clock_runs_as_long_as_it_was_told() -> None:
    speed = measure_speed(open_loader(make_dataset()), seconds=0.05, num_warm_up_batches=0)

    assert len(speed.positions) / speed.images_per_s >= 0.05


def test_the_endless_order_holds_each_position_once_in_each_pass() -> None:
    order = [
        position for position, _ in zip(endless_sampler(make_dataset()), range(30), strict=False)
    ]

    assert all(sorted(order[at : at + 10]) == list(range(10)) for at in (0, 10, 20))
    assert order[:10] != order[10:20]


def test_an_epoch_delivers_all_and_counts_its_workers_cpu() -> None:
    loader = DataLoader(make_dataset(), batch_size=3, num_workers=2)

    speed = measure_epoch(loader)

    assert speed.positions == list(range(10))
    assert speed.client_cpu_ms_per_image > 0


def test_the_sides_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def measured(name: str) -> Speed:
        order.append(name)
        return Speed(1.0, 1.0, 0.0, [1, 2, 3])

    measure_in_turns({"a": lambda: measured("a"), "b": lambda: measured("b")}, Effort(repeats=3))

    assert order == ["a", "b", "b", "a", "a", "b"]


def test_sides_that_deliver_other_positions_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="ours: got position 9 as sample 1, expected 2 as in t"):
        check_same_positions({"torch": [[1, 2, 3]], "ours": [[1, 2, 3, 4], [1, 9]]})


def test_sides_that_deliver_other_pixels_are_not_compared() -> None:
    sides = {
        "torch": lambda: open_loader(make_dataset()),
        "ours": lambda: open_loader(make_dataset(offset=1)),
    }

    with pytest.raises(RuntimeError, match="ours: batch 0 differs from that of torch"):
        check_same_batches(sides, num_batches=1)


def test_sides_with_equal_bits_are_compared() -> None:
    check_same_batches(
        {name: lambda: open_loader(make_dataset(), num_workers=2) for name in "ab"}, num_batches=3
    )
