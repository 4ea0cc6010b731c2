"""ImageNet's files: meta.mat, ground truth, development kit, original archives, Kaggle's layout."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import ImageNet

from concurrent_dataloader import devkit
from concurrent_dataloader.errors import (
    ClassesFormatError,
    KeyNotFoundError,
    ShardFormatError,
    UnknownClassError,
)
from concurrent_dataloader.formats.fields import Box
from concurrent_dataloader.labels import LabelSpace, convert_ids, imagenet_classes
from concurrent_dataloader.prepare.sources import open_source
from tests.prepare.source_files import (
    COMPRESS,
    labels_of,
    make_tar,
    make_tar_of_tars,
    names_of,
    write_tree,
)

WNIDS = [entry.wnid for entry in imagenet_classes()]
INNER_NODE = "n00001740"
# Source: the first lines of ILSVRC2012_validation_ground_truth.txt, and the labels that
# torchvision gives these images.
GROUND_TRUTH = [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
SORTED_LABELS = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332]
VAL = {f"ILSVRC2012_val_{n:08d}.JPEG": b"%d" % n for n in range(1, 11)}


def make_meta(ids: Mapping[str, Any]) -> bytes:
    """A meta.mat with the fields that are looked at, and some that are not."""
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "children")]
    synsets = np.zeros((len(ids), 1), fields)
    for row, (wnid, number) in enumerate(ids.items()):
        synsets[row, 0] = (number, wnid, f"words of {wnid}", np.array([[1.0, 2.0]]))
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    return file.getvalue()


@pytest.fixture(scope="module")
def meta() -> bytes:
    """As in the kit: 1000 leaves, then inner nodes."""
    leaves = {wnid: float(number) for number, wnid in enumerate(WNIDS, start=1)}
    return make_meta({**leaves, INNER_NODE: 1001.0, "n00002137": 1002.0})


def make_devkit(meta: bytes, lines: list[int] | None = None) -> bytes:
    text = "".join(f"{number}\n" for number in lines or GROUND_TRUTH).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    files = {f"{folder}/meta.mat": meta, f"{folder}/{devkit.GROUND_TRUTH}": text}
    return COMPRESS[".tar.gz"](make_tar({**files, "ILSVRC2012_devkit_t12/readme.txt": b"x"}))


def write_truth(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# -- meta.mat


@pytest.mark.parametrize("kind", [float, int, str, np.uint16])
def test_ids_of_meta_mat_are_exact_as_numbers_and_as_text_a13(kind: type) -> None:
    ids = {"n01440764": 449, "n02119789": 1, "n01443537": 450, "n02100735": 1860}

    found = devkit.parse_meta(make_meta({w: kind(n) for w, n in ids.items()}), "meta.mat")

    assert found == ids


def test_a_meta_mat_of_one_class_is_read() -> None:
    assert devkit.parse_meta(make_meta({"n1": "12"}), "meta.mat") == {"n1": 12}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no matlab", "meta.mat: no table of synsets"),
        (make_meta({"n1": 1.5}), "got ILSVRC2012_ID '1.5', expected a whole number"),
        (make_meta({"n1": "4x"}), "no table of synsets .*4x"),
        (make_meta({"n1": 1, "n2": 1}), "a WNID or an ILSVRC2012_ID stands there twice"),
    ],
    # Not by the contents: those hold the second of their making, and processes that share the tests
    # out among themselves must find the same names.
    ids=["no_matlab", "a_fraction", "no_number", "twice"],
)
def test_a_file_that_is_no_meta_mat_is_refused(content: bytes, says: str) -> None:
    with pytest.raises(ClassesFormatError, match=says):
        devkit.parse_meta(content, "meta.mat")


def test_labels_by_meta_mat_are_torchvisions_unless_the_kits_are_asked_for_a12(
    tmp_path: Path, meta: bytes
) -> None:
    (tmp_path / "meta.mat").write_bytes(meta)
    chosen = ["n01440764", "n02119789", "n15075141"]
    root = write_tree(tmp_path / "train", {f"{wnid}/1.JPEG": b"" for wnid in chosen})

    ours = open_source(root, meta_mat=tmp_path / "meta.mat")
    kits = open_source(root, meta_mat=tmp_path / "meta.mat", label_space="ilsvrc2012_id")

    # Source: torchvision's label and the kit's ILSVRC2012_ID of these three, less 1.
    assert (labels_of(ours), ours.label_space) == ([0, 278, 999], "sorted_wnid")
    assert (labels_of(kits), kits.label_space) == ([448, 0, 888], "ilsvrc2012_id")
    assert list(ours.classes or ()) == sorted(WNIDS)
    assert list(kits.classes or ()) == WNIDS


def test_an_inner_node_of_wordnet_is_no_class_a12(tmp_path: Path, meta: bytes) -> None:
    (tmp_path / "meta.mat").write_bytes(meta)
    root = write_tree(tmp_path / "train", {f"{INNER_NODE}/1.JPEG": b"", f"{WNIDS[0]}/1.JPEG": b""})

    with pytest.raises(UnknownClassError, match=r"n00001740/1\.JPEG: .* inner node .* 1001"):
        open_source(root, meta_mat=tmp_path / "meta.mat")
    skipped = open_source(root, meta_mat=tmp_path / "meta.mat", on_unknown="skip")
    assert names_of(skipped) == [f"{WNIDS[0]}/1.JPEG"]


def test_a_meta_mat_of_other_classes_keeps_their_order(tmp_path: Path) -> None:
    (tmp_path / "meta.mat").write_bytes(make_meta({"zebra": "1", "ant": "2", "animal": "1200"}))
    root = write_tree(tmp_path / "train", {"ant/1.JPEG": b"", "zebra/1.JPEG": b""})

    source = open_source(root, meta_mat=tmp_path / "meta.mat")

    assert (source.classes, labels_of(source)) == (("zebra", "ant"), [1, 0])
    assert source.label_space is None


def test_all_classes_of_imagenet_by_folder_are_declared(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(make_tar({f"{wnid}/1.JPEG": b"" for wnid in WNIDS}))

    ours = open_source(tmp_path / "train.tar")
    kits = open_source(tmp_path / "train.tar", label_space=LabelSpace.ILSVRC2012_ID)

    assert (ours.label_space, labels_of(ours)) == ("sorted_wnid", list(range(1000)))
    expected = convert_ids(np.arange(1000), LabelSpace.SORTED_WNID, LabelSpace.ILSVRC2012_ID) - 1
    assert (kits.label_space, labels_of(kits)) == ("ilsvrc2012_id", expected.tolist())
    assert [(kits.classes or ())[label] for label in expected.tolist()] == sorted(WNIDS)


def test_some_classes_of_imagenet_are_numbered_as_they_occur(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {f"{wnid}/1.JPEG": b"" for wnid in WNIDS[:3]})

    source = open_source(root)

    assert (labels_of(source), source.label_space) == ([0, 1, 2], None)
    with pytest.raises(ValueError, match="label_space: got 'ilsvrc2012_id' for classes that are"):
        open_source(root, label_space="ilsvrc2012_id")


@pytest.mark.parametrize("space", ["ilsvrc2012_id", "sorted_wnid", "tf_builder"])
def test_a_map_of_imagenets_ids_keeps_their_space_and_is_converted(
    tmp_path: Path, space: str
) -> None:
    ids = {
        wnid: convert_ids(n, LabelSpace.ILSVRC2012_ID, LabelSpace(space))
        for n, wnid in enumerate(WNIDS, start=1)
    }
    (tmp_path / "classes.json").write_text(
        json.dumps({wnid: {"id": number, "name": f"a {wnid}"} for wnid, number in ids.items()})
    )
    root = write_tree(tmp_path / "train", {"n01440764/1.JPEG": b"", "n02119789/1.JPEG": b""})

    source = open_source(root, class_map=tmp_path / "classes.json")
    converted = open_source(
        root, class_map=tmp_path / "classes.json", label_space=LabelSpace.SORTED_WNID
    )

    first = LabelSpace(space).first_id
    assert source.label_space == space
    assert labels_of(source) == [ids["n01440764"] - first, ids["n02119789"] - first]
    assert [(source.classes or ())[n or 0] for n in labels_of(source)] == ["n01440764", "n02119789"]
    assert (labels_of(converted), converted.label_space) == ([0, 278], "sorted_wnid")


# -- ground truth


TRUTHS: dict[str, str] = {
    "ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in GROUND_TRUTH),
    "wnids.txt": "".join(f"{WNIDS[n - 1]}\n" for n in GROUND_TRUTH),
    "val.txt": "".join(f"{name} {n}\n" for name, n in zip(VAL, SORTED_LABELS, strict=True)),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(
        f"{name[:-5]},{WNIDS[n - 1]} 85 1 499 272 {WNIDS[n - 1]} 3 4 5 6 \n"
        for name, n in reversed(list(zip(VAL, GROUND_TRUTH, strict=True)))
    ),
    "from-0.json": json.dumps({str(n): number for n, number in enumerate(GROUND_TRUTH)}),
    "from-1.json": json.dumps({str(n): number for n, number in enumerate(GROUND_TRUTH, start=1)}),
}


@pytest.mark.parametrize("kind", TRUTHS)
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_flat_validation_set_has_torchvisions_labels_by_any_list(
    tmp_path: Path, kind: str, form: str
) -> None:
    (tmp_path / kind).write_text(TRUTHS[kind])
    write_tree(tmp_path / "val", VAL)
    (tmp_path / "val.tar").write_bytes(make_tar(VAL))
    where = tmp_path / ("val" if form == "folder" else "val.tar")
    how: dict[str, Any] = {
        "class_map" if kind.endswith("json") else "ground_truth": tmp_path / kind
    }

    source = open_source(where, **how)

    assert names_of(source) == list(VAL)
    assert labels_of(source) == SORTED_LABELS
    assert (source.label_space, source.classes) == ("sorted_wnid", tuple(sorted(WNIDS)))


def test_a_flat_and_a_sorted_validation_folder_give_the_same_labels(tmp_path: Path) -> None:
    folders = {
        f"{WNIDS[n - 1]}/{name}": VAL[name] for name, n in zip(VAL, GROUND_TRUTH, strict=True)
    }
    write_tree(tmp_path / "flat" / "val", VAL)
    write_truth(tmp_path / "flat" / devkit.GROUND_TRUTH, GROUND_TRUTH)
    write_tree(tmp_path / "sorted" / "val", folders)
    (tmp_path / "classes.txt").write_text("".join(f"{wnid}\n" for wnid in sorted(WNIDS)))

    flat = open_source(tmp_path / "flat", split="val")
    in_folders = open_source(tmp_path / "sorted", split="val", class_map=tmp_path / "classes.txt")

    by_image = {name.rpartition("/")[2]: n for n, name in enumerate(names_of(in_folders))}
    assert [in_folders.label(by_image[name]) for name in names_of(flat)] == labels_of(flat)
    assert in_folders.label_space == flat.label_space == "sorted_wnid"


@pytest.mark.parametrize(
    "name",
    [
        devkit.DEVKIT,
        devkit.GROUND_TRUTH,
        f"ILSVRC2012_devkit_t12/data/{devkit.GROUND_TRUTH}",
        devkit.KAGGLE_SOLUTION,
        f"val/{devkit.GROUND_TRUTH}",
    ],
)
def test_what_lies_beside_a_flat_validation_folder_is_found_without_network_b11(
    tmp_path: Path, meta: bytes, name: str
) -> None:
    if name == devkit.DEVKIT:
        content = make_devkit(meta)
    else:
        content = TRUTHS[name.rpartition("/")[2]].encode()
    write_tree(tmp_path, {f"val/{image}": VAL[image] for image in VAL} | {name: content})

    source = open_source(tmp_path, split="val")

    assert (labels_of(source), source.label_space) == (SORTED_LABELS, "sorted_wnid")


def test_a_flat_validation_folder_without_any_list_says_what_is_missing(tmp_path: Path) -> None:
    write_tree(tmp_path / "val", VAL)

    with pytest.raises(ClassesFormatError, match=r"none of LOC_val_solution\.csv, .* give ground_"):
        open_source(tmp_path, split="val")


def test_a_test_split_has_no_labels(tmp_path: Path) -> None:
    write_tree(tmp_path / "test", {"ILSVRC2012_test_00000001.JPEG": b"1"})

    source = open_source(tmp_path, split="test")

    assert (labels_of(source), source.classes) == ([None], None)


@pytest.mark.parametrize("change", [-1, 1])
def test_as_many_lines_as_images_are_needed(tmp_path: Path, change: int) -> None:
    write_tree(tmp_path / "val", VAL)
    lines = [*GROUND_TRUTH, 5][: len(VAL) + change]

    with pytest.raises(ClassesFormatError, match=f"got {10 + change} lines for 10 images"):
        open_source(tmp_path / "val", ground_truth=write_truth(tmp_path / "truth.txt", lines))


def test_a_limit_does_not_count_against_the_lines(tmp_path: Path) -> None:
    write_tree(tmp_path / "val", VAL)
    truth = write_truth(tmp_path / "truth.txt", GROUND_TRUTH)

    source = open_source(tmp_path / "val", ground_truth=truth, limit=3)

    assert labels_of(source) == SORTED_LABELS[:3]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG"], "go from 1 to 3"),
        (["a/ILSVRC2012_val_00000001.JPEG", "b/ILSVRC2012_val_00000001.JPEG"], "go from 1 to 1"),
        (
            ["ILSVRC2012_val_00000001.JPEG", "other_00000002.JPEG"],
            "other_00000002.JPEG: has no num",
        ),
        (["x.JPEG", "y.JPEG"], r"x\.JPEG: has no number"),
    ],
)
def test_images_that_do_not_fit_the_lines_are_refused(
    tmp_path: Path, names: list[str], says: str
) -> None:
    write_tree(tmp_path / "val", dict.fromkeys(names, b""))
    truth = write_truth(tmp_path / "truth.txt", [1, 2])

    with pytest.raises(ClassesFormatError, match=says):
        open_source(tmp_path / "val", ground_truth=truth)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "got no line"),
        ("1\nb 2\n", "got lines of several kinds"),
        ("\xff\n", "no text"),
        ("".join(f"{name[:-5]} {n}\n" for n, name in enumerate(VAL, 1)), "says no class"),
        ("a.JPEG 3\na.JPEG 2\n", "a name stands there twice"),
        ("".join(f"{n}\n" for n in [*GROUND_TRUTH[:-1], 1001]), "got class id 1001, expected 1 to"),
    ],
)
def test_a_file_that_is_no_ground_truth_is_refused(tmp_path: Path, content: str, says: str) -> None:
    write_tree(tmp_path / "val", VAL)
    (tmp_path / "truth.txt").write_bytes(content.encode("latin-1"))

    with pytest.raises(ClassesFormatError, match=says):
        open_source(tmp_path / "val", ground_truth=tmp_path / "truth.txt")


def test_ground_truth_of_another_data_set_has_its_own_classes(tmp_path: Path) -> None:
    images = {f"img{n}.jpg": b"" for n in (1, 2, 3, 10)}
    write_tree(tmp_path / "val", images | {f"img{n}.jpg": b"" for n in range(4, 10)})
    by_id = write_truth(tmp_path / "ids.txt", [3, 1, 2, 1, 1, 1, 1, 1, 1, 3])
    by_name = write_truth(tmp_path / "names.txt", ["cat", *["dog"] * 8, "ape"])

    ids = open_source(tmp_path / "val", ground_truth=by_id)
    names = open_source(tmp_path / "val", ground_truth=by_name)

    # Sorted by name: img1, img10, img2, ...
    assert (labels_of(ids)[:4], ids.classes) == ([2, 2, 0, 1], ("1", "2", "3"))
    assert (labels_of(names)[:3], names.classes) == ([1, 0, 2], ("ape", "cat", "dog"))
    assert (ids.label_space, names.label_space) == (None, None)


# -- original archives


@pytest.fixture
def archives(tmp_path: Path, meta: bytes) -> Path:
    """What torchvision's ImageNet asks for, with two classes of train."""
    train = {f"{wnid}/{wnid}_{n}.JPEG": wnid.encode() for wnid in WNIDS[:2] for n in range(2)}
    return write_tree(
        tmp_path / "archives",
        {
            "ILSVRC2012_img_train.tar": make_tar_of_tars(train),
            "ILSVRC2012_img_val.tar": make_tar(VAL),
            devkit.DEVKIT: make_devkit(meta),
        },
    )


