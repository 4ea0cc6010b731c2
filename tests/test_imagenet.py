"""The trainer, on a few small images: what a user sees, and that nothing of it depends on luck."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import imagenet
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.prepare.__main__ import main as pack
from concurrent_dataloader.testing import ObjectServer
from concurrent_dataloader.training.checkpoint import advise_resume, go_on_in_epoch
from concurrent_dataloader.training.data import find_classes

REPOSITORY = Path(imagenet.__file__).parent
NUM_TRAIN, NUM_VAL = 12, 5
"""Images of each of the three classes. Neither number is divided by the batch or the ranks."""


def encode_image(rng: np.random.Generator, label: int) -> bytes:
    pixels = rng.integers(0, 120, (40, 48, 3), np.uint8)
    pixels[..., label] += 100
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With more, threads of tiny convolutions wait for each other on a machine that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {
        f"{split}/class{label}/{number}.jpg": encode_image(rng, label)
        for split, num_images in (("train", NUM_TRAIN), ("val", NUM_VAL))
        for label in range(3)
        for number in range(num_images)
    }


@pytest.fixture(scope="session")
def image_folder(images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for key, raw in images.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(raw)
    return root


@pytest.fixture
def train(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the trainer in this process; gives the folder of its results."""

    def run(name: str, *arguments: str, data: str | Path = image_folder) -> Path:
        output = tmp_path / name
        assert imagenet.main([str(data), *small_job(output), *arguments]) == 0
        return output

    return run


def small_job(output: Path) -> list[str]:
    text = "-a shufflenet_v2_x0_5 --image-size 32 -b 8 -j 2 --lr 0.01 -p 1 --seed 3 --no-accel"
    return [*text.split(), "--output-base-folder", str(output)]


