"""Sources: the same samples from every form, strays, damage, temporary files, classes, boxes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import ImageFolder
from webdataset.writer import TarWriter as WebDatasetWriter

from concurrent_dataloader.datasets import ScratchDataset
from concurrent_dataloader.errors import (
    ChecksumError,
    ClassesFormatError,
    KeyNotFoundError,
    ShardFormatError,
    UnknownClassError,
)
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.formats.tar_writer import TarWriter
from concurrent_dataloader.prepare.metadata import Metadata, SplitMetadata
from concurrent_dataloader.prepare.shard import write_shards as pack_shards
from concurrent_dataloader.prepare.shard_settings import ShardSettings
from concurrent_dataloader.prepare.sources import SampleTable, open_source
from concurrent_dataloader.prepare.sources.layouts import expand_braces
from concurrent_dataloader.prepare.sources.read_ahead import ReadAheadFile
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.stores import open_store
from concurrent_dataloader.testing import ObjectServer
from tests.prepare.memory_source import MemorySource, make_samples
from tests.prepare.shard_sets import flip_byte
from tests.prepare.source_files import (
    COMPRESS,
    IMAGES,
    LABELS,
    SORTED,
    encode_image,
    labels_of,
    make_link,
    make_tar,
    make_tar_of_tars,
    names_of,
    put_all,
    read_all,
    write_tree,
)

FORMS = ["folder", "flat.tar", "classes.tar", *(f"flat{ending}" for ending in COMPRESS)]


@pytest.fixture
def forms(tmp_path: Path) -> Path:
    """The images as a folder, a tar, a tar of class tars, and compressed tars."""
    write_tree(tmp_path / "folder", IMAGES)
    flat = make_tar(IMAGES)
    (tmp_path / "flat.tar").write_bytes(flat)
    (tmp_path / "classes.tar").write_bytes(make_tar_of_tars(IMAGES))
    for ending, compress in COMPRESS.items():
        (tmp_path / f"flat{ending}").write_bytes(compress(flat))
    return tmp_path


@pytest.fixture
def bucket(object_server: ObjectServer, forms: Path, tmp_path: Path) -> dict[str, Any]:
    """The same in a bucket; gives what `open_store` needs."""
    object_server.put_objects("data", {f"some/folder/{name}": IMAGES[name] for name in IMAGES})
    object_server.put_objects("data", {"some/folder/": b"", "some/folder2/x/1.jpg": b"other"})
    tars = {f"some/{form}": (forms / form).read_bytes() for form in FORMS if form != "folder"}
    object_server.put_objects("data", tars)
    credentials = tmp_path / "credentials.json"
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    credentials.write_text(json.dumps(keys))
    return {"endpoint_url": object_server.endpoint_url, "credentials": credentials}


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """A folder for temporary files, so that what is left can be seen."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


# -- the same from every form


def check_is_images(source: SampleTable) -> None:
    expected = [
        (name, label, len(IMAGES[name]), IMAGES[name], ())
        for name, label in zip(SORTED, LABELS, strict=True)
    ]
    assert read_all(source) == expected
    assert source.classes == ("Dog", "cat", "emu")
    assert source.label_space is None
    assert source.num_stray == 0


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples_in_the_order_of_their_names_a06(
    forms: Path, form: str
) -> None:
    source = open_source(forms / form)

    check_is_images(source)
    source.close()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_a_bucket_gives_the_same_samples(bucket: dict[str, Any], form: str) -> None:
    source = open_source(f"s3://data/some/{form}", **bucket)

    check_is_images(source)
    source.close()


def test_a_tar_on_a_web_server_is_read_by_ranges(object_server: ObjectServer) -> None:
    object_server.create_bucket("public", public=True)
    object_server.put_objects("public", {"flat.tar": make_tar(IMAGES)})

    source = open_source(f"{object_server.endpoint_url}/public/flat.tar")

    check_is_images(source)
    source.close()


def test_an_index_keeps_its_order_and_may_lie_in_a_bucket(
    bucket: dict[str, Any], object_server: ObjectServer, forms: Path
) -> None:
    keys = [f"folder/{name}" for name in reversed(SORTED)]
    (forms / "index.json").write_text(json.dumps(keys))
    object_server.put_objects("data", {"index.json": json.dumps(keys).encode()})

    local = open_source(forms / "index.json")
    remote = open_source("s3://data/index.json", root="s3://data/some", **bucket)

    for source in (local, remote):
        assert names_of(source) == keys
        assert bytes(source.read(0)) == IMAGES[SORTED[-1]]
        source.close()
    with pytest.raises(KeyNotFoundError, match=r"root: got '.*', the first file that .* names"):
        open_source(forms / "index.json", root=str(forms / "folder"))


def test_classes_and_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    names = ["b/1.png", "a/2.png", "a/1.png", "C/1.png", "a-b/1.png", "ä/1.png", "10/1.png"]
    root = write_tree(tmp_path, {name: encode_image(n) for n, name in enumerate(names)})
    oracle = ImageFolder(str(root))

    source = open_source(root)

    assert list(source.classes or ()) == oracle.classes
    ours = dict(zip(names_of(source), labels_of(source), strict=True))
    assert ours == {os.path.relpath(path, root): label for path, label in oracle.samples}