def test_the_original_archives_are_read_where_they_lie(archives: Path) -> None:
    train = open_source(archives, split="train")
    val = open_source(archives, split="val")

    assert names_of(train)[0] == "n02100735/n02100735_0.JPEG"
    assert (labels_of(train), train.classes) == ([0, 0, 1, 1], ("n02100735", "n02119789"))
    assert (labels_of(val), bytes(val.read(9))) == (SORTED_LABELS, b"10")
    with pytest.raises(ValueError, match="holds tars of train, val"):
        open_source(archives)


def test_labels_are_those_of_torchvisions_imagenet(tmp_path: Path, meta: bytes) -> None:
    val = {
        f"val/{WNIDS[n - 1]}/{name}": VAL[name] for name, n in zip(VAL, GROUND_TRUTH, strict=True)
    }
    train = {f"train/{WNIDS[n - 1]}/{n}.JPEG": b"" for n in GROUND_TRUTH}
    root = write_tree(tmp_path, {**val, **train})
    names = {wnid: (f"name of {wnid}",) for wnid in WNIDS}
    torch.save((names, [WNIDS[n - 1] for n in GROUND_TRUTH]), root / "meta.bin")

    for split in ("train", "val"):
        oracle = ImageNet(str(root), split)
        source = open_source(root, split=split)

        ours = dict(zip(names_of(source), labels_of(source), strict=True))
        expected = {str(Path(path).relative_to(root / split)): n for path, n in oracle.samples}
        assert ours == expected
        assert list(source.classes or ()) == oracle.wnids


