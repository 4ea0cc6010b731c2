"""The queue that looks ahead, alone."""

import queue
from typing import Any

import pytest

from concurrent_dataloader.dataloader_mod import torch_internals
from concurrent_dataloader.dataloader_mod.fetched import FetchedDataset
from concurrent_dataloader.dataloader_mod.lookahead import BatchTaken, Lookahead
from concurrent_dataloader.dataloader_mod.settings import FetchSettings
from tests.dataloader_mod.doubles import MergedSquares, StagedSquares

RESUME = torch_internals.ResumeIteration()


class Begins(FetchedDataset):
    """Notes which batches were begun."""

    def __init__(self, settings, samples):
        super().__init__(samples, settings, auto_collation=True)
        self.begun = []

    def begin(self, *batches):
        self.begun += [batch.positions[0] for batch in batches if batch.futures is None]
        super().begin(*batches)


@pytest.fixture
def make_lookahead():
    made = []

    def make(*items, batch_pool=2, prefetch_factor=2, takes_counted=True, samples=None):
        settings = FetchSettings(
            num_fetch_workers=4,
            batch_pool=batch_pool,
            prefetch_factor=prefetch_factor,
            takes_counted=takes_counted,
        )
        source = queue.Queue()
        for item in items:
            source.put(item)
        dataset = Begins(settings, samples or StagedSquares(100))
        made.append(dataset)
        lookahead: Any = Lookahead(source, dataset, settings)
        lookahead.put = source.put
        return lookahead, dataset

    yield make
    for dataset in made:
        dataset.close()


def batches(*numbers):
    return [(number, [number, number + 1]) for number in numbers]


def take(lookahead):
    item = lookahead.get(timeout=0.01)
    return item[0] if isinstance(item, tuple) else item


def test_batches_are_begun_ahead_and_handed_out_in_order(make_lookahead):
    lookahead, dataset = make_lookahead(*batches(0, 10, 20, 30), prefetch_factor=9)

    assert take(lookahead) == 0
    assert dataset.begun == [0, 10, 20]
    assert take(lookahead) == 10
    assert dataset.begun == [0, 10, 20, 30]
    assert [take(lookahead), take(lookahead)] == [20, 30]
    with pytest.raises(queue.Empty):
        take(lookahead)


@pytest.mark.parametrize(("batch_pool", "num_requests"), [(0, 6), (3, 4), (5, 2)])
def test_near_positions_of_batches_that_are_begun_together_share_a_request(
    make_lookahead, batch_pool, num_requests
):
    """Of six batches of two positions the first five lie together; the last ones come later."""
    samples = MergedSquares(20)
    lookahead, dataset = make_lookahead(
        *batches(0, 2, 4, 6, 8, 10), batch_pool=batch_pool, prefetch_factor=9, samples=samples
    )

    labels = []
    for _ in range(6):
        _, batch = lookahead.get(timeout=0.01)
        labels += [label for _, label in dataset.__getitems__(batch)]

    assert labels == list(range(12))
    assert samples.num_requests.value == num_requests


def test_a_batch_waits_until_one_was_taken(make_lookahead):
    lookahead, dataset = make_lookahead(*batches(0, 10, 20, 30, 40, 50))

    assert [take(lookahead), take(lookahead)] == [0, 10]
    with pytest.raises(queue.Empty):
        take(lookahead)
    assert dataset.begun == [0, 10, 20, 30]
    lookahead.put(BatchTaken)
    assert take(lookahead) == 20


def test_without_counting_all_that_was_sent_is_handed_out(make_lookahead):
    lookahead, _ = make_lookahead(*batches(0, 10, 20), prefetch_factor=1, takes_counted=False)

    assert [take(lookahead) for _ in range(3)] == [0, 10, 20]


def test_the_end_overtakes_what_was_not_handed_out(make_lookahead):
    lookahead, _ = make_lookahead(*batches(0, 10, 20))
    take(lookahead)
    lookahead.put(None)

    assert take(lookahead) is None


def test_a_new_epoch_comes_after_what_torch_would_have_made_and_before_the_rest(make_lookahead):
    lookahead, _ = make_lookahead(*batches(0, 10, 20, 30, 40))
    assert take(lookahead) == 0
    lookahead.put(RESUME)
    for item in batches(50, 60, 70):
        lookahead.put(item)

    assert take(lookahead) == 10
    assert take(lookahead) is RESUME
    assert [take(lookahead), take(lookahead)] == [50, 60]
    with pytest.raises(queue.Empty):
        take(lookahead)


def test_the_end_may_come_twice_since_it_can_be_seen_before_it_is_sent(make_lookahead):
    lookahead, _ = make_lookahead(None, None)

    assert take(lookahead) is None
