from __future__ import annotations

import itertools
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from concurrent_dataloader.errors import SampleDecodeError
from concurrent_dataloader.imagenet_loader import ImagenetLoader, Loader
from concurrent_dataloader.prepare.lmdb import write_lmdb
from tests.datasets.conftest import encode_image
from tests.prepare.listed_source import ListedSource

NUM_RECORDS = 45  # not a multiple of the batch size

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Databases whose records hold their numbers; train and val differ in length."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", NUM_RECORDS), ("val", 10)):
        payloads = [number.to_bytes(4, "big") for number in range(count)]
        write_lmdb(
            ListedSource(payloads), folder / f"ILSVRC-{split}.lmdb", split=split, order="list"
        )
    return folder


def to_number(raw: Any) -> int:
    return int.from_bytes(raw, "big")


def to_size(raw: Any) -> int:
    return len(raw)


def loader_of(root: Path, mode: str = "train", **settings: Any) -> ImagenetLoader:
    chosen: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "cache": 9, **settings}
    return ImagenetLoader(mode, root=root, decode=to_number, **chosen)


def numbers_of(loader: ImagenetLoader) -> list[list[int]]:
    return [numbers.tolist() for numbers, _ in loader]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_b_01_b_08_the_length_is_true_and_the_last_batch_is_kept(
    root: Path, num_workers: int, drop_last: bool
) -> None:
    loader = loader_of(root, num_workers=num_workers, drop_last=drop_last)

    batches = numbers_of(loader)

    assert len(batches) == len(loader) == (11 if drop_last else 12)
    assert [len(batch) for batch in batches] == [4] * 11 + [1] * (not drop_last)
    assert len(set(itertools.chain(*batches))) == (44 if drop_last else 45)


