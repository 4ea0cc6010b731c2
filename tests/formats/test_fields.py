"""Fields of packed samples: what their names say, and what a class is."""

from __future__ import annotations

import pytest

from concurrent_dataloader.errors import SampleDecodeError
from concurrent_dataloader.formats.fields import find_field, read_label, split_alternatives


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"0", 0),
        (b"17", 17),
        (b" 17\r\n", 17),
        (b"0017", 17),
        (b"9223372036854775807", 2**63 - 1),
        (b"0" * 5000 + b"5", 5),
        (b"0" * 5000, 0),
    ],
)
def test_a_class_is_a_decimal(content: bytes, label: int) -> None:
    assert read_label(content) == label


@pytest.mark.parametrize("content", [b"", b" ", b"-1", b"1.0", b"1 2", b"x", "²".encode(), b"\xb2"])
def test_what_is_no_decimal_is_refused(content: bytes) -> None:
    with pytest.raises(SampleDecodeError, match=r"^cls: got .*, expected a decimal such as b'17'$"):
        read_label(content)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"9" * 5000, "5000 digits, 99999999999999999999"),
        (b"1" + b"0" * 4300, "4301 digits"),
        (b"9223372036854775808", "19 digits, 9223372036854775808"),
        (b"000" + b"1" * 20, "20 digits"),
    ],
)
def test_a_number_that_no_tensor_holds_is_refused(content: bytes, got: str) -> None:
    with pytest.raises(SampleDecodeError, match=rf"^cls: got a number of {got}.*expected one from"):
        read_label(content)


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