NESTED = {
    "dog/1.jpg": encode_image(1),
    "cat/siamese/2.jpg": encode_image(2),
    "cat/persian/kittens/3.jpg": encode_image(3),
    "cat/4.jpg": encode_image(4),
    "emu/val/5.jpg": encode_image(5),
}


@pytest.mark.parametrize("above", ["", "photos/", "photos/2024/", "./"])
def test_nested_folders_have_the_labels_of_imagefolder(tmp_path: Path, above: str) -> None:
    write_tree(tmp_path / "tree", NESTED)
    (tmp_path / "tree.tar").write_bytes(
        make_tar({f"{above}{name}": raw for name, raw in NESTED.items()})
    )
    oracle = ImageFolder(str(tmp_path / "tree"))
    expected = sorted((Path(path).read_bytes(), label) for path, label in oracle.samples)
    unpacked = ScratchDataset(tmp_path / "tree", decode=None)

    for form in ("tree", "tree.tar"):
        with contextlib.closing(open_source(tmp_path / form)) as source:
            found = [(raw, label) for _, label, _, raw, _ in read_all(source)]

        assert sorted(found) == expected
        assert source.classes == tuple(oracle.classes)
    assert sorted(unpacked[position] for position in range(len(unpacked))) == expected


def test_the_folder_of_the_only_split_is_no_class(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"train/{name}": raw for name, raw in NESTED.items()})

    with contextlib.closing(open_source(tmp_path)) as source:
        assert source.classes == ("cat", "dog", "emu")
    with contextlib.closing(open_source(tmp_path, split="train")) as source:
        assert source.classes == ("cat", "dog", "emu")


def test_a_folder_with_one_class_keeps_it(tmp_path: Path) -> None:
    cats = {name: raw for name, raw in NESTED.items() if name.startswith("cat/")}
    write_tree(tmp_path / "tree", cats)
    (tmp_path / "cats.tar").write_bytes(make_tar(cats))

    for form in ("tree", "cats.tar"):
        with contextlib.closing(open_source(tmp_path / form)) as source:
            assert source.classes == ("cat",)
            assert set(labels_of(source)) == {0}


def test_reading_a_sample_of_an_inner_tar_is_one_request_of_its_size(
    bucket: dict[str, Any], object_server: ObjectServer
) -> None:
    source = open_source("s3://data/some/classes.tar", **bucket)
    object_server.reset_counters()

    raw = bytes(source.read(3))

    counters = object_server.counters()
    assert (counters.num_requests, counters.body_bytes_sent) == (1, len(raw))
    source.close()


def test_opening_a_remote_tar_skips_long_members_and_reads_through_short_ones(
    bucket: dict[str, Any], object_server: ObjectServer
) -> None:
    long = {f"c{n}/1.jpg": bytes(3 << 20) for n in range(4)}
    short = {f"a/{n}.jpg": bytes(1500) for n in range(500)}
    tars = {"long.tar": make_tar_of_tars(long), "short.tar": make_tar(short)}
    object_server.put_objects("data", tars)

    object_server.reset_counters()
    open_source("s3://data/long.tar", **bucket).close()
    of_long = object_server.counters()
    object_server.reset_counters()
    open_source("s3://data/short.tar", **bucket).close()
    of_short = object_server.counters()

    # For each inner tar its own header, its member's, and its end; then the end of all.
    assert of_long.num_gets <= 4 * 3 + 2
    assert of_long.body_bytes_sent <= len(tars["long.tar"]) / 10
    # 64 KiB, 128 KiB, ... of 1.2 MB.
    assert of_short.num_gets <= 6


def test_an_archive_is_a_file_from_front_to_back_and_with_skips(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    store = open_store(tmp_path)

    for is_remote in (False, True):
        with ReadAheadFile(store, "file", None, is_remote=is_remote) as file:
            assert file.read() == content
            for start, size in [(0, 10), (5, 1), (250_000, 70_000), (3, 200_000), (299_999, 5)]:
                assert file.seek(start) == start
                assert file.read(size) == content[start : start + size]
                assert file.tell() == min(start + size, len(content))
            file.seek(-5, os.SEEK_END)
            file.seek(2, os.SEEK_CUR)
            assert file.read() == content[-3:]
            assert file.read(1) == b""
        with ReadAheadFile(store, "file", 100, is_remote=is_remote) as file:
            assert file.read(1000) == content[:100]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_tree(tmp_path / "there", {"1.jpg": b"1"})
    write_tree(tmp_path / "data", {"cat/2.jpg": b"2"})
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "there")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")

    assert names_of(open_source(tmp_path / "data")) == ["cat/2.jpg", "dog/1.jpg"]