def read_log(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses_of(output: Path) -> list[tuple[str, int, float]]:
    return [(each["split"], each["step"], each["loss"]) for each in read_log(output, "step")]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@contextlib.contextmanager
def start(*command: str) -> Generator[subprocess.Popen[str]]:
    """Start a process of Python, which does not outlive the test."""
    with subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end; gives all that it said."""
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    return said


# Loaders


@pytest.mark.slow
def test_losses_from_a_bucket_are_those_of_torchs_loader_on_the_same_files(
    train: Callable[..., Path],
    images: dict[str, bytes],
    object_server: ObjectServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    object_server.put_objects("photos", {f"set/{key}": raw for key, raw in images.items()})
    object_server.set_latency(median_s=0.005, sigma=0.5)
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    credential_file = tmp_path / "credentials.json"
    credential_file.write_text(json.dumps(keys))
    bucket = [
        *("--endpoint-url", object_server.endpoint_url),
        *("--s3-credential-file", str(credential_file)),
    ]

    torchs = train("torchs", "--epochs", "2", "--loader", "torch")
    ours = [
        train(name, "--epochs", "2", "--fetch-impl", name, *bucket, data="s3://photos/set")
        for name in ("threaded", "asyncio")
    ]

    assert len(losses_of(torchs)) == 2 * (5 + 2)
    for output in ours:
        assert losses_of(output) == losses_of(torchs)
        assert object_server.secret_key not in (output / "log.jsonl").read_text()
    object_server.reset_counters()
    cache = ["--cache-dir", str(tmp_path / "cache"), "--cache-limit", "0.01"]
    cached = train("cached", "--epochs", "2", *cache, *bucket, data="s3://photos/set")
    assert losses_of(cached) == losses_of(torchs)
    gets = object_server.counters(by_key=True).num_gets_by_key
    assert {gets[f"photos/set/{key}"] for key in images} == {1}
    assert object_server.secret_key not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", ["images", "shards", "bare shards"])
def test_a_public_bucket_is_read_without_credentials(
    kind: str,
    train: Callable[..., Path],
    images: dict[str, bytes],
    image_folder: Path,
    object_server: ObjectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    objects, flags = images, ["--epochs", "1", "-j", "1"]
    if kind != "images":
        assert pack(["shard", str(image_folder), str(tmp_path / "p"), "--splits", "train,val"]) == 0
        objects = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
        flags.append("--stream")
    if kind == "bare shards":
        objects = {name: raw for name, raw in objects.items() if name.endswith(".tar")}
        flags += ["--classes", "3", "--epoch-images", str(3 * NUM_TRAIN)]
    object_server.create_bucket("public", public=True)
    object_server.put_objects("public", objects)
    flags += ["--endpoint-url", object_server.endpoint_url]

    output = train("run", *flags, "--anonymous", data="s3://public")

    (epoch,) = read_log(output, "epoch")
    assert epoch["val"]["num_images"] == 3 * NUM_VAL
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        imagenet.main(["s3://public", *small_job(output), *flags])
    assert caught.value.code == 2
    assert "(--anonymous of commands)" in capfd.readouterr().err


PACKED = {
    "webdataset": ("shard", "--no-shuffle", "--maxcount", "10"),
    "tfrecord": ("shard", "--no-shuffle", "--maxcount", "10", "--format", "tfrecord"),
    "lmdb": ("lmdb", "--order", "list"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKED)
def test_losses_from_packed_data_are_those_of_single_files(
    kind: str, train: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lmdb")
    verb, *flags = PACKED[kind]
    packed = tmp_path / "packed"
    assert pack([verb, str(image_folder), str(packed), "--splits", "train,val", *flags]) == 0

    single = losses_of(train("single", "--epochs", "1"))

    assert losses_of(train("auto", "--epochs", "1", data=packed)) == single
    assert losses_of(train("named", "--epochs", "1", "--dataset", kind, data=packed)) == single


@pytest.mark.slow
def test_losses_from_packed_data_in_a_bucket_are_those_of_single_files(
    train: Callable[..., Path],
    image_folder: Path,
    object_server: ObjectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    kinds = [kind for kind in PACKED if kind != "lmdb"]
    for kind in kinds:
        _, *flags = PACKED[kind]
        packed = tmp_path / kind
        assert pack(["shard", str(image_folder), str(packed), "--splits", "train,val", *flags]) == 0
        object_server.put_folder(kind, packed)

    single = losses_of(train("single", "--epochs", "1"))

    assert len(single) == 5 + 2
    for kind in kinds:
        remote = train(f"remote-{kind}", "--epochs", "1", data=f"s3://{kind}")
        assert losses_of(remote) == single


@pytest.mark.slow
def test_data_copied_first_gives_the_same_job_and_both_times(
    train: Callable[..., Path],
    images: dict[str, bytes],
    object_server: ObjectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    object_server.put_objects("photos", {f"set/{key}": raw for key, raw in images.items()})
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    copied = tmp_path / "local"

    single = losses_of(train("single", "--epochs", "1"))
    first = train("copied", "--epochs", "1", "--copy-to", str(copied), data="s3://photos/set")
    again = train("again", "--epochs", "1", "--copy-to", str(copied), data="s3://photos/set")

    assert losses_of(first) == losses_of(again) == single
    assert sum(path.is_file() for path in copied.rglob("*")) == len(images)
    said = capfd.readouterr().out
    assert f"copied {len(images)} files" in said
    assert f"copied 0 files, 0.0 MB (10^6 bytes), to {copied}" in said
    (summary,) = read_log(first, "summary")
    assert 0 < summary["copy_s"] < 60


@pytest.mark.slow
def test_a_stream_of_shards_trains_on_every_image_once_an_epoch(
    train: Callable[..., Path],
    image_folder: Path,
    object_server: ObjectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (
        pack(["shard", str(image_folder), str(tmp_path / "packed"), "--splits", "train,val"]) == 0
    )
    object_server.put_folder("shards", tmp_path / "packed")
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)

    for data in (tmp_path / "packed", "s3://shards"):
        for output in (
            train(f"run-{len(str(data))}", "--epochs", "2", "--stream", data=data),
            train(f"twin-{len(str(data))}", "--epochs", "2", "--stream", data=data),
        ):
            epochs = read_log(output, "epoch")
            assert [epoch["train"]["num_images"] for epoch in epochs] == [3 * NUM_TRAIN] * 2
            assert [epoch["val"]["num_images"] for epoch in epochs] == [3 * NUM_VAL] * 2
        assert losses_of(output) == losses_of(output.with_name(f"run-{len(str(data))}"))


@pytest.mark.slow
def test_kaggles_layout_trains_and_validates_as_it_lies(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    """Its validation images are flat, and stopped the trainer."""
    rng = np.random.default_rng(1)
    wnids = ("n01440764", "n01443537", "n01484850")
    solution = ["ImageId,PredictionString"]
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for number in range(6):
        label = number % 3
        name = f"ILSVRC2012_val_{number + 1:08}"
        for folder, file in ((f"train/{wnids[label]}", f"{number}.JPEG"), ("val", f"{name}.JPEG")):
            (data / folder).mkdir(parents=True, exist_ok=True)
            (data / folder / file).write_bytes(encode_image(rng, label))
        solution.append(f"{name},{wnids[label]} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(solution))

    output = train("run", "--epochs", "1", "--classes", "5", data=tmp_path)

    (epoch,) = read_log(output, "epoch")
    assert [epoch[split]["num_images"] for split in ("train", "val")] == [6, 6]
    state = load(output / "checkpoint.pth.tar")
    assert state["state_dict"]["fc.weight"].shape[0] == len(state["classes"]) == 5
    with pytest.raises(SystemExit):
        train("few", "--classes", "2", data=tmp_path)


@pytest.mark.slow
def test_an_index_and_a_classes_file_give_the_same_job(
    train: Callable[..., Path], images: dict[str, bytes], tmp_path: Path
) -> None:
    """A folder is listed in the order of its keys, which the index has too."""
    for split in ("train", "val"):
        keys = sorted(key for key in images if key.startswith(split))
        (tmp_path / f"{split}.json").write_text(json.dumps(keys))
    classes = {f"class{label}": {"id": label + 1, "name": f"name{label}"} for label in range(3)}
    (tmp_path / "classes.json").write_text(json.dumps(classes))

    listed = train("listed", "--epochs", "1")
    indexed = train(
        "indexed",
        *("--epochs", "1", "--index-file", str(tmp_path / "train.json")),
        *("--val-index-file", str(tmp_path / "val.json")),
        *("--classes-file", str(tmp_path / "classes.json")),
    )

    assert losses_of(indexed) == losses_of(listed)
    assert load(indexed / "checkpoint.pth.tar")["classes"] == ["name0", "name1", "name2"]


# Checkpoints


@pytest.mark.slow
def test_b07_a_resumed_run_is_the_uninterrupted_one(train: Callable[..., Path]) -> None:
    """B-07: the saved epoch was repeated."""
    whole = train("whole", "--epochs", "3")
    begun = train("begun", "--epochs", "2")
    resumed = train("begun", "--epochs", "3", "--resume", str(begun / "checkpoint.pth.tar"))

    assert losses_of(resumed) == losses_of(whole)
    assert [each["epoch"] for each in read_log(resumed, "epoch")] == [0, 1, 2]
    states = [load(output / "checkpoint.pth.tar") for output in (whole, resumed)]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name


@contextlib.contextmanager
def one_broken(folder: Path, place: int) -> Generator[None]:
    """Have the image broken that stands at this place of the first epoch's order."""
    dataset = imagenet.open_split(imagenet.parse_arguments([str(folder), "--no-accel"]), "train")
    order = list(DistributedSampler(dataset, 1, 0, seed=3))
    path = folder / "train" / dataset.key(order[place]).removeprefix("train/")
    whole = path.read_bytes()
    path.write_bytes(b"broken")
    try:
        yield
    finally:
        path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "shards"])
