"""Labels: the class of each sample, in the numbering that was declared or found out."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from concurrent_dataloader.errors import ClassesFormatError, UnknownClassError
from concurrent_dataloader.labels import Classes, LabelSpace, convert_ids, imagenet_classes

# As in the README of the seed: ids of the development kit, which count from 1.
SEED_TRAIN = {
    "n02119789": {"id": 1, "name": "kit_fox"},
    "n01440764": {"id": 449, "name": "tench"},
    "n03255030": {"id": 1000, "name": "dumbbell"},
}
# Labels of ILSVRC2012_val_00000001 to ..10, from the development kit.
VALIDATION = [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
IMAGENET_SPACES = [space for space in LabelSpace if space is not LabelSpace.CUSTOM]


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def val_key(number: int, folder: str = "val/") -> str:
    return f"{folder}ILSVRC2012_val_{number:08d}.JPEG"


class TestImagenetTable:
    def test_it_holds_1000_distinct_classes(self) -> None:
        wnids, names = zip(*imagenet_classes(), strict=True)

        assert len(set(wnids)) == len(set(names)) == 1000
        assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)

    @pytest.mark.parametrize(
        ("wnid", "name", "ilsvrc2012_id", "sorted_position"),
        [
            ("n02119789", "kit_fox", 1, 278),
            ("n02100735", "English_setter", 2, 212),
            ("n02110185", "Siberian_husky", 3, 250),
            ("n01440764", "tench", 449, 0),
            ("n01443537", "goldfish", 450, 1),
            ("n01751748", "sea_snake", 490, 65),
            ("n09193705", "alp", 361, 970),
            ("n02105855", "Shetland_sheepdog", 171, 230),
            ("n04263257", "soup_bowl", 822, 809),
            ("n02123045", "tabby", 174, 281),
            ("n03126707", "crane", 545, 517),
            ("n15075141", "toilet_tissue", 889, 999),
            ("n03255030", "dumbbell", 1000, 543),
        ],
    )
    def test_known_classes_stand_where_they_belong(
        self, wnid: str, name: str, ilsvrc2012_id: int, sorted_position: int
    ) -> None:
        table = imagenet_classes()

        assert table[ilsvrc2012_id - 1] == (wnid, name)
        assert sorted(entry.wnid for entry in table)[sorted_position] == wnid

    def test_the_sorted_order_is_torchvisions(self) -> None:
        meta = pytest.importorskip("torchvision.models._meta")
        by_wnid = [name.replace("_", " ").lower() for _, name in sorted(imagenet_classes())]

        assert by_wnid == [name.lower() for name in meta._IMAGENET_CATEGORIES]


class TestConversion:
    @pytest.mark.parametrize(("source", "target"), [*itertools.product(IMAGENET_SPACES, repeat=2)])
    def test_there_and_back_gives_all_1000_classes_again(
        self, source: LabelSpace, target: LabelSpace
    ) -> None:
        ids = np.arange(source.first_id, source.first_id + 1000)

        there = convert_ids(ids, source, target)

        assert sorted(there.tolist()) == list(range(target.first_id, target.first_id + 1000))
        assert np.array_equal(convert_ids(there, target, source), ids)

    @pytest.mark.parametrize(
        ("space", "sea_snake"),
        [
            (LabelSpace.SORTED_WNID, 65),
            (LabelSpace.ILSVRC2012_ID, 490),
            (LabelSpace.ILSVRC2012_VALIDATION, 490),
            (LabelSpace.TF_BUILDER, 66),
        ],
    )
    def test_the_sea_snake_has_its_id_in_each_space(
        self, space: LabelSpace, sea_snake: int
    ) -> None:
        assert convert_ids(490, LabelSpace.ILSVRC2012_ID, space) == sea_snake
        assert convert_ids(sea_snake, space, LabelSpace.ILSVRC2012_ID) == 490

    @pytest.mark.parametrize(
        ("space", "outside"),
        [
            (LabelSpace.SORTED_WNID, 1000),
            (LabelSpace.ILSVRC2012_ID, 0),
            (LabelSpace.TF_BUILDER, 1001),
        ],
    )
    def test_an_id_out_of_range_is_refused(self, space: LabelSpace, outside: int) -> None:
        with pytest.raises(ValueError, match=f"class id: got {outside}, expected"):
            convert_ids(np.array([5, outside]), space, LabelSpace.SORTED_WNID)

    def test_ids_of_the_users_own_cannot_be_converted(self) -> None:
        with pytest.raises(ValueError, match="got 'custom', whose ids have no relation"):
            convert_ids(1, LabelSpace.CUSTOM, LabelSpace.SORTED_WNID)


class TestRules:
    @pytest.mark.parametrize("prefix", ["", "train/", "a/b/c/d/e/", "/data/imagenet/train/"])
    def test_the_depth_of_a_folder_does_not_matter(self, prefix: str) -> None:  # I-30
        classes = Classes({"n01440764": 7})

        assert classes.label_of(f"{prefix}n01440764/n01440764_10026.JPEG") == 7

    @pytest.mark.parametrize("key", ["n01440764_10026.JPEG", "x/y/n01440764_10026_1.JPEG"])
    def test_the_prefix_of_a_file_name(self, key: str) -> None:
        assert Classes({"n01440764": 7}, label_rule="prefix").label_of(key) == 7

    @pytest.mark.parametrize(
        ("key", "number"),
        [
            ("val/ILSVRC2012_val_00000001.JPEG", "1"),
            ("ILSVRC2012_val_00050000.JPEG", "50000"),
            ("2012/17.tar.png", "17"),
            ("img_00000000.jpg", "0"),
            ("img 007 b", "7"),
        ],
    )
    def test_the_number_of_an_image(self, key: str, number: str) -> None:
        assert Classes({number: 3}, label_rule="number").label_of(key) == 3

    def test_the_group_of_a_pattern(self) -> None:
        classes = Classes({"cat": 0, "dog": 1}, label_rule=r"regex:/(\w+)-\d+\.png$")

        assert classes.label_of("pets/dog-17.png") == 1

    def test_an_explicit_map(self) -> None:
        classes = Classes({"cat": 0, "dog": 1}, label_rule={"a.png": "dog", "b.png": "cat"})

        assert classes.labels_of(["b.png", "a.png"]).tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("rule", "said"),
        [
            ("folder", "label_rule: got 'folder', expected 'parent', 'prefix'"),
            ("regex:(", "no regular expression"),
            ("regex:abc", "expected a group in parentheses"),
        ],
    )
    def test_a_rule_that_cannot_be_is_refused_at_once(self, rule: str, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            Classes({"a": 0}, label_rule=rule)

    @pytest.mark.parametrize("rule", ["parent", "prefix", "number", "regex:(a)", {"a": "b"}])
    def test_classes_pickle_with_any_rule(self, rule: str | dict[str, str]) -> None:
        classes = Classes({"a": 1, "b": 2}, label_rule=rule)

        again = pickle.loads(pickle.dumps(classes))

        assert again.count == 3
        assert again.label_rule == rule


class TestUnknownClass:
    def test_the_sample_the_class_and_near_ones_are_named(self) -> None:
        with pytest.raises(UnknownClassError) as caught:
            Classes.imagenet().labels_of(["t/n01440764/a.JPEG", "t/n0144076/b.JPEG"])

        said = str(caught.value)
        assert said.startswith("t/n0144076/b.JPEG (position 1): got class 'n0144076' by label_rule")
        assert "expected one of the 1000 in ImageNet's classes" in said
        assert "near: 'n01440764'" in said
        assert "\n" not in said

    def test_a_rule_that_would_fit_is_named(self) -> None:
        with pytest.raises(UnknownClassError, match="; try label_rule='prefix'"):
            Classes.imagenet().label_of("images/n01440764_10026.JPEG")

    def test_a_key_without_folder_is_named(self) -> None:
        with pytest.raises(UnknownClassError, match=r"^x\.JPEG: got class '' by label_rule 'par"):
            Classes.imagenet().label_of("x.JPEG")


class TestTrainFile:
    """``{wnid: {"id": ..., "name": ...}}``"""

    def test_the_seeds_file_loads_and_its_labels_count_from_0(self, tmp_path: Path) -> None:  # I-32
        classes = Classes.load(write_json(tmp_path / "c.json", SEED_TRAIN))

        assert classes.labels_of(["t/n02119789/a.JPEG", "t/n03255030/b.JPEG"]).tolist() == [0, 999]
        assert classes.labels_of(["t/n01440764/a.JPEG"]).dtype == np.int32
        assert classes.label_space is LabelSpace.ILSVRC2012_ID
        assert classes.id_base == 1
        assert classes.count == 1000

    def test_names_are_there(self, tmp_path: Path) -> None:
        classes = Classes.load(str(write_json(tmp_path / "c.json", SEED_TRAIN)))  # I-34

        assert classes.name(448) == "tench"
        assert classes.name(5) == "6"

    def test_ids_in_the_order_of_folders_are_recognised(self, tmp_path: Path) -> None:
        content = {"n01440764": {"id": 0, "name": "tench"}, "n15075141": {"id": 999}}

        classes = Classes.load(write_json(tmp_path / "c.json", content))

        assert classes.label_space is LabelSpace.SORTED_WNID
        assert classes.label_of("n15075141/x.JPEG") == 999

    @pytest.mark.parametrize(("ids", "base"), [([0, 1, 2], 0), ([1, 2, 3], 1), ([5, 0, 5], 0)])
    def test_the_base_of_own_ids_is_found(self, tmp_path: Path, ids: list[int], base: int) -> None:
        content = {name: {"id": number} for name, number in zip("abc", ids, strict=True)}

        classes = Classes.load(write_json(tmp_path / "c.json", content))

        assert classes.label_space is LabelSpace.CUSTOM
        assert classes.labels_of(["a/1", "b/1", "c/1"]).tolist() == [i - base for i in ids]

    def test_a_base_that_cannot_be_told_has_to_be_declared(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "c.json", {"cat": {"id": 3}, "dog": {"id": 5}})

        with pytest.raises(ClassesFormatError, match=r"from 3 to 5, .* give id_base=0 or"):
            Classes.load(path)
        assert Classes.load(path, id_base=1).label_of("dog/1.png") == 4
        assert Classes.load(path, id_base=0).label_of("dog/1.png") == 5

    def test_ids_that_contradict_the_declared_space_are_refused(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "c.json", SEED_TRAIN)

        with pytest.raises(ClassesFormatError, match="'n02119789': got id 1, expected 278 in sort"):
            Classes.load(path, label_space=LabelSpace.SORTED_WNID)

    def test_plain_ids_by_class_are_a_classes_file_too(self, tmp_path: Path) -> None:
        classes = Classes.load(write_json(tmp_path / "c.json", {"cat": 0, "dog": 1}))

        assert classes.label_of("dog/1.png") == 1
        assert classes.name(1) == "dog"

    def test_folders_named_by_digits_can_be_classes(self, tmp_path: Path) -> None:
        digits = {str(i): {"id": i, "name": f"digit {i}"} for i in range(10)}
        plain = {str(i): i for i in range(10)}

        by_entry = Classes.load(write_json(tmp_path / "c.json", digits))
        by_rule = Classes.load(write_json(tmp_path / "p.json", plain), label_rule="parent")

        assert by_entry.label_of("train/7/00012.png") == 7
        assert by_rule.label_of("train/7/00012.png") == 7

    def test_what_we_write_reads_as_the_same(self, tmp_path: Path) -> None:
        classes = Classes.imagenet(LabelSpace.ILSVRC2012_ID)
        classes.save_json(tmp_path / "c.json")

        content = json.loads((tmp_path / "c.json").read_bytes())
        again = Classes.load(tmp_path / "c.json")

        assert content["n02119789"] == {"id": 1, "name": "kit_fox"}
        assert again.label_space is LabelSpace.ILSVRC2012_ID
        assert again.label_of("n01751748/a.JPEG") == 489
        assert again.name(489) == "sea_snake"


class TestValidationFile:
    """``{"<number of the image>": class}``, numbers from 0 or from 1."""

    @pytest.mark.parametrize("number_base", [0, 1])
    def test_both_ways_to_number_the_images_are_recognised(
        self, tmp_path: Path, number_base: int
    ) -> None:  # I-31
        content = {str(i + number_base): number for i, number in enumerate(VALIDATION)}

        classes = Classes.load(write_json(tmp_path / "c.json", content))

        assert classes.label_of(val_key(1)) + classes.id_base == 490
        assert classes.labels_of(map(val_key, range(1, 11))).tolist() == [i - 1 for i in VALIDATION]
        assert classes.label_space is LabelSpace.ILSVRC2012_VALIDATION
        assert classes.name(489) == "sea_snake"

    @pytest.mark.parametrize("number_base", [0, 1])
    def test_the_last_of_50000_images_has_its_label(
        self, tmp_path: Path, number_base: int
    ) -> None:  # I-31
        numbers = VALIDATION + [1 + i % 1000 for i in range(49_989)] + [186]
        content = {str(i + number_base): number for i, number in enumerate(numbers)}

        classes = Classes.load(write_json(tmp_path / "c.json", content))

        assert classes.label_of(val_key(50_000)) == 185
        with pytest.raises(UnknownClassError, match=r"val_00050001.* got class '50001'"):
            classes.label_of(val_key(50_001))

    def test_the_label_does_not_depend_on_the_folder(self, tmp_path: Path) -> None:  # I-30
        content = {str(i): number for i, number in enumerate(VALIDATION, start=1)}
        classes = Classes.load(write_json(tmp_path / "c.json", content))

        keys = [val_key(4, folder) for folder in ("", "val/", "a/b/c/val/n123/")]

        assert classes.labels_of(keys).tolist() == [821, 821, 821]

    def test_lines_of_the_ground_truth_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
        path.write_text("".join(f"{number}\n" for number in VALIDATION))

        classes = Classes.load(path)

        assert classes.label_of(val_key(3)) == 170
        assert classes.label_space is LabelSpace.ILSVRC2012_VALIDATION

    def test_sorted_labels_are_recognised_by_the_first_images(self, tmp_path: Path) -> None:
        content = dict(enumerate([65, 970, 230, 809, 516, 57, 334, 415, 674, 332], start=1))

        classes = Classes.load(write_json(tmp_path / "c.json", content))

        assert classes.label_space is LabelSpace.SORTED_WNID
        assert classes.label_of(val_key(1)) == 65

    def test_ids_written_as_text_are_read(self, tmp_path: Path) -> None:
        content = {str(i): str(number) for i, number in enumerate(VALIDATION)}

        assert Classes.load(write_json(tmp_path / "c.json", content)).label_of(val_key(2)) == 360

    def test_numbers_with_gaps_have_to_be_declared(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "c.json", {"17": 0, "21": 1})

        with pytest.raises(ClassesFormatError, match=r"from 17 to 21 with gaps.* number_base=0 or"):
            Classes.load(path)
        assert Classes.load(path, number_base=1).label_of(val_key(21)) == 1
        assert Classes.load(path, number_base=0).label_of(val_key(22)) == 1

    def test_train_and_validation_files_of_the_seed_agree(self, tmp_path: Path) -> None:
        train = {entry.wnid: {"id": i} for i, entry in enumerate(imagenet_classes(), start=1)}
        validation = dict(enumerate(VALIDATION))

        train_classes = Classes.load(write_json(tmp_path / "t.json", train))
        val_classes = Classes.load(write_json(tmp_path / "v.json", validation))

        sea_snake = train_classes.label_of("train/n01751748/n01751748_1.JPEG")
        assert val_classes.label_of(val_key(1)) == sea_snake


class TestBadFiles:
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.json: no such classes file"):
            Classes.load(tmp_path / "none.json")

    def test_malformed_json_is_named_with_line_and_column(self, tmp_path: Path) -> None:
        path = tmp_path / "c.json"
        path.write_text('{"a":\n x}')

        with pytest.raises(ClassesFormatError, match=r"c\.json, line 2, column 2: "):
            Classes.load(path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ([], "got a JSON list, expected"),
            ({}, "got an empty object, expected"),
            ({"a": {"name": "x"}}, "entry 'a': got id None, expected an integer"),
            ({"a": -1}, "entry 'a': got id -1, expected an integer"),
            ({"a": True}, "entry 'a': got id True, expected an integer"),
            ({"a": 1.5}, "entry 'a': got id 1.5, expected an integer"),
            ({"a": {"id": 1, "name": 2}}, "entry 'a': got name 2, expected a string"),
            ({"1": 1, "01": 2}, "an image number stands there twice"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, content: object, said: str) -> None:
        path = write_json(tmp_path / "c.json", content)

        with pytest.raises(ClassesFormatError, match=said) as caught:
            Classes.load(path)

        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "said"),
        [("490\nx\n", "line 2: got 'x', expected a class id"), ("", "got an empty file")],
    )
    def test_a_bad_ground_truth_file_is_named(self, tmp_path: Path, text: str, said: str) -> None:
        path = tmp_path / "truth.txt"
        path.write_text(text)

        with pytest.raises(ClassesFormatError, match=said):
            Classes.load(path)

    def test_a_base_against_the_declared_space_is_refused(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "c.json", SEED_TRAIN)

        with pytest.raises(ValueError, match="id_base: got 0, but the ids of ilsvrc2012_id count"):
            Classes.load(path, id_base=0, label_space=LabelSpace.ILSVRC2012_ID)


class TestClassesOfKeys:
    def test_classes_are_numbered_by_name(self) -> None:
        classes = Classes.from_keys(["t/dog/1.png", "t/cat/1.png", "t/dog/2.png"])

        assert classes.labels_of(["t/dog/9.png", "t/cat/9.png"]).tolist() == [1, 0]
        assert [classes.name(0), classes.name(1)] == ["cat", "dog"]
        assert classes.label_space is LabelSpace.CUSTOM

    def test_all_folders_of_imagenet_are_torchvisions_order(self) -> None:
        classes = Classes.from_keys(f"{entry.wnid}/x.JPEG" for entry in imagenet_classes())

        assert classes.label_space is LabelSpace.SORTED_WNID
        assert classes.label_of("n01751748/x.JPEG") == 65
        assert classes.name(65) == "sea_snake"

    def test_a_key_without_class_is_named(self) -> None:
        with pytest.raises(UnknownClassError, match=r"top\.png: names no class by label_rule"):
            Classes.from_keys(["a/1.png", "top.png"])


class TestConvertedClasses:
    def test_ids_of_the_development_kit_become_those_of_torchvisions_weights(
        self, tmp_path: Path
    ) -> None:
        train = Classes.load(write_json(tmp_path / "c.json", SEED_TRAIN))

        converted = train.converted(LabelSpace.SORTED_WNID)

        keys = ["n02119789/a.JPEG", "n01440764/a.JPEG", "n03255030/a.JPEG"]
        assert converted.labels_of(keys).tolist() == [278, 0, 543]
        assert converted.name(0) == "tench"
        assert train.converted(LabelSpace.ILSVRC2012_ID) is train

    def test_the_validation_labels_become_the_same(self, tmp_path: Path) -> None:
        content = {str(i): number for i, number in enumerate(VALIDATION)}

        classes = Classes.load(write_json(tmp_path / "c.json", content))

        converted = classes.converted(LabelSpace.SORTED_WNID)
        assert converted.labels_of(map(val_key, (1, 2, 3, 4))).tolist() == [65, 970, 230, 809]

    def test_own_classes_cannot_be_converted(self) -> None:
        with pytest.raises(ValueError, match="got 'custom'"):
            Classes.from_keys(["a/1", "b/1"]).converted(LabelSpace.SORTED_WNID)


def test_the_file_in_indexes_holds_the_table() -> None:
    path = Path(__file__).parents[1] / "indexes" / "imagenet-train-classes.json"

    classes = Classes.load(path)

    assert classes.label_space is LabelSpace.ILSVRC2012_ID
    keys = [f"{entry.wnid}/x.JPEG" for entry in imagenet_classes()]
    assert classes.labels_of(keys).tolist() == list(range(1000))
    assert [classes.name(label) for label in range(1000)] == [e.name for e in imagenet_classes()]
