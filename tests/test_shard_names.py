"""Names of shards: what a pattern stands for, and what a name says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.shard_names import (
    UNFINISHED,
    ShardSet,
    expand_braces,
    expand_shards,
    find_kind,
    find_split,
    has_glob,
    locate_shards,
    match_names,
    sort_shards,
)

# Expected values were written out by hand; bash prints the same for all but {0..{1,3}}.


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a{00..02}.tar", ["a00.tar", "a01.tar", "a02.tar"]),
        ("a{8..11}", ["a8", "a9", "a10", "a11"]),
        ("a{08..11}", ["a08", "a09", "a10", "a11"]),
        ("a{2..0}", ["a2", "a1", "a0"]),
        ("a{0..6..3}", ["a0", "a3", "a6"]),
        ("{b..d}", ["b", "c", "d"]),
        ("{train,val}-{0..1}", ["train-0", "train-1", "val-0", "val-1"]),
        ("{a,b{0..2},}x", ["ax", "b0x", "b1x", "b2x", "x"]),
        ("{{0..1},{5..6}}", ["0", "1", "5", "6"]),
        ("{0..{1,3}}", ["0", "1", "0", "1", "2", "3"]),
        ("{x}-{0..1}", ["{x}-0", "{x}-1"]),
    ],
)
def test_braces_expand_in_the_order_in_which_they_stand(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_w_01_a_range_names_both_its_ends() -> None:
    """W-01: {000000..000490} names 491 shards, where the documents said 490."""
    assert len(expand_braces("train-{000000..000490}.tar")) == 491
    assert expand_braces("train-{000000..000489}.tar")[-1] == "train-000489.tar"


@given(first=st.integers(0, 10**7), length=st.integers(1, 50), width=st.integers(2, 9))
def test_a_padded_range_has_the_width_of_its_bounds(first: int, length: int, width: int) -> None:
    last = first + length - 1
    bounds = f"{first:0{width}d}", f"{last:0{width}d}"
    is_padded = any(bound.startswith("0") and len(bound) > 1 for bound in bounds)

    names = expand_braces(f"s{{{bounds[0]}..{bounds[1]}}}")

    assert [int(name[1:]) for name in names] == list(range(first, last + 1))
    if is_padded:
        assert {len(name) for name in names} == {1 + max(map(len, bounds))}


@pytest.mark.parametrize(
    "pattern", ["a{0..3", "a0..3}", "{a,{b}", "{0..99999999999}", "{0..3..0}", "{0..999}" * 4]
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^shards: got"):
        expand_braces(pattern)


def test_a_list_of_patterns_keeps_its_order() -> None:
    assert expand_shards(["b{0..1}.tar", Path("a.tar")]) == ["b0.tar", "b1.tar", "a.tar"]
    for nothing in ([], "", ["a.tar", ""]):
        with pytest.raises(ValueError, match="expected at least one name"):
            expand_shards(nothing)


def test_names_are_sorted_as_people_count() -> None:
    names = ["a10.tar", "a9.tar", "a100.tar", "b1.tar", "a1/2.tar", "a1/10.tar", "a", "a01.tar"]

    assert sort_shards(names) == [
        *["a", "a01.tar", "a1/2.tar", "a1/10.tar", "a9.tar", "a10.tar", "a100.tar", "b1.tar"]
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x/train-000000.tar", "tar"),
        ("A.TAR", "tar"),
        ("a.tar.gz", "compressed tar"),
        ("a.tgz", "compressed tar"),
        ("train-00000-of-01024", "tfrecord"),
        ("train-00000-of-01024.tfrecord", "tfrecord"),
        ("a.tfrecord-00000-of-00002", "tfrecord"),
        ("a.tfrecords", "tfrecord"),
        ("train", None),
        ("star", None),
        ("train-index.npz", None),
    ],
)
def test_the_ending_tells_what_a_shard_is(name: str, kind: str | None) -> None:
    assert find_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-train-000000.tar", "train"),
        ("validation-00000-of-00128", "val"),
        ("val/x0.tar", None),
        ("test.tar", "test"),
        ("trainval-0.tar", None),
        ("train-val-0.tar", None),
        ("TRAIN_3.tar", "train"),
    ],
)
def test_a_word_in_the_name_tells_the_split(name: str, split: str | None) -> None:
    assert find_split(name) == split


def test_a_glob_stays_in_its_folder() -> None:
    names = ["a/10.tar", "a/9.tar", "b.tar", "a/b/1.tar", "a/x.txt", "a/^.tar", "a/].tar"]

    assert match_names("a/*.tar", names) == ["a/9.tar", "a/10.tar", "a/].tar", "a/^.tar"]
    assert match_names("**/[0-9].tar", names) == ["a/9.tar", "a/b/1.tar"]
    assert match_names("?.tar", names) == ["b.tar"]
    assert match_names("a/[!0-9].tar", names) == ["a/].tar", "a/^.tar"]
    assert match_names("a/[]^].tar", names) == ["a/].tar", "a/^.tar"]
    assert [has_glob(name) for name in ("a*", "b?", "[c]", "d{0..1}")] == [True, True, True, False]


class Listing:
    """A place with some objects, which remembers what was listed."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys
        self.asked: list[tuple[str, str]] = []

    def __call__(self, root: str, prefix: str) -> Iterable[tuple[str, int]]:
        self.asked.append((root, prefix))
        return [(key, len(key)) for key in self.keys if key.startswith(prefix)]