def test_inner_folders_and_links_of_a_tar_of_tars_are_skipped(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("sub")
    folder.type = tarfile.DIRTYPE
    inner = make_tar({"1.JPEG": b"1", "sub/2.JPEG": b"22"}, [folder, make_link("3.JPEG")])
    outer = make_tar({"n01440764.tar": inner}, [make_link("n0.tar", tarfile.LNKTYPE)])
    (tmp_path / "train.tar").write_bytes(outer)

    source = open_source(tmp_path / "train.tar", label_rule="regex:^(n[0-9]+)/")

    assert [row[:4] for row in read_all(source)] == [
        ("n01440764/1.JPEG", 0, 1, b"1"),
        ("n01440764/sub/2.JPEG", 0, 2, b"22"),
    ]


def test_a_folder_of_class_tars_is_read_by_class(tmp_path: Path) -> None:
    for name in ("n02119789", "n01440764"):
        (tmp_path / f"{name}.tar").write_bytes(make_tar({f"{name}_1.JPEG": name.encode()}))

    source = open_source(tmp_path)

    assert names_of(source) == ["n01440764/n01440764_1.JPEG", "n02119789/n02119789_1.JPEG"]
    assert (labels_of(source), bytes(source.read(1))) == ([0, 1], b"n02119789")


# -- strays, names, emptiness


def test_every_image_ending_in_any_case_is_taken_from_a_flat_tar_a09(tmp_path: Path) -> None:
    files = {
        f"a/{ending}.{ending}": b"x"
        for ending in ("jpeg", "JPEG", "jpg", "JPG", "png", "PNG", "webp", "bmp")
    }
    (tmp_path / "flat.tar").write_bytes(make_tar(files | {"a/readme.txt": b"no", "plain": b"no"}))

    source = open_source(tmp_path / "flat.tar")

    assert names_of(source) == sorted(files)
    assert (source.num_stray, source.strays) == (2, ("a/readme.txt", "plain"))


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_stray_files_are_skipped_and_counted_or_refused_a05(tmp_path: Path, form: str) -> None:
    strays = {".DS_Store": b"", "a.b/._1.JPEG": b"", "FileInfo.json": b"{}", "a.b/notes": b""}
    files = {"a.b/1.JPEG": b"1"} | strays
    write_tree(tmp_path / "folder", files)
    (tmp_path / "tar.tar").write_bytes(make_tar(files))
    where = tmp_path / ("folder" if form == "folder" else "tar.tar")

    source = open_source(where)

    assert (names_of(source), source.classes) == (["a.b/1.JPEG"], ("a.b",))
    assert (source.num_stray, sorted(source.strays)) == (4, sorted(strays))
    with pytest.raises(ShardFormatError, match=r"holds 4 stray files such as '"):
        open_source(where, on_stray="error")


def test_suffixes_may_be_chosen_or_all_files_taken(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a/1.jpg": b"", "a/2.dat": b"", "a/3": b""})

    assert names_of(open_source(tmp_path, suffixes=(".DAT",))) == ["a/2.dat"]
    assert names_of(open_source(tmp_path, suffixes=())) == ["a/1.jpg", "a/2.dat", "a/3"]


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "a/../../1.jpg"])
def test_a_member_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.tar").write_bytes(make_tar({"a/1.jpg": b"1", name: b"2"}))

    with pytest.raises(ShardFormatError, match=r"bad\.tar: .*unsafe member name"):
        open_source(tmp_path / "bad.tar")


def test_names_that_begin_with_a_dot_and_slash_are_those_without(tmp_path: Path) -> None:
    (tmp_path / "dot.tar").write_bytes(make_tar({f"./{name}": IMAGES[name] for name in IMAGES}))

    check_is_images(open_source(tmp_path / "dot.tar"))


def test_a_name_that_stands_in_a_tar_twice_is_an_error(tmp_path: Path) -> None:
    once, again = make_tar({"a/1.jpg": b"1"}), make_tar({"a/1.jpg": b"2"})
    (tmp_path / "twice.tar").write_bytes(once[:1024] + again)

    with pytest.raises(ShardFormatError, match=r"'a/1\.jpg' stands there, and again in .* 1536"):
        open_source(tmp_path / "twice.tar")


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    write_tree(tmp_path / "other", {"a/1.txt": b""})
    (tmp_path / "none.tar").write_bytes(make_tar({}))

    for name in ("none", "none.tar"):
        with pytest.raises(KeyNotFoundError, match="holds no sample; check the source"):
            open_source(tmp_path / name)
    with pytest.raises(KeyNotFoundError, match=r"no sample, but other files such as 'a/1\.txt'"):
        open_source(tmp_path / "other")
    for name in ("missing", "missing.tar", "missing.tar.gz", "missing-*.tar"):
        with pytest.raises(KeyNotFoundError, match=r"missing|no such"):
            open_source(tmp_path / name if "*" not in name else tmp_path / "none" / name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"")

    with pytest.raises(ValueError, match=r"photos\.zip', a file that is neither a tar nor an ind"):
        open_source(tmp_path / "photos.zip")


# -- damage


@pytest.mark.parametrize("cut", [100, 700, 1100])
def test_a_tar_that_is_cut_short_is_damaged(tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.tar").write_bytes(make_tar({"a/1.jpg": bytes(600)})[:cut])

    with pytest.raises(ShardFormatError, match=r"cut\.tar: cut short"):
        open_source(tmp_path / "cut.tar")


def test_a_name_that_is_no_text_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "latin.tar").write_bytes(make_tar({"a/\udcfc.jpg": b"1"}))

    with pytest.raises(ShardFormatError, match=r"latin\.tar: .*udcfc.*not UTF-8"):
        open_source(tmp_path / "latin.tar")


