"""What becomes of samples that cannot be had: recorded, counted, held to a budget.

Workers say what failed (`error_policy`); this is the main process, which alone writes the file.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import numbers
import operator
import os
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

import orjson

from concurrent_dataloader.datasets.contract import SampleLocation, SkippingStream
from concurrent_dataloader.errors import ErrorBudgetError, StoreUnavailableError

OnError = Literal["raise", "skip", "replace"]

log = logging.getLogger(__name__)

_MAX_ERROR_CHARACTERS = 500
_MAX_KEPT = 1000
"""Failures of an epoch that `ErrorReport` holds; the file has all of them."""

_NUM_NAMED = 3
_MIN_SHARE_OF = 1000

_MAX_TIMEOUT_S = 1e6
"""A waiting thread counts in 2**31 milliseconds at least on any system: 24 days."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ErrorBudget:
    """How many samples of an epoch may fail, over all workers, before the loader gives up."""

    count: int | None = 1000
    """At most this many; None: as many as ``share`` allows."""

    share: float = 0.01
    """At most this share of the samples that the epoch has asked for so far, or of 1000 while it
    has asked for fewer; 1.0: as many as ``count`` allows."""

    def __post_init__(self) -> None:
        if self.count is not None:
            if isinstance(self.count, bool) or not isinstance(self.count, numbers.Integral):
                raise TypeError(f"count: got {self.count!r}, expected None or a whole number")
            if self.count < 0:
                raise ValueError(f"count: got {self.count!r}, expected None, or 0 or more")
        if isinstance(self.share, bool) or not isinstance(self.share, numbers.Real):
            raise TypeError(f"share: got {self.share!r}, expected a number from 0 to 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: got {self.share!r}, expected 0 to 1")

    def allows(self, num_failed: int, num_asked: int) -> bool:
        """Tell whether an epoch may go on."""
        if self.count is not None and num_failed > self.count:
            return False
        return num_failed <= self.share * max(num_asked, _MIN_SHARE_OF)


class SampleFailure(NamedTuple):
    """A sample that could not be had."""

    position: int | str | None
    """As the sampler gave it; its repr where it is no number. Of a stream that in its index; None
    without one."""

    location: SampleLocation | None
    """None where the dataset does not say."""

    error_type: str
    error: str
    """In one line, without what may be secret."""

    attempts: int | None
    """Requests that were made for it; None where that is not known."""

    elapsed_s: float
    """From when its batch was begun to when it was found to fail, in its turn."""

    time: str
    """Of that moment, ISO 8601, UTC."""

    num_samples: int | None = 1
    """Samples that are lost with it, as of a shard; None where that is not known."""

    @property
    def num_counted(self) -> int:
        """Samples that count as failed: one where it is not known how many."""
        return 1 if self.num_samples is None else self.num_samples

    def describe(self) -> str:
        """Name it for a person, in a line."""
        where = "" if self.location is None else self.location.describe()
        if self.position is not None:
            where = f"position {self.position} ({where})" if where else f"position {self.position}"
        if self.num_samples != 1:
            count = "some" if self.num_samples is None else self.num_samples
            where = f"{count} samples from {where}"
        return f"{where}: {self.error_type}: {self.error}"

    def to_line(self, epoch: int) -> bytes:
        """Give its line of the quarantine file, JSON, as ``validate --from`` reads it."""
        location = self.location
        byte_range = None if location is None else location.byte_range
        content = {
            "key": None if location is None else location.key,
            "range": None if byte_range is None else list(byte_range),
            "sample": "" if location is None else location.sample,
            "kind": "bytes" if location is None else location.kind,
            "error_type": self.error_type,
            "error": self.error,
            "attempts": self.attempts,
            "elapsed_s": round(self.elapsed_s, 3),
            "time": self.time,
            "position": self.position,
            "num_samples": self.num_samples,
            "epoch": epoch,
        }
        return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


class FailedSamples:
    """Sent on the data queue in place of a number: what failed of a batch, before the batch."""

    def __init__(
        self, number: int, failures: list[SampleFailure], num_given: int | None = None
    ) -> None:
        """Tell of a batch.

        Args:
            number: Of the batch.
            failures: What failed of it.
            num_given: Samples that a stream gave for it; None: as many as positions, less those.
        """
        self.number = number
        self.failures = failures
        self.num_given = num_given


class ErrorReport(NamedTuple):
    """What an epoch could not have, as far as its batches were taken."""

    epoch: int
    """How many epochs the loader had begun before."""

    num_asked: int
    num_failed: int
    failures: tuple[SampleFailure, ...]
    """The first 1000 of them, in sampler order."""


