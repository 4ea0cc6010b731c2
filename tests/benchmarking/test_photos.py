import hashlib
import pathlib

import pytest
from PIL import Image

from benchmarking import photos
from benchmarking.photos import PHOTOGRAPHS, Photograph, make_benchmark_set, make_demo_set

pytest.importorskip("skimage", reason="the photographs ship with scikit-image")
pytest.importorskip("sklearn", reason="the photographs ship with scikit-learn")


def digest_all(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.jpg"))
    }


def test_the_benchmark_set_has_the_size_of_imagenet_files(tmp_path: pathlib.Path) -> None:
    folder = make_benchmark_set(60, cache=tmp_path)

    sizes_bytes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    assert len(sizes_bytes) == 60
    assert 95_000 < sum(sizes_bytes) / 60 < 125_000


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: pathlib.Path) -> None:
    one = digest_all(make_benchmark_set(20, seed=1, cache=tmp_path / "a"))
    same = digest_all(make_benchmark_set(20, seed=1, cache=tmp_path / "b"))
    other = digest_all(make_benchmark_set(20, seed=2, cache=tmp_path / "c"))

    assert one == same
    assert set(one) == set(other)
    assert not set(one.values()) & set(other.values())


def test_a_second_call_finds_the_files_of_the_first(tmp_path: pathlib.Path) -> None:
    folder = make_benchmark_set(10, cache=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}

    again = make_benchmark_set(10, cache=tmp_path)

    assert again == folder
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*.jpg")} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_every_sample_differs_from_every_other(tmp_path: pathlib.Path) -> None:
    digests = list(digest_all(make_benchmark_set(40, cache=tmp_path)).values())

    assert len(set(digests)) == 40


def test_the_demo_set_has_each_class_in_both_splits(tmp_path: pathlib.Path) -> None:
    folder = make_demo_set(tmp_path, num_train=20, num_val=10)

    names = sorted(photograph.name for photograph in PHOTOGRAPHS)
    for split, num_each in [("train", 2), ("val", 1)]:
        assert sorted(path.name for path in (folder / split).iterdir()) == names
        assert all(len(list(path.iterdir())) == num_each for path in (folder / split).iterdir())
    with Image.open(next((folder / "val").rglob("*.jpg"))) as image:
        assert (image.mode, image.size) == ("RGB", (384, 384))


def test_no_images_at_all_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="num_images: got 0"):
        make_benchmark_set(0, cache=tmp_path)


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    absent = Photograph("moon", "no_such_package", "no-such-package", "moon.png")

    with pytest.raises(ImportError, match="run `pip install no-such-package`"):
        photos._open_photograph(absent)
