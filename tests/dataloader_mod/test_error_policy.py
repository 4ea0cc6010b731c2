"""What becomes of samples that cannot be had, and of batches that do not come."""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import ConcatDataset, Subset
from typing_extensions import Buffer

from concurrent_dataloader import DataLoader, ErrorBudget
from concurrent_dataloader.dataloader_mod.failures import clean_text
from concurrent_dataloader.datasets.contract import SampleLocation
from concurrent_dataloader.errors import (
    DeadlineError,
    ErrorBudgetError,
    ExpiredCredentialsError,
    KeyNotFoundError,
    MissingDependencyError,
    SampleDecodeError,
)
from tests.dataloader_mod import doubles
from tests.dataloader_mod.conftest import is_same, read_epochs

BAD = (3, 8, 9, 17, 20, 21, 22, 23)
"""Of 26 samples in batches of 4: one, two, one, and all of a batch."""

DROP: Any = None


class FailingAt(doubles.StagedSquares):
    """Fails at some positions in one stage, before any random number is drawn there."""

    def __init__(
        self, num_samples: int, stage: str, bad: Sequence[int] = BAD, error: Exception | None = None
    ) -> None:
        super().__init__(num_samples)
        self.stage, self.bad = stage, bad
        self.error = error or KeyNotFoundError("s3://bucket/key: no such object")

    def fail(self, stage: str, position: int) -> None:
        if stage == self.stage and position in self.bad:
            raise copy.copy(self.error)

    def fetch(self, position: int) -> bytes:
        self.fail("fetch", position)
        return super().fetch(position)

    async def fetch_async(self, position: int) -> bytes:
        self.fail("fetch", position)
        return await super().fetch_async(position)

    def decode(self, position: int, raw: Buffer) -> int:
        self.fail("decode", position)
        return super().decode(position, raw)

    def apply_transform(self, decoded: int) -> tuple[torch.Tensor, int]:
        self.fail("transform", decoded)
        return super().apply_transform(decoded)

    def locate_sample(self, position: int) -> SampleLocation:
        return SampleLocation(f"squares/{position}")


