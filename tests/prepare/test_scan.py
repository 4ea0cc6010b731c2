"""An index for shards that have none: offsets as tarfile sees them, labels, and damage."""

from __future__ import annotations

import contextlib
import functools
import gc
import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from concurrent_dataloader.datasets import ShardDataset, StreamedShards
from concurrent_dataloader.errors import KeyNotFoundError, ShardFormatError
from concurrent_dataloader.formats.tfrecord import (
    ImageExample,
    TFRecordWriter,
    serialize_image_example,
)
from concurrent_dataloader.labels import LabelSpace, imagenet_classes
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.prepare.scan import find_shards, scan_shards
from concurrent_dataloader.prepare.sources import open_source
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.shard_names import Source
from concurrent_dataloader.stores import Credentials, open_store
from concurrent_dataloader.testing import ObjectServer
from tests.datasets.conftest import encode_image

KIT = [entry.wnid for entry in imagenet_classes()]
WNIDS = sorted(KIT)
Members = Sequence[tuple[str, bytes]]


def make_tar(members: Members, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def sample(key: str, label: int | None, size: int = 700, field: str = "jpg") -> Members:
    content = np.random.default_rng(len(key) + size).bytes(size)
    cls = [] if label is None else [(f"{key}.cls", b"%d" % label)]
    return [*cls, (f"{key}.{field}", content)]


def write(root: Path, shards: Mapping[str, bytes]) -> Path:
    for name, body in shards.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def scan(source: Source, **options: object) -> ShardIndex:
    return scan_shards(find_shards(source, open_store), open_store, **options)  # pyright: ignore[reportArgumentType]: a test passes options on


def labels_of(index: ShardIndex) -> list[int] | None:
    return None if index.labels is None else index.labels.tolist()


def some_shards() -> dict[str, bytes]:
    return {
        "t-0.tar": make_tar([*sample("a/1", 0), *sample("b/2", 1, 5000), ("README", b"x")]),
        "t-2.tar": make_tar(sample("ä" * 80 + "/3", 1, field="JPEG"), tarfile.GNU_FORMAT),
        "t-10.tar": make_tar([("dir.with/4.a.jpg", b"image"), ("dir.with/4.json", b"{}")]),
    }


def check_against_tarfile(index: ShardIndex, root: Path) -> None:
    for position in range(len(index)):
        body = (root / index.shard_of(position).name).read_bytes()
        start, stop = index.payload(position)
        name = index.names.key(position)
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            by_name = {member.name.lower(): member for member in tar.getmembers()}
            content = tar.extractfile(by_name[name.lower()])
            assert content is not None
            assert body[start:stop] == content.read()
        extent_start, extent_stop = index.extent(position)
        with tarfile.open(fileobj=io.BytesIO(body[extent_start:extent_stop] + bytes(1024))) as tar:
            key = name.partition(".jp")[0].partition(".a")[0]
            assert all(member.startswith(f"{key}.") for member in tar.getnames())
            assert name.lower() in map(str.lower, tar.getnames())


def test_samples_lie_where_tarfile_finds_them(tmp_path: Path) -> None:
    write(tmp_path, some_shards())

    index = scan(tmp_path)

    assert [shard.name for shard in index.shards] == ["t-0.tar", "t-2.tar", "t-10.tar"]
    assert [shard.size_bytes for shard in index.shards] == [
        (tmp_path / shard.name).stat().st_size for shard in index.shards
    ]
    assert list(index.names.keys()) == [
        "a/1.jpg",
        "b/2.jpg",
        f"{'ä' * 80}/3.jpeg",
        "dir.with/4.a.jpg",
    ]
    check_against_tarfile(index, tmp_path)


def test_a_folder_and_a_bucket_give_the_same_index(
    tmp_path: Path, object_server: ObjectServer
) -> None:
    write(tmp_path, some_shards())
    object_server.put_folder("sets", tmp_path, prefix="p/")
    open_root = functools.partial(
        open_store,
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )
    told: list[tuple[str, int]] = []

    local = scan(f"{tmp_path}/t-*.tar")
    object_server.reset_counters()
    remote = scan_shards(
        find_shards("s3://sets/p/t-*.tar", open_root),
        open_root,
        on_shard=lambda name, num_samples: told.append((name, num_samples)),
    )

    assert remote.to_bytes() == local.to_bytes()
    assert told == [("t-0.tar", 2), ("t-2.tar", 1), ("t-10.tar", 1)]
    counters = object_server.counters()
    assert counters.num_gets <= 5, "one GET a shard and two listings: members are small"


def test_long_members_are_not_read(object_server: ObjectServer) -> None:
    big = 12 << 20
    body = make_tar([*sample("a", 1, big), *sample("b", 0, big)])
    object_server.put_objects("sets", {"x.tar": body})
    open_root = functools.partial(
        open_store,
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )
    object_server.reset_counters()

    index = scan_shards(find_shards(["s3://sets/x.tar"], open_root), open_root)

    assert labels_of(index) == [1, 0]
    assert object_server.counters().body_bytes_sent < len(body) * 3 // 4


def test_the_payload_is_the_callers_choice(tmp_path: Path) -> None:
    members = [("a.jpg", b"j"), ("a.png", b"p"), ("a.txt", b"t")]
    write(tmp_path, {"x.tar": make_tar(members)})

    names = [scan(tmp_path, payload=wanted).names.key(0) for wanted in (None, "png", "webp;txt")]

    assert names == ["a.jpg", "a.png", "a.txt"]
    with pytest.raises(ShardFormatError, match=r"x.tar: sample 'a' has fields jpg, png, txt"):
        scan(tmp_path, payload="webp")


def test_tensors_and_content_that_is_no_image_are_payloads_too(tmp_path: Path) -> None:
    members = [
        *sample("1", 4, field="pth"),
        *sample("2", 5, field="img"),
        *sample("3", 6, field="flac"),
    ]
    write(tmp_path, {"x.tar": make_tar(members)})

    index = scan(tmp_path)

    assert list(index.names.keys()) == ["1.pth", "2.img", "3.flac"]
    assert labels_of(index) == [4, 5, 6]


# Labels


def test_labels_count_from_where_it_is_declared(tmp_path: Path) -> None:
    write(tmp_path, {"x.tar": make_tar([*sample("1", 1), *sample("2", 1000)])})

    assert labels_of(scan(tmp_path)) == [1, 1000]
    assert labels_of(scan(tmp_path, label_base=1)) == [0, 999]
    kit = scan(tmp_path, label_space=LabelSpace.ILSVRC2012_ID)
    assert labels_of(kit) == [0, 999]
    assert (kit.label_space, kit.classes) == ("ilsvrc2012_id", tuple(KIT))
    with pytest.raises(
        ShardFormatError, match=r"x.tar: sample '2.jpg': got label 1000, expected 0"
    ):
        scan(tmp_path, label_space=LabelSpace.SORTED_WNID)


def test_a_label_below_the_declared_base_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"x.tar": make_tar([*sample("1", 1), *sample("2", 0)])})

    with pytest.raises(ShardFormatError, match=r"x.tar: sample '2.jpg': got label 0, expected 1"):
        scan(tmp_path, label_base=1)


