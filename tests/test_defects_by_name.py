"""Defects of older systems that have no other home: each test is named after what it forbids."""

from __future__ import annotations

import ast
import itertools
import random
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import concurrent_dataloader
import imagenet
from benchmarking.measure import endless_sampler, measure_epoch, measure_speed
from benchmarking.results import unit_of
from concurrent_dataloader.prepare.__main__ import SUMMARIES
from concurrent_dataloader.prepare.__main__ import main as run_command
from concurrent_dataloader.prepare.lmdb import ReadSpeed
from concurrent_dataloader.training import report

PACKAGE = Path(concurrent_dataloader.__file__).parent
CHECKOUT = PACKAGE.parent
CODE = "__import__('os').mkdir('made by a word of the user')"


# -- W-08: words of the user are looked up, never evaluated, and unknown ones are refused at once


@pytest.mark.parametrize(
    "flag", ["--dataset", "--loader", "--fetch-impl", "--on-error", "--decoder", "--amp", "-a"]
)
def test_w08_words_for_the_trainer_are_refused_with_those_that_are_known(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match="2"):
        imagenet.main([str(tmp_path), flag, CODE])

    said = capsys.readouterr().err
    assert "choose from" in said or "expected a model of torchvision" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "known"),
    [
        ("--format", "tar"),
        ("--payload", "jpeg"),
        ("--key-style", "path"),
        ("--on-stray", "skip"),
        ("--client", "obstore"),
        ("--steps", "Resize(n), CenterCrop(n)"),
        ("--maxsize", "300MB"),
    ],
)
def test_w08_words_for_a_command_are_refused_with_those_that_are_known(
    flag: str,
    known: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match="2"):
        run_command(["shard", "here", "there", flag, CODE])

    said = capsys.readouterr().err
    assert flag in said
    assert known in said
    assert not list(tmp_path.iterdir())


# -- W-10: arguments are checked by errors, which stay under -O