def test_a_member_of_more_than_8_gib_is_skipped_over_and_has_its_size(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("a/huge.jpg")
    huge.size = 9 << 30
    with (tmp_path / "huge.tar").open("wb") as file:
        file.write(huge.tobuf(tarfile.GNU_FORMAT))
        file.seek(huge.size, os.SEEK_CUR)  # a hole
        file.write(make_tar({"a/small.jpg": b"small"}))

    source = open_source(tmp_path / "huge.tar")

    assert [source.size_bytes(position) for position in range(2)] == [9 << 30, 5]
    assert bytes(source.read(1)) == b"small"


def test_an_inner_tar_that_is_cut_short_is_named_and_does_not_run_into_the_next(
    tmp_path: Path,
) -> None:
    inner = make_tar({"1.jpg": bytes(600), "2.jpg": b"2"})
    outer = make_tar({"a.tar": inner[:1024], "b.tar": inner})
    (tmp_path / "outer.tar").write_bytes(outer)

    with pytest.raises(ShardFormatError, match=r"outer\.tar, a\.tar: cut short"):
        open_source(tmp_path / "outer.tar")


def test_a_tar_that_was_cut_after_it_was_opened_is_an_error_of_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "flat.tar"
    path.write_bytes(make_tar({"a/1.jpg": bytes(600)}))
    source = open_source(path)
    os.truncate(path, 600)

    with pytest.raises(ShardFormatError, match="the archive has changed since it was opened"):
        source.read(0)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_compressed_tar_leaves_no_temporary_file(
    tmp_path: Path, temporary: Path, ending: str, damage: str
) -> None:
    path = tmp_path / f"flat{ending}"
    whole = COMPRESS[ending](make_tar({"a/1.jpg": os.urandom(5000)}))
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"something else")

    with pytest.raises(ShardFormatError, match=r"flat.*cannot be unpacked"):
        open_source(path, temporary_folder=temporary)

    assert list(temporary.iterdir()) == []


# -- temporary files


def test_a_temporary_file_goes_when_the_source_is_closed_a09(forms: Path, temporary: Path) -> None:
    source = open_source(forms / "flat.tar.gz", temporary_folder=temporary)
    assert len(list(temporary.iterdir())) == 1

    source.close()
    source.close()

    assert list(temporary.iterdir()) == []


def test_a_temporary_file_goes_when_the_source_is_forgotten(forms: Path, temporary: Path) -> None:
    source = open_source(forms / "flat.tar.gz", temporary_folder=temporary)

    del source
    gc.collect()

    assert list(temporary.iterdir()) == []


def test_a_temporary_file_goes_when_the_classes_are_not_known(forms: Path, temporary: Path) -> None:
    (forms / "map.json").write_text('{"cat": 0}')

    with pytest.raises(UnknownClassError):
        open_source(forms / "flat.tar.gz", temporary_folder=temporary, class_map=forms / "map.json")

    assert list(temporary.iterdir()) == []


def test_a_temporary_file_goes_when_the_process_ends(forms: Path, temporary: Path) -> None:
    code = (
        "import sys\n"
        "from concurrent_dataloader.prepare.sources import open_source\n"
        "source = open_source(sys.argv[1], temporary_folder=sys.argv[2])\n"
        "raise SystemExit(len(source))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, forms / "flat.tar.gz", temporary], check=False
    )

    assert done.returncode == len(IMAGES)
    assert list(temporary.iterdir()) == []