def make_failure(
    error: Exception,
    position: Any,
    location: SampleLocation | None,
    begun_s: float,
    num_samples: int | None = 1,
) -> SampleFailure:
    """Record an error of a sample; ``begun_s`` is by ``time.monotonic``."""
    try:
        number: int | str | None = None if position is None else operator.index(position)
    except TypeError:
        number = clean_text(repr(position))
    return SampleFailure(
        number,
        location,
        type(error).__name__,
        clean_text(str(error)),
        _find_attempts(error),
        time.monotonic() - begun_s,
        datetime.now(UTC).isoformat(timespec="milliseconds"),
        num_samples,
    )


def clean_text(text: str) -> str:
    """Give a text as one line that is not too long, without queries and passwords of URLs.

    The library's own errors hold none; those of a user's dataset may, as presigned URLs do.
    """
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    line = re.sub(r"(\w+://)[^/\s@]+@", r"\1", line)
    line = re.sub(r"(\w+://[^\s?]+)\?[^\s'\">)]+", r"\1?(left out)", line)
    return line[:_MAX_ERROR_CHARACTERS]


def _find_attempts(error: Exception) -> int | None:
    # Said in words: the error is made anew on its way here, of its text alone.
    said = re.search(r"\bafter (\d+) attempts?\b", str(error))
    return int(said[1]) if said and isinstance(error, StoreUnavailableError) else None


def check_policy(loader: Any, *, is_concurrent: bool) -> None:
    """Raise ValueError or TypeError unless these arguments of a loader go together.

    Args:
        loader: Has ``on_error``, ``error_budget``, ``quarantine_file``, and torch's attributes.
        is_concurrent: Whether samples are fetched one by one, by position, in our way.
    """
    path = loader.quarantine_file
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"quarantine_file: got {path!r}, expected the path of a file, or None")
    on_error = loader.on_error
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error: got {on_error!r}, expected 'raise', 'skip' or 'replace'")
    if not isinstance(loader.error_budget, ErrorBudget | None):
        got = loader.error_budget
        count = got if isinstance(got, int) and not isinstance(got, bool) else 100
        raise TypeError(
            f"error_budget: got {got!r}, expected an ErrorBudget such as ErrorBudget(count={count})"
        )
    if on_error == "raise":
        for name in ("error_budget", "quarantine_file"):
            if getattr(loader, name) is not None:
                raise ValueError(
                    f"{name}: got {getattr(loader, name)!r} with on_error='raise', which passes "
                    "over no sample; expected on_error='skip' or 'replace' with it"
                )
    elif not is_concurrent:
        _check_stream_policy(loader)
    elif on_error == "replace" and loader.batch_sampler is None:
        raise ValueError(
            "on_error: got 'replace' without batches (batch_size=None), whose other samples could "
            "take a sample's place; expected 'skip'"
        )


def _check_stream_policy(loader: Any) -> None:
    is_stream = isinstance(loader.dataset, SkippingStream) and loader.fetch_impl != "vanilla"
    if not is_stream:
        raise ValueError(
            f"on_error: got {loader.on_error!r} for an iterable dataset or fetch_impl='vanilla', "
            "expected a dataset with positions, or StreamedShards, and fetch_impl='threaded' or "
            "'asyncio'"
        )
    if loader.on_error == "replace":
        raise ValueError(
            "on_error: got 'replace' for a stream, expected 'skip', under which samples that come "
            "next fill its batches already; how many a lost shard held need not be known"
        )


def check_timeout(timeout_s: object, num_workers: int) -> None:
    """Raise TypeError or ValueError where a wait could not be told to end; torch refuses less."""
    if not isinstance(timeout_s, numbers.Real):
        raise TypeError(f"timeout: got {timeout_s!r}, expected a number of seconds, 0 for no end")
    seconds = float(timeout_s)
    if math.isnan(seconds) or seconds > _MAX_TIMEOUT_S:
        raise ValueError(
            f"timeout: got {timeout_s} s, expected 0 s, for no end, to {_MAX_TIMEOUT_S:.0f} s"
        )
    if seconds > 0 and num_workers == 0:
        # torch says so when it is iterated over, by an assertion.
        raise ValueError(
            f"timeout: got {timeout_s} s with num_workers 0, expected 0 s: without workers nobody "
            "can end a wait; leave timeout out, or let there be a worker"
        )


