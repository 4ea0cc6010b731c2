"""Full batches of partial ones: nothing lost, nothing swapped, no batch too long (G-10)."""

from __future__ import annotations

import collections
import itertools
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from concurrent_dataloader.datasets.rebatch import Rebatch


class Pair(NamedTuple):
    image: Any
    label: Any


def tensors(sizes: list[int]) -> list[torch.Tensor]:
    numbers = itertools.count()
    return [
        torch.tensor(list(itertools.islice(numbers, size)), dtype=torch.int64) for size in sizes
    ]


def test_an_older_partial_batch_comes_before_a_newer_full_one_g10() -> None:
    found = [batch.tolist() for batch in Rebatch(tensors([2, 4, 4]), 4)]

    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@given(
    sizes=st.lists(st.integers(0, 9), max_size=12),
    batch_size=st.integers(1, 7),
    drop_last=st.booleans(),
)
def test_order_sizes_and_length_are_right_for_any_batches_g10(
    sizes: list[int], batch_size: int, drop_last: bool
) -> None:
    total = sum(sizes)
    loader = Rebatch(tensors(sizes), batch_size, drop_last=drop_last, num_samples=total)

    for _ in range(2):
        found = [batch.tolist() for batch in loader]

        kept = total - total % batch_size if drop_last else total
        assert list(itertools.chain(*found)) == list(range(kept))
        assert all(len(batch) == batch_size for batch in found[:-1])
        assert len(found) == len(loader)


BUILDS: dict[str, type] = {"default": dict}
"""What becomes of a mapping that cannot be made of a dict, as in torch's own collating."""


def build(kind: str, numbers: range) -> Any:
    """A batch of the samples ``numbers``, each of which can be told from its parts."""
    column = torch.tensor(list(numbers))
    boxes = column[:, None] + torch.tensor([0.1, 0.2, 0.3, 0.4])
    return {
        "tuple": (column, column * 2),
        "list": [column, column * 2],
        "dict": {"image": column, "box": boxes},
        "ordered": OrderedDict(image=column, box=boxes),
        "named": Pair(column, column * 2),
        "boxes": [[column, boxes], column * 2],
        "numpy": (column.numpy(), boxes.numpy()),
        "texts": (column, [f"key {number}" for number in numbers]),
        "ragged": ([boxes[:1].repeat(number % 3, 1) for number in numbers], column),
        "default": collections.defaultdict(list, image=column, box=boxes),
        "samples": [{"number": number} for number in numbers],
    }[kind]


