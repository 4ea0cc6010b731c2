"""Tar shards: what GNU tar, Python and the webdataset package write and read."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_dataloader.errors import ShardFormatError
from concurrent_dataloader.formats.tar import (
    check_name,
    group_members,
    parse_sample,
    read_members,
    read_samples,
    split_name,
)
from concurrent_dataloader.formats.tar_writer import TarWriter, count_sample_bytes, encode_header

LONG = "folder/" + "n" * 150
SAMPLES: list[tuple[str, dict[str, bytes]]] = [
    ("n01/a", {"cls": b"0", "jpg": b"\xff\xd8" * 700}),
    ("n01/b c", {"cls": b"1", "jpg": b"", "json": b"null"}),
    ("ünï/日本", {"jpg": b"x" * 512}),
    (LONG, {"cls": b"2", "jpg": b"y" * 513}),
]


class Stream:
    """A file that can only be read, a few bytes at a time."""

    def __init__(self, raw: bytes) -> None:
        self._file = io.BytesIO(raw)

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, 7000))


def write(samples: list[tuple[str, dict[str, bytes]]] = SAMPLES) -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    written = [writer.write(key, fields) for key, fields in samples]
    checksums = writer.close()
    assert checksums.tar == f"{google_crc32c.value(file.getvalue()):08x}"
    assert checksums.samples.tolist() == [
        google_crc32c.value(file.getvalue()[sample.extent.start : sample.extent.stop])
        for sample in written
    ]
    assert writer.size_bytes == len(file.getvalue())
    return file.getvalue()


def python_tar(names: dict[str, bytes], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, content in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("open_raw", [io.BytesIO, Stream], ids=["seekable", "stream"])
def test_what_was_written_is_read_back(open_raw: type) -> None:
    found = [(sample.key, sample.fields) for sample in read_samples(open_raw(write()), "t")]

    assert found == SAMPLES


def test_the_same_samples_give_the_same_bytes() -> None:
    assert write() == write([(key, dict(reversed(fields.items()))) for key, fields in SAMPLES])


def test_pythons_tarfile_reads_what_was_written() -> None:
    with tarfile.open(fileobj=io.BytesIO(write())) as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}  # pyright: ignore[reportOptionalMemberAccess]

    assert found == {
        f"{key}.{field}": raw for key, fields in SAMPLES for field, raw in fields.items()
    }


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_gnu_tar_extracts_what_was_written(tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", "-"], input=write(), cwd=tmp_path, check=True)

    for key, fields in SAMPLES:
        for field, raw in fields.items():
            assert (tmp_path / f"{key}.{field}").read_bytes() == raw


# The package leaves the closing of its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_package_reads_what_was_written(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    path.write_bytes(write())

    found = [
        {name: value for name, value in sample.items() if not name.startswith("__")}
        for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]

    assert found == [fields for _, fields in SAMPLES]


def test_what_the_webdataset_package_writes_is_read(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    with wds.TarWriter(str(path)) as sink:
        sink.write({"__key__": "0000007", "jpg": b"picture", "cls": 3, "json": {"bbox": None}})

    (sample,) = read_samples(io.BytesIO(path.read_bytes()), "t")

    assert sample.key == "0000007"
    assert sample.fields == {"cls": b"3", "jpg": b"picture", "json": b'{"bbox": null}'}


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_survive_in_each_format(tar_format: int) -> None:
    names = {f"{LONG}.jpg": b"1", "ä/ö.jpg": b"22", "plain.jpg": b"333"}

    members = list(read_members(io.BytesIO(python_tar(names, tar_format)), "t"))

    assert [member.name for member in members] == list(names)


def test_ranges_hold_just_the_bytes() -> None:
    raw = write()
    groups = list(group_members(read_members(io.BytesIO(raw), "t"), "t"))

    for group, (key, fields) in zip(groups, SAMPLES, strict=True):
        assert group.key == key
        for field, member in group.members.items():
            assert raw[member.data.start : member.data.stop] == fields[field]
        sample = parse_sample(raw[group.extent.start : group.extent.stop], "t")
        assert (sample.key, sample.fields) == (key, fields)
        assert group.extent.stop - group.extent.start == count_sample_bytes(key, fields)


def test_reading_may_begin_at_any_sample() -> None:
    raw = write()
    third = list(read_samples(io.BytesIO(raw), "t"))[2]
    file = io.BytesIO(raw)
    file.seek(third.extent.start)

    for source in (file, Stream(raw[third.extent.start :])):
        again = list(read_samples(source, "t", offset=third.extent.start))
        assert [sample.key for sample in again] == [key for key, _ in SAMPLES[2:]]
        assert again[0].extent == third.extent


def test_a_member_above_8_gib_is_found_without_being_read() -> None:
    size = 9 << 30
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.bin")
        info.size = size
        header = info.tobuf(tar_format)
        (member,) = read_members(Sparse(header, size, bytes(1024)), "t")
        assert member.data == (len(header), len(header) + size)


class Sparse(io.RawIOBase):
    """A file of a head, a hole, and a tail."""

    def __init__(self, head: bytes, hole: int, tail: bytes) -> None:
        self._head, self._hole, self._tail, self._at = head, hole, tail, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        base = (0, self._at, len(self._head) + self._hole + len(self._tail))[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        at, self._at = self._at, self._at + size
        if at < len(self._head):
            return self._head[at : at + size]
        assert at >= len(self._head) + self._hole, "the hole was read"
        at -= len(self._head) + self._hole
        return self._tail[at : at + size]


def test_keys_and_fields_part_at_the_first_dot_of_the_last_name() -> None:
    assert split_name("a.b/c.tar.GZ") == ("a.b/c", "tar.gz")
    assert split_name("x.JPEG") == ("x", "jpeg")
    for name in ("noext", ".hidden", "a/.hidden", "dir/__meta__", "__x.y__", "trailing."):
        assert split_name(name) is None, name


def test_members_that_are_no_files_or_have_no_field_are_left_out() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("n01", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
        for name in ("README", "__meta__.json__", "n01/a.jpg", "n01/a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))

    (sample,) = read_samples(io.BytesIO(file.getvalue()), "t")

    assert (sample.key, sample.fields) == ("n01/a", {"jpg": b"7", "cls": b"7"})


def test_a_field_that_comes_twice_is_an_error() -> None:
    raw = python_tar({"a.jpg": b"1", "a.JPG": b"2"})

    with pytest.raises(ShardFormatError, match="'a' has field 'jpg' twice"):
        list(read_samples(io.BytesIO(raw), "s3://b/x.tar"))


@pytest.mark.parametrize("open_raw", [io.BytesIO, Stream], ids=["seekable", "stream"])
def test_a_tar_cut_anywhere_is_an_error(open_raw: type) -> None:
    raw = write()
    for stop in range(0, len(raw) - 1024 + 1, 256):
        with pytest.raises(ShardFormatError, match=r"s3://b/x\.tar: cut short"):
            list(read_samples(open_raw(raw[:stop]), "s3://b/x.tar"))
        with pytest.raises(ShardFormatError, match="cut short"):
            list(read_members(open_raw(raw[:stop]), "t"))


def test_a_header_that_lies_is_an_error() -> None:
    raw = bytearray(write())
    second = list(read_samples(io.BytesIO(bytes(raw)), "t"))[1].extent.start
    raw[second + 124] ^= 1  # its size

    with pytest.raises(ShardFormatError, match=f"no header at offset {second}"):
        list(read_samples(io.BytesIO(bytes(raw)), "t"))


def test_an_empty_file_is_no_tar_and_an_empty_tar_has_no_sample() -> None:
    with pytest.raises(ShardFormatError, match="cut short: got 0 bytes at offset 0"):
        list(read_samples(io.BytesIO(b""), "t"))
    assert list(read_samples(io.BytesIO(write([])), "t")) == []


@pytest.mark.parametrize("open_raw", [io.BytesIO, Stream], ids=["seekable", "stream"])
@pytest.mark.parametrize("num_blocks", [1, 2, 45])
def test_zeros_in_place_of_members_are_an_error(open_raw: type, num_blocks: int) -> None:
    raw = bytearray(python_tar({f"{number}.jpg": b"x" * 3000 for number in range(20)}))
    raw[3584 : 3584 + num_blocks * 512] = bytes(num_blocks * 512)
    # Two blocks of zeros end a tar, and its last record may hold anything behind them.
    place = {1: 4096, 2: 10240, 45: 3584 + 45 * 512}[num_blocks]

    with pytest.raises(ShardFormatError, match=f"t: zeros at offset 3584, .* from offset {place}"):
        list(read_samples(open_raw(bytes(raw)), "t"))
    with pytest.raises(ShardFormatError, match="zeros at offset 3584"):
        list(read_members(open_raw(bytes(raw)), "t"))


def test_a_tar_that_is_zeros_from_its_middle_on_is_warned_of() -> None:
    raw = python_tar({f"{number}.jpg": b"x" * 3000 for number in range(20)})
    raw = raw[:7168] + bytes(len(raw) - 7168)

    with pytest.warns(UserWarning, match=f"^t: the tar ends at offset 7168 with {len(raw) - 7168}"):
        assert len(list(read_samples(io.BytesIO(raw), "t"))) == 2


@pytest.mark.parametrize("size", range(500, 10_500, 512))
def test_records_that_are_filled_up_are_no_damage(size: int) -> None:
    raw = python_tar({"a.jpg": b"x" * size})
    assert len(raw) % 10240 == 0
    at = 512 + -(-size // 512) * 512 + 1024
    undefined = raw[:at] + b"?" * (len(raw) - at)  # as POSIX allows

    assert len(list(read_samples(io.BytesIO(raw), "t"))) == 1
    assert len(list(read_samples(io.BytesIO(undefined), "t"))) == 1


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
@pytest.mark.parametrize("factor", [1, 20])
def test_tars_of_gnu_tar_end_without_a_warning(factor: int, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 9000)
    subprocess.run(["tar", "-b", str(factor), "-cf", "a.tar", "a.jpg"], cwd=tmp_path, check=True)

    with (tmp_path / "a.tar").open("rb") as file:
        assert len(list(read_samples(file, "t"))) == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "a\0b"])
def test_names_that_lead_out_of_a_folder_are_refused(name: str) -> None:
    with pytest.raises(ShardFormatError, match="unsafe"):
        check_name(name)


@pytest.mark.parametrize(
    ("key", "field"), [("a.b", "jpg"), ("a", "JPG"), ("a", ""), ("", "jpg"), ("a/", "jpg")]
)
def test_a_key_that_would_be_read_as_another_is_not_written(key: str, field: str) -> None:
    with pytest.raises(ValueError, match="would be read as"):
        TarWriter(io.BytesIO()).write(key, {field: b"x"})


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 4000), st.binary(min_size=1, max_size=40))
def test_damage_is_an_error_or_leaves_samples_whole(tail: bytes, at: int, patch: bytes) -> None:
    raw = bytearray(write()[:-1024] + tail)
    raw[at : at + len(patch)] = patch
    try:
        list(read_samples(io.BytesIO(bytes(raw)), "t"))
        list(read_members(Stream(bytes(raw)), "t"))
    except ShardFormatError:
        pass


@pytest.mark.parametrize(
    "name", ["a.jpg", "n" * 96 + ".jpg", "n" * 97 + ".jpg", "ü.jpg", "a b/c.x"]
)
@pytest.mark.parametrize("size_bytes", [0, 1, 511, 8 << 20, (8 << 30) - 1, 8 << 30])
def test_headers_are_those_of_pythons_tarfile(name: str, size_bytes: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size_bytes, 0o644

    assert encode_header(name, size_bytes) == info.tobuf(tarfile.PAX_FORMAT, "utf-8")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["a.jpg", "n" * 100, "ü.jpg"]),
    st.sampled_from([3, 0o777]),
    st.integers(0, 511),
    st.binary(min_size=1, max_size=12),
    st.booleans(),
)
def test_headers_are_read_as_pythons_tarfile_reads_them(
    name: str, size_bytes: int, at: int, patch: bytes, is_checksum_mended: bool
) -> None:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "utf-8"))
    block[at : at + len(patch)] = patch
    del block[512:]
    if is_checksum_mended:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    try:
        expected = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        expected = None
    raw = bytes(block) + bytes(512 * 20)

    try:
        found = next(iter(read_members(Stream(raw), "t")), None)
    except ShardFormatError:
        found = None

    if expected is None and found is not None:
        assert is_checksum_mended  # damage in a field that is of no use here, such as the owner
    if expected is not None and expected.type == tarfile.REGTYPE and expected.size >= 0:
        assert found is not None
        assert (found.name, found.data.stop - found.data.start) == (expected.name, expected.size)


def test_a_header_of_which_any_byte_changed_is_damage() -> None:
    raw = write([("a", {"jpg": b"x"})])
    for at in [*range(148), *range(156, 512)]:
        changed = bytearray(raw)
        changed[at] ^= 1
        with pytest.raises(ShardFormatError, match="checksum"):
            list(read_members(io.BytesIO(bytes(changed)), "t"))


@pytest.mark.parametrize("size", ["9" * 19, "1" * 5000, "²", "٣"])
def test_a_size_in_an_extended_header_that_is_none_is_damage(size: str) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": size}
    raw = info.tobuf(tarfile.PAX_FORMAT, "utf-8") + bytes(1024)

    with pytest.raises(ShardFormatError, match="got size"):
        list(read_members(io.BytesIO(raw), "t"))
