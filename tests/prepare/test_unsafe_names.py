"""Names in tars that lead out of the folder that they are extracted to: told, and never copied."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from concurrent_dataloader.datasets.streamed import StreamedShards
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.stores import open_writable_store
from tests.prepare.shard_sets import write_set

UNSAFE_KEYS = ("/etc/a", "../a", "n1/../../a")


def encode_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(params=[True, False], ids=["indexed", "no index"])
def indexed(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=UNSAFE_KEYS)
def unsafe(request: pytest.FixtureRequest, tmp_path: Path, indexed: bool) -> tuple[Path, str]:
    """Two shards, of which the second holds an unsafe name, and that name."""
    folder, key = tmp_path / "shards", request.param
    fields = {"cls": b"0", "jpg": encode_image()}
    samples = [[("n1/0", fields)], [("n1/1", {**fields, "cls": b"1"}), (key, fields)]]
    write_set(open_writable_store(folder), samples, indexed=indexed)
    return folder, key


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["reshard", "{}/shards", "{}/new", "--shards", "1"],
        ["map", "{}/shards", "{}/new", "--function", "builtins:dict", "--processes", "1"],
        ["distribute", "{}/shards", "-n", "2"],
        ["shard", "{}/shards", "{}/new"],
        ["index", "{}/shards", "--output", "{}/shards/other.npz"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_copies_samples_refuses_them_by_name_before_it_writes(
    unsafe: tuple[Path, str],
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = listed(tmp_path)

    status = main([argument.format(tmp_path) for argument in arguments])

    said = capsys.readouterr().err
    assert status == 1
    assert "train-000001.tar" in said
    assert f"'{unsafe[1]}." in said
    assert "unsafe member name" in said
    assert listed(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--deep"]], ids=["shallow", "deep"])
def test_a_check_calls_them_unsafe(
    unsafe: tuple[Path, str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["validate", str(unsafe[0]), *options])

    said = capsys.readouterr().out
    assert status == 1
    assert f"'{unsafe[1]}." in said
    assert "unsafe member name" in said


def test_a_member_of_no_sample_counts_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in (("0.cls", b"0"), ("/etc/passwd", b"x"), ("0.jpg", encode_image())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    assert main(["validate", str(tmp_path), "--deep"]) == 1
    assert "'/etc/passwd': an unsafe member name" in capsys.readouterr().out
    assert main(["reshard", str(tmp_path), str(tmp_path.parent / "new"), "--shards", "1"]) == 1


def test_they_are_read_since_nothing_is_extracted(unsafe: tuple[Path, str]) -> None:
    names = str(unsafe[0] / "train-{000000..000001}.tar")
    shards = StreamedShards(names, fields=("__key__", "cls"))

    assert unsafe[1] in {key for key, _ in shards}