def test_named_shards_are_located_without_a_listing() -> None:
    listing = Listing()

    assert locate_shards("s3://b/p/t-{8..10}.tar", listing) == ShardSet(
        "s3://b/p", ("t-8.tar", "t-9.tar", "t-10.tar"), (None,) * 3
    )
    assert locate_shards(["/d/x/a.tar", "/d/y/b.tar"], listing)[:2] == (
        "/d",
        ("x/a.tar", "y/b.tar"),
    )
    assert locate_shards(["a.tar", "./c/b.tar"], listing)[:2] == (".", ("a.tar", "c/b.tar"))
    assert locate_shards("/a.tar", listing)[:2] == ("/", ("a.tar",))
    assert listing.asked == []


def test_folders_and_globs_are_listed() -> None:
    listing = Listing("v2.tar", "v10.tar", "v/9.tar", "index.npz", "train-00000-of-00001")

    folder = locate_shards("s3://b/p/", listing)
    glob = locate_shards("s3://b/p/v*.tar", listing)
    here = locate_shards("v*.tar", listing)

    assert folder == ShardSet("s3://b/p", ("train-00000-of-00001", "v2.tar", "v10.tar"), (20, 6, 7))
    assert glob == ShardSet("s3://b/p", ("v2.tar", "v10.tar"), (6, 7))
    assert here == ShardSet(".", ("v2.tar", "v10.tar"), (6, 7))
    assert [asked for asked in listing.asked if asked[1] != UNFINISHED] == [
        ("s3://b/p", ""),
        ("s3://b/p", "v"),
        (".", "v"),
    ]


def test_globs_leave_out_what_describes_the_shards() -> None:
    shards = ["train-00000-of-00002", "train-00001-of-00002"]
    beside = ["train-index.npz", "train-FileInfo.json", "train-manifest.json", "metadata.json"]
    listing = Listing(*shards, *beside, "train-mine.json")

    assert list(locate_shards("train-*", listing).names) == [*shards, "train-mine.json"]
    assert list(locate_shards("*-of-*", listing).names) == shards
    assert list(locate_shards("s3://b/*", Listing(*shards, *beside)).names) == shards
    with pytest.raises(KeyNotFoundError, match="no shard there"):
        locate_shards("train-*", Listing(*beside))


def test_what_fits_nothing_or_lies_in_two_places_is_an_error() -> None:
    for nothing in ("x*.tar", "s3://b/p"):
        with pytest.raises(KeyNotFoundError, match="no shard there"):
            locate_shards(nothing, Listing("a.txt"))
    for places in (
        ["s3://a/1.tar", "s3://b/1.tar"],
        ["1.tar", "/1.tar"],
        ["s3://a/1.tar", "1.tar"],
    ):
        with pytest.raises(ValueError, match="shards: got shards below"):
            locate_shards(places, Listing())
    with pytest.raises(ValueError, match=r"'1\.tar' twice"):
        locate_shards("a/{1,1}.tar", Listing())
