"""How a run goes: sums of the steps, a bar or lines of text, and a log in JSON."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

import torch
import torch.distributed as dist
from rich import progress
from rich.console import Console
from torch import Tensor

from concurrent_dataloader.errors import (
    ByteRangeError,
    KeyNotFoundError,
    LoaderError,
    SampleDecodeError,
    ShardFormatError,
)
from concurrent_dataloader.training.arguments import Args
from concurrent_dataloader.training.processes import Place

_OF_A_SAMPLE = (SampleDecodeError, ShardFormatError, ByteRangeError, KeyNotFoundError)


class Result(NamedTuple):
    """One pass over a split, of all processes together; ``wait_s`` is their mean."""

    loss: float
    acc1: float
    acc5: float
    num_images: int
    time_s: float
    wait_s: float


NO_SUMS = torch.zeros(7, dtype=torch.float64)
"""Of a process in an epoch: the four sums of `measure`, seconds of waiting and in all, steps."""


def measure(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum up a batch: (4,) float64 of loss, right at first, right among five, and images."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    count = torch.full_like(loss, len(labels), dtype=torch.float64)
    return torch.stack([loss.detach() * count, right[:, 0].sum(), right.sum(), count]).cpu()


class Report:
    """How a pass over a split goes; entered while batches are taken, and no longer."""

    def __init__(
        self,
        title: str,
        place: Place,
        num_steps: int | None,
        *,
        log: TextIO | None,
        print_freq: int,
        num_epochs_after: int = 0,
        first_step: int = 0,
        first_sums: Tensor = NO_SUMS,
    ) -> None:
        """Start the clock.

        Args:
            title: "Test:", or the epoch.
            place: The first process tells, and the results are of all of them.
            num_steps: Of the whole pass in this process, if somebody knows.
            log: Where the first process writes its lines of JSON.
            print_freq: Steps from line to line.
            num_epochs_after: Passes like this one that come later; for the time that is left.
            first_step: The steps before it were done earlier.
            first_sums: What those came to, as `add` gives it.
        """
        self._title, self._place, self._num_steps = title, place, num_steps
        self._log, self._print_freq, self._num_epochs_after = log, print_freq, num_epochs_after
        self._first_step = first_step
        self._sums = first_sums[:4]
        self._wait_s, time_before_s, self._num_before = first_sums[4:].tolist()
        self._began_s = time.perf_counter() - time_before_s
        columns = ("{task.description}", progress.BarColumn())
        counts = "{task.completed} {task.fields[text]}"
        is_silent = place.rank > 0 or not Console().is_terminal
        # No thread to refresh it: workers are forked while it is drawn.
        self._bars = progress.Progress(*columns, counts, disable=is_silent, auto_refresh=False)
        self._shown = contextlib.nullcontext() if is_silent else self._bars

    def __enter__(self) -> Self:
        """Show the bar, if there is a terminal."""
        self._shown.__enter__()
        self._bar = self._bars.add_task(
            self._title, total=self._num_steps, completed=self._first_step, text=""
        )
        return self

    def __exit__(self, *raised: Any) -> None:
        """Leave the bar as it is."""
        self._shown.__exit__(*raised)

    def add(self, i: int, loss: Tensor, logits: Tensor, labels: Tensor, wait_s: float) -> Tensor:
        """Tell of step ``i``, that waited so long for its batch; gives the sums so far."""
        # Reading the sums waits for the device: the time outside is a wait for data only.
        batch_sums = measure(loss, logits, labels)
        self._sums, self._wait_s = self._sums + batch_sums, self._wait_s + wait_s
        time_s = time.perf_counter() - self._began_s
        num_done = i + 1 - self._first_step + self._num_before
        is_told = i % self._print_freq == 0 or i + 1 == self._num_steps
        text = self._describe(i, time_s, num_done)
        self._bars.update(self._bar, advance=1, text=text, refresh=is_told)
        if self._place.rank == 0 and is_told:
            loss_of_batch = (batch_sums[0] / batch_sums[3]).item()
            record = {"split": self._title, "step": i, "loss": loss_of_batch}
            write_record(self._log, "step", **record, time_s=time_s, wait_s=self._wait_s)
            if self._bars.disable:
                num_told = "?" if self._num_steps is None else max(self._num_steps, i + 1)
                print(f"{self._title} [{i + 1}/{num_told}] {text}", flush=True)
        return torch.cat([self._sums, self._sums.new_tensor([self._wait_s, time_s, num_done])])

    def _describe(self, i: int, time_s: float, num_done: float) -> str:
        loss, acc1, acc5 = (self._sums[:3] / self._sums[3]).tolist()
        images_per_s = self._place.world_size * self._sums[3].item() / time_s
        left = "?"
        if self._num_steps is not None:
            num_left = max(0, self._num_steps - 1 - i) + self._num_steps * self._num_epochs_after
            left = format_time(num_left * time_s / num_done)
        return (
            f"Time {time_s / num_done:.3f} Data {self._wait_s / num_done:.3f} Loss {loss:.4f} "
            f"Acc@1 {100 * acc1:.2f} Acc@5 {100 * acc5:.2f} {images_per_s:.0f} images/s "
            f"ETA {left}"
        )

    def result(self) -> Result:
        """Sum up over all processes, each of which has to ask for it."""
        place = self._place
        totals = torch.cat([self._sums, self._sums.new_tensor([self._wait_s])]).to(place.device)
        if place.world_size > 1:
            dist.all_reduce(totals)
        loss_sum, right1, right5, count, wait_sum = totals.tolist()
        num = max(count, 1)  # none: all of the epoch was done before a resume
        rates = (loss_sum / num, 100 * right1 / num, 100 * right5 / num)
        time_s = time.perf_counter() - self._began_s
        return Result(*rates, round(count), time_s, wait_sum / place.world_size)


def print_summary(
    results: Sequence[tuple[int, Result, Result | None]],
    *,
    best_acc1: float,
    copy_s: float,
    log: TextIO | None,
) -> None:
    """Print a table of the epochs, and what they come to; None: there was no validation."""
    print("epoch     loss   acc@1  val loss  val acc@1  val acc@5  images/s  waiting     time")
    for epoch, train, val in results:
        tested = f"{'-':>9} {'-':>10} {'-':>10}"
        if val is not None:
            tested = f"{val.loss:9.4f} {val.acc1:10.2f} {val.acc5:10.2f}"
        print(
            f"{epoch:5} {train.loss:8.4f} {train.acc1:7.2f} {tested} "
            f"{train.num_images / train.time_s:9.1f} "
            f"{train.wait_s / train.time_s:8.1%} {format_time(train.time_s):>8}"
        )
    time_s = sum(train.time_s for _, train, _ in results) or math.inf
    images_per_s = sum(train.num_images for _, train, _ in results) / time_s
    wait_share = sum(train.wait_s for _, train, _ in results) / time_s
    record = {"images_per_s": images_per_s, "wait_share": wait_share, "copy_s": copy_s}
    is_tested = not results or any(val is not None for _, _, val in results)
    write_record(log, "summary", best_acc1=best_acc1 if is_tested else None, **record)
    best = f"best acc@1 {best_acc1:.2f}" if is_tested else "no validation"
    print(
        f"{best}, {images_per_s:.1f} images/s in training, "
        f"{wait_share:.1%} of the time waiting for data"
        + (f"; {copy_s:.1f} s before it to copy the data" if copy_s else ""),
        flush=True,
    )


@contextlib.contextmanager
def data_errors_in_a_line(args: Args) -> Generator[None]:
    """End with status 1, and a line instead of a traceback, where data cannot be read."""
    try:
        yield
    except LoaderError as error:
        text = _without_traceback(error)
        can_pass_over = args.loader == "ours" and args.fetch_impl != "vanilla"
        if isinstance(error, _OF_A_SAMPLE) and args.on_error == "raise" and can_pass_over:
            choice = "skip" if args.stream else "replace"
            text += f"; to train on without such: --on-error {choice} --quarantine FILE"
        print(f"imagenet.py: error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def _without_traceback(error: Exception) -> str:
    """Give an error's own words, also of one that torch brought from a worker in its traceback."""
    said = re.findall(rf"^[\w.]*\b{type(error).__name__}: (.*)$", str(error), re.MULTILINE)
    return said[-1] if said else " ".join(str(error).split())


def tell_accuracy(tested: Result, place: Place, log: TextIO | None) -> None:
    """Print what a validation came to that stands alone."""
    write_record(log, "evaluate", **tested._asdict())
    if place.rank == 0:
        print(f"acc@1 {tested.acc1:.3f} acc@5 {tested.acc5:.3f}, {tested.num_images} images")


def format_time(time_s: float) -> str:
    """Write a time as hours, minutes and seconds."""
    return f"{int(time_s) // 3600}:{int(time_s) // 60 % 60:02}:{int(time_s) % 60:02}"


def open_log(folder: Path, place: Place) -> TextIO | None:
    """Open the log in the folder of results, to go on with; None but in the first process."""
    if place.rank > 0:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "log.jsonl").open("a", buffering=1)


def write_record(log: TextIO | None, kind: str, **fields: Any) -> None:
    """Add a line of JSON to the log, if this process has one."""
    if log is not None:
        log.write(json.dumps({"kind": kind, **fields}) + "\n")