def test_only_checksums_that_are_sure_are_known() -> None:
    assert dict(devkit.ARCHIVE_MD5) == {
        "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
        "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
        "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    }


def test_an_archive_is_compared_with_its_checksum(archives: Path) -> None:
    content = (archives / "ILSVRC2012_img_val.tar").read_bytes()
    known = {"some.tar": hashlib.md5(content).hexdigest()}

    devkit.check_archive(io.BytesIO(content), "some.tar", "here", md5_by_name=known)
    with pytest.raises(ShardFormatError, match=r"here: got MD5 .*, expected .* fetch it anew"):
        devkit.check_archive(io.BytesIO(content[:-1]), "some.tar", "here", md5_by_name=known)


def test_archives_are_checked_on_request(archives: Path) -> None:
    with pytest.raises(ShardFormatError, match=r"img_val\.tar: got MD5 .* expected 29b22e2961"):
        open_source(archives, split="val", verify_archives=True)
    with pytest.raises(ShardFormatError, match=r"devkit_t12\.tar\.gz: got MD5 .* expected fa75699"):
        open_source(
            write_tree(archives / "val", VAL),
            ground_truth=archives / devkit.DEVKIT,
            verify_archives=True,
        )
    with pytest.raises(ValueError, match=r"verify_archives: .* nothing was read from an original"):
        open_source(archives / "val", label_rule="none", verify_archives=True)
    (archives / "my.tar").write_bytes(make_tar({"a/1.jpg": b""}))
    with pytest.raises(ValueError, match=r"no checksum is known for 'my\.tar'"):
        open_source(archives / "my.tar", verify_archives=True)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"no tar", ShardFormatError, "cannot be read as a tar"),
        (make_tar({"readme": b""}), ClassesFormatError, "does not hold .*, meta.mat"),
        (make_tar({"../meta.mat": b""}), ShardFormatError, "unsafe member name"),
    ],
)
def test_a_file_that_is_no_development_kit_is_refused(
    tmp_path: Path, content: bytes, error: type[Exception], says: str
) -> None:
    write_tree(tmp_path, {f"val/{image}": b"" for image in VAL} | {devkit.DEVKIT: content})

    with pytest.raises(error, match=says):
        open_source(tmp_path, split="val")


