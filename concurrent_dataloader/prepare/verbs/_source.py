"""The arguments that say which samples are meant, and which class each has."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from concurrent_dataloader.files import write_whole
from concurrent_dataloader.label_rules import check_label_rule
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.sources import (
    AUTO_BOXES,
    IMAGE_SUFFIXES,
    NO_LABELS,
    OnStray,
    SampleTable,
    open_source,
)
from concurrent_dataloader.prepare.sources.layouts import split_folders
from concurrent_dataloader.prepare.verbs._common import (
    check_at_least,
    check_output_files,
    store_settings,
)
from concurrent_dataloader.prepare.verbs._config import BOOL, INT, TEXT, Kind, list_of, one_of

OWN_BOXES = "own"
"""The bounding boxes that a source has already, as shards may."""

_SPACES = tuple(space.value for space in LabelSpace)


def parse_list(text: str) -> tuple[str, ...]:
    """Read words that are parted by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_splits(text: str) -> tuple[str, ...]:
    """Read the names of splits, of which there must be one; a variable of a script may be empty.

    Raises:
        ArgumentTypeError: There is none.
    """
    splits = parse_list(text)
    if not splits:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected the name of a split, or several parted by commas: train,val"
        )
    return splits


SOURCE_KINDS: dict[str, Kind] = {
    "root": TEXT,
    "suffix": list_of(parse_list),
    "on_stray": one_of(*get_args(OnStray)),
    "label_rule": TEXT,
    "class_map": TEXT,
    "meta_mat": TEXT,
    "ground_truth": TEXT,
    "id_base": INT,
    "label_space": one_of(*_SPACES),
    "on_unknown": one_of("error", "skip"),
    "boxes": TEXT,
    "limit": INT,
    "limit_seed": INT,
    "verify_archives": BOOL,
}
"""What each of these options may be in a configuration file."""


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    group = parser.add_argument_group("the samples")
    group.add_argument(
        "--root",
        metavar="URL",
        help="folder or bucket of the keys, if SOURCE is an index (default: that of the index)",
    )
    group.add_argument(
        "--suffix",
        type=parse_list,
        default=",".join(IMAGE_SUFFIXES),
        metavar="LIST",
        help="endings of samples, in any case, parted by commas; '' takes every file"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--on-stray",
        choices=get_args(OnStray),
        default="skip",
        help="what to do about files that are no samples, by their ending or since they are hidden"
        " (default: %(default)s). Links in a folder are followed, but not into a folder that holds"
        " them, and one to nothing is an error; links in archives are left out",
    )
    group.add_argument(
        "--strays",
        type=Path,
        metavar="FILE",
        help="write the names of all files that are no samples to this file, a line each (default:"
        " say how many, and one of them)",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="take that many samples (default: all)"
    )
    group.add_argument(
        "--limit-seed",
        type=int,
        metavar="N",
        help="take them from everywhere, by this seed (default: take the first)",
    )
    group.add_argument(
        "--verify-archives",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compare ImageNet's archives with their published MD5 first"
        " (default: --no-verify-archives)",
    )
    group.add_argument(
        "--boxes",
        metavar="PLACE",
        help="also pack bounding boxes: from a .csv table, a folder or tar of XML files, 'auto' for"
        f" those of Kaggle's layout, '{OWN_BOXES}' for those that shards have; of several splits,"
        " some may have none, and get null (default: none)",
    )
    _add_class_options(parser.add_argument_group("their classes"))


def _add_class_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--label-rule",
        metavar="RULE",
        help="how a name holds its class: parent (its folder), prefix, number, regex:PATTERN (the"
        " first group), or none for samples without classes (default: the top folder, as for"
        " torchvision's ImageFolder; for an index, parent)",
    )
    group.add_argument(
        "--class-map", metavar="FILE", help="JSON file of classes, or of samples (default: none)"
    )
    group.add_argument(
        "--meta-mat",
        metavar="FILE",
        help="meta.mat of ImageNet's development kit, or its archive (default: none)",
    )
    group.add_argument(
        "--ground-truth",
        metavar="FILE",
        help="file with the class of each image, by its number (default: one that lies beside)",
    )
    group.add_argument(
        "--id-base",
        type=int,
        choices=(0, 1),
        help="what ids of the class map count from (default: what the file says)",
    )
    group.add_argument(
        "--label-space",
        choices=_SPACES,
        help="order of ImageNet's classes (default: that of the map, or sorted_wnid)",
    )
    group.add_argument(
        "--on-unknown",
        choices=("error", "skip"),
        default="error",
        help="what to do about a sample whose class is not known (default: %(default)s)",
    )