@pytest.mark.parametrize(
    ("wnids", "base", "space"),
    [(WNIDS, 0, "sorted_wnid"), (KIT, 1, "ilsvrc2012_id"), (KIT, 0, "ilsvrc2012_id")],
)
def test_a_12_wordnet_ids_in_the_keys_tell_the_label_space(
    tmp_path: Path, wnids: list[str], base: int, space: str
) -> None:
    """A-12: ids in the order of the development kit passed for those of torchvision's weights."""
    members = [
        member for label in (3, 700, 999) for member in sample(f"{wnids[label]}/x", label + base)
    ]
    write(tmp_path, {"x.tar": make_tar(members)})

    index = scan(tmp_path)
    dataset = ShardDataset(index, open_store(tmp_path))
    dataset.convert_labels(LabelSpace.SORTED_WNID)

    assert index.label_space == space
    assert labels_of(index) == [3, 700, 999]
    assert [dataset.label(i) for i in range(3)] == [WNIDS.index(wnids[n]) for n in (3, 700, 999)]


def test_folders_that_are_numbered_anew_are_classes_of_their_own(tmp_path: Path) -> None:
    members = [*sample("n01443537/x", 0), *sample("n01440764/y", 1), *sample("n01443537/z", 0)]
    write(tmp_path, {"x.tar": make_tar(members)})

    index = scan(tmp_path)

    assert (index.classes, index.label_space) == (("n01443537", "n01440764"), None)


def test_dots_before_names_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path, {"x.tar": make_tar([*sample("./1", 0), *sample("2", 1)])})

    index = scan(tmp_path)

    assert (index.classes, labels_of(index)) == (None, [0, 1])
    assert ShardDataset(index.select([1, 0]), open_store(tmp_path), decode=None)[0][1] == 1