ATTEMPTS = r"""
import sys
from concurrent_dataloader import *
from concurrent_dataloader.datasets import *
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.advise import Amount, advise
from concurrent_dataloader.prepare.distribute import distribute
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.steps import Preparation, parse_steps
from concurrent_dataloader.stores import DiskCache, HedgePolicy, RetryPolicy
from concurrent_dataloader.prepare.__main__ import main as pack
from benchmarking.__main__ import main as benchmark
from benchmarking.misc.init_benchmarking import get_dataset
import imagenet

if __debug__:
    sys.exit("asserts are on")
root = sys.argv[1]
data = ScratchDataset(root)
attempts = {
    "dataset": lambda: DataLoader("photos"),
    "fetch_impl": lambda: DataLoader(data, fetch_impl="fast"),
    "num_fetch_workers": lambda: DataLoader(data, num_fetch_workers=0),
    "batch_pool": lambda: DataLoader(data, batch_pool=-1),
    "on_error": lambda: DataLoader(data, on_error="ignore"),
    "batch_size": lambda: DataLoader(data, batch_size=0),
    "error_budget": lambda: ErrorBudget(count=-1),
    "rank": lambda: ElasticDistributedSampler(data, 2, 5),
    "decode": lambda: ScratchDataset(root, decode="opencv"),
    "limit": lambda: ScratchDataset(root, limit=0),
    "label_rule": lambda: ScratchDataset(root, label_rule="guess"),
    "folder": lambda: ScratchDataset(root + "/nowhere"),
    "boxes": lambda: ScratchDataset(root, boxes={"1.jpg": [(0, 0, 2, 1)]}),
    "missing table": lambda: ScratchDataset(root, boxes=root + "/boxes.csv"),
    "bucket": lambda: S3Dataset("No Bucket"),
    "option": lambda: open_dataset(root, colour="red"),
    "kind": lambda: open_dataset("gopher://here"),
    "no path": lambda: open_dataset(17),
    "url": lambda: open_store("gopher://here"),
    "client": lambda: open_store("s3://bucket", client="curl"),
    "deadline_s": lambda: open_store("s3://bucket", deadline_s=0, anonymous=True),
    "verify": lambda: open_store("s3://bucket", verify="maybe", anonymous=True),
    "max_connections": lambda: open_store("s3://bucket", max_connections=0, anonymous=True),
    "retry": lambda: RetryPolicy(max_attempts=0),
    "hedge": lambda: HedgePolicy(max_share=2.0),
    "cache": lambda: DiskCache(root + "/cache", limit_bytes=-1),
    "shards": lambda: StreamedShards([]),
    "missing shards": lambda: StreamedShards(root + "/train-{0..3}.tar"),
    "uneven": lambda: StreamedShards("fake:8", uneven="maybe"),
    "half a world": lambda: StreamedShards("fake:8", rank=1),
    "shuffle_buffer": lambda: StreamedShards("fake:8", shuffle=True, shuffle_buffer=0),
    "memory": lambda: MemoryCachedDataset(data, 2.0),
    "rebatch": lambda: Rebatch([], 0),
    "mode": lambda: ImagenetLoader("val", root=root, batch_size=0),
    "dataset word": lambda: get_dataset("tape"),
    "space": lambda: LabelSpace("guess"),
    "amount": lambda: advise(Amount(0)),
    "instances": lambda: distribute(root, 1),
    "step": lambda: parse_steps(["Blur(3)"]),
    "quality": lambda: Preparation(payload="jpeg", quality=101),
    "payload": lambda: Preparation(payload="bmp"),
    "raw without crop": lambda: Preparation(payload="raw"),
    "max_count": lambda: ShardSettings(max_count=0),
    "seed": lambda: ShardSettings(seed=-1),
    "pattern": lambda: ShardSettings(pattern="no-number.tar"),
}
commands = {
    "shard --processes": lambda: pack(["shard", root, root + "/x", "--processes", "0"]),
    "distribute --instances": lambda: pack(["distribute", root, "--instances", "1"]),
    "a scenario": lambda: benchmark(["nothing"]),
    "imagenet.py --loader": lambda: imagenet.main([root, "--loader", "fast"]),
    "imagenet.py -b": lambda: imagenet.main([root, "-b", "0"]),
}
for name, command in commands.items():
    try:
        status = command()
    except SystemExit as end:
        status = end.code
    if status not in (1, 2):
        print(name, "ended with", status)
for name, attempt in attempts.items():
    try:
        attempt()
    except (ValueError, TypeError, LookupError, OSError) as error:
        if not str(error).strip():
            print(name, "has no words")
    else:
        print(name, "was taken")
print(len(attempts) + len(commands), "tried")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)  # nothing is compiled for -O yet, where Python may not write it
def test_w10_wrong_arguments_are_refused_without_asserts(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "images" / "cat" / "1.jpg")

    done = run_python("-O", "-W", "ignore", "-c", ATTEMPTS, str(tmp_path / "images"))

    assert done.returncode == 0, done.stderr
    *taken, last = done.stdout.splitlines()
    assert taken == []
    assert re.fullmatch(r"\d+ tried", last)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )


def asserts_of_arguments(tree: ast.AST) -> Iterator[ast.Assert]:
    """Asserts in public functions that speak of a parameter itself, and not of its parts."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if function.name.startswith("_") and function.name != "__init__":
            continue
        given = function.args
        names = {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        for node in ast.walk(function):
            if isinstance(node, ast.Assert):
                parts = {
                    id(inner.value) for inner in ast.walk(node) if isinstance(inner, ast.Attribute)
                }
                if any(
                    isinstance(inner, ast.Name) and inner.id in names and id(inner) not in parts
                    for inner in ast.walk(node.test)
                ):
                    yield node


def test_w10_no_assert_checks_an_argument() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.name.startswith("_")  # those are called by ours alone
        for node in asserts_of_arguments(ast.parse(path.read_text()))
    ]

    assert found == []
    assert list(asserts_of_arguments(ast.parse("def f(x):\n    assert x > 0")))


# -- G-16, G-17: what is made up draws from no global generator; what is given stays as it is


def states() -> list[Any]:
    return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]


def test_g16_made_up_images_leave_the_global_generators_alone() -> None:
    args = imagenet.parse_arguments(["--dummy", "--dataset-limit", "9", "--classes", "4"])
    noise = imagenet.open_split(args, "val")
    before = states()

    first = [noise[position] for position in range(9)]

    assert states() == before
    torch.manual_seed(5)
    assert all(torch.equal(noise[n][0], image) for n, (image, _) in enumerate(first))
    assert not torch.equal(first[0][0], first[1][0])
    assert [label for _, label in first] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_g16_random_transforms_of_made_up_images_are_torchs_in_every_worker() -> None:
    """Those of torchvision's FakeData would come from the seeds of other threads' images."""
    args = imagenet.parse_arguments(["--dummy", "--dataset-limit", "24"])
    noise = imagenet.open_split(args, "train")
    taken: list[list[torch.Tensor]] = []
    for loader_of in (DataLoader, concurrent_dataloader.DataLoader):
        torch.manual_seed(3)
        loader: Any = loader_of(noise, batch_size=6, num_workers=2)
        taken.append([images for images, _ in loader])

    assert all(torch.equal(one, other) for one, other in zip(*taken, strict=True))