class OfTorch(torch.utils.data.Dataset[Any]):
    """The same for torch's loader: what fails is None."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        try:
            return self.dataset[position]
        except KeyNotFoundError:
            return None


def collate_skipped(samples: list[Any]) -> Any:
    good = [sample for sample in samples if sample is not None]
    return torch.utils.data.default_collate(good) if good else DROP


def collate_replaced(samples: list[Any]) -> Any:
    twice = samples + samples
    filled = [next(s for s in twice[at:] if s is not None) for at in range(len(samples))]
    return torch.utils.data.default_collate(filled)


def labels_of(batches: Any) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("stage", ["fetch", "decode", "transform"])
@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_the_good_samples_are_those_of_torch(
    on_error: Any, stage: str, fetch_impl: Any, num_workers: int
) -> None:
    bad = BAD if on_error == "skip" else BAD[:-1]
    settings: Any = {"batch_size": 4, "num_workers": num_workers}
    dataset = FailingAt(26, stage, bad)
    collate_fn = collate_skipped if on_error == "skip" else collate_replaced
    theirs = read_epochs(
        torch.utils.data.DataLoader, OfTorch(dataset), collate_fn=collate_fn, **settings
    )

    ours = read_epochs(DataLoader, dataset, on_error=on_error, fetch_impl=fetch_impl, **settings)

    assert is_same(ours, [batch for batch in theirs if batch is not DROP])
    assert len(ours) == 2 * (6 if on_error == "skip" else 7)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_without_an_error_batches_are_those_of_torch(on_error: Any, num_workers: int) -> None:
    settings: Any = {"batch_size": 4, "num_workers": num_workers, "shuffle": True}
    dataset = doubles.StagedSquares(26)

    ours = read_epochs(DataLoader, dataset, on_error=on_error, **settings)

    assert is_same(ours, read_epochs(torch.utils.data.DataLoader, dataset, **settings))


class FailingPlain(doubles.PlainSquares):
    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        if position in BAD:
            raise SampleDecodeError(f"no image at {position}")
        return super().__getitem__(position)

    def key(self, position: int) -> str:
        return f"plain/{position}"


class FailingBatched(FailingPlain):
    def __getitems__(self, positions: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[position] for position in positions]


class FailingAwaited(FailingPlain):
    async def getitem_async(self, position: int) -> tuple[torch.Tensor, int]:
        return FailingPlain.__getitem__(self, position)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("kind", [FailingPlain, FailingBatched, FailingAwaited])
def test_samples_of_plain_datasets_are_left_out_one_by_one(
    kind: Any, fetch_impl: Any, num_workers: int
) -> None:
    loader = DataLoader(
        kind(26), 4, num_workers=num_workers, fetch_impl=fetch_impl, on_error="skip"
    )

    batches = labels_of(loader)

    good = [
        [p for p in range(start, min(start + 4, 26)) if p not in BAD] for start in range(0, 26, 4)
    ]
    assert batches == [batch for batch in good if batch]
    failures = loader.error_report().failures
    assert [(failure.position, failure.error) for failure in failures] == [
        (position, f"no image at {position}") for position in BAD
    ]
    assert [failure.location for failure in failures] == [
        SampleLocation(f"plain/{position}") for position in BAD
    ]


def test_a_sample_of_a_request_for_several_is_left_out_alone() -> None:
    dataset = doubles.MergedSquares(20, missing=13)

    loader = DataLoader(dataset, 10, num_workers=1, on_error="skip")

    assert labels_of(loader) == [list(range(10)), [10, 11, 12, 14, 15, 16, 17, 18, 19]]


def test_parts_of_datasets_name_where_their_samples_lie() -> None:
    both = ConcatDataset([doubles.StagedSquares(5), Subset(FailingAt(26, "fetch"), range(6, 12))])

    loader = DataLoader(both, 3, on_error="skip")

    assert labels_of(loader) == [[0, 1, 2], [3, 4, 6], [7], [10, 11]]
    assert [(each.position, each.location) for each in loader.error_report().failures] == [
        (7, SampleLocation("squares/8")),
        (8, SampleLocation("squares/9")),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_single_samples_are_left_out_where_there_are_no_batches(num_workers: int) -> None:
    dataset = FailingAt(26, "fetch")

    loader = DataLoader(dataset, None, num_workers=num_workers, on_error="skip")

    assert [label for _, label in loader] == [at for at in range(26) if at not in BAD]
    assert loader.error_report()[:3] == (0, 26, len(BAD))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_persistent_workers_begin_a_new_count_with_each_epoch(num_workers: int) -> None:
    dataset = FailingAt(26, "fetch")
    torch.manual_seed(1)
    loader = DataLoader(
        dataset,
        1,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=8 if num_workers else None,
        on_error="skip",
    )
    next(iter(loader))  # what fails of the other batches belongs to an epoch that is left

    for epoch in (1, 2):
        assert len(list(loader)) == 26 - len(BAD)
        assert loader.error_report()[:3] == (epoch, 26, len(BAD))
        failures = loader.error_report().failures
        assert sorted(int(each.position or 0) for each in failures) == list(BAD)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_without_a_good_sample_cannot_be_replaced(num_workers: int) -> None:
    loader = DataLoader(FailingAt(26, "fetch"), 4, num_workers=num_workers, on_error="replace")
    iterator = iter(loader)
    before = [next(iterator) for _ in range(5)]

    with pytest.raises(KeyNotFoundError, match="no such object") as caught:
        next(iterator)

    shown = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "position 23" in shown
    assert "on_error='replace': no sample of the batch is good" in shown
    assert [len(labels) for _, labels in before] == [4] * 5
    assert [labels.tolist() for _, labels in (before[0], before[2], before[4])] == [
        [0, 1, 2, 0],
        [10, 10, 10, 11],
        [16, 18, 18, 19],
    ]
    assert loader.error_report().num_failed == 8


def pop_and_collect(samples: list[dict[str, int]]) -> list[int]:
    return [sample.pop("label") for sample in samples]


class Dictionaries(torch.utils.data.Dataset[dict[str, int]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, position: int) -> dict[str, int]:
        if position == 2:
            raise OSError("gone")
        return {"label": position}


def test_a_collate_function_may_change_the_samples_that_replace_others() -> None:
    loader = DataLoader(Dictionaries(), 4, collate_fn=pop_and_collect, on_error="replace")

    assert list(loader) == [[0, 1, 3, 3]]


class Words(torch.utils.data.Dataset[str]):
    def __getitem__(self, position: str) -> str:
        if position == "bad":
            raise SampleDecodeError("no word")
        return position.upper()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_positions_may_be_words_and_batches_of_them_arrays(num_workers: int) -> None:
    settings: Any = {"num_workers": num_workers, "on_error": "skip"}
    words = DataLoader(Words(), None, sampler=["good", "bad", "fine"], **settings)
    assert list(words) == ["GOOD", "FINE"]
    assert words.error_report()[1:3] == (3, 1)
    assert words.error_report().failures[0].position == "'bad'"

    batches: Any = [np.array([1, 2]), np.array([3, 4, 5])]
    arrays = DataLoader(FailingAt(26, "fetch"), batch_sampler=batches, **settings)
    assert labels_of(arrays) == [[1, 2], [4, 5]]
    assert arrays.error_report()[1:3] == (5, 1)


# -- the budget


@pytest.mark.parametrize(
    ("budget", "num_failed", "num_asked", "is_allowed"),
    [
        (ErrorBudget(), 10, 10, True),
        (ErrorBudget(), 11, 500, False),
        (ErrorBudget(), 1000, 100_000, True),
        (ErrorBudget(), 1001, 10**9, False),
        (ErrorBudget(count=0), 0, 5, True),
        (ErrorBudget(count=0), 1, 5, False),
        (ErrorBudget(count=None, share=0.5), 5001, 10_000, False),
        (ErrorBudget(count=None, share=1), 10**6, 10**6, True),
        (ErrorBudget(share=0.0), 1, 10**6, False),
    ],
)
def test_a_budget_is_of_count_and_share(
    budget: ErrorBudget, num_failed: int, num_asked: int, is_allowed: bool
) -> None:
    assert budget.allows(num_failed, num_asked) is is_allowed


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_budget_holds_over_all_workers_and_says_what_was_spent(
    num_workers: int, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    loader = DataLoader(
        FailingAt(40, "fetch", range(0, 40, 4)),
        4,
        num_workers=num_workers,
        on_error="skip",
        error_budget=ErrorBudget(count=5),
        quarantine_file=path,
    )
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)

    with pytest.raises(ErrorBudgetError) as caught:
        next(iterator)

    message = str(caught.value)
    assert "6 of 24 samples of the epoch failed (25.00%)" in message
    assert "count=5 and share=0.01" in message
    assert "position 20 (squares/20): KeyNotFoundError: s3://bucket/key: no such" in message
    assert repr(str(path)) in message
    assert len(path.read_text().splitlines()) == 6


def test_a_store_that_is_gone_ends_the_epoch_by_default() -> None:
    loader = DataLoader(FailingAt(4000, "fetch", range(4000)), 8, num_workers=2, on_error="skip")

    with pytest.raises(ErrorBudgetError, match="16 of 16 samples"):
        list(loader)


# -- what is written down


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_failure_is_a_line_of_the_file_once_its_batch_is_taken(
    num_workers: int, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    loader = DataLoader(
        FailingAt(26, "fetch"), 4, num_workers=num_workers, on_error="skip", quarantine_file=path
    )

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    iterator = iter(loader)
    assert lines() == []
    for _ in range(2):
        next(iterator)
    assert [line["position"] for line in lines()] == [3]
    list(loader)

    assert [(line["epoch"], line["position"]) for line in lines()] == [
        (0, 3),
        *((1, position) for position in BAD),
    ]
    first = lines()[0]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[0-9:.]{12}\+00:00", first.pop("time"))
    assert 0 <= first.pop("elapsed_s") < 60
    assert first == {
        "key": "squares/3",
        "range": None,
        "sample": "",
        "kind": "bytes",
        "error_type": "KeyNotFoundError",
        "error": "s3://bucket/key: no such object",
        "attempts": None,
        "position": 3,
        "num_samples": 1,
        "epoch": 0,
    }


def test_a_file_that_cannot_be_written_is_an_error_before_the_first_batch(tmp_path: Path) -> None:
    loader = DataLoader(
        FailingAt(26, "fetch"), 4, on_error="skip", quarantine_file=tmp_path / "no" / "bad.jsonl"
    )

    with pytest.raises(
        FileNotFoundError, match=r"quarantine_file: .*make the folder, .*bad\.jsonl"
    ):
        iter(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_full_disk_is_said_with_the_name_of_the_file(num_workers: int) -> None:
    dataset = FailingAt(26, "fetch")
    loader = DataLoader(
        dataset, 4, on_error="skip", quarantine_file="/dev/full", num_workers=num_workers
    )

    said = r"\[Errno 28\] quarantine_file: cannot be written \(No space left .*: '/dev/full'"
    with pytest.raises(OSError, match=said):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stage", ["fetch", "decode", "transform"])
def test_an_error_says_which_sample_of_which_key_raised_it(stage: str, num_workers: int) -> None:
    with pytest.raises(KeyNotFoundError) as caught:
        list(DataLoader(FailingAt(26, stage), 4, num_workers=num_workers))

    where = f"asked for by position {BAD[0]} of the data set (squares/{BAD[0]})"
    said = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    assert any(where in each for each in said), said


def test_what_may_be_secret_does_not_get_into_the_file(tmp_path: Path) -> None:
    url = "https://me:pa55@host/key.jpg?X-Amz-Signature=c0ffee&X-Amz-Credential=AKIA"
    path = tmp_path / "bad.jsonl"
    dataset = FailingAt(8, "decode", [1], SampleDecodeError(f"got\n{url!r}, expected an image"))

    list(DataLoader(dataset, 4, num_workers=1, on_error="skip", quarantine_file=path))

    assert json.loads(path.read_text())["error"] == (
        "got 'https://host/key.jpg?(left out)', expected an image"
    )


def test_a_text_of_odd_characters_can_be_written() -> None:
    assert clean_text("a\udcff \n b") == "a? b"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_end_of_an_epoch_says_what_failed(
    num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    list(DataLoader(FailingAt(26, "fetch"), 4, num_workers=num_workers, on_error="skip"))

    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("on_error='skip': position 3 (squares/3): KeyNotFoundError: s3://")
    assert last.startswith(
        "epoch 0: 8 of 26 samples failed and were left out (KeyNotFoundError 8): position 3 ("
    )
    assert last.endswith("; and 5 more")


def test_nothing_is_said_and_reported_where_nothing_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = DataLoader(doubles.StagedSquares(8), 4, on_error="replace")
    assert loader.error_report() == (0, 0, 0, ())

    list(loader)

    assert not caplog.records
    assert loader.error_report() == (0, 8, 0, ())


# -- what is never passed over


def fail_to_collate(samples: list[Any]) -> Any:
    raise ValueError(f"cannot collate {len(samples)}")


class EndsBadly:
    """A sampler whose iterator fails."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        yield from range(4)
        raise ValueError("the sampler failed")


