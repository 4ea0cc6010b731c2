"""What a worker does about a sample that fails: raise its error, leave it out, or replace it.

```text
FetchedDataset -error-> FailureLog -settled samples-> collate -> ReportingQueue -> main process
                            |                                        ^
                            +---- what failed, before its batch -----+
                            |
StreamSource --------loss---+    of an iterable dataset that goes on by itself
```

An error of a sample is what its fetch, decode or transform raises. What the collate function, the
sampler, ``worker_init_fn`` or the loader itself raise is none, nor what says that the process
cannot go on; these are raised under any policy.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from concurrent_dataloader.dataloader_mod.failures import (
    FailedSamples,
    OnError,
    SampleFailure,
    make_failure,
)
from concurrent_dataloader.datasets.contract import Loss, SampleLocation
from concurrent_dataloader.errors import (
    CredentialsError,
    DeadlineError,
    ExpiredCredentialsError,
    MissingDependencyError,
    UnsupportedTorchError,
)

_NUM_NAMED = 5
_NEVER_OF_A_SAMPLE = (
    CredentialsError,
    ExpiredCredentialsError,
    MissingDependencyError,
    UnsupportedTorchError,
    MemoryError,
    concurrent.futures.CancelledError,  # the fetcher was closed
)

FAILED: Any = object()
"""Stands for a sample that failed, until its batch is settled."""


class LeftOut(list[Any]):
    """The samples of a batch of which none is left. The class itself is the batch, when sent."""


def explain(error: Exception, position: Any, location: SampleLocation | None) -> Exception:
    """Say which sample an error belongs to; in place of one that would end a loop, another."""
    where = "" if location is None else f" ({location.describe()})"
    if isinstance(error, StopIteration):
        # In a loop over batches this would mean that they have come to their end.
        return RuntimeError(f"position {position!r} of the data set{where} raised StopIteration")
    error.add_note(f"asked for by position {position!r} of the data set{where}")
    return error


def is_of_sample(error: Exception) -> bool:
    """Tell whether what a sample raised is its own fault, so that its batch may go on."""
    return not isinstance(error, _NEVER_OF_A_SAMPLE)


def make_deadline_error(
    missing: Sequence[Any],
    num_samples: int,
    waited_s: float,
    timeout_s: float,
    locate: Callable[[Any], SampleLocation | None],
) -> DeadlineError:
    """Say which samples of a batch have not come; ``missing`` holds their positions."""
    named: list[str] = []
    for position in missing[:_NUM_NAMED]:
        location = locate(position)
        named.append(
            f"{position!r}" if location is None else f"{position!r} ({location.describe()})"
        )
    first = "position" if len(named) == 1 else "first positions"
    return DeadlineError(
        f"timeout: {len(missing)} of {num_samples} samples of a batch have not come in "
        f"{waited_s:.3g} s, allowed are {timeout_s:g} s; {first} {', '.join(named)}; check the "
        "store and the network, or allow a longer timeout"
    )


class FailureLog:
    """What failed of the batch that a worker is making."""

    def __init__(self, on_error: OnError) -> None:
        self._replaces = on_error == "replace"
        self._failures: list[SampleFailure] = []
        self._last_error: Exception | None = None
        self.num_given: int | None = None
        """Samples of the batch that a stream gave; None: it is none."""
        self._begun_s = time.monotonic()

    def add(
        self, error: Exception, position: Any, location: SampleLocation | None, begun_s: float
    ) -> None:
        """Record the error of a sample."""
        self._failures.append(make_failure(error, position, location, begun_s))
        self._last_error = error

    def add_loss(self, loss: Loss) -> None:
        """Record what a stream goes on without; raise what it must not go on after."""
        if not is_of_sample(loss.error):
            raise loss.error
        self._failures.append(
            make_failure(loss.error, loss.position, loss.location, self._begun_s, loss.num_samples)
        )

    def count_given(self) -> None:
        """Count a sample that a stream gave."""
        self.num_given = (self.num_given or 0) + 1

    def settle(self, samples: list[Any]) -> list[Any]:
        """Leave out what failed, or put a copy of the next good sample of the batch in its place.

        The next after the last is the first. Nothing is fetched for it and no random number drawn.

        Args:
            samples: A batch, with `FAILED` in the place of what failed.

        Returns:
            The batch; `LeftOut` if all of it failed and may be left out.

        Raises:
            Exception: There is nothing to replace by: the last error of the batch.
        """
        error, self._last_error = self._last_error, None
        if error is None:
            return samples
        good = [sample for sample in samples if sample is not FAILED]
        if not self._replaces:
            return good or LeftOut()
        if not good:
            error.add_note("on_error='replace': no sample of the batch is good to take its place")
            raise error
        settled: list[Any] = []
        following = good[0]
        for sample in reversed(samples):
            if sample is FAILED:
                # A copy, since a collate function may change the samples that it is given.
                settled.append(copy.deepcopy(following))
            else:
                following = sample
                settled.append(sample)
        return settled[::-1]

    def take(self, number: int) -> FailedSamples | None:
        """Give what was recorded since the last call; None if that is nothing."""
        taken, self._failures = self._failures, []
        num_given = self.num_given
        if num_given is not None:
            self.num_given, self._begun_s = 0, time.monotonic()
        elif not taken:
            return None
        return FailedSamples(number, taken, num_given)


class ReportingQueue:
    """The data queue of a worker: what failed of a batch is sent before the batch."""

    def __init__(self, target: Any, failures: FailureLog) -> None:
        self._target = target
        self._failures = failures

    def put(self, item: tuple[Any, Any]) -> None:
        """Send ``(number, batch)``; a signal passes as it is."""
        if isinstance(item[0], int):
            failed = self._failures.take(item[0])
            if failed is not None:
                self._target.put((failed, None))
        self._target.put(item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def make_failure_log(on_error: OnError) -> FailureLog | None:
    """Make what records failures; None where their errors are raised."""
    return None if on_error == "raise" else FailureLog(on_error)


def report_through(
    failures: FailureLog | None, data_queue: Any, collate_fn: Any
) -> tuple[Any, Any]:
    """Make the data queue and the collate function of a worker that records failures, or not."""
    if failures is None:
        return data_queue, collate_fn
    collate_fn = functools.partial(collate_what_is_left, collate_fn)
    return ReportingQueue(data_queue, failures), collate_fn


def collate_what_is_left(collate_fn: Callable[[Any], Any], samples: Any) -> Any:
    """Collate a batch, unless nothing is left of it."""
    return LeftOut if isinstance(samples, LeftOut) else collate_fn(samples)
