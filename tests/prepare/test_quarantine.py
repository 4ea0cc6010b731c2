"""A loader writes bad samples down, and ``validate --from`` looks at them again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

from concurrent_dataloader import DataLoader, S3Dataset, ScratchDataset, ShardDataset, open_store
from concurrent_dataloader.datasets.contract import BytesKind
from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.samples import SampleKind, read_report
from concurrent_dataloader.shard_index import Shard, ShardIndex, ShardIndexBuilder
from concurrent_dataloader.stores import RetryPolicy
from concurrent_dataloader.testing import Fault, ObjectServer


def encode_image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def fill_folder(folder: Path) -> Path:
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            (folder / name / f"{number}.jpg").write_bytes(encode_image(number))
    return folder


def read_epoch(dataset: Any, path: Path, num_epochs: int = 1) -> list[dict[str, Any]]:
    """Read epochs, and give the lines of the quarantine file."""
    loader = DataLoader(
        dataset, 4, num_workers=1, collate_fn=len, on_error="skip", quarantine_file=path
    )
    for _ in range(num_epochs):
        list(loader)
    return [json.loads(line) for line in path.read_text().splitlines()]


def validate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["validate", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_files_are_checked_again_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill_folder(tmp_path / "photos")
    whole = (folder / "ant/2.jpg").read_bytes()
    (folder / "ant/2.jpg").write_bytes(whole[: len(whole) // 2])
    dataset = ScratchDataset(folder)
    (folder / "bee/4.jpg").rename(tmp_path / "hidden.jpg")
    quarantine = tmp_path / "quarantine.jsonl"

    lines = read_epoch(dataset, quarantine, num_epochs=2)

    assert [(line["epoch"], line["key"], line["error_type"]) for line in lines] == [
        (epoch, *what)
        for epoch in (0, 1)
        for what in (("ant/2.jpg", "SampleDecodeError"), ("bee/4.jpg", "KeyNotFoundError"))
    ]
    status, said = validate(capsys, folder, "--from", quarantine)
    assert status == 1
    assert sorted(line.partition(":")[0] for line in said.splitlines()[:-1]) == [
        "ant/2.jpg",
        "bee/4.jpg",
    ]
    (folder / "ant/2.jpg").write_bytes(whole)
    (tmp_path / "hidden.jpg").rename(folder / "bee/4.jpg")
    (folder / "ant/3.jpg").write_bytes(b"no image, but no line says so")
    status, said = validate(capsys, folder, "--from", quarantine)
    assert status == 0
    assert "OK (2 files, 2 samples" in said


def test_objects_of_a_bucket_are_checked_again_and_attempts_are_written_down(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    object_server: ObjectServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    object_server.put_folder("photos", fill_folder(tmp_path / "photos"), prefix="train/")
    retry = RetryPolicy(max_attempts=3, first_wait_s=0.001)
    dataset = S3Dataset("photos", prefix="train", retry=retry)
    object_server.set_faults([Fault("internal_error", key_pattern="bee/1")])
    quarantine = tmp_path / "quarantine.jsonl"

    (line,) = read_epoch(dataset, quarantine)

    assert (line["key"], line["range"], line["attempts"]) == ("bee/1.jpg", None, 3)
    assert line["elapsed_s"] > 0
    assert object_server.secret_key not in quarantine.read_text()
    assert validate(capsys, "s3://photos/train", "--from", quarantine)[0] == 1
    object_server.set_faults([])
    assert validate(capsys, "s3://photos/train", "--from", quarantine)[0] == 0


def write_shards(folder: Path) -> ShardIndex:
    """Two shards of six samples; the third of the second one is no image."""
    folder.mkdir()
    builder = ShardIndexBuilder("tar")
    for number in range(2):
        file = io.BytesIO()
        writer = TarWriter(file)
        for place in range(6):
            raw = b"no image" if (number, place) == (1, 2) else encode_image(place)
            found = writer.write(f"{number}{place}", {"jpg": raw, "cls": b"%d" % place})
            builder.add_sample(f"{found.key}.jpg", found.extent, found.members["jpg"].data, place)
        crc32c = writer.close().tar
        (folder / f"train-{number}.tar").write_bytes(file.getvalue())
        builder.add_shard(Shard(f"train-{number}.tar", writer.size_bytes, crc32c=crc32c))
    return builder.build()


@pytest.mark.parametrize(
    ("fields", "decode", "kind"),
    [
        (None, "pillow", "payload"),
        (("jpg", "cls"), "pillow", "tar"),
        (None, "own", "bytes"),
    ],
)
def test_byte_ranges_of_shards_are_checked_again(
    fields: Any, decode: Any, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    index = write_shards(folder)
    if decode == "own":
        decode = refuse_what_is_no_image
    dataset = ShardDataset(index, open_store(str(folder)), fields=fields, decode=decode)
    quarantine = tmp_path / "quarantine.jsonl"

    (line,) = read_epoch(dataset, quarantine)

    byte_range = index.payload(8) if fields is None else index.extent(8)
    assert (line["key"], line["range"]) == ("train-1.tar", list(byte_range))
    assert (line["sample"], line["kind"], line["position"]) == ("12", kind, 8)
    status, said = validate(capsys, folder, "--from", quarantine)
    if kind == "bytes":  # which the command cannot decode; it can read them
        assert status == 0
        (folder / "train-1.tar").write_bytes((folder / "train-1.tar").read_bytes()[:100])
        assert validate(capsys, folder, "--from", quarantine)[0] == 1
        return
    assert status == 1
    assert said.startswith(f"train-1.tar [{byte_range.start}, {byte_range.stop}) sample '12': ")
    shard = (folder / "train-1.tar").read_bytes()
    (folder / "train-1.tar").write_bytes(
        shard.replace(b"no image" + bytes(504), encode_image(0)[:512].ljust(512, b"\0"))
    )
    assert validate(capsys, folder, "--from", quarantine)[0] == 1  # a part of one is none


def refuse_what_is_no_image(raw: Any) -> bytes:
    if not bytes(raw).startswith(b"\xff\xd8"):
        raise ValueError("got no JPEG")
    return bytes(raw)


def test_a_dataset_without_keys_leaves_lines_that_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quarantine = tmp_path / "quarantine.jsonl"

    (line,) = read_epoch(Halves(), quarantine)

    assert (line["key"], line["position"], line["error_type"]) == (None, 2, "ZeroDivisionError")
    assert main(["validate", str(tmp_path), "--from", str(quarantine)]) == 1
    assert "line 1: no bad sample (ValueError: got key None" in capsys.readouterr().err


class Halves(Dataset[float]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, position: int) -> float:
        return 1 / (position - 2)


def test_wrong_arguments_and_files_that_are_not_there_have_their_own_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(tmp_path), "--from", str(tmp_path / "gone.jsonl")]) == 1
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(tmp_path), "--from"])
    assert caught.value.code == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_an_empty_file_says_that_nothing_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill_folder(tmp_path / "photos")
    quarantine = tmp_path / "quarantine.jsonl"

    assert read_epoch(ScratchDataset(folder), quarantine) == []

    assert validate(capsys, folder, "--from", quarantine)[0] == 0


def test_a_sample_of_several_lines_is_checked_once_and_keeps_its_last_error() -> None:
    lines = b'{"key": "a", "error": "1"}\n{"key": "b"}\n{"key": "a", "error": "2"}\n'

    assert [(sample.key, sample.error) for sample in read_report(lines, "x")] == [
        ("a", "2"),
        ("b", "None"),
    ]


def test_the_kinds_of_the_data_sets_are_those_of_the_command() -> None:
    assert set(get_args(BytesKind)) == set(get_args(SampleKind))