def test_g16_a_made_up_stream_leaves_the_global_generators_alone() -> None:
    stream = concurrent_dataloader.StreamedShards("fake:8", shuffle=True)
    before = states()

    assert len(list(stream)) == 8

    assert states() == before


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_g17_normalising_leaves_the_callers_pixels_as_they_were(dtype: torch.dtype) -> None:
    args = imagenet.parse_arguments(["--dummy"])
    place = imagenet.Place(0, 1, 1, torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8).to(dtype)
    kept = pixels.clone()
    batches: Any = [(pixels, torch.tensor([0, 1]))]

    (batch,) = imagenet.iter_batches(batches, args, place)

    assert torch.equal(pixels, kept)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (imagenet.MEAN, imagenet.STD))
    torch.testing.assert_close(batch.images, (kept.float() / 255 - mean) / std)


# -- B-12: figures say their units, and commands start


def test_a19_figures_have_units_and_megabytes_are_of_10_to_6() -> None:
    assert unit_of("ours_mbit_per_s") == "Mbit/s (10^6 bit)"
    assert ReadSpeed(num_records=4, num_bytes=6_000_000, elapsed_s=2.0).megabytes_per_s == 3.0
    with pytest.raises(ValueError, match="its name ends in no unit"):
        unit_of("speed")


def test_a19_nothing_delivered_is_an_error_that_says_so_and_no_division_by_zero() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0), torch.zeros(0)), batch_size=2)

    with pytest.raises(ValueError, match="loader: delivered no image, expected one at least"):
        measure_epoch(empty)
    with pytest.raises(ValueError, match="loader: ended after 0 images, expected more than are"):
        measure_speed(empty, seconds=0.01)


def test_a19_images_are_counted_and_not_batches() -> None:
    data = TensorDataset(torch.zeros(10), torch.arange(10))

    speed = measure_speed(
        DataLoader(data, batch_size=5, sampler=endless_sampler(data)), 0.0, num_warm_up_batches=0
    )

    assert len(speed.positions) == 5  # one round of one batch
    assert measure_epoch(DataLoader(data, batch_size=4)).positions == list(range(10))


@pytest.mark.parametrize(
    "program",
    [
        *(["-m", "concurrent_dataloader.prepare", verb] for verb in SUMMARIES),
        ["-m", "concurrent_dataloader.prepare"],
        ["-m", "concurrent_dataloader.testing"],
        ["-m", "benchmarking"],
        ["imagenet.py"],
    ],
    ids=" ".join,
)
def test_a20_every_program_starts_as_it_is_documented(program: list[str]) -> None:
    done = run_python(*program, "--help")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


@pytest.mark.slow
def test_b12_the_time_that_is_left_is_that_of_the_steps_that_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that goes on by ten seconds each time that somebody looks, so that there is time left.
    seen = itertools.count(step=10)
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(seen)), time=time.time)
    for module in (imagenet, report):
        monkeypatch.setattr(module, "time", clock)
    text = "--dummy --dataset-limit 40 --classes 3 -b 8 -j 0 -p 1 --epochs 3 --image-size 32"
    output = ["--output-base-folder", str(tmp_path), "--no-accel", "--seed", "1"]
    assert imagenet.main([*text.split(), *output]) == 0

    lines = re.findall(
        r"^Epoch: \[(\d)\] \[(\d)/5\] Time ([\d.]+) .* ETA (\d+):(\d\d):(\d\d)$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert len(lines) == 15
    assert int(lines[0][3]) * 60 + int(lines[0][4]) >= 1  # minutes
    for epoch, step, time_s, *left in lines:
        num_left = (2 - int(epoch)) * 5 + 5 - int(step)
        left_s = sum(int(part) * unit for part, unit in zip(left, (3600, 60, 1), strict=True))
        # Time is printed to the millisecond, and what is left in whole seconds.
        assert abs(left_s - num_left * float(time_s)) <= 1.0 + num_left * 0.001