def fail_to_begin(worker_id: int) -> None:
    raise ValueError(f"no disk for {worker_id}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"collate_fn": fail_to_collate}, "cannot collate 4"),
        ({"collate_fn": fail_to_collate, "num_workers": 2}, "cannot collate 4"),
        ({"sampler": EndsBadly()}, "the sampler failed"),
        ({"sampler": EndsBadly(), "num_workers": 2}, "the sampler failed"),
        ({"worker_init_fn": fail_to_begin, "num_workers": 1}, "no disk for 0"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip", "replace"])
def test_what_is_no_error_of_a_sample_is_raised(settings: Any, message: str, on_error: Any) -> None:
    loader = DataLoader(doubles.StagedSquares(8), 4, on_error=on_error, **settings)

    with pytest.raises(ValueError, match=message) as caught:
        list(loader)

    assert str(caught.value).count(message) <= 2  # once, and once in the remote traceback
    assert loader.error_report().num_failed == 0


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        MissingDependencyError("pip install it"),
        ExpiredCredentialsError("the token has run out"),
        MemoryError("no memory"),
    ],
)
def test_an_error_that_no_sample_is_to_blame_for_is_raised(error: Any, num_workers: int) -> None:
    dataset = FailingAt(8, "decode", [1], error)

    with pytest.raises(type(error)):
        list(DataLoader(dataset, 4, num_workers=num_workers, on_error="skip"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"on_error": "ignore"}, ValueError, "on_error: got 'ignore', expected 'raise', 'skip'"),
        ({"on_error": "skip", "error_budget": 5}, TypeError, "error_budget: got 5, expected an E"),
        ({"error_budget": ErrorBudget()}, ValueError, "expected on_error='skip' or 'replace'"),
        ({"quarantine_file": "x"}, ValueError, "quarantine_file: got 'x' with on_error='raise'"),
        ({"quarantine_file": 5}, TypeError, "quarantine_file: got 5, expected the path of a file"),
        ({"timeout": float("nan")}, ValueError, "timeout: got nan s, expected 0 s"),
        ({"timeout": 1e12}, ValueError, "timeout: got 1000000000000.0 s, expected 0 s"),
        ({"timeout": 1}, ValueError, "timeout: got 1 s with num_workers 0, expected 0 s"),
        ({"timeout": -1}, ValueError, "timeout option should be non-negative"),
        ({"timeout": "5"}, TypeError, "timeout: got '5', expected a number of seconds"),
        ({"on_error": "skip", "fetch_impl": "vanilla"}, ValueError, "or fetch_impl='vanilla'"),
        ({"on_error": "replace", "batch_size": None}, ValueError, "'replace' without batches"),
    ],
)
def test_arguments_that_do_not_go_together_are_an_error_of_the_constructor(
    settings: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        DataLoader(doubles.PlainSquares(3), **settings)


def test_an_iterable_dataset_has_no_policy_but_to_raise() -> None:
    with pytest.raises(ValueError, match="on_error: got 'skip' for an iterable dataset"):
        DataLoader(doubles.Counting(3), on_error="skip")


@pytest.mark.parametrize("given", [{"count": -1}, {"share": 1.5}, {"share": float("nan")}])
def test_a_budget_that_is_none_is_an_error(given: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        ErrorBudget(**given)


@pytest.mark.parametrize("given", [{"count": 1.5}, {"count": True}, {"share": "x"}])
def test_a_budget_names_its_field_of_another_type(given: Any) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(given))}: got"):
        ErrorBudget(**given)