def test_batches_are_the_same_for_any_number_of_workers(root: Path) -> None:
    epochs = [
        [numbers_of(loader) for _ in range(2)]
        for loader in (loader_of(root, num_workers=n) for n in (0, 1, 2, 3))
    ]

    assert all(epoch == epochs[0] for epoch in epochs)
    assert epochs[0][0] != epochs[0][1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_b_02_validation_sees_exactly_the_set_each_time(root: Path, num_workers: int) -> None:
    loader = loader_of(root, "val", num_workers=num_workers)

    epochs = [numbers_of(loader) for _ in range(3)]

    assert epochs == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 3


def test_b_05_without_shuffling_the_order_is_that_of_the_keys(root: Path) -> None:
    loader = loader_of(root, shuffle=False, num_workers=3)

    assert list(itertools.chain(*numbers_of(loader))) == list(range(NUM_RECORDS))


def test_b_02_an_epoch_that_is_left_early_does_not_shift_the_next(root: Path) -> None:
    left, whole = loader_of(root, num_workers=2), loader_of(root)

    for _ in left:
        break
    numbers_of(whole)

    assert numbers_of(left) == numbers_of(whole)


def test_workers_that_persist_hear_of_the_next_epoch(root: Path) -> None:
    persistent = loader_of(root, num_workers=2, persistent_workers=True)
    fresh = loader_of(root)

    assert [numbers_of(persistent) for _ in range(3)] == [numbers_of(fresh) for _ in range(3)]


def test_a_resumed_run_has_the_epochs_that_it_would_have_had(root: Path) -> None:
    whole, resumed = loader_of(root), loader_of(root)
    epochs = [numbers_of(whole) for _ in range(3)]

    resumed.set_epoch(2)

    assert numbers_of(resumed) == epochs[2]


def fail_at_7(number: int) -> int:
    if number == 7:
        raise RuntimeError("no sevens")
    return number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_b_04_an_error_of_a_transform_arrives_with_the_record(root: Path, num_workers: int) -> None:
    loader = loader_of(root, num_workers=num_workers, transform=fail_at_7)

    with pytest.raises(RuntimeError, match="no sevens") as caught:
        numbers_of(loader)
    assert "record 7" in str([caught.value, getattr(caught.value, "__notes__", None)])


def test_b_04_a_corrupt_image_arrives_with_its_name(tmp_path: Path) -> None:
    raws = [encode_image(number) for number in range(9)]
    raws[5] = raws[5][:200]
    write_lmdb(ListedSource(raws), tmp_path / "x.lmdb", split="val", order="list")

    with pytest.raises(SampleDecodeError, match=r"record 5 \('c/5\.jpg'\)"):
        list(ImagenetLoader("val", path=tmp_path / "x.lmdb", batch_size=2, num_workers=2))


def die_at_7(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_that_is_killed_is_an_error(root: Path) -> None:
    loader = loader_of(root, num_workers=2, transform=die_at_7)

    with pytest.raises(RuntimeError, match="worker"):
        numbers_of(loader)


def test_the_call_of_the_older_readme_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        raws = [encode_image(number) for number in range(5)]
        write_lmdb(ListedSource(raws), tmp_path / f"ILSVRC-{split}.lmdb", split=split, order="list")
    monkeypatch.setenv("IMAGENET", str(tmp_path))

    train_loader = Loader("train", batch_size=2, num_workers=2)
    val_loader = ImagenetLoader("val", batch_size=5, num_workers=0)

    assert [tuple(images.shape) for images, _ in train_loader] == [(2, 3, 224, 224)] * 2 + [
        (1, 3, 224, 224)
    ]
    images, labels = next(iter(val_loader))
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert Loader is ImagenetLoader


def test_without_a_folder_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET", raising=False)

    with pytest.raises(ValueError, match=r"IMAGENET is not set; expected the folder of ILSVRC-val"):
        ImagenetLoader("val")


def test_a_database_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ILSVRC-test\.lmdb: no such LMDB database"):
        ImagenetLoader("test", root=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_cuda_without_a_device_is_refused_at_once(root: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        loader_of(root, cuda=True)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # torch's, without a device
@pytest.mark.parametrize("num_workers", [0, 2])
def test_b_08_pin_memory_is_passed_on_with_what_else_the_older_readme_names(
    root: Path, num_workers: int
) -> None:
    named: dict[str, Any] = {
        "transform": None,
        "batch_size": 4,
        "shuffle": False,
        "num_workers": num_workers,
        "cache": 9,
        "collate_fn": None,
        "drop_last": True,
        "cuda": False,
    }
    pinned = Loader("val", root=root, decode=to_number, pin_memory=True, **named)
    plain = Loader("val", root=root, decode=to_number, **named)

    assert pinned.loader.pin_memory
    assert not plain.loader.pin_memory
    assert (pinned.loader.num_workers, pinned.loader.drop_last) == (num_workers, True)
    assert numbers_of(pinned) == numbers_of(plain) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no device")
def test_b_08_batches_are_pinned_if_asked_for(root: Path) -> None:
    for numbers, labels in loader_of(root, "val", pin_memory=True, num_workers=2):
        assert numbers.is_pinned()
        assert labels.is_pinned()
    assert not next(iter(loader_of(root, "val")))[0].is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no device")
def test_batches_lie_on_the_device_if_asked_for(root: Path) -> None:
    numbers, labels = next(iter(loader_of(root, "val", cuda=True)))

    assert numbers.device.type == labels.device.type == "cuda"
    assert numbers.tolist() == [0, 1, 2, 3]


def as_is(samples: list[Any]) -> list[Any]:
    return samples


def test_a_collate_function_gets_the_samples(root: Path) -> None:
    loader = loader_of(root, "val", collate_fn=as_is)

    assert next(iter(loader)) == [(0, 0), (1, 1), (2, 2), (3, 0)]


def test_b_06_ranks_have_equally_many_batches_and_miss_nothing(root: Path) -> None:
    ranks = [loader_of(root, rank=rank, world_size=4, num_workers=2) for rank in range(4)]

    batches = [numbers_of(rank) for rank in ranks]

    assert {len(rank) for rank in ranks} == {len(rank) for rank in batches} == {3}
    assert set(itertools.chain(*itertools.chain(*batches))) == set(range(NUM_RECORDS))


def test_b_06_half_of_the_world_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="rank, world_size: got 1 and None, expected both"):
        loader_of(root, rank=1)


def test_b_13_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    write_lmdb(
        ListedSource([bytes(100_000)] * 50), tmp_path / "x.lmdb", split="train", order="list"
    )
    loader = ImagenetLoader(
        "train", path=tmp_path / "x.lmdb", decode=to_size, batch_size=5, num_workers=0, cache=10
    )
    for _ in range(5):
        list(loader)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(50):
        list(loader)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 1024  # KiB