def test_a_temporary_file_of_a_killed_process_goes_with_the_next_run(
    forms: Path, temporary: Path
) -> None:
    code = (
        "import os, signal, sys\n"
        "from concurrent_dataloader.prepare.sources import open_source\n"
        "source = open_source(sys.argv[1], temporary_folder=sys.argv[2])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, forms / "flat.tar.gz", temporary], check=False)
    assert len(list(temporary.iterdir())) == 1
    (temporary / "unpacked-by-somebody-else.tar").touch()

    source = open_source(forms / "flat.tar.gz", temporary_folder=temporary)
    other = open_source(forms / "flat.tar.gz", temporary_folder=temporary)

    assert len(list(temporary.iterdir())) == 3, "what is in use stays, as does what is not ours"
    check_is_images(source)
    check_is_images(other)
    source.close()
    other.close()
    assert [path.name for path in temporary.iterdir()] == ["unpacked-by-somebody-else.tar"]


def test_a_twin_reads_the_temporary_file_and_leaves_it(forms: Path, temporary: Path) -> None:
    source = open_source(forms / "flat.tar.xz", temporary_folder=temporary)
    twin: SampleTable = pickle.loads(pickle.dumps(source))

    check_is_images(twin)
    twin.close()
    del twin
    gc.collect()

    check_is_images(source)
    source.close()


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing(
    tmp_path: Path, temporary: Path
) -> None:
    (tmp_path / "big.tar.gz").write_bytes(
        COMPRESS[".tar.gz"](make_tar({"a/1.jpg": bytes(1 << 21)}))
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"while .*big\.tar\.gz was unpacked; give a folder"):
            open_source(tmp_path / "big.tar.gz", temporary_folder=temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert list(temporary.iterdir()) == []


# -- processes, threads, memory


def test_a_spawned_process_reads_the_same(bucket: dict[str, Any]) -> None:
    source = open_source("s3://data/some/classes.tar", **bucket)
    context = multiprocessing.get_context("spawn")
    result = context.SimpleQueue()
    process = context.Process(target=put_all, args=(source, result))

    process.start()
    there = result.get()
    process.join()

    assert there == read_all(source)
    source.close()


def test_threads_read_at_once(forms: Path) -> None:
    source = open_source(forms / "classes.tar")
    begin = threading.Barrier(8)

    def read(thread: int) -> list[bytes]:
        begin.wait(10)
        return [bytes(source.read((thread + n) % len(source))) for n in range(30)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))

    for thread, contents in enumerate(found):
        assert contents == [IMAGES[SORTED[(thread + n) % len(SORTED)]] for n in range(30)]


def test_a_sample_takes_little_more_than_its_name(tmp_path: Path) -> None:
    names = [f"n{n % 10}/{n:06d}.jpg" for n in range(4000)]
    (tmp_path / "flat.tar").write_bytes(make_tar(dict.fromkeys(names, b"")))

    source = open_source(tmp_path / "flat.tar")

    per_sample = len(pickle.dumps(source)) / len(names)
    # Offsets and sizes of the name, place in the tar, archive and label: 40 bytes.
    assert per_sample < len(names[0]) + 60
    gc.collect()
    before = len(gc.get_objects())
    twin = pickle.loads(pickle.dumps(source))
    gc.collect()
    assert len(gc.get_objects()) - before < 200
    assert len(twin) == 4000


# -- a part


def test_a_limit_takes_the_first_or_some_from_everywhere(forms: Path) -> None:
    head = open_source(forms / "flat.tar", limit=2)
    drawn = open_source(forms / "flat.tar", limit=3, sample_seed=1)

    assert (names_of(head), labels_of(head)) == (SORTED[:2], LABELS[:2])
    assert head.classes == ("Dog", "cat", "emu")
    assert len(drawn) == 3
    assert names_of(drawn) == names_of(open_source(forms / "folder", limit=3, sample_seed=1))
    for position, name in enumerate(names_of(drawn)):
        assert bytes(drawn.read(position)) == IMAGES[name]
    with pytest.raises(ValueError, match="limit: got 0"):
        open_source(forms / "flat.tar", limit=0)


def test_a_split_is_its_folder_and_never_both_by_accident(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train/a/1.jpg": b"1", "validation/a/2.jpg": b"2"})

    assert names_of(open_source(tmp_path, split="train")) == ["a/1.jpg"]
    assert names_of(open_source(tmp_path, split="val")) == ["a/2.jpg"]
    with pytest.raises(ValueError, match=r"split: got None .* holds train, validation"):
        open_source(tmp_path)
    with pytest.raises(KeyNotFoundError, match="no split 'test', but train, validation"):
        open_source(tmp_path, split="test")


def test_a_split_is_only_a_name_where_there_are_none(forms: Path) -> None:
    check_is_images(open_source(forms / "folder", split="val"))


# -- classes


def test_a_rule_finds_the_class_by_its_first_group(tmp_path: Path) -> None:
    write_tree(tmp_path, {"x/cat_1.jpg": b"", "x/dog_2.jpg": b"", "x/y/dog_3.jpg": b""})

    source = open_source(tmp_path, label_rule=r"regex:/([a-z]+)_[0-9]+\.")

    assert (source.classes, labels_of(source)) == (("cat", "dog"), [0, 1, 1])


def test_a_tar_with_sub_folders_needs_no_rule_a04(tmp_path: Path) -> None:
    (tmp_path / "deep.tar").write_bytes(
        make_tar({"data/train/cat/1.jpg": b"", "data/train/dog/1.jpg": b""})
    )

    source = open_source(tmp_path / "deep.tar")

    assert (source.classes, labels_of(source)) == (("cat", "dog"), [0, 1])


@pytest.mark.parametrize("rule", [None, "regex:^([a-z]+)/"])
def test_a_name_without_a_class_is_an_error_or_left_out_a05(
    tmp_path: Path, rule: str | None
) -> None:
    write_tree(tmp_path, {"cat/1.jpg": b"1", "loose.jpg": b"2", "dog/3.jpg": b"3"})

    source = open_source(tmp_path, label_rule=rule, on_unknown="skip")

    assert [row[:4] for row in read_all(source)] == [
        ("cat/1.jpg", 0, 1, b"1"),
        ("dog/3.jpg", 1, 1, b"3"),
    ]
    assert source.num_unlabelled == 1
    with pytest.raises(UnknownClassError, match=r"loose\.jpg: names no class; give label_rule"):
        open_source(tmp_path, label_rule=rule)


def test_samples_may_be_without_labels(forms: Path) -> None:
    source = open_source(forms / "folder", label_rule="none")

    assert (source.classes, source.label_space) == (None, None)
    assert labels_of(source) == [None] * len(SORTED)


MAPS: dict[str, tuple[str, tuple[str, ...], list[int]]] = {
    "class-ids.json": ('{"cat": 2, "Dog": 0, "emu": 1}', ("Dog", "emu", "cat"), [0, 0, 0, 2, 2, 1]),
    "ids-from-1.json": (
        '{"cat": 1, "Dog": 2, "emu": 3}',
        ("cat", "Dog", "emu"),
        [1, 1, 1, 0, 0, 2],
    ),
    "id-and-name.json": (
        '{"cat": {"id": "1", "name": "a cat"}, "Dog": {"id": 0}, "emu": {"id": 2}}',
        ("Dog", "cat", "emu"),
        [0, 0, 0, 1, 1, 2],
    ),
    "list.json": ('["emu", "cat", "Dog"]', ("emu", "cat", "Dog"), [2, 2, 2, 1, 1, 0]),
    "list.txt": ("emu\ncat\nDog\n", ("emu", "cat", "Dog"), [2, 2, 2, 1, 1, 0]),
    "file-names.json": (
        json.dumps(dict(zip([n.rpartition("/")[2] for n in SORTED], "aabbcc", strict=True))),
        ("a", "b", "c"),
        [0, 0, 1, 1, 2, 2],
    ),
    "stems.json": (
        '{"1": "x", "10": "y", "2": "x", "a": "y", "b": "x", "ü 1": "x"}',
        ("x", "y"),
        [0, 1, 0, 1, 0, 0],
    ),
    "whole-names.json": (
        json.dumps(dict(zip(SORTED, ["q", "p", "q", "p", "p", "p"], strict=True))),
        ("p", "q"),
        [1, 0, 1, 0, 0, 0],
    ),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_map_goes_by_class_or_by_file_name(forms: Path, kind: str) -> None:
    content, classes, labels = MAPS[kind]
    (forms / kind).write_text(content)

    source = open_source(forms / "flat.tar", class_map=forms / kind)

    assert labels_of(source) == labels
    assert (source.classes, source.label_space) == (classes, None)


def test_a_class_that_maps_to_nothing_names_file_value_and_map(forms: Path) -> None:
    (forms / "map.json").write_text('{"cat": 0, "Dog": 1}')

    with pytest.raises(
        UnknownClassError, match=r"emu/ü 1\.webp: got class 'emu' .*map\.json; add it there"
    ):
        open_source(forms / "folder", class_map=forms / "map.json")

    source = open_source(forms / "folder", class_map=forms / "map.json", on_unknown="skip")
    assert (names_of(source), source.num_unlabelled) == (SORTED[:5], 1)
    (forms / "map.json").write_text('{"cow": 0}')
    with pytest.raises(KeyNotFoundError, match="no sample is of a known class"):
        open_source(forms / "folder", class_map=forms / "map.json", on_unknown="skip")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "expected JSON"),
        ("{}", "is empty"),
        ("", "is empty"),
        ("[1, 2]", "expected a list of strings"),
        ('{"cat": -1}', "entry 'cat': got -1"),
        ('{"cat": true}', "entry 'cat': got True"),
        ('{"cat": 1, "Dog": "x"}', "entry 'Dog': got 'x' beside ids"),
        ('{"cat": 3, "Dog": 5}', "ids go from 3 to 5, .* give id_base"),
        ("cat\nDog\ncat\n", "'cat' stands there twice"),
        ("1\n2\n", "holds numbers, .* ground_truth"),
    ],
)
def test_a_file_that_is_no_map_is_refused(forms: Path, content: str, says: str) -> None:
    (forms / "map.json").write_text(content)

    with pytest.raises(ClassesFormatError, match=says):
        open_source(forms / "folder", class_map=forms / "map.json")


