"""Shards by a path or URL: the index beside them, and whether it is theirs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data
from torchvision.transforms.functional import pil_to_tensor

from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.datasets import (
    ShardDataset,
    StreamedShards,
    open_dataset,
    open_shards,
)
from concurrent_dataloader.errors import (
    IndexFormatError,
    KeyNotFoundError,
    MissingIndexError,
    ShardFormatError,
)
from concurrent_dataloader.formats.image import decode_image
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.conftest import IMAGES
from tests.datasets.shard_doubles import pack_tars

JPEGS = [raw for key, raw in IMAGES.items() if key.lower().endswith((".jpg", ".jpeg"))]


def write_split(root: Path, split: str, num_samples: int = 5, folder: str = "") -> Path:
    """Write shards of two samples each, and their index."""
    samples = [
        (f"{split}/{number}", {"jpg": JPEGS[number % len(JPEGS)], "cls": b"%d" % number})
        for number in range(num_samples)
    ]
    shards = {
        f"{split}-{first // 2:06}.tar": samples[first : first + 2]
        for first in range(0, num_samples, 2)
    }
    bodies, index = pack_tars(shards)
    target = root / folder
    target.mkdir(parents=True, exist_ok=True)
    for name, body in bodies.items():
        (target / name).write_bytes(body)
    index.save(target / f"{split}-index.npz")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with train and val shards."""
    write_split(tmp_path, "val", 3)
    return write_split(tmp_path, "train")