def test_labels_may_be_missing_or_stand_in_json(tmp_path: Path) -> None:
    with_json = [("1.jpg", b"x"), ("1.json", json.dumps({"label": 3}).encode())]
    write(tmp_path / "none", {"x.tar": make_tar(sample("1", None))})
    write(tmp_path / "some", {"x.tar": make_tar([*with_json, *sample("2", None)])})

    assert labels_of(scan(tmp_path / "none")) is None
    assert labels_of(scan(tmp_path / "some")) == [3, -1]


# TFRecord


def make_records(examples: Sequence[ImageExample], label_base: int) -> bytes:
    file = io.BytesIO()
    writer = TFRecordWriter(file)
    for example in examples:
        writer.write(serialize_image_example(example, label_base=label_base))
    return file.getvalue()


def test_g_14_labels_of_tfrecords_count_from_1_unless_declared(tmp_path: Path) -> None:
    """G-14: labels of TensorFlow's builder, 1 to 1000, were used as they stood."""
    plain = [ImageExample(b"image", label) for label in (0, 999)]
    write(tmp_path / "one", {"train-00000-of-00001": make_records(plain, 1)})
    write(tmp_path / "zero", {"train-00000-of-00001": make_records(plain, 0)})

    assert labels_of(scan(tmp_path / "one")) == [0, 999]
    assert labels_of(scan(tmp_path / "zero", label_base=0)) == [0, 999]
    with pytest.raises(
        ShardFormatError, match=r"-00001: sample .*: got label 0, expected 1 or more"
    ):
        scan(tmp_path / "zero")


def test_synsets_of_tfrecords_tell_the_label_space(tmp_path: Path) -> None:
    examples = [
        ImageExample(b"i%d" % label, label, filename=f"{WNIDS[label]}_1.JPEG", synset=WNIDS[label])
        for label in (5, 900)
    ]
    body = make_records(examples, 1)
    write(tmp_path, {"train-00000-of-00002": body, "train-00001-of-00002": body})

    index = scan(tmp_path)

    assert index.kind == "tfrecord"
    assert (index.label_space, labels_of(index)) == ("tf_builder", [5, 900] * 2)
    assert index.names.key(1) == f"{WNIDS[900]}/{WNIDS[900]}_1.JPEG"
    raws = ShardDataset(index, open_store(tmp_path), decode=None)
    assert [raws[i][0] for i in range(4)] == [b"i5", b"i900"] * 2


def test_folders_in_the_file_names_of_tfrecords_are_classes(tmp_path: Path) -> None:
    examples = [
        ImageExample(b"image", label, filename=f"{name}/1.jpg")
        for label, name in enumerate(["cat", "dog"])
    ]
    write(tmp_path, {"x.tfrecord": make_records(examples, 1)})

    assert scan(tmp_path).classes == ("cat", "dog")


def test_g_14_a_wrong_crc_is_an_error(tmp_path: Path) -> None:
    body = bytearray(make_records([ImageExample(b"image", 3)], 1))
    body[-6] ^= 1
    write(tmp_path, {"x.tfrecord": bytes(body)})

    with pytest.raises(ShardFormatError, match=r"x.tfrecord .*CRC"):
        scan(tmp_path)


# Damage


def test_shards_that_cannot_be_indexed_are_errors_that_name_them(tmp_path: Path) -> None:
    good = make_tar([*sample("a", 0), *sample("b", 1)])
    bad: dict[str, tuple[bytes, str]] = {
        "cut.tar": (good[:1300], "cut short"),
        "text.tar": (b"no tar" * 200, "no header"),
        "twice.tar": (make_tar([*sample("a", 0), *sample("a", 1)]), "'a' has field 'cls' twice"),
        "apart.tar": (
            make_tar([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"1")]),
            "sample 'a' comes back after others",
        ),
        "bare.tar": (make_tar([("a.cls", b"1")]), "sample 'a' has fields cls"),
        "label.tar": (make_tar([("a.cls", b"x"), ("a.jpg", b"")]), "sample 'a': cls: got b'x'"),
    }
    write(tmp_path, {name: body for name, (body, _) in bad.items()})

    for name, (_, text) in bad.items():
        with pytest.raises(ShardFormatError, match=text) as caught:
            scan(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_compressed_tar_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, {"x.tar.gz": gzip.compress(make_tar(sample("a", 0)))})

    with pytest.raises(
        ShardFormatError, match=r"x.tar.gz: a compressed tar .*; stream it, or convert"
    ):
        scan(tmp_path)