def test_ids_may_be_declared_to_count_from_one(forms: Path) -> None:
    (forms / "map.json").write_text('{"cat": 1, "Dog": 4, "emu": 2}')

    source = open_source(forms / "folder", class_map=forms / "map.json", id_base=1)

    assert labels_of(source) == [3, 3, 3, 0, 0, 1]
    assert source.classes == ("cat", "emu", "2", "Dog")


# -- shards


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with path.open("wb") as file:
        writer = TarWriter(file)
        for key, fields in samples.items():
            writer.write(key, fields)
        writer.close()


def make_sample(label: int, box: list[float] | None = None) -> dict[str, bytes]:
    return {
        "jpg": b"image %d" % label,
        "cls": b"%d" % label,
        "json": json.dumps({"bbox": box}).encode(),
    }


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    first = {"z/9": make_sample(2, [0.1, 0.2, 0.3, 0.4]), "a/1": make_sample(0)}
    write_shard(folder / "train-000000.tar", first)
    write_shard(folder / "train-000001.tar", {"b/5": make_sample(1, [0, 0, 1, 0.5])})
    write_shard(folder / "val-000000.tar", {"v/1": make_sample(3)})
    return folder


def test_samples_of_shards_are_compared_with_the_checksums_of_their_index(tmp_path: Path) -> None:
    samples = make_samples(20)
    pack_shards(MemorySource(samples), tmp_path, ShardSettings(max_count=8))
    index = ShardIndex.load(tmp_path / "train-index.npz")
    with contextlib.closing(open_source(f"{tmp_path}/train-*.tar")) as source:
        assert {bytes(source.read(at)) for at in range(20)} == set(samples.values())
        (start, stop), shard = index.payload(9), tmp_path / index.shard_of(9).name
        flip_byte(shard, start)
        changed = [at for at in range(20) if source.name(at) == index.names.key(9)]

        with pytest.raises(ChecksumError) as raised:
            source.read(changed[0])

    expected = f"{shard} [{start}, {stop}): got bytes of CRC-32C "
    assert str(raised.value).startswith(expected)
    assert f"expected {index.payload_crc(9):08x} by the index beside it" in str(raised.value)


def test_shards_beside_an_index_of_others_are_read(tmp_path: Path) -> None:
    pack_shards(MemorySource(make_samples(20)), tmp_path, ShardSettings(max_count=8))
    (tmp_path / "train-000000.tar").rename(tmp_path / "train-000009.tar")

    with contextlib.closing(open_source(f"{tmp_path}/train-000009.tar")) as source:
        assert len({bytes(source.read(at)) for at in range(8)}) == 8