# -- the layout of Kaggle


def make_xml(wnid: str) -> bytes:
    box = "<xmin>20</xmin><ymin>50</ymin><xmax>100</xmax><ymax>60</ymax>"
    found = f"<object><name>{wnid}</name><bndbox>{box}</bndbox></object>"
    size = "<size><width>200</width><height>100</height></size>"
    return f"<annotation>{size}{found}</annotation>".encode()


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    data, sets = "ILSVRC/Data/CLS-LOC", "ILSVRC/ImageSets/CLS-LOC"
    notes = "ILSVRC/Annotations/CLS-LOC"
    train = [f"{wnid}/{wnid}_{n}" for wnid in WNIDS[:2] for n in (1, 12)]
    val = [name[:-5] for name in VAL]
    files = {f"{data}/train/{name}.JPEG": name.encode() for name in train}
    files |= {f"{data}/val/{name}.JPEG": name.encode() for name in val}
    files |= {f"{data}/test/ILSVRC2012_test_00000001.JPEG": b"t"}
    files |= {f"{notes}/train/{train[1]}.xml": make_xml(WNIDS[0])}
    files |= {
        f"{notes}/val/{name}.xml": make_xml(WNIDS[n - 1])
        for name, n in zip(val, GROUND_TRUTH, strict=True)
    }
    for name, images in (("train_cls.txt", train), ("val.txt", val)):
        lines = "".join(f"{image} {n}\n" for n, image in enumerate(images, start=1))
        files[f"{sets}/{name}"] = lines.encode()
    files[devkit.KAGGLE_SOLUTION] = TRUTHS[devkit.KAGGLE_SOLUTION].encode()
    return write_tree(tmp_path / "kaggle", files)


