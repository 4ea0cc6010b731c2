"""Fields of packed samples: what their names say."""

from __future__ import annotations

import pytest

from concurrent_dataloader.formats.fields import find_field, split_alternatives


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("jpg", ("jpg",)),
        ("JPG; png ;\tv2.Cls", ("jpg", "png", "v2.cls")),
        (";;jpg;", ("jpg",)),
        (" ; ", ()),
        ("", ()),
    ],
)
def test_alternatives_are_names_without_spaces(wanted: str, names: tuple[str, ...]) -> None:
    assert split_alternatives(wanted) == names


def test_the_first_alternative_that_is_present_is_found() -> None:
    assert find_field("png; jpg", ["cls", "jpg", "png"]) == "png"
    assert find_field("webp; jpg", ["cls", "v2.jpg"]) == "v2.jpg"
    assert find_field("webp; jpg", ["v1.jpg", "v2.jpg"]) is None
    assert find_field(" ; ", ["jpg", "x."]) is None
