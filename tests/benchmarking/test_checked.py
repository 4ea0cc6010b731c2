import io
import pathlib

import pytest
from PIL import Image

pytest.importorskip("skimage", reason="the photographs ship with scikit-image")

from benchmarking.checked import CheckedEpoch, CheckedImages, check_order, draw_order
from benchmarking.workload import Photos
from concurrent_dataloader.stores._memory import MemoryStore


def make_photos() -> Photos:
    raw: dict[str, bytes] = {}
    for number, name in enumerate("abc"):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (number, 0, 0)).save(file, "JPEG")
        raw[f"{name}.jpg"] = file.getvalue()
    return Photos(pathlib.Path(), raw)


def test_the_original_passes_and_any_other_body_does_not() -> None:
    photos = make_photos()
    swapped = {**photos.raw, "b.jpg": photos.raw["c.jpg"]}
    images = CheckedImages(photos, MemoryStore(swapped))

    assert images[0][1] == 0
    with pytest.raises(RuntimeError, match=r"b\.jpg: got .* that are not the original's"):
        images[1]


def test_the_order_holds_each_position_once_in_each_pass_and_is_the_same_each_time() -> None:
    order = draw_order(10, 25)

    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert len(order) == 25
    assert order == draw_order(10, 25)


@pytest.mark.parametrize(
    ("positions", "named"),
    [
        ([1, 2], "got 2 samples, expected 3"),
        ([1, 2, 2], "got position 2 as sample 2, expected 3"),
        ([2, 1, 3], "got position 2 as sample 0, expected 1"),
    ],
)
def test_what_is_missing_doubled_or_out_of_order_is_named(positions: list[int], named: str) -> None:
    check_order([1, 2, 3], [1, 2, 3])

    with pytest.raises(RuntimeError, match=named):
        check_order(positions, [1, 2, 3])


def test_requests_are_told_by_sample() -> None:
    epoch = CheckedEpoch(
        images_per_s=1.0, positions=[0, 1, 2, 3], num_gets=5, num_refused=1, num_faults=1
    )

    assert epoch.num_gets_per_sample == 1.25
    assert epoch.extra_requests_share == 0.25
    assert epoch.refused_share == 0.2
