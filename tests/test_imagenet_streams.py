"""The trainer on streams of shards: without an index, and each node with shards of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import imagenet
from concurrent_dataloader.datasets import StreamedShards
from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.prepare.__main__ import main as pack
from concurrent_dataloader.testing import ObjectServer
from concurrent_dataloader.training.checkpoint import go_on_in_epoch
from concurrent_dataloader.training.shares import open_stream
from tests import test_imagenet
from tests.test_imagenet import (
    NUM_TRAIN,
    NUM_VAL,
    finish,
    load,
    losses_of,
    read_log,
    small_job,
    start,
)

images, image_folder = test_imagenet.images, test_imagenet.image_folder
one_thread, train = test_imagenet.one_thread, test_imagenet.train

CPU = torch.device("cpu")


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    """Train shards of 10, 10, 10 and 6 images, val shards of 10 and 5, with indexes."""
    flags = ["--splits", "train,val", "--maxcount", "10"]
    assert pack(["shard", str(image_folder), str(tmp_path / "shards"), *flags]) == 0
    return tmp_path / "shards"


@pytest.fixture
def bare(shards: Path) -> Path:
    """The same without indexes."""
    for path in shards.glob("*.npz"):
        path.unlink()
    return shards


def refusal(capfd: pytest.CaptureFixture[str], data: Path, output: Path, *flags: str) -> str:
    """Run what is to be refused; gives what was said."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        imagenet.main([str(data), *small_job(output), *flags])
    assert caught.value.code == 2
    return capfd.readouterr().err


def open_images(data: Path, *flags: str) -> tuple[imagenet.Args, Any]:
    """Open the training images as tensors that are the same whenever they are read."""
    args = imagenet.parse_arguments(
        [str(data), "--no-accel", "--stream", "-b", "4", "-j", "2", "--seed", "3", *flags]
    )
    dataset = imagenet.open_split(args, "train")
    dataset.set_transform(pil_to_tensor)
    return args, dataset


def place_of(node: int, num_nodes: int, local_rank: int, num_local: int) -> imagenet.Place:
    rank, world_size = node * num_local + local_rank, num_nodes * num_local
    return imagenet.Place(rank, world_size, num_local, CPU, local_rank, node, num_nodes)


def read_epoch(args: imagenet.Args, dataset: Any, place: imagenet.Place) -> list[bytes]:
    loader = imagenet.make_loader(args, dataset, place, is_train=True)
    imagenet.set_epoch(loader, 1)
    assert isinstance(loader.dataset, StreamedShards)
    batches = [pixels for pixels, _ in loader]
    assert len(batches) == imagenet.count_steps(loader, place)
    return [image.numpy().tobytes() for pixels in batches for image in pixels]


# Without an index