@pytest.fixture
def reach(object_server: ObjectServer, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "credentials.json"
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    file.write_text(json.dumps(keys))
    return {"s3_credential_file": file, "endpoint_url": object_server.endpoint_url}


def labels_of(dataset: ShardDataset) -> list[int | None]:
    return [dataset.label(position) for position in range(len(dataset))]


def test_w_02_counts_are_those_of_what_is_there(root: Path) -> None:
    """W-01, W-02: numbers of shards and samples were written into the program."""
    assert len(open_shards(root)) == 5
    assert len(open_shards(root, split="val")) == 3
    assert len(open_shards(str(root / "val-index.npz"))) == 3
    assert len(open_shards(root.as_uri(), split="train", limit=2)) == 2


def test_shards_are_chosen_by_brace_range_and_glob(root: Path) -> None:
    some = open_shards(f"{root}/train-{{000001..000002}}.tar")
    one = open_shards(f"{root}/val-*0.tar")

    assert labels_of(some) == [2, 3, 4]
    assert labels_of(one) == [0, 1]
    assert some[0][0].tobytes() == decode_image(JPEGS[2]).tobytes()


def test_w_01_a_shard_that_does_not_exist_is_named_before_training_starts(root: Path) -> None:
    """W-01: {000000..000490} named one shard too many, and training ended at its file."""
    with pytest.raises(KeyNotFoundError, match=r"train-000003.tar: no such shard in .*has 3, "):
        open_shards(f"{root}/train-{{000000..000003}}.tar")
    (root / "train-000001.tar").unlink()
    with pytest.raises(
        KeyNotFoundError, match=r"train-000001.tar: no such shard, one of 1 missing"
    ):
        open_shards(root)
    assert len(open_shards(root, check=False)) == 5


def test_a_shard_of_another_size_is_named(root: Path) -> None:
    with (root / "train-000002.tar").open("ab") as file:
        file.write(bytes(512))

    with pytest.raises(ShardFormatError, match=r"train-000002.tar: got \d+ bytes, expected \d+ as"):
        open_shards(root)


def test_metadata_of_another_run_is_an_error(root: Path) -> None:
    metadata = root / "metadata.json"

    metadata.write_text(json.dumps({"train_length": 5, "validation_length": 3}))
    assert len(open_shards(root)) == 5
    metadata.write_text(json.dumps({"train_length": 6, "validation_length": 3}))
    assert len(open_shards(root, split="val")) == 3
    with pytest.raises(IndexFormatError, match=r"metadata.json: says 6 samples of 'train', but"):
        open_shards(root)
    metadata.write_text(json.dumps({"splits": {"train": {"num_samples": 4}}}))
    with pytest.raises(IndexFormatError, match="says 4 samples"):
        open_shards(root)
    metadata.write_text("{")
    with pytest.raises(IndexFormatError, match=r"metadata.json: no metadata of shards"):
        open_shards(root)


def test_raw_pixels_have_the_size_that_the_metadata_record(tmp_path: Path) -> None:
    bodies, index = pack_tars({"train-0.tar": [("a", {"rgb": bytes(2 * 6 * 3)})]})
    (tmp_path / "train-0.tar").write_bytes(bodies["train-0.tar"])
    index.save(tmp_path / "train-index.npz")
    described = {"train": {"num_samples": 1, "image_size": [2, 6]}}
    (tmp_path / "metadata.json").write_text(json.dumps({"splits": described}))

    assert open_shards(tmp_path)[0][0].size == (6, 2)


def test_splits_may_have_folders_of_their_own(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 4, folder="train")
    write_split(tmp_path, "val", 2, folder="val")

    assert labels_of(open_shards(tmp_path)) == [0, 1, 2, 3]
    assert labels_of(open_shards(tmp_path, split="val")) == [0, 1]
    assert open_shards(tmp_path, split="val")[1][0].mode == "RGB"


def test_what_has_no_index_says_how_to_make_one(root: Path) -> None:
    (root / "train-index.npz").unlink()

    with pytest.raises(KeyNotFoundError, match=r"shards such as train-.* without an index"):
        open_shards(root, split="train")
    with pytest.raises(KeyNotFoundError, match=r"no index of split 'test' among val-index.npz"):
        open_shards(root, split="test")
    (root / "val-index.npz").unlink()
    with pytest.raises(KeyNotFoundError, match=r"concurrent-dataloader index .*train-index.npz"):
        open_shards(root)
    for path in root.glob("*.tar"):
        path.rename(f"{path}.gz")
    with pytest.raises(KeyNotFoundError, match=r"compressed tars, .* convert them .*\nStreamed"):
        open_shards(root)


def run_command_of(error: pytest.ExceptionInfo[KeyNotFoundError]) -> None:
    """Run the command that a message names, as a user would."""
    found = re.search(r"`concurrent-dataloader (.*?)`", str(error.value))
    assert found is not None, f"{error.value} names no command"
    assert main(shlex.split(found[1])) == 0


@pytest.mark.parametrize("folders", [False, True], ids=["side by side", "a folder each"])
def test_the_command_that_is_named_makes_the_missing_index(tmp_path: Path, folders: bool) -> None:
    root = tmp_path / "two words"
    for split, count in (("train", 5), ("val", 3)):
        write_split(root, split, count, folder=split if folders else "")
    for index in root.rglob("*.npz"):
        index.unlink()

    with pytest.raises(KeyNotFoundError, match="without an index") as error:
        open_dataset(root)
    run_command_of(error)

    assert len(open_dataset(root)) == 5
    (root / "train" / "train-index.npz" if folders else root / "train-index.npz").unlink()
    with pytest.raises(KeyNotFoundError, match="without an index") as error:
        open_dataset(root, split="val")
    run_command_of(error)
    assert len(open_dataset(root, split="val")) == 3


def test_an_index_on_this_machine_serves_shards_elsewhere(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "indexes"
    elsewhere.mkdir()
    (root / "train-index.npz").rename(elsewhere / "i.npz")

    assert len(open_shards(root, index_file=elsewhere / "i.npz")) == 5
    with pytest.raises(FileNotFoundError, match=r"j.npz: no such index of shards"):
        open_shards(root, index_file=elsewhere / "j.npz")


def test_a_classes_file_renames_the_classes(tmp_path: Path) -> None:
    samples = [("x", {"jpg": JPEGS[0], "cls": b"0"}), ("y", {"jpg": JPEGS[0], "cls": b"1"})]
    bodies, index = pack_tars({"train-0.tar": samples}, classes=["cat", "dog"])
    (tmp_path / "train-0.tar").write_bytes(bodies["train-0.tar"])
    index.save(tmp_path / "train-index.npz")
    classes = tmp_path / "classes.json"
    classes.write_text('{"dog": {"id": 0, "name": "Hund"}, "cat": {"id": 1, "name": "Katze"}}')

    dataset = open_shards(tmp_path, classes_file=classes)

    assert labels_of(dataset) == [1, 0]
    assert dataset.classes is not None
    assert dataset.classes.name(1) == "Katze"


# Remote


def test_a_bucket_has_the_items_of_the_folder(
    root: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    object_server.put_folder("sets", root, prefix="p/")
    local = open_shards(root)
    object_server.reset_counters()

    remote = open_shards("s3://sets/p", **reach)
    num_requests = object_server.counters().num_requests
    items = [remote[position] for position in range(5)]

    assert num_requests <= 4, "two listings, the index and metadata.json"
    assert [label for _, label in items] == labels_of(local)
    for (image, _), (expected, _) in zip(items, (local[i] for i in range(5)), strict=True):
        assert image.tobytes() == expected.tobytes()
    assert object_server.counters().num_requests == num_requests + 5
    assert labels_of(open_shards("s3://sets/p/val-{000000..000001}.tar", **reach)) == [0, 1, 2]
    assert labels_of(open_shards("s3://sets/p/val-index.npz", **reach)) == [0, 1, 2]


def test_workers_forked_after_the_listing_read_what_torch_reads(
    root: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    object_server.put_folder("sets", root, prefix="p/")
    dataset = open_shards("s3://sets/p", transform=pil_to_tensor, **reach)
    first = dataset[0][0]  # the parent has read, too

    def epoch(loader_class: Any) -> list[Any]:
        torch.manual_seed(5)
        loader = loader_class(
            dataset, batch_size=2, shuffle=True, num_workers=2, multiprocessing_context="fork"
        )
        return list(loader)

    ours, torchs = epoch(DataLoader), epoch(torch.utils.data.DataLoader)

    assert torch.equal(first, pil_to_tensor(decode_image(JPEGS[0])))
    for mine, theirs in zip(ours, torchs, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_a_shard_missing_in_the_bucket_is_named(
    root: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    (root / "train-000001.tar").unlink()
    object_server.put_folder("sets", root, prefix="p/")

    with pytest.raises(KeyNotFoundError, match=r"s3://sets/p/train-000001.tar: no such shard"):
        open_shards("s3://sets/p/", **reach)


def test_an_index_beyond_the_first_page_of_a_bucket_is_found(
    root: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    object_server.put_objects("sets", {f"p/a/{number:05}.jpg": b"" for number in range(1100)})
    object_server.put_folder("sets", root, prefix="p/")

    assert len(open_shards("s3://sets/p", split="val", **reach)) == 3


def test_a_plain_web_server_is_asked_for_the_usual_names(
    root: Path, object_server: ObjectServer
) -> None:
    object_server.create_bucket("open", public=True)
    object_server.put_folder("open", root)
    url = f"{object_server.endpoint_url}/open"

    assert open_shards(url)[4][1] == 4
    assert labels_of(open_shards(f"{url}/val-{{000000..000000}}.tar")) == [0, 1]
    with pytest.raises(KeyNotFoundError, match=r"no index of shards, looked for test-index.npz"):
        open_shards(url, split="test")
    with pytest.raises(ValueError, match="cannot be listed"):
        open_shards(f"{url}/val-*.tar")


def test_the_command_that_is_named_makes_the_missing_index_of_a_bucket(
    root: Path,
    object_server: ObjectServer,
    reach: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for index in root.glob("*.npz"):
        index.unlink()
    object_server.put_folder("sets", root, prefix="p/")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    with pytest.raises(KeyNotFoundError, match="reads all of them") as error:
        open_dataset("s3://sets/p", **reach)
    run_command_of(error)

    assert len(open_dataset("s3://sets/p", **reach)) == 5


def test_the_command_that_is_named_makes_the_missing_index_of_a_web_server(
    root: Path,
    object_server: ObjectServer,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for index in root.glob("*.npz"):
        index.unlink()
    object_server.create_bucket("open", public=True)
    object_server.put_folder("open", root)
    shards = f"{object_server.endpoint_url}/open/train-{{000000..000002}}.tar"
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    with pytest.raises(KeyNotFoundError, match=r"pass index_file='train-index.npz'") as error:
        open_dataset(shards)
    run_command_of(error)

    assert len(open_dataset(shards, index_file="train-index.npz")) == 5


@pytest.mark.parametrize("source", ["", "train-*.tar", "train-{000000..000001}.tar", "inner"])
def test_shards_without_an_index_are_told_by_where_they_can_be_streamed(
    source: str, root: Path, object_server: ObjectServer, reach: dict[str, Any]
) -> None:
    if source == "inner":
        write_split(root / "inner", "train", folder="train")
    for index in root.rglob("*.npz"):
        index.unlink()
    object_server.put_folder("sets", root, prefix="p/")
    expected = [0, 1, 2, 3] if "{" in source else [0, 1, 2, 3, 4]

    for place, settings in ((str(root), {}), ("s3://sets/p", reach)):
        with pytest.raises(MissingIndexError) as caught:
            open_shards(f"{place}/{source}", split="train", **settings)
        settings = dict(settings)
        credentials = settings.pop("s3_credential_file", None)
        location = caught.value.location
        stream = StreamedShards(
            location, split="train", decode=None, credentials=credentials, **settings
        )
        assert [label for _, label in stream] == expected