def test_missing_shards_mixed_kinds_and_empty_tars_are_errors(tmp_path: Path) -> None:
    write(tmp_path, {"a.tar": make_tar([]), "b.tfrecord": b""})

    with pytest.raises(KeyNotFoundError, match=r"a-[123].tar: no such shard"):
        scan(f"{tmp_path}/a-{{1..3}}.tar")
    with pytest.raises(ValueError, match=r"a.tar, b.tfrecord, expected shards of one kind"):
        scan(tmp_path)
    with pytest.raises(KeyNotFoundError, match="no sample in 1 shards"):
        scan(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="cannot be listed"):
        scan("http://127.0.0.1:1/folder/*.tar")


# Other writers


def test_shards_of_the_webdataset_package_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/train-%06d.tar", maxcount=2, verbose=0) as sink:
        for number in range(5):
            image = np.full((4, 4, 3), number, np.uint8)
            sink.write({"__key__": f"{number:07d}", "ppm": image, "cls": number, "json": {"n": 1}})

    index = scan(f"{tmp_path}/train-{{000000..000002}}.tar")
    dataset = ShardDataset(index, open_store(tmp_path))
    whole = ShardDataset(index, dataset.store, fields=("jpg;ppm", "cls", "json"))

    assert [(dataset[i][0].getpixel((0, 0))[0], dataset[i][1]) for i in range(5)] == [
        (number, number) for number in range(5)
    ]
    assert whole[3][1:] == (3, {"n": 1})


@pytest.mark.parametrize("tar_format", ["gnu", "ustar", "posix", "v7"])
def test_shards_of_gnu_tar_are_read(tmp_path: Path, tar_format: str) -> None:
    folder = tmp_path / "in"
    names = {f"a/{number}.{field}": field for number in range(3) for field in ("cls", "jpg")}
    write(
        folder, {name: b"7" if field == "cls" else name.encode() for name, field in names.items()}
    )
    command = ["tar", "--sort=name", f"--format={tar_format}", "-cf", str(tmp_path / "x.tar"), "a"]
    subprocess.run(command, cwd=folder, check=True)

    index = scan(tmp_path / "x.tar")

    raws = ShardDataset(index, open_store(tmp_path), decode=None)
    assert [raws[i] for i in range(3)] == [(b"a/%d.jpg" % number, 7) for number in range(3)]


# The command


def test_the_command_writes_an_index_beside_the_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {f"train-{number:06}.tar": make_tar(sample("a", 7)) for number in range(3)})
    write(tmp_path, {"val-000000.tar": make_tar(sample("b", 1))})
    output = tmp_path / "train-index.npz"

    status = main(["index", str(tmp_path), "--output", str(output)])

    assert status == 0
    assert [shard.name for shard in ShardIndex.load(output).shards] == [
        f"train-{number:06}.tar" for number in range(3)
    ]
    said = capsys.readouterr()
    assert said.out == f"{output}: 3 samples in 3 shards, labels 0 to 7\n"
    assert [line.count("train-") for line in said.err.splitlines()] == [1, 1, 1]


def test_names_are_relative_to_the_folder_of_the_index(tmp_path: Path) -> None:
    write(tmp_path / "sub", {"x-0.tar": make_tar(sample("a", 7))})
    above, elsewhere = tmp_path / "i.npz", tmp_path / "other" / "i.npz"

    for output in (above, elsewhere):
        assert main(["index", f"{tmp_path}/sub/x-{{0..0}}.tar", "--output", str(output)]) == 0

    assert ShardIndex.load(above).shards[0].name == "sub/x-0.tar"
    assert ShardIndex.load(elsewhere).shards[0].name == "x-0.tar"


def test_the_command_reads_a_bucket_and_uploads_the_index(
    tmp_path: Path, object_server: ObjectServer
) -> None:
    object_server.put_objects("sets", {"p/x-0.tar": make_tar(sample("a", 1))})
    credentials = tmp_path / "credentials.json"
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    credentials.write_text(json.dumps(keys))
    output = tmp_path / "index.npz"

    status = main(
        [
            *("index", "s3://sets/p/x-{0..0}.tar", "--output", str(output), "--label-base", "1"),
            *("--upload", "s3://sets/p/train-index.npz", "--credentials", str(credentials)),
            *("--endpoint-url", object_server.endpoint_url),
        ]
    )

    store = open_store(
        "s3://sets/p",
        endpoint_url=object_server.endpoint_url,
        credentials=Credentials(object_server.access_key, object_server.secret_key),
    )
    uploaded = ShardIndex.from_bytes(store.get("train-index.npz"), "uploaded")
    assert status == 0
    assert (labels_of(uploaded), uploaded.shards[0].name) == ([0], "x-0.tar")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["x-{0..3}.tar", "--output", "i.json"], "expected a name that ends in .npz"),
        (["a", "b", "--output", "i.json"], "SOURCE: got 2"),
        (["a.tar", "--output", "i.npz", "--classes-output", "c.json"], "--classes-output"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", *arguments]) == (1 if text.startswith("SOURCE") else 2)
    assert text in capsys.readouterr().err


def test_shards_of_several_splits_need_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"train-0.tar": b"", "val-0.tar": b""})

    assert main(["index", str(tmp_path), "--output", str(tmp_path / "all.npz")]) == 1
    assert "has shards of train, val, expected those of one split" in capsys.readouterr().err