# -- an epoch that goes on elsewhere


@pytest.mark.parametrize("on_error", ["skip", "replace"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_goes_on_after_what_was_passed_over(
    num_workers: int, on_error: Any
) -> None:
    bad = (3, 8, 9, 10, 11, 13) if on_error == "skip" else (3, 8, 9, 13)

    def make() -> DataLoader[Any]:
        torch.manual_seed(3)
        return DataLoader(
            FailingAt(26, "fetch", bad), 4, num_workers=num_workers, on_error=on_error
        )

    whole = list(make())
    loader = make()
    taken = list(itertools.islice(loader, 3))
    resumed = make()
    resumed.load_state_dict(loader.state_dict())

    rest = list(resumed)
    if not num_workers:  # draws in the main process are the caller's to restore
        whole, taken, rest = labels_of(whole), labels_of(taken), labels_of(rest)
    assert is_same(taken + rest, whole)
    assert resumed.error_report().num_failed == (0 if on_error == "skip" else 1)


# -- a batch that does not come


class Stalled(doubles.Stalling):
    def locate_sample(self, position: int) -> SampleLocation:
        return SampleLocation(f"squares/{position}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fetch_impl", ["threaded", "asyncio"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_batch_that_does_not_come_in_time_says_what_is_missing(
    on_error: Any, fetch_impl: Any
) -> None:
    begun_s = time.monotonic()
    loader = DataLoader(
        Stalled(8, 5), 4, num_workers=2, timeout=1, fetch_impl=fetch_impl, on_error=on_error
    )
    with loader:
        iterator = iter(loader)
        assert next(iterator)[1].tolist() == [0, 1, 2, 3]

        with pytest.raises(DeadlineError) as caught:
            next(iterator)

    assert re.search(
        r"timeout: 1 of 4 samples of a batch have not come in 1\.?\d* s, allowed are 1 s; "
        r"position 5 \(squares/5\); check the store",
        str(caught.value),
    )
    assert time.monotonic() - begun_s < 30


class AllStalled(doubles.BatchedSquares):
    def __getitems__(self, positions: list[int]) -> Any:
        time.sleep(3600)

    def key(self, position: int) -> str:
        return f"squares/{position}"


@pytest.mark.timeout(60)
def test_a_batch_that_is_fetched_as_a_whole_names_its_first_positions() -> None:
    with (
        DataLoader(AllStalled(8), 8, num_workers=1, timeout=0.5) as loader,
        pytest.raises(DeadlineError, match=r"8 of 8 samples .* first positions 0 \(squares/0\), 1"),
    ):
        next(iter(loader))


class StuckTransform(doubles.StagedSquares):
    def apply_transform(self, decoded: int) -> Any:
        time.sleep(3600)


@pytest.mark.timeout(60)
def test_a_worker_that_says_nothing_is_named() -> None:
    with (
        DataLoader(StuckTransform(8), 4, num_workers=1, timeout=0.5) as loader,
        pytest.raises(
            DeadlineError,
            match=r"worker 0 \(pid \d+\): no batch in 1\.5 s \(timeout is 0\.5 s\)",
        ),
    ):
        next(iter(loader))
