"""Windows over a sorted stream: exactly their samples, read once where that is enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.datasets.streamed import StreamedShards
from concurrent_dataloader.datasets.windows import SlidingWindow
from tests.datasets.shards import write_shards


class Times:
    """Counts how often each is read."""

    def __init__(self, times: list[int]) -> None:
        self.times = times
        self.num_read = 0

    def __iter__(self) -> Iterator[int]:
        for time in self.times:
            self.num_read += 1
            yield time


@given(
    times=st.lists(st.integers(0, 20), max_size=30).map(sorted),
    windows=st.lists(st.tuples(st.integers(-2, 22), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_a18_a_window_gives_exactly_its_samples_in_order(
    times: list[int], windows: list[tuple[int, int]]
) -> None:
    view = SlidingWindow(Times(times), lambda time: time)

    for start, width in windows:
        view.set_window(start, start + width)
        expected = [time for time in times if start <= time < start + width]
        assert list(view) == list(view) == expected


def test_windows_that_move_on_read_each_sample_once() -> None:
    source = Times(list(range(100)))
    view = SlidingWindow(source, lambda time: time)

    for start in range(0, 50, 5):
        view.set_window(start, start + 10)
        assert list(view) == list(range(start, start + 10))

    assert source.num_read == 56


def test_samples_that_are_not_sorted_are_refused() -> None:
    view = SlidingWindow([1, 3, 2], lambda time: time)
    view.set_window(0, 9)

    with pytest.raises(ValueError, match="got 2 after 3, expected sorted"):
        list(view)


def test_a_window_is_set_before_and_not_while_it_is_read() -> None:
    view = SlidingWindow(range(9), lambda time: time)
    with pytest.raises(ValueError, match="window: got none"):
        list(view)
    with pytest.raises(ValueError, match=r"got \[3, 2\), expected a stop of 3"):
        view.set_window(3, 2)
    view.set_window(0, 5)
    samples = iter(view)
    next(samples)

    view.set_window(2, 6)

    with pytest.raises(RuntimeError, match="set anew"):
        list(samples)


def test_a18_windows_over_shards(tmp_path: Path) -> None:
    dataset = StreamedShards(write_shards(tmp_path, [10, 10]), decode=bytes)
    view = SlidingWindow(dataset, lambda sample: sample[1])

    view.set_window(7, 13)

    assert [label for _, label in view] == list(range(7, 13))
    view.close()