def parts(batch: Any) -> list[Any]:
    """The samples of a batch, apart."""
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return list(batch.tolist())
    if isinstance(batch, dict):
        columns = [parts(value) for value in batch.values()]
        return [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(batch, list) and not any(
        isinstance(value, (torch.Tensor, list)) for value in batch
    ):
        return batch
    return list(zip(*map(parts, batch), strict=True))


@pytest.mark.parametrize(
    "kind",
    ["tuple", "list", "dict", "ordered", "default", "named", "boxes", "numpy", "texts", "samples"],
)
def test_batches_keep_their_build(kind: str) -> None:
    given_batches = [build(kind, range(3)), build(kind, range(3, 4)), build(kind, range(4, 11))]

    found = list(Rebatch(given_batches, 5))

    assert [type(batch) for batch in found] == [BUILDS.get(kind, type(given_batches[0]))] * 3
    whole = build(kind, range(11))
    samples = list(itertools.chain(*map(parts, found)))
    assert samples == parts(whole)
    assert [len(parts(batch)) for batch in found] == [5, 5, 1]


def test_each_sample_may_have_its_own_number_of_boxes() -> None:
    batches = [build("ragged", range(3)), build("ragged", range(3, 8))]

    found = list(Rebatch(batches, 4))

    assert [len(boxes) for boxes, _ in found] == [4, 4]
    boxes = [tuple(box.shape) for boxes, _ in found for box in boxes]
    assert boxes == [(number % 3, 4) for number in range(8)]
    assert torch.equal(torch.cat([column for _, column in found]), torch.arange(8))


def test_a_list_of_samples_that_looks_like_fields_is_told_by_other_batches() -> None:
    two = ([torch.zeros(2, 4), torch.ones(2, 4)], torch.arange(2))  # two samples of two boxes
    three = ([torch.zeros(1, 4)] * 3, torch.arange(3))

    found = list(Rebatch([three, two], 5))

    assert [tuple(box.shape) for box in found[0][0]] == [(1, 4)] * 3 + [(2, 4)] * 2


def test_lists_of_samples_can_be_declared() -> None:
    two = ([torch.zeros(2, 4), torch.ones(2, 4)], torch.arange(2))

    found = list(Rebatch([two, two], 3, per_sample_lists=True))

    assert [len(boxes) for boxes, _ in found] == [3, 1]
    assert torch.equal(found[1][0][0], torch.ones(2, 4))
    samples = [[torch.zeros(3), torch.ones(3)], [torch.zeros(3)]]
    assert [len(batch) for batch in Rebatch(samples, 2, per_sample_lists=True)] == [2, 1]


def test_a_list_that_was_taken_for_fields_by_mistake_is_an_error() -> None:
    two = ([torch.zeros(2, 4), torch.ones(2, 4)], torch.arange(2))
    fields = ([torch.zeros(3, 4), torch.ones(3, 4)], torch.arange(3))
    ragged = ([torch.zeros(1, 4), torch.ones(5, 4)], torch.arange(2))

    with pytest.raises(ValueError, match=r"list at \[0\] holds fields in some batches"):
        list(Rebatch([two, fields, ragged], 4))


def test_a_full_batch_goes_through_as_it_is() -> None:
    batches = tensors([4, 4, 2])

    found = list(Rebatch(batches, 4))

    assert found[0] is batches[0]
    assert found[1] is batches[1]


def test_what_is_handed_out_holds_on_to_no_larger_batch() -> None:
    found = list(Rebatch(tensors([100]), 10))

    assert {batch.untyped_storage().nbytes() for batch in found} == {80}


def test_a_wrong_number_of_samples_is_an_error_after_the_last_batch() -> None:
    batches = iter(Rebatch(tensors([3, 3]), 4, num_samples=8))

    assert [next(batches).tolist(), next(batches).tolist()] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(ValueError, match="num_samples: got 8, but the batches held 6"):
        next(batches)


def test_without_a_number_of_samples_there_is_no_length() -> None:
    with pytest.raises(TypeError, match="num_samples: got None"):
        len(Rebatch([], 4))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(torch.zeros(2), torch.zeros(3))], r"got 3 samples at \[1\], and 2 samples elsewhere"),
        ([(torch.zeros(2), torch.tensor(1))], r"got a single number at \[1\], and 2 samples"),
        ([(torch.zeros(2), "text")], r"got a str at \[1\]"),
        ([5], "got a int without a tensor"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], r"\['[ab]'\] is in some batches only"),
    ],
)
def test_batches_that_cannot_be_put_together_are_refused(batches: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(Rebatch(batches, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "batch_size: got 0"), ({"num_samples": -1}, "num_samples: got -1")],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    given_settings: dict[str, Any] = {"batch_size": 4} | settings

    with pytest.raises(ValueError, match=message):
        Rebatch([], **given_settings)


class Stream(IterableDataset[int]):
    """10 samples, of which worker ``i`` of 3 delivers every third."""

    def __iter__(self):
        worker = get_worker_info()
        assert worker is not None
        return iter(range(worker.id, 10, worker.num_workers))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_partial_batches_of_workers_become_full_ones() -> None:
    partial = DataLoader(Stream(), batch_size=4, num_workers=3)
    assert [len(batch) for batch in partial] == [4, 3, 3]
    loader = Rebatch(partial, 4, num_samples=10)

    found = [batch.tolist() for batch in loader]

    assert found == [[0, 3, 6, 9], [1, 4, 7, 2], [5, 8]]
    assert len(loader) == 3
