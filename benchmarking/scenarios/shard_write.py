"""How fast are shards written and checked?

Command: ``python -m benchmarking shard_write [--only write memory validate]``

Held fixed: photographs of 110 kB, in files in the page cache; shards of 64 MiB, bytes unchanged,
shuffled, with index and metadata, on the disk of the checkout.

Varied: ``write``: our writer with one process and with two, against ``tar`` of the same files; both
sides make the kernel write all they wrote (``fsync``) before the clock stops. ``memory``: how many
MiB more the writer's memory grows by when it packs four times as much. ``validate``: the shallow
check of shards, against ``md5sum`` of the same files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Mapping

from benchmarking.effort import Effort
from benchmarking.processes import run_in_process
from benchmarking.results import Bar, Row, Setting, make_row
from benchmarking.statistics import paired_ratio
from benchmarking.workload import Photos, read_photos
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.shard import write_shards
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.sources import open_source

_SCENARIO = "shard_write"
_SHARD_BYTES = 64 << 20
_COPIES = 4
_MIB = 2**20


def compare_writing(effort: Effort) -> list[Row]:
    """Compare our writer with tar."""
    photos = read_photos(effort.num_images)
    with _scratch(photos, copies=2 * _COPIES) as scratch:
        folder = _link(photos, scratch / "images", _COPIES)
        sides: dict[str, Callable[[pathlib.Path], None]] = {
            "tar": functools.partial(_tar, folder),
            "one process": functools.partial(_write, folder, num_processes=1),
            "two processes": functools.partial(_write, folder, num_processes=2),
        }
        seconds = _time_in_turns(
            {name: functools.partial(_time_writing, side, scratch) for name, side in sides.items()},
            effort,
        )
    mib = _COPIES * sum(map(len, photos.raw.values())) / _MIB
    rows: list[Row] = []
    bounds = {"one process": Bar(figure="ratio", bound=0.7), "two processes": None}
    for name, bar in bounds.items():
        rows.append(
            make_row(
                _SCENARIO,
                f"shards from a folder in page cache, {name}, against tar of the same files",
                _describe(photos, effort),
                {
                    "ratio": paired_ratio(seconds["tar"], seconds[name]),
                    "ours_s": seconds[name],
                    "tar_s": seconds["tar"],
                    "packed_mib": mib,
                },
                bar,
            )
        )
    rows.append(
        make_row(
            _SCENARIO,
            "shards from a folder, two processes against one",
            _describe(photos, effort),
            {"ratio": paired_ratio(seconds["one process"], seconds["two processes"])},
            Bar(figure="ratio", bound=1.0),
        )
    )
    return rows


def measure_memory(effort: Effort) -> list[Row]:
    """Measure what the writer's memory grows by when the set is four times as large."""
    photos = read_photos(effort.num_images)
    growth_mib: list[float] = []
    with _scratch(photos, copies=5) as scratch:
        for copies in (1, 4):
            folder = _link(photos, scratch / f"images-{copies}", copies)
            growth_mib.append(run_in_process(_measure_growth, folder, scratch / f"out-{copies}"))
    return [
        make_row(
            _SCENARIO,
            "memory of a conversion, of four times the set against the set",
            _describe(photos, effort),
            {
                "more_mib": growth_mib[1] - growth_mib[0],
                "small_set_mib": growth_mib[0],
                "large_set_mib": growth_mib[1],
            },
            Bar(figure="more_mib", bound=16.0, direction="at most"),
        )
    ]


def compare_validating(effort: Effort) -> list[Row]:
    """Compare the shallow check with md5sum."""
    photos = read_photos(effort.num_images)
    with _scratch(photos) as scratch:
        shards = scratch / "shards"
        _write(photos.folder, shards, num_processes=1)
        files = sorted(shards.glob("*.tar"))
        seconds = _time_in_turns(
            {
                "md5sum": lambda: _time(
                    lambda: subprocess.run(["md5sum", *files], check=True, capture_output=True)
                ),
                "ours": lambda: _time(functools.partial(_validate, shards)),
            },
            effort,
        )
        mib = sum(file.stat().st_size for file in files) / _MIB
    return [
        make_row(
            _SCENARIO,
            "shallow check of shards, against md5sum",
            _describe(photos, effort),
            {
                "ratio": paired_ratio(seconds["md5sum"], seconds["ours"]),
                "ours_s": seconds["ours"],
                "md5sum_s": seconds["md5sum"],
                "checked_mib": mib,
            },
            Bar(figure="ratio", bound=0.5),
        )
    ]


def _link(photos: Photos, folder: pathlib.Path, copies: int) -> pathlib.Path:
    """Make a larger set of the same files, without copying them."""
    for copy in range(copies):
        shutil.copytree(photos.folder, folder / str(copy), copy_function=os.link)
    return folder


def _tar(folder: pathlib.Path, target: pathlib.Path) -> None:
    target.mkdir()
    subprocess.run(
        ["tar", "--hard-dereference", "-C", folder, "-cf", target / "all.tar", "."], check=True
    )
    with open(target / "all.tar", "rb") as file:
        os.fsync(file.fileno())


def _write(folder: pathlib.Path, target: pathlib.Path, *, num_processes: int) -> None:
    settings = ShardSettings(max_bytes=_SHARD_BYTES)
    with contextlib.closing(open_source(str(folder))) as source:
        write_shards(source, target, settings, num_processes=num_processes)


def _validate(shards: pathlib.Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = main(["validate", str(shards)])
    if status != 0:
        raise RuntimeError(f"{shards}: validate said {said.getvalue()!r}, expected OK")


def _measure_growth(folder: pathlib.Path, target: pathlib.Path) -> float:
    before_mib = _read_status_mib("VmRSS:")
    _write(folder, target, num_processes=1)
    return _read_status_mib("VmHWM:") - before_mib


def _read_status_mib(field: str) -> float:
    # Not getrusage, whose maximum begins with that of the process that this one was started by.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(field)[2].split()[0]) / 1024


def _time_writing(write: Callable[[pathlib.Path], None], scratch: pathlib.Path) -> float:
    target = scratch / "target"
    try:
        return _time(functools.partial(write, target))
    finally:
        shutil.rmtree(target)


def _time(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def _time_in_turns(
    sides: Mapping[str, Callable[[], float]], effort: Effort
) -> dict[str, list[float]]:
    """Time all sides once for nothing, so that files are in the page cache, then in turns."""
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(effort.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(sides[name]())
    return seconds


@contextlib.contextmanager
def _scratch(photos: Photos, copies: int = 2) -> Generator[pathlib.Path]:
    """Give a folder on the disk of the photographs, so that they can be linked into it."""
    needed = copies * sum(map(len, photos.raw.values()))
    if shutil.disk_usage(photos.folder).free < 2 * needed:
        raise OSError(f"{photos.folder}: less than {2 * needed} bytes are free on its disk")
    with tempfile.TemporaryDirectory(dir=photos.folder.parent, prefix=".shard-write-") as name:
        yield pathlib.Path(name)


def _describe(photos: Photos, effort: Effort) -> dict[str, Setting]:
    return {
        "num_images": len(photos.raw),
        "mean_image_bytes": round(photos.mean_bytes),
        "num_copies": _COPIES,
        "max_shard_bytes": _SHARD_BYTES,
        "order": "shuffled, seed 0",
        "repeats": effort.repeats,
    }


CASES: dict[str, Callable[[Effort], list[Row]]] = {
    "write": compare_writing,
    "memory": measure_memory,
    "validate": compare_validating,
}
BARS = tuple(CASES)