@pytest.mark.parametrize("below", ["", "ILSVRC"])
def test_kaggles_layout_is_read_as_it_is_w13(kaggle: Path, below: str) -> None:
    train = open_source(kaggle / below, split="train", boxes="auto")
    val = open_source(kaggle / below, split="val", boxes="auto")
    test = open_source(kaggle / below, split="test")
    same = open_source(kaggle / below, split="validation")

    box = (Box(0.1, 0.5, 0.5, 0.6),)
    assert names_of(train)[1] == "n02100735/n02100735_12.JPEG"
    assert labels_of(train) == [0, 0, 1, 1]
    assert [train.boxes(n) for n in range(4)] == [(), (), (), box]
    assert (labels_of(val), val.label_space) == (SORTED_LABELS, "sorted_wnid")
    assert val.boxes(9) == box
    assert labels_of(same) == SORTED_LABELS
    assert bytes(val.read(0)) == b"ILSVRC2012_val_00000001"
    assert (labels_of(test), test.classes, len(test)) == ([None], None, 1)
    with pytest.raises(ValueError, match=r"split: got None for Kaggle's layout .* train, val"):
        open_source(kaggle / below)


def test_kaggles_validation_images_have_the_classes_of_their_xml_files(kaggle: Path) -> None:
    (kaggle / devkit.KAGGLE_SOLUTION).unlink()

    source = open_source(kaggle, split="val")

    assert (labels_of(source), source.label_space) == (SORTED_LABELS, "sorted_wnid")


def test_kaggles_list_of_images_says_which_belong_and_which_are_missing(kaggle: Path) -> None:
    data = kaggle / "ILSVRC/Data/CLS-LOC/train"
    (data / WNIDS[0] / "extra.JPEG").write_bytes(b"")

    source = open_source(kaggle, split="train")
    assert (len(source), source.strays) == (4, (f"{WNIDS[0]}/extra.JPEG",))

    (data / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    with pytest.raises(KeyNotFoundError, match=r"lacks 1 of the 4 images that .*train_cls\.txt"):
        open_source(kaggle, split="train")


def test_the_stem_and_number_of_an_image_are_found_in_its_name() -> None:
    assert devkit.parse_image_number("a.b/ILSVRC2012_val_00050000.JPEG") == (
        "ILSVRC2012_val_",
        50000,
    )
    assert devkit.parse_image_number("7.jpg") == ("", 7)
    assert devkit.parse_image_number("7a.jpg") is None
    assert devkit.stem_of("a.b/c") == "c"
    assert re.fullmatch(r"n\d{8}", devkit.stem_of("x/n01440764.tar"))