def check_source_options(options: argparse.Namespace) -> None:
    """Raise for what cannot be, before the samples are listed, which may take minutes.

    Raises:
        ValueError: A number or a rule cannot be, or a file or folder that is named is not there.
    """
    check_at_least(options, limit=1)
    check_output_files(options, "strays")
    if options.limit_seed is not None and not 0 <= options.limit_seed < 1 << 32:
        raise ValueError(f"limit_seed: got {options.limit_seed}, expected 0 to {(1 << 32) - 1}")
    if options.label_rule not in (None, NO_LABELS):
        check_label_rule(options.label_rule)
    for name in ("class_map", "meta_mat", "ground_truth", "boxes"):
        text: str | None = getattr(options, name)
        if text is None or (name == "boxes" and text in (OWN_BOXES, AUTO_BOXES)):
            continue
        is_path = is_folder(text) and not any(sign in text for sign in "*?{")
        if is_path and not os.path.exists(os.path.expanduser(text.removeprefix("file://"))):
            raise ValueError(f"{name}: got {text!r}, where there is nothing; check the path")
    scratch: os.PathLike[str] | str | None = options.scratch
    if scratch is not None and not os.path.isdir(scratch):
        raise ValueError(
            f"scratch: got '{scratch}', expected a folder that is there; make it, or leave it out"
        )


def is_sample(options: argparse.Namespace, name: str) -> bool:
    """Tell whether a file of this name in the source would count as a sample, by its ending."""
    suffixes = _suffixes(options)
    return not suffixes or name.lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def _suffixes(options: argparse.Namespace) -> tuple[str, ...]:
    suffixes: str | tuple[str, ...] = options.suffix
    return parse_list(suffixes) if isinstance(suffixes, str) else suffixes


def open_samples(
    options: argparse.Namespace, text: str, split: str | None, *, must_have_boxes: bool = True
) -> SampleTable:
    """Open the samples that the arguments mean; the caller closes them."""
    return open_source(
        text,
        split=split,
        root=options.root,
        suffixes=_suffixes(options),
        on_stray=options.on_stray,
        label_rule=options.label_rule,
        class_map=options.class_map,
        meta_mat=options.meta_mat,
        ground_truth=options.ground_truth,
        id_base=options.id_base,
        label_space=options.label_space,
        on_unknown=options.on_unknown,
        boxes=None if options.boxes == OWN_BOXES else options.boxes,
        must_have_boxes=must_have_boxes,
        limit=options.limit,
        sample_seed=options.limit_seed,
        temporary_folder=options.scratch,
        verify_archives=options.verify_archives,
        **store_settings(options),
    )


def check_apart(text: str, sources: Mapping[str, SampleTable]) -> None:
    """Raise if two splits are the same samples, as of a source without parts.

    Args:
        text: What the user calls the source.
        sources: The samples of each split.

    Raises:
        ValueError: They are.
    """
    for (one, first), (other, second) in itertools.combinations(sources.items(), 2):
        if first.where != second.where or len(first) != len(second):
            continue
        if all(first.name(number) == second.name(number) for number in range(len(first))):
            names = {first.name(number).partition("/")[0] for number in range(len(first))}
            there = ", ".join(sorted(names)[:_NUM_SHOWN])
            more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
            folders = [
                " or ".join(f"{name}/" for name in split_folders(one_of_them))
                for one_of_them in (one, other)
            ]
            raise ValueError(
                f"--splits: got {one} and {other}, which would be the same {len(first)} samples of"
                f" {text}: looked there for {folders[0]} and {folders[1]}, or tars called so, and"
                f" found {there}{more}; give one split, or sort the samples into such folders"
            )


_NUM_SHOWN = 4


def write_strays(options: argparse.Namespace, sources: Iterable[SampleTable]) -> None:
    """Write the names of files that are no samples, if asked to; before the work, which may fail.

    Raises:
        OSError: The file cannot be written.
    """
    if options.strays is not None:
        lines = [f"{source.where}/{name}\n" for source in sources for name in source.strays]
        write_whole(options.strays, (line.encode(errors="surrogateescape") for line in lines))


def check_boxes(options: argparse.Namespace, sources: Mapping[str, SampleTable]) -> None:
    """Say which of several splits have no boxes in the place that was given; theirs are null.

    Raises:
        ValueError: None has any.
    """
    if options.boxes in (None, OWN_BOXES) or len(sources) < 2:
        return
    without = [split for split, source in sources.items() if not source.has_boxes]
    if len(without) == len(sources):
        first = next(iter(sources.values())).name(0)
        raise ValueError(
            f"{options.boxes}: no row and no file of it belongs to a sample of"
            f" {', '.join(sources)}, the first of which is {first!r}; check the names"
        )
    for split in without:
        print(f"{options.boxes}: no boxes of split {split}, whose samples get null instead")


def print_left_out(options: argparse.Namespace, source: SampleTable) -> None:
    """Say how many files and samples were left out, if any were."""
    if source.num_stray:
        listed = f"listed in {options.strays}" if options.strays else f"as {source.strays[0]!r}"
        print(f"{source.where}: {source.num_stray} stray files left out, {listed}")
    if source.num_unlabelled:
        print(f"{source.where}: {source.num_unlabelled} samples of unknown class left out")