@pytest.mark.slow
def test_shards_without_an_index_train_and_validate_on_every_image_once(
    bare: Path,
    train: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = train("auto", "--stream", "--epochs", "2", data=bare)
    told = train("told", "--stream", "--epochs", "2", "--dataset", "webdataset", data=bare)

    for output in (found, told):
        epochs = read_log(output, "epoch")
        assert [epoch["train"]["num_images"] for epoch in epochs] == [3 * NUM_TRAIN] * 2
        assert [epoch["val"]["num_images"] for epoch in epochs] == [3 * NUM_VAL] * 2
    assert losses_of(found) == losses_of(told)
    classes = load(found / "checkpoint.pth.tar")["classes"]
    assert classes == ["class0", "class1", "class2"]
    said = capfd.readouterr().out
    assert "Epoch: [0] [1/5] " in said  # 36 images in batches of 8, as metadata.json says
    assert "ETA ?" not in said


@pytest.mark.slow
def test_what_nobody_says_of_the_shards_is_asked_for(
    bare: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (bare / "metadata.json").unlink()

    assert "which classes there are; give their number by --classes" in refusal(
        capfd, bare, tmp_path / "run", "--stream"
    )
    flags = ["--stream", "--classes", "3", "--epochs", "1"]
    for smooth in (["--scheduler", "cosine"], ["--warmup-epochs", "1"]):
        error = refusal(capfd, bare, tmp_path / "run", *flags, *smooth)
        assert "the rate changes within an epoch" in error
        assert "give --epoch-images" in error
    output = train("run", *flags, data=bare)
    said = capfd.readouterr().out
    assert "Epoch: [0] [1/?] " in said
    assert "ETA ?" in said
    told = train("told", *flags, "--scheduler", "cosine", "--epoch-images", "36", data=bare)
    assert "Epoch: [0] [1/5] " in capfd.readouterr().out
    for each in (output, told):
        (epoch,) = read_log(each, "epoch")
        assert epoch["train"]["num_images"] == 3 * NUM_TRAIN
        assert epoch["val"]["num_images"] == 3 * NUM_VAL


def test_shards_in_a_folder_of_their_split_are_found(bare: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for number, path in enumerate(sorted(bare.glob(f"{split}-*.tar"))):
            path.rename(root / split / f"{number:06}.tar")
    args = imagenet.parse_arguments([str(root), "--stream", "--seed", "3", "--no-accel"])

    for split, count in (("train", 3 * NUM_TRAIN), ("val", 3 * NUM_VAL)):
        assert len(list(imagenet.open_split(args, split))) == count


@pytest.mark.slow
def test_shards_of_a_bucket_without_an_index_are_streamed_through_the_cache(
    bare: Path,
    train: Callable[..., Path],
    object_server: ObjectServer,
    tmp_path: Path,
) -> None:
    object_server.put_folder("sets", bare, prefix="p/")
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    reach = ["--endpoint-url", object_server.endpoint_url]
    reach += ["--s3-credential-file", str(tmp_path / "keys.json")]
    flags = ["--stream", "--epochs", "1"]

    local = train("local", *flags, data=bare)
    remote = train("remote", *flags, *reach, data="s3://sets/p")
    cached = ["--cache-dir", str(tmp_path / "cache"), "--cache-limit", "0.1"]
    for loader in ("ours", "torch"):
        object_server.reset_counters()
        again = train(loader, *flags, *reach, *cached, "--loader", loader, data="s3://sets/p")
        assert losses_of(again) == losses_of(remote) == losses_of(local)
    gets = object_server.counters(by_key=True).num_gets_by_key
    assert not [key for key in gets if key.endswith(".tar")]


def test_validation_alone_streams_shards_without_an_index(
    bare: Path, train: Callable[..., Path]
) -> None:
    output = train("run", "--stream", "--evaluate", "-j", "0", data=bare)

    (tested,) = read_log(output, "evaluate")
    assert tested["num_images"] == 3 * NUM_VAL


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*some workers idle")
def test_processes_share_whole_shards_and_wait_for_each_other(bare: Path, tmp_path: Path) -> None:
    """20 images and 16: 3 steps and 2, which would wait for ever without `Join`."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    job = [str(bare), *small_job(tmp_path / "ranks"), "--stream", "--epochs", "2", "-b", "16"]

    with start(*torchrun, "imagenet.py", *job) as ranks:
        finish(ranks)

    epochs = read_log(tmp_path / "ranks", "epoch")
    assert [epoch["train"]["num_images"] for epoch in epochs] == [3 * NUM_TRAIN] * 2
    assert [epoch["val"]["num_images"] for epoch in epochs] == [3 * NUM_VAL] * 2


def test_without_stream_an_index_is_asked_for_and_stream_is_named(
    bare: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It advised StreamedShards, which --stream is."""
    error = refusal(capfd, bare, tmp_path / "run")

    command = f"concurrent-dataloader index {bare} --output {bare / 'train-index.npz'}"
    assert f"without an index of byte ranges; write it once with `{command}`" in error
    assert "; or give --stream, which needs none" in error
    assert "StreamedShards" not in error


# Nodes with shards of their own


@pytest.mark.parametrize(("num_nodes", "num_local"), [(2, 1), (2, 4), (4, 1), (3, 1)])
def test_all_instances_together_train_on_each_image_once(
    shards: Path, num_nodes: int, num_local: int
) -> None:
    assert pack(["distribute", str(shards), "-n", str(num_nodes)]) == 0
    args, dataset = open_images(shards, "--instances")
    whole = sorted(dataset[at][0].numpy().tobytes() for at in range(len(dataset)))

    got = [
        read_epoch(args, dataset, place_of(node, num_nodes, local, num_local))
        for node, local in itertools.product(range(num_nodes), range(num_local))
    ]

    assert sorted(itertools.chain(*got)) == whole
    assert len(set(whole)) == 3 * NUM_TRAIN


def test_a_node_reads_none_of_the_shards_of_another(shards: Path) -> None:
    assert pack(["distribute", str(shards), "-n", "2"]) == 0
    args, dataset = open_images(shards, "--instances")

    own = [open_stream(args, dataset, place_of(n, 2, 0, 1), 4) for n in range(2)]

    names = [set(stream._shards.keys) for stream in own]
    assert names == [
        {f"train-00000{n}.tar", f"distributed/2-instances/train-00000{n}.tar"} for n in range(2)
    ]


def test_without_parts_the_first_process_says_how_many_images_are_skipped(shards: Path) -> None:
    args, dataset = open_images(shards, "--instances")

    with pytest.warns(UserWarning, match=r"6 samples of the last 1 of 4 shards are skipped by all"):
        first = open_stream(args, dataset, place_of(0, 3, 0, 1), 4)
    others = [open_stream(args, dataset, place_of(n, 3, 0, 1), 4) for n in (1, 2)]

    assert [len(stream) for stream in (first, *others)] == [10, 10, 10]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_percentage_is_the_same_on_all_instances_and_in_each_epoch(
    shards: Path, num_nodes: int
) -> None:
    flags = ["--percentage", "30", *(["--instances"] if num_nodes > 1 else [])]
    args, dataset = open_images(shards, *flags)

    epochs: list[list[bytes]] = []
    for epoch in range(2):
        got: list[bytes] = []
        for node in range(num_nodes):
            place = place_of(node, num_nodes, 0, 1)
            loader = imagenet.make_loader(args, dataset, place, is_train=True)
            imagenet.set_epoch(loader, epoch)
            got += [image.numpy().tobytes() for pixels, _ in loader for image in pixels]
        epochs.append(got)

    wanted = [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert sorted(epochs[0]) == sorted(dataset[at][0].numpy().tobytes() for at in wanted)
    assert epochs[0] != epochs[1]


@pytest.mark.slow
@pytest.mark.parametrize("is_distributed", [True, pytest.param(False, marks=pytest.mark.grid)])
def test_two_nodes_under_torchrun_train_and_validate_on_each_image_once(
    is_distributed: bool, shards: Path, tmp_path: Path
) -> None:
    """Without parts, which 4 shards do not need, one node has 20 images and the other 16."""
    if is_distributed:
        assert pack(["distribute", str(shards), "-n", "2", "--split", "train"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    nodes += ["--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"]
    num_epochs = 1 if is_distributed else 2
    job = [str(shards), *small_job(tmp_path / "run"), "--stream", "--instances"]
    job += ["--epochs", str(num_epochs)]

    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(start(*nodes, str(node), "imagenet.py", *job)) for node in range(2)
        ]
        said = [finish(node) for node in running]

    epochs = read_log(tmp_path / "run", "epoch")
    assert [epoch["train"]["num_images"] for epoch in epochs] == [3 * NUM_TRAIN] * num_epochs
    assert [epoch["val"]["num_images"] for epoch in epochs] == [3 * NUM_VAL] * num_epochs
    assert "Epoch: [0] [1/3] " in said[0]  # 18 or 20 images in batches of 8
    assert "skipped by all" not in "".join(said)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--instances", "argument --instances: is for streams of shards, expected --stream"),
        ("--percentage 20", "argument --percentage: is for streams of shards, expected --stream"),
        ("--epoch-images 9", "argument --epoch-images: is for streams of shards, expected"),
        ("--stream --percentage 0", "argument --percentage: got '0', expected more than 0, and at"),
        ("--stream --percentage 101", "argument --percentage: got '101', expected more than 0"),
        ("--stream --instances", "--instances, --percentage: the shards have no index, which"),
        ("--stream --percentage 9", "--instances, --percentage: the shards have no index, which"),
        ("--stream --epoch-images 9", "length: got 9, expected 36, as metadata.json says"),
        ("--stream --classes 2", "--classes: got 2, but the data have 3"),
        ("--stream --classes-file c.json", "--classes-file: c.json: labels are those in the"),
    ],
)
def test_what_does_not_go_together_is_refused(
    flags: str, text: str, bare: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"class0": 0}))

    assert text in refusal(capfd, bare, tmp_path / "run", *flags.split())


def test_processes_with_different_numbers_of_batches_save_no_middle(shards: Path) -> None:
    args, dataset = open_images(shards, "--instances", "--checkpoint-steps", "2")

    with pytest.raises(ValueError, match="--checkpoint-steps: processes that have different"):
        imagenet.make_loader(args, dataset, place_of(0, 2, 0, 1), is_train=True)
    imagenet.make_loader(args, dataset, place_of(0, 1, 0, 1), is_train=True)


def test_processes_without_a_shard_are_refused_before_training(bare: Path) -> None:
    args, dataset = open_images(bare)
    val = imagenet.open_split(args, "val")
    place = place_of(0, 3, 0, 1)

    imagenet.make_loader(args, dataset, place, is_train=True)
    with pytest.raises(ValueError, match="--stream: got 2 shards without an index for 3 proc"):
        imagenet.make_loader(args, val, place, is_train=False)


def test_parts_of_shards_that_were_packed_anew_are_refused(
    shards: Path, image_folder: Path
) -> None:
    assert pack(["distribute", str(shards), "-n", "2"]) == 0
    flags = ["--splits", "train,val", "--maxcount", "9", "--overwrite"]
    assert pack(["shard", str(image_folder), str(shards), *flags]) == 0
    args, dataset = open_images(shards, "--instances")

    with pytest.raises(ShardFormatError, match=r"out of date, .*concurrent-dataloader distribute"):
        imagenet.make_loader(args, dataset, place_of(0, 2, 0, 1), is_train=True)
    imagenet.make_loader(args, dataset, place_of(0, 4, 0, 1), is_train=True)


@pytest.mark.parametrize("is_counted", [True, False])
def test_an_epoch_without_an_index_goes_on_in_the_middle(bare: Path, is_counted: bool) -> None:
    if not is_counted:
        (bare / "metadata.json").unlink()
    place = place_of(0, 1, 0, 1)

    def make() -> tuple[imagenet.Args, Any]:
        args, dataset = open_images(bare)
        return args, imagenet.make_loader(args, dataset, place, is_train=True)

    def read(loader: Any, num_batches: int | None = None) -> list[int]:
        imagenet.set_epoch(loader, 1)
        batches = itertools.islice(loader, num_batches)
        return [label for _, labels in batches for label in labels.tolist()]

    whole = read(make()[1])
    _, loader = make()
    taken = read(loader, 4)
    num_steps = imagenet.count_steps(loader, place)
    middle = {"step": 4, "num_steps": num_steps, "loaders": [loader.state_dict()]}
    loader.close()

    args, resumed = make()
    num_done, _ = go_on_in_epoch(args, place, resumed, middle)

    assert num_done == 4
    assert num_steps == (9 if is_counted else None)
    assert taken + read(resumed) == whole
    assert len(whole) == 3 * NUM_TRAIN