class EpochFailures:
    """Counts the failures of an iterator's epochs, writes them down, and holds to the budget."""

    def __init__(
        self,
        on_error: OnError,
        budget: ErrorBudget,
        quarantine_file: str | os.PathLike[str] | None,
        epoch: int,
    ) -> None:
        """Begin an epoch.

        Raises:
            OSError: The file cannot be written.
        """
        self._on_error = on_error
        self._budget = budget
        self._path = quarantine_file
        self._clear(epoch)
        self._append(())  # now, and not at the first failure hours later

    def restart(self) -> None:
        """Begin the next epoch."""
        self._clear(self.epoch + 1)

    def _clear(self, epoch: int) -> None:
        self.epoch = epoch
        self._num_asked = 0
        self._num_failed = 0
        self._first: list[SampleFailure] = []
        self._last: SampleFailure | None = None
        self._types: collections.Counter[str] = collections.Counter()
        # By number of a batch that was not taken yet.
        self._held: dict[int, list[SampleFailure]] = {}
        self._num_samples: dict[int, int] = {}

    def hold(self, message: FailedSamples) -> None:
        """Keep what failed of a batch until the batch is taken."""
        self._held[message.number] = message.failures
        if message.num_given is not None:
            self.ask(message.number, message.num_given + count_failed(message.failures))

    def ask(self, number: int, num_samples: int) -> None:
        """Remember how many samples a batch is of."""
        self._num_samples[number] = num_samples

    def forget_held(self) -> None:
        """Drop what failed of batches of the epoch before, which come no more."""
        self._held.clear()

    def take(self, number: int, *, may_raise: bool) -> None:
        """Count and write down what failed of a batch that is taken.

        Raises:
            ErrorBudgetError: That was too much, and it ``may_raise``: the batch has no other error.
            OSError: The file cannot be written.
        """
        self.record(self._num_samples.pop(number, 0), self._held.pop(number, ()))
        if may_raise:
            self.check()

    def record(self, num_asked: int, failures: Sequence[SampleFailure]) -> None:
        """Count and write down failures.

        Raises:
            OSError: The file cannot be written.
        """
        self._num_asked += num_asked
        if not failures:
            return
        if not self._num_failed:
            log.warning("on_error=%r: %s", self._on_error, failures[0].describe())
        self._num_failed += count_failed(failures)
        self._types.update(failure.error_type for failure in failures)
        self._first.extend(failures[: _MAX_KEPT - len(self._first)])
        self._last = failures[-1]
        self._append(failures)

    def _append(self, failures: Sequence[SampleFailure]) -> None:
        if self._path is None:
            return
        # Opened each time: nothing to close, and each line is on its way to the disk when its
        # batch is handed out. Several processes may write to one file.
        try:
            with open(self._path, "ab", buffering=0) as file:
                for failure in failures:
                    line = memoryview(failure.to_line(self.epoch))
                    while line:
                        line = line[file.write(line) :]
        except OSError as error:
            # With errno it stays the subclass that it is, such as FileNotFoundError.
            raise OSError(
                error.errno,
                f"quarantine_file: cannot be written ({error.strerror}), expected a file in a "
                "folder that is there and writable, on a disk with room; make the folder, make "
                "room, or name another file",
                os.fspath(self._path),
            ) from error

    def check(self) -> None:
        """Raise ErrorBudgetError if more samples failed than may."""
        if self._last is None or self._budget.allows(self._num_failed, self._num_asked):
            return
        budget = self._budget
        written = "" if self._path is None else f", all are in {os.fspath(self._path)!r}"
        raise ErrorBudgetError(
            f"on_error={self._on_error!r}: {self._num_failed} of {self._num_asked} samples of the "
            f"epoch failed ({self._num_failed / max(self._num_asked, 1):.2%}), allowed are count="
            f"{budget.count} and share={budget.share:g}{written}; the last is "
            f"{self._last.describe()}; look at what failed, or allow more by error_budget"
        )

    def end(self) -> None:
        """Say at the end of an epoch what failed, if anything did.

        What failed after the last batch of a worker counts too: torch never hands out the batch
        which an iterable dataset has no sample for.

        Raises:
            ErrorBudgetError: That was too much.
            OSError: The file cannot be written.
        """
        for number in sorted(self._held):
            self.take(number, may_raise=False)
        self.check()
        if not self._num_failed:
            return
        done = "left out" if self._on_error == "skip" else "replaced by others"
        named = "; ".join(failure.describe() for failure in self._first[:_NUM_NAMED])
        rest = self._types.total() - min(_NUM_NAMED, len(self._first))
        log.warning(
            "epoch %d: %d of %d samples failed and were %s (%s): %s%s%s",
            self.epoch,
            self._num_failed,
            self._num_asked,
            done,
            ", ".join(f"{name} {count}" for name, count in self._types.most_common()),
            named,
            f"; and {rest} more" if rest else "",
            "" if self._path is None else f"; all are in {os.fspath(self._path)!r}",
        )

    def report(self) -> ErrorReport:
        """Say how many were asked for and failed so far."""
        return ErrorReport(self.epoch, self._num_asked, self._num_failed, tuple(self._first))


def count_failed(failures: Sequence[SampleFailure]) -> int:
    """Count the samples that failed."""
    return sum(failure.num_counted for failure in failures)


def count_samples(positions: Any, *, is_batch: bool) -> int:
    """Count the samples that a sampler gives at once; an iterator, which cannot tell, is one."""
    return len(positions) if is_batch and hasattr(positions, "__len__") else 1