def test_a_run_that_broke_in_an_epoch_goes_on_there(
    kind: str, train: Callable[..., Path], images: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for key, raw in images.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(raw)
    data, flags = folder, ["--epochs", "2", "--checkpoint-steps", "2"]
    if kind == "shards":
        data, flags = tmp_path / "shards", [*flags, "--stream"]
        assert pack(["shard", str(folder), str(data), "--splits", "train,val"]) == 0
    whole = train("whole", *flags, data=data)

    begun = tmp_path / "begun"
    if kind == "images":
        with one_broken(folder, 20), pytest.raises(SystemExit, match=r"^1$"):
            train("begun", *flags, data=data)
    else:
        with start("imagenet.py", str(data), *small_job(begun), *flags) as process:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("Epoch: [0] [3/"):
                assert process.poll() is None
            process.kill()
    resumed = train("begun", *flags, "--resume", str(begun / "checkpoint.pth.tar"), data=data)

    # A step that was taken twice is there twice: after the checkpoint, and again.
    assert dict_of(losses_of(resumed)) == dict_of(losses_of(whole))
    assert [each["epoch"] for each in read_log(resumed, "epoch")] == [0, 1]
    assert averages_of(resumed) == averages_of(whole)


def averages_of(output: Path) -> list[tuple[float, ...]]:
    """Loss, accuracies and images of each epoch's training."""
    names = ("loss", "acc1", "acc5", "num_images")
    return [tuple(each["train"][name] for name in names) for each in read_log(output, "epoch")]


def dict_of(losses: list[tuple[str, int, float]]) -> dict[tuple[str, int], float]:
    return {(split, step): loss for split, step, loss in losses}


@pytest.mark.slow
def test_an_epoch_goes_on_with_fewer_processes(
    train: Callable[..., Path], images: dict[str, bytes], tmp_path: Path
) -> None:
    folder, output = tmp_path / "images", tmp_path / "ranks"
    for key, raw in images.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(raw)
    flags = ["--epochs", "1", "--checkpoint-steps", "2"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    job = [str(folder), *small_job(output), *flags]

    with one_broken(folder, 20), start(*torchrun, "imagenet.py", *job) as ranks:
        said, _ = ranks.communicate(timeout=100)
        assert ranks.returncode == 1, said
    path = str(output / "checkpoint.pth.tar")
    train("alone", *flags, "--resume", path, data=folder)

    assert load(output / "checkpoint.pth.tar")["middle"]["step"] == 2
    (epoch,) = read_log(tmp_path / "alone", "epoch")
    assert epoch["train"]["num_images"] == 3 * NUM_TRAIN
    with pytest.raises(SystemExit):
        imagenet.main([str(folder), *small_job(output), "--resume", path, "--loader", "torch"])


def test_a_stream_goes_on_with_fewer_processes(images: dict[str, bytes], tmp_path: Path) -> None:
    folder, data = tmp_path / "images", tmp_path / "shards"
    for key, raw in images.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(raw)
    assert pack(["shard", str(folder), str(data), "--splits", "train,val"]) == 0
    args = imagenet.parse_arguments(
        [str(data), "--no-accel", "--stream", "--batch-size", "4", "--workers", "2", "--seed", "3"]
    )
    dataset = imagenet.open_split(args, "train")

    def make(rank: int, world_size: int) -> Any:
        place = imagenet.Place(rank, world_size, world_size, torch.device("cpu"))
        return imagenet.make_loader(args, dataset, place, is_train=True)

    loaders = [make(rank, 2) for rank in range(2)]
    taken = [labels for loader in loaders for _, labels in itertools.islice(loader, 2)]
    middle = {
        "step": 2,
        "num_steps": len(loaders[0]),
        "loaders": [loader.state_dict() for loader in loaders],
    }
    alone = make(0, 1)
    place = imagenet.Place(0, 1, 1, torch.device("cpu"))
    num_done, _ = go_on_in_epoch(args, place, alone, middle)
    rest = [labels for _, labels in alone]
    for loader in loaders:
        loader.close()

    assert num_done == 2 * len(alone) // len(loaders[0])
    expected = sorted(dataset.labels.tolist())
    assert sorted(torch.cat([*taken, *rest]).tolist()) == expected


@pytest.mark.slow
def test_b07_evaluate_validates_with_and_without_a_checkpoint(train: Callable[..., Path]) -> None:
    """B-07: without a checkpoint it was a crash."""
    trained = train("trained", "--epochs", "2")
    best = load(trained / "model_best.pth.tar")
    last_val = read_log(trained, "epoch")[-1]["val"]

    train("fresh", "--evaluate")
    train("last", "-e", "--resume", str(trained / "checkpoint.pth.tar"))

    (fresh,), (last,) = (read_log(trained.parent / n, "evaluate") for n in ("fresh", "last"))
    assert {name: last[name] for name in ("loss", "acc1", "num_images")} == {
        name: last_val[name] for name in ("loss", "acc1", "num_images")
    }
    assert fresh["num_images"] == 3 * NUM_VAL
    assert not (trained.parent / "last" / "checkpoint.pth.tar").exists()
    assert best["best_acc1"] == max(each["val"]["acc1"] for each in read_log(trained, "epoch"))
    assert sorted(path.name for path in trained.iterdir()) == [
        "checkpoint.pth.tar",
        "log.jsonl",
        "model_best.pth.tar",
    ]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, image_folder: Path) -> None:
    path = tmp_path / "evil.pth.tar"
    with path.open("wb") as file:
        pickle.dump({"state_dict": {}, "arch": eval}, file, protocol=2)

    with pytest.raises(SystemExit) as caught:
        imagenet.main([str(image_folder), *small_job(tmp_path), "--resume", str(path)])

    assert caught.value.code == 2


def test_weights_of_other_classes_are_replaced_and_the_rest_is_kept(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A-12. The file of the weights lies where torch keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    path = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    published = torchvision.models.shufflenet_v2_x0_5().state_dict()
    torch.save(published, path)

    output = train("pretrained", "--pretrained", "--epochs", "1", "--lr", "0")

    state = load(output / "checkpoint.pth.tar")["state_dict"]
    assert torch.equal(state["conv1.0.weight"], published["conv1.0.weight"])
    assert state["fc.weight"].shape == (3, 1024)


# Several processes


@pytest.mark.slow
def test_ranks_validate_as_one_process_does_and_only_the_first_saves(
    train: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    """15 images over two ranks: nothing is counted twice."""
    output = tmp_path / "ranks"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    # At a higher rate the running means of so few steps have losses of 1e6, or none, by chance.
    job = [str(image_folder), *small_job(output), "--epochs", "2", "--lr", "0.00001"]

    with start(*torchrun, "imagenet.py", *job) as ranks:
        trained = finish(ranks)
    path = str(output / "checkpoint.pth.tar")
    train("alone", "--evaluate", "--resume", path)

    (alone,) = read_log(tmp_path / "alone", "evaluate")
    last = read_log(output, "epoch")[-1]
    assert last["val"]["num_images"] == alone["num_images"] == 3 * NUM_VAL
    assert last["val"]["acc1"] == alone["acc1"]
    assert last["val"]["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert last["train"]["num_images"] == 3 * NUM_TRAIN
    assert trained.count("best acc@1") == 1


@pytest.mark.slow
def test_nodes_meet_by_the_flags_of_pytorchs_example(image_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    job = [str(image_folder), *small_job(tmp_path), "--epochs", "1"]
    job += ["--world-size", "2", "--dist-url", url, "--rank"]

    with start("imagenet.py", *job, "1") as second:
        assert imagenet.main([*job, "0"]) == 0
        said = finish(second)

    (epoch,) = read_log(tmp_path, "epoch")
    assert epoch["val"]["num_images"] == 3 * NUM_VAL
    assert said == ""


@pytest.mark.slow
def test_a_process_is_started_for_each_gpu_or_one_for_the_cpu(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here

    spawned = train("spawned", "--epochs", "1", "--multiprocessing-distributed")
    plain = train("plain", "--epochs", "1")

    assert losses_of(spawned) == losses_of(plain)


# What it says


@pytest.mark.slow
def test_a16_a_log_has_plain_lines_with_time_data_loss_and_accuracy(
    image_folder: Path, tmp_path: Path
) -> None:
    """A-16: meters were computed and never printed. -p 2 of 5 steps: the 1st, 3rd and last."""
    job = [str(image_folder), *small_job(tmp_path), "--epochs", "1", "-p", "2", "--no-pin-memory"]

    with start("imagenet.py", *job) as process:
        said = finish(process)

    pattern = (
        r"^Epoch: \[0\] \[(\d)/5\] Time \d+\.\d{3} Data \d+\.\d{3} Loss \d+\.\d{4} Acc@1 \d+\.\d\d "
        r"Acc@5 \d+\.\d\d \d+ images/s ETA \d+:\d\d:\d\d$"
    )
    assert re.findall(pattern, said, re.MULTILINE) == ["1", "3", "5"]
    assert re.search(r"^ +0 +\d.*%", said, re.MULTILINE), said
    assert re.search(r"^best acc@1 .* images/s .* of the time waiting", said, re.MULTILINE)
    (summary,) = read_log(tmp_path, "summary")
    assert 0 < summary["wait_share"] < 1
    assert "\x1b" not in said


def test_noise_needs_no_data(train: Callable[..., Path]) -> None:
    output = train("noise", "--dummy", "--dataset-limit", "10", "--epochs", "1", "-j", "0")

    (epoch,) = read_log(output, "epoch")
    assert epoch["train"]["num_images"] == epoch["val"]["num_images"] == 10


def test_mixed_precision_channels_last_and_the_other_decoder_train(
    train: Callable[..., Path],
) -> None:
    output = train(
        "fast",
        *("--epochs", "1", "--amp", "bf16", "--channels-last", "--decoder", "torchvision"),
        *("--scheduler", "cosine", "--warmup-epochs", "0.5", "--label-smoothing", "0.1"),
        *("--batch-pool", "1", "--num-fetch-workers", "4", "--prefetch-factor", "3"),
    )

    (epoch,) = read_log(output, "epoch")
    assert np.isfinite(epoch["train"]["loss"])


def test_a_seed_is_drawn_and_kept_for_the_resume(image_folder: Path, tmp_path: Path) -> None:
    job = [each for each in small_job(tmp_path) if each not in ("--seed", "3")]

    assert imagenet.main([str(image_folder), *job, "--epochs", "1"]) == 0
    seed = load(tmp_path / "checkpoint.pth.tar")["seed"]
    path = str(tmp_path / "checkpoint.pth.tar")
    assert imagenet.main([str(image_folder), *job, "--epochs", "2", "--resume", path]) == 0

    assert load(tmp_path / "checkpoint.pth.tar")["seed"] == seed


@pytest.mark.slow
def test_ctrl_c_ends_it_with_status_130(image_folder: Path, tmp_path: Path) -> None:
    job = [str(image_folder), *small_job(tmp_path), "--epochs", "999"]
    with start("imagenet.py", *job) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Epoch: [0]")
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()

    assert process.returncode == 130
    assert "stopped by Ctrl-C; " in said
    assert "Traceback" not in said


def test_after_ctrl_c_only_a_checkpoint_of_this_run_is_advised(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    path.touch()
    written_s = path.stat().st_mtime

    assert advise_resume(tmp_path, written_s - 1) == f"go on with --resume {path}"
    assert advise_resume(tmp_path, written_s + 1) == "it had written no checkpoint yet"


# Parts


def arguments(*argv: str) -> argparse.Namespace:
    return imagenet.parse_arguments(argv)


def test_the_flags_of_pytorchs_example_have_its_defaults() -> None:
    expected = {
        "data": "imagenet",
        "arch": "resnet18",
        "workers": 4,
        "epochs": 90,
        "start_epoch": 0,
        "batch_size": 256,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "print_freq": 10,
        "evaluate": False,
        "pretrained": False,
        "world_size": -1,
        "rank": -1,
        "dist_url": "tcp://224.66.41.62:23456",
        "dist_backend": "nccl",
        "seed": None,
        "gpu": None,
        "no_accel": False,
        "multiprocessing_distributed": False,
        "dummy": False,
    }

    args = vars(arguments())

    assert {name: args[name] for name in expected} == expected
    short = arguments("-a", "resnet50", "-j", "3", "-b", "7", "-p", "9", "-e")
    assert (short.arch, short.workers, short.batch_size, short.print_freq, short.evaluate) == (
        *("resnet50", 3, 7, 9),
        True,
    )


def test_data_is_a_flag_too() -> None:
    """It was an ambiguous abbreviation of --dataset and --dataset-limit."""
    given = [
        arguments(*argv) for argv in (["a"], ["--data", "a"], ["--data=a"], ["a", "--data", "a"])
    ]

    assert [vars(args) for args in given] == [vars(given[0])] * 4


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 1.0), (29.99, 1.0), (30, 0.1), (59.9, 0.1), (60, 0.01), (89, 0.01)]
)
def test_b07_the_rate_falls_to_a_tenth_each_30_epochs_counted_from_0(
    epoch: float, rate: float
) -> None:
    """B-07: it fell one epoch early, and epoch 90 had a thousandth."""
    assert imagenet.learning_rate(arguments("--lr", "1"), epoch) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("flags", "epoch", "rate"),
    [
        ("--scheduler cosine --epochs 10", 0, 1.0),
        ("--scheduler cosine --epochs 10", 5, 0.5),
        ("--scheduler cosine --epochs 10", 10, 0.0),
        ("--scheduler exponential --lr-step 2 --lr-gamma 0.25", 1, 0.5),
        ("--scheduler constant", 80, 1.0),
        ("--warmup-epochs 2", 0, 0.01),
        ("--warmup-epochs 2", 1, 0.505),
        ("--warmup-epochs 2", 2, 1.0),
    ],
)
def test_schedules_have_the_rates_that_they_say(flags: str, epoch: float, rate: float) -> None:
    args = arguments("--lr", "1", *flags.split())

    assert imagenet.learning_rate(args, epoch) == pytest.approx(rate)


def test_weights_of_imagenet_are_refused_for_1000_other_classes() -> None:
    """A-12: with the dev kit's numbers, published weights were near chance."""
    args = arguments("--pretrained")
    others = argparse.Namespace(classes=Classes({f"class{i}": i for i in range(1000)}))
    imagenets = argparse.Namespace(classes=Classes.imagenet())

    with pytest.raises(ValueError, match=r"^--pretrained: these 1000 classes are not ImageNet's"):
        find_classes(args, others, None)
    assert find_classes(args, imagenets, None)[0] == "tench"


class Numbers(IterableDataset[int]):
    """A stream that reorders itself by epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter([self.epoch, self.epoch + 1])


def test_the_epoch_is_told_to_what_wants_to_know() -> None:
    """W-04: a sampler without set_epoch was a crash."""
    shuffled = DataLoader(list(range(8)), shuffle=True)  # pyright: ignore[reportArgumentType]: any sequence will do
    sharded = DataLoader(
        list(range(8)),  # pyright: ignore[reportArgumentType]: as above
        sampler=DistributedSampler(list(range(8)), 2, 0),  # pyright: ignore[reportArgumentType]: as above
    )
    stream = DataLoader(Numbers())
    before = [int(each) for each in sharded]

    for loader in (shuffled, sharded, stream):
        imagenet.set_epoch(loader, 5)

    assert [int(each) for each in sharded] != before
    assert [int(each) for each in stream] == [5, 6]
    assert sorted(int(each) for each in shuffled) == list(range(8))


def test_several_processes_may_not_leave_out_images_in_training() -> None:
    args = imagenet.parse_arguments(["--dummy", "--on-error", "skip", "--seed", "1", "-j", "0"])
    place = imagenet.Place(0, 2, 1, torch.device("cpu"))
    noise = torchvision.datasets.FakeData(8)

    with pytest.raises(ValueError, match="--on-error: got skip for several processes"):
        imagenet.make_loader(args, noise, place, is_train=True)
    imagenet.make_loader(args, noise, place, is_train=False)


def test_images_that_are_kept_in_memory_train_as_others(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train("plain", "--epochs", "2")
    kept = train("kept", "--epochs", "2", "--memory-cache", "0.5")

    assert losses_of(kept) == losses_of(plain)
    num_kept, num_images = round(0.5 * 3 * NUM_TRAIN), 3 * NUM_TRAIN
    said = f"training images: {num_kept} of {num_images} samples are kept in memory once they were"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folders", "shards", "bare shards", "scratch"])
def test_without_a_split_for_validation_it_trains_and_says_so(
    kind: str,
    train: Callable[..., Path],
    image_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data, flags = tmp_path / "photos", ["--epochs", "1", "-j", "0"]
    shutil.copytree(image_folder / "train", data)
    if kind == "scratch":
        flags += ["--dataset", "scratch"]
    if "shards" in kind:
        data = tmp_path / "packed"
        assert pack(["shard", str(image_folder / "train"), str(data)]) == 0
    if kind == "bare shards":
        for name in ("train-index.npz", "metadata.json"):
            (data / name).unlink()
        flags += ["--stream", "--classes", "3", "--epoch-images", str(3 * NUM_TRAIN)]

    output = train("run", *flags, data=data)

    (epoch,) = read_log(output, "epoch")
    assert (epoch["train"]["num_images"], epoch["val"]) == (3 * NUM_TRAIN, None)
    assert load(output / "checkpoint.pth.tar")["epoch"] == 1
    said = capfd.readouterr().out
    assert f"no split 'val' in {data}: training without validation\n" in said
    assert ("no split 'train'" in said) == ("shards" not in kind)
    assert "\nno validation, " in said
    with pytest.raises(SystemExit) as caught:
        imagenet.main([str(data), *small_job(output), *flags, "--evaluate"])
    assert caught.value.code == 2
    assert "; the trainer expects train/CLASS/*.jpg and val/CLASS/*.jpg" in capfd.readouterr().err


def test_folders_that_may_be_classes_or_splits_are_no_training_images(
    image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_folder / "val", tmp_path / "data/val")

    with pytest.raises(SystemExit) as caught:
        imagenet.main([str(tmp_path / "data"), *small_job(tmp_path)])

    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert "has no folder 'train' for the split asked for; the trainer expects train/" in error


@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_bad_images_are_passed_over_and_written_down(
    on_error: str, train: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    bad = ("train/class1/3.jpg", "val/class0/2.jpg")
    for key in bad:
        (data / key).write_bytes(b"no image")
    quarantine = tmp_path / "quarantine.jsonl"

    flags = ["--epochs", "1", "--on-error", on_error, "--quarantine", str(quarantine)]
    output = train("run", *flags, data=data)

    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {line["key"] for line in lines} == {key.partition("/")[2] for key in bad}
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    (epoch, *_) = (record for record in records if record["kind"] == "epoch")
    assert epoch["train"]["num_images"] == 3 * NUM_TRAIN - (on_error == "skip")
    assert epoch["val"]["num_images"] == 3 * NUM_VAL - 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("is_stream", [False, True], ids=["images", "stream"])
def test_a_bad_image_ends_it_with_a_line_that_says_how_to_go_on(
    num_workers: int,
    is_stream: bool,
    image_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    (data / "train/class1/3.jpg").write_bytes(b"no image")
    flags, choice, where = ["-j", str(num_workers)], "replace", "class1/3.jpg: image: got 8 bytes"
    if is_stream:
        source, data = data, tmp_path / "packed"
        flags, choice, where = [*flags, "--stream"], "skip", "train-000000.tar"
        (source / "train/class1/3.jpg").write_bytes((source / "train/class1/4.jpg").read_bytes())
        assert pack(["shard", str(source), str(data), "--splits", "train,val"]) == 0
        (shard,) = data.glob("train-*.tar")
        raw = bytearray(shard.read_bytes())
        start = raw.index(b"\xff\xd8\xff")
        raw[start : start + 100] = bytes(100)
        shard.write_bytes(raw)

    with pytest.raises(SystemExit) as caught:
        imagenet.main([str(data), *small_job(tmp_path / "run"), "--epochs", "1", *flags])

    assert caught.value.code == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    (line,) = lines
    assert line.startswith("imagenet.py: error: ")
    assert where in line
    assert line.endswith(f"; to train on without such: --on-error {choice} --quarantine FILE")


def test_a_stream_goes_on_after_an_image_that_is_damaged(
    train: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    data, quarantine = tmp_path / "packed", tmp_path / "quarantine.jsonl"
    assert pack(["shard", str(image_folder), str(data), "--splits", "train,val"]) == 0
    (shard,) = data.glob("train-*.tar")
    raw = bytearray(shard.read_bytes())
    start = raw.index(b"\xff\xd8\xff")  # the first image
    raw[start : start + 100] = bytes(100)
    shard.write_bytes(raw)

    flags = ["--epochs", "1", "--stream", "--on-error", "skip", "--quarantine", str(quarantine)]
    output = train("run", *flags, data=data)

    (line,) = map(json.loads, quarantine.read_text().splitlines())
    assert (line["key"], line["num_samples"]) == (shard.name, 1)
    assert line["range"][0] < start < line["range"][1]
    (epoch,) = read_log(output, "epoch")
    assert epoch["train"]["num_images"] == 3 * NUM_TRAIN - 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--arch resnet19", "argument -a/--arch: got 'resnet19', expected a model of torchvision"),
        ("--data other", "argument --data: got other, and nowhere before, expected one"),
        ("--epoch 1", "unrecognized arguments: --epoch 1"),
        ("--classes 0", "argument --classes: got '0', expected a number from 1 on"),
        ("-j -1", "argument -j/--workers: got '-1', expected a number from 0 on"),
        ("-b x", "argument -b/--batch-size: got 'x', expected a number from 1 on"),
        ("--num-fetch-workers 0", "--num-fetch-workers: got '0', expected a number from 1 on"),
        ("--fetch-impl async", "--fetch-impl: invalid choice: 'async'"),
        ("--loader dali", "--loader: invalid choice: 'dali'"),
        ("--quarantine x.jsonl", "argument --quarantine: expected --on-error skip or replace"),
        (
            "--on-error skip --loader torch",
            "argument --on-error: got skip, expected no --loader torch",
        ),
        ("--on-error replace --stream", "argument --on-error: got replace, expected skip with"),
        ("--resume .", "argument --resume: .: is a folder, expected a checkpoint in it, such as"),
        ("--on-error skip --quarantine gone/x.jsonl", "--quarantine: gone/x.jsonl: cannot be writ"),
        ("--on-error skip --quarantine .", "argument --quarantine: .: cannot be written, expected"),
        ("--cache-dir imagenet.py", "--cache-dir: imagenet.py: "),
        ("--cache-dir imagenet.py/a", "imagenet.py is no folder that can be written, expected"),
        ("--resume gone.pth.tar", "argument --resume: gone.pth.tar: no such file"),
        ("", "nowhere: nothing there, expected shards of tar or TFRecord"),
        ("--index-file gone.json", "nowhere: no such folder"),
        ("--dataset s3 --use-cache", "use_cache: got True without cache_endpoint_url"),
        ("--dataset s3 --cache-limit 1", "cache_limit_bytes: got 1000000000 without cache_dir"),
        ("--dataset s3 --cache-limit 0", "cache_limit_bytes: got 0 without cache_dir"),
        ("--memory-cache 1.5", "argument --memory-cache: got '1.5', expected 0 to 1"),
        ("--memory-cache 1 --stream --dataset webdataset", "keeps single samples, expected no"),
        ("--cache-dir a --copy-to b", "--copy-to: copies all of the data, expected no --dummy"),
        ("--dataset s3 --cache-dir a --cache-limit 0", "limit_bytes: got 0 bytes"),
        ("--dataset s3 --index-file gone.json", "gone.json: no such index file"),
        ("--dataset s3 --s3-credential-file gone.json", "gone.json: cannot be read"),
    ],
)
def test_a_mistake_ends_it_with_status_2_and_says_what_to_do(
    flags: str, text: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        imagenet.main(["nowhere", *small_job(tmp_path), *flags.split()])

    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_a_checkpoint_of_other_classes_is_refused(
    train: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = train("noise", "--dummy", "--dataset-limit", "2", "--epochs", "1") / "checkpoint.pth.tar"

    with pytest.raises(SystemExit):
        train("other", "--resume", str(path))

    assert "knows 1000 classes, '0' first, the data 3, 'class0' first" in capfd.readouterr().err