@pytest.mark.parametrize("text", ["", "train-{000000..000001}.tar", "train-*.tar"])
def test_shards_give_names_labels_and_boxes_in_their_order(shards: Path, text: str) -> None:
    source = open_source(f"{shards}/{text}", split="train")

    assert read_all(source) == [
        ("z/9.jpg", 2, 7, b"image 2", (Box(0.1, 0.2, 0.3, 0.4),)),
        ("a/1.jpg", 0, 7, b"image 0", ()),
        ("b/5.jpg", 1, 7, b"image 1", (Box(0.0, 0.0, 1.0, 0.5),)),
    ]
    assert (source.classes, source.label_space) == (("0", "1", "2"), None)
    assert source.num_stray == 0


def test_shards_of_several_splits_need_one_to_be_named(shards: Path) -> None:
    assert names_of(open_source(shards, split="val")) == ["v/1.jpg"]
    with pytest.raises(ValueError, match="holds tars of train, val; expected one of these"):
        open_source(shards)
    with pytest.raises(KeyNotFoundError, match="no tar of split 'test', but of train, val"):
        open_source(shards, split="test")


def test_shards_have_the_classes_of_their_metadata(shards: Path) -> None:
    split = SplitMetadata(num_samples=3, classes=("a", "b", "z"), label_space=None)
    Metadata(splits={"train": split}).save(shards / "metadata.json")

    assert open_source(shards, split="train").classes == ("a", "b", "z")

    short = SplitMetadata(num_samples=3, classes=("a", "b"), label_space=None)
    Metadata(splits={"train": short}).save(shards / "metadata.json")
    with pytest.raises(ClassesFormatError, match="names 2 classes, expected 3"):
        open_source(shards, split="train")


def test_keys_that_come_back_in_another_shard_get_its_name(tmp_path: Path) -> None:
    for shard in range(2):
        write_shard(tmp_path / f"train-{shard}.tar", {"0000": make_sample(shard)})

    source = open_source(tmp_path)

    assert names_of(source) == ["train-0/0000.jpg", "train-1/0000.jpg"]
    assert labels_of(source) == [0, 1]


def test_shards_of_the_webdataset_package_are_read(tmp_path: Path) -> None:
    with WebDatasetWriter(str(tmp_path / "wds-000.tar")) as sink:
        for number in range(3):
            sink.write({"__key__": f"{number:07d}", "jpeg": b"raw %d" % number, "cls": number})

    source = open_source(tmp_path / "wds-000.tar")

    assert [row[:4] for row in read_all(source)] == [
        (f"{number:07d}.jpeg", number, 5, b"raw %d" % number) for number in range(3)
    ]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cls": b"cat"}, r"'1\.cls' holds b'cat', expected a label"),
        ({"cls": b"3000000000"}, "expected a label in decimal, of 9 digits at most"),
        ({"cls": b"1" * 5000}, "expected a label in decimal, of 9 digits at most"),
        ({"cls": b"0", "json": b"{"}, r"'1\.json': no boxes"),
        ({"cls": b"0", "json": b'{"bbox": [0, 0, 2, 1]}'}, "got box 0, 0, 2, 1, expected"),
        ({"cls": b"0", "json": b'{"bbox": [0, 0, 1]}'}, r"'1\.json': no boxes"),
    ],
)
def test_a_shard_with_a_damaged_label_or_box_is_refused(
    tmp_path: Path, fields: dict[str, bytes], says: str
) -> None:
    write_shard(tmp_path / "s.tar", {"1": {"jpg": b"", **fields}})

    with pytest.raises(ShardFormatError, match=says):
        open_source(tmp_path / "s.tar")


def test_a_label_that_stands_in_a_shard_twice_is_an_error(tmp_path: Path) -> None:
    once = make_tar({"1.jpg": b"", "1.cls": b"3"})
    (tmp_path / "s.tar").write_bytes(once[: 3 * 512] + make_tar({"1.cls": b"4"}))

    with pytest.raises(ShardFormatError, match=r"'1\.cls' stands there twice"):
        open_source(tmp_path / "s.tar")


def test_what_looks_like_an_annotation_is_stray_in_a_tar_that_is_no_shard(tmp_path: Path) -> None:
    strays = {"cat/1.json": b"{", "article.cls": b"\\LaTeX", "cat/2.json": b'{"bbox": "?"}'}
    (tmp_path / "a.tar").write_bytes(make_tar({"cat/1.jpg": b"1"} | strays))

    source = open_source(tmp_path / "a.tar")

    assert [row[:4] for row in read_all(source)] == [("cat/1.jpg", 0, 1, b"1")]
    assert (source.classes, sorted(source.strays)) == (("cat",), sorted(strays))


def test_a_sample_of_a_shard_without_a_label_is_unknown(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", {"1": make_sample(0), "2": {"jpg": b"2"}})

    with pytest.raises(UnknownClassError, match=r"2\.jpg: names no class"):
        open_source(tmp_path / "s.tar")
    assert names_of(open_source(tmp_path / "s.tar", on_unknown="skip")) == ["1.jpg"]


def test_braces_expand_with_and_without_leading_zeros() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}{9..10}") == ["a9", "a10", "b9", "b10"]
    with pytest.raises(ValueError, match=r"expected \{000\.\.146\} or \{a,b\}"):
        expand_braces("{x}")


# -- boxes