# Names with dots


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files open
def test_a10_all_readers_agree_on_names_with_dots(tmp_path: Path) -> None:
    """The stream had the labels; index, random access and packers dropped them in silence."""
    photo = encode_image(0)
    members = {"ü.1.jpg": photo, "ü.1.cls": b"7", "v.d/x.2.JPG": photo, "v.d/x.2.cls": b"5"}
    root = write(tmp_path / "shards", {"train-0.tar": make_tar(list(members.items()))})

    index = scan(root)
    by_position = ShardDataset(index, open_store(root))
    by_field = ShardDataset(index, open_store(root), fields=("jpg", "cls"), decode="pillow")

    assert labels_of(index) == [7, 5]
    assert [label for _, label in StreamedShards(root)] == [7, 5]
    assert [by_position[n][1] for n in range(2)] == [7, 5]
    assert [(by_field[n][0].size, by_field[n][1]) for n in range(2)] == [
        ((24, 20), 7),
        ((24, 20), 5),
    ]
    webdataset = pytest.importorskip("webdataset")
    files = str(root / "train-0.tar")
    theirs = webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode()
    assert [each.get("1.cls", each.get("2.cls")) for each in theirs] == [7, 5]
    del theirs
    gc.collect()
    with contextlib.closing(open_source(f"{root}/train-*.tar", on_stray="error")) as source:
        assert [source.name(n) for n in range(2)] == ["ü.1.jpg", "v.d/x.2.JPG"]
        assert [source.label(n) for n in range(2)] == [7, 5]


def test_a10_samples_whose_names_begin_alike_are_refused_or_told_apart(tmp_path: Path) -> None:
    photo = encode_image(0)
    members = {"a.1.jpg": photo, "a.1.cls": b"1", "a.2.jpg": photo, "a.2.cls": b"2"}
    root = write(tmp_path / "shards", {"train-0.tar": make_tar(list(members.items()))})

    with pytest.raises(ShardFormatError, match=r"'a' has the images 1.jpg, 2.jpg, expected one"):
        scan(root)
    with pytest.raises(ShardFormatError, match=r"cls: got 1.cls and 2.cls, expected one"):
        scan(root, payload="1.jpg")
    with pytest.raises(ShardFormatError, match=r"sample 'a' has no field"):
        list(StreamedShards(root))
    with contextlib.closing(open_source(root / "train-0.tar", on_stray="error")) as source:
        assert [source.label(n) for n in range(2)] == [1, 2]


def test_one_of_several_images_is_named_or_has_the_plain_name(tmp_path: Path) -> None:
    views = {"a.left.jpg": b"l", "a.right.jpg": b"right", "a.cls": b"3"}
    root = write(tmp_path / "views", {"train-0.tar": make_tar(list(views.items()))})
    masks = {"a.jpg": b"image", "a.mask.png": b"m", "a.cls": b"4"}
    other = write(tmp_path / "masks", {"train-0.tar": make_tar(list(masks.items()))})

    assert scan(root, payload="right.jpg").names.key(0) == "a.right.jpg"
    assert labels_of(scan(root, payload="left.jpg")) == [3]
    assert scan(other).names.key(0) == "a.jpg"
    with contextlib.closing(open_source(root / "train-0.tar", on_stray="error")) as source:
        assert [source.label(n) for n in range(2)] == [3, 3]


def test_a10_a_deep_check_sees_the_labels_of_names_with_dots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {"a.1.jpg": encode_image(0), "a.1.cls": b"seven"}
    root = write(tmp_path / "shards", {"train-0.tar": make_tar(list(members.items()))})

    assert main(["validate", str(root), "--deep"]) != 0
    assert "got class b'seven', expected a number" in capsys.readouterr().out