def test_boxes_of_a_table_are_united_and_axes_are_right_g12(forms: Path) -> None:
    (forms / "boxes.csv").write_text(
        "name,x1,y1,x2,y2\n"
        "a.PNG,0.1,0.6,0.2,0.9\n"
        "cat/b.png,0,0,1,1\n"
        "a.PNG,0.05,0.7,0.15,0.95\n"
        "10,0.5,0.5,0.75,0.75\n"
        "unknown.png,0,0,1,1\n"
    )

    merged = open_source(forms / "folder", boxes=forms / "boxes.csv")
    apart = open_source(forms / "folder", boxes=forms / "boxes.csv", merge_boxes=False)

    by_name = {name: merged.boxes(n) for n, name in enumerate(names_of(merged))}
    assert by_name == {
        "Dog/1.jpg": (),
        "Dog/10.JPEG": (Box(0.5, 0.5, 0.75, 0.75),),
        "Dog/2.jpeg": (),
        "cat/a.PNG": (Box(0.05, 0.6, 0.2, 0.95),),
        "cat/b.png": (Box(0.0, 0.0, 1.0, 1.0),),
        "emu/ü 1.webp": (),
    }
    assert apart.boxes(3) == (Box(0.1, 0.6, 0.2, 0.9), Box(0.05, 0.7, 0.15, 0.95))
    limited = open_source(forms / "folder", boxes=forms / "boxes.csv", limit=4)
    assert limited.boxes(3) == by_name["cat/a.PNG"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a.PNG,0.1,0.2,0.3\n", "line 1: .* expected name,x1,y1,x2,y2"),
        ("a.PNG,0,0,1,1\na.PNG,0,0,1,one\n", "line 2: .*expected name,x1,y1,x2,y2"),
        ("a.PNG,0.5,0,0.4,1\n", "line 1: got box 0.5, 0, 0.4, 1, expected x1, y1, x2"),
        ("a.PNG,10,20,30,40\n", "line 1: got box 10, 20, 30, 40"),
        ("a.PNG,nan,0,1,1\n", "line 1: got box"),
        ("z.PNG,0,0,1,1\n", "no row belongs to any of the 6 samples"),
    ],
)
def test_a_table_that_holds_no_boxes_is_refused(forms: Path, content: str, says: str) -> None:
    (forms / "boxes.csv").write_text(content)

    with pytest.raises(ValueError, match=says):
        open_source(forms / "folder", boxes=forms / "boxes.csv")


XML = """<annotation><folder>val</folder><filename>a</filename>
<size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>n1</name><bndbox>
<xmin>20</xmin><ymin>50</ymin><xmax>100</xmax><ymax>60</ymax></bndbox></object>
<object><name>n1</name><part><bndbox><xmin>1</xmin></bndbox></part><bndbox>
<xmin>210</xmin><ymin>10</ymin><xmax>50</xmax><ymax>20</ymax></bndbox></object>
</annotation>"""


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz"])
def test_boxes_of_xml_files_are_relative_and_read_when_asked_for(
    forms: Path, temporary: Path, form: str
) -> None:
    files = {"cat/a.xml": XML.encode(), "flat/ü 1.xml": XML.encode(), "x/none.xml": b"<a/>"}
    write_tree(forms / "xml", files)
    (forms / "xml.tar").write_bytes(make_tar(files))
    (forms / "xml.tar.gz").write_bytes(COMPRESS[".tar.gz"](make_tar(files)))
    where = forms / ("xml" if form == "folder" else f"xml.{form}")

    source = open_source(
        forms / "folder", boxes=where, merge_boxes=False, temporary_folder=temporary
    )

    two = (Box(0.1, 0.5, 0.5, 0.6), Box(0.25, 0.1, 1.0, 0.2))
    twin: SampleTable = pickle.loads(pickle.dumps(source))
    assert [twin.boxes(n) for n in range(6)] == [(), (), (), two, (), two]
    twin.close()
    source.close()
    assert list(temporary.iterdir()) == []
    merged = open_source(forms / "folder", boxes=where)
    assert merged.boxes(3) == (Box(0.1, 0.1, 1.0, 0.6),)
    merged.close()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "document type"),
        ("<annotation>", "ExpatError"),
        (XML.replace("<width>200</width>", ""), "'width'"),
        (XML.replace("<width>200", "<width>0"), "got size 0 x 100"),
        (XML.replace("<xmin>20<", "<xmin>left<"), "ValueError"),
        (XML.replace("<ymin>50</ymin>", ""), "'ymin'"),
        (" " * (1 << 20) + XML, "bytes, expected 1048576 at most"),
    ],
)
def test_an_xml_file_that_is_no_annotation_is_refused(forms: Path, content: str, says: str) -> None:
    write_tree(forms / "xml", {"cat/a.xml": content.encode()})
    source = open_source(forms / "folder", boxes=forms / "xml")

    with pytest.raises(ShardFormatError, match=rf"a\.xml: no annotation in XML .*{says}"):
        source.boxes(3)


def test_boxes_that_belong_to_no_sample_are_refused(forms: Path) -> None:
    write_tree(forms / "xml", {"x/none.xml": XML.encode()})

    with pytest.raises(ValueError, match="no XML file belongs to any of the 6 samples"):
        open_source(forms / "folder", boxes=forms / "xml")
    with pytest.raises(ValueError, match="not in Kaggle's layout"):
        open_source(forms / "folder", boxes="auto")
