"""What the verbs that read samples share: the arguments that say where these lie."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.sources import (
    AUTO_BOXES,
    IMAGE_SUFFIXES,
    NO_LABELS,
    OnStray,
    OnUnknown,
    SampleTable,
    open_source,
)

SOURCE_HELP = (
    "samples: a folder, s3://bucket[/prefix], an index (with --root), a .tar, .tar.gz, .tar.bz2 or"
    " .tar.xz, a tar of class tars, shards such as 'train-{000..146}.tar', or a folder in"
    " torchvision's or Kaggle's layout of ImageNet"
)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what the samples, their classes and boxes are.

    ``source``, ``--split`` and the store's are the verb's to add.
    """
    group = parser.add_argument_group("the source")
    group.add_argument(
        "--root", metavar="URL", help="folder or bucket that the keys of an index are relative to"
    )
    group.add_argument(
        "--suffix",
        type=_suffixes,
        default=",".join(IMAGE_SUFFIXES),
        metavar="LIST",
        help="endings of samples, in any case, parted by commas; '' takes every file"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--on-stray",
        choices=get_args(OnStray),
        default="skip",
        help="what is done with files that are no samples: skip and count them, or stop"
        " (default: %(default)s)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="take N samples only (default: all)")
    group.add_argument(
        "--sample-seed",
        type=int,
        metavar="SEED",
        help="take those N from everywhere, by this seed (default: the first N)",
    )
    group.add_argument(
        "--temporary-folder",
        type=Path,
        metavar="FOLDER",
        help="where compressed archives are unpacked (default: the system's temporary folder)",
    )
    group.add_argument(
        "--verify-archives",
        action="store_true",
        help="compare ImageNet's original archives with their MD5 first (default: do not)",
    )
    _add_class_options(parser)


def _add_class_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("classes and boxes")
    group.add_argument(
        "--label-rule",
        metavar="RULE",
        help="how a name holds its class: parent (its last folder), prefix (its file name up to"
        f" the first '_'), regex:PATTERN (the first group), or {NO_LABELS} (default: parent, or"
        " what the layout says)",
    )
    group.add_argument(
        "--class-map",
        metavar="FILE",
        help="JSON map of classes, or of file names, to ids or class names; or a list of classes",
    )
    group.add_argument(
        "--meta-mat",
        metavar="FILE",
        help="meta.mat of ImageNet's development kit, or the kit's archive",
    )
    group.add_argument(
        "--ground-truth",
        metavar="FILE",
        help="class of each image, a line each; or 'name class' lines, Kaggle's"
        " LOC_val_solution.csv, or the archive of the development kit",
    )
    group.add_argument(
        "--id-base",
        type=int,
        choices=(0, 1),
        help="lowest possible id in --class-map (default: found out)",
    )
    group.add_argument(
        "--label-space",
        choices=[s.value for s in LabelSpace if s is not LabelSpace.CUSTOM],
        help="order of ImageNet's classes (default: that of --class-map or the shards, else"
        " sorted_wnid, torchvision's)",
    )
    group.add_argument(
        "--on-unknown",
        choices=get_args(OnUnknown),
        default="error",
        help="what is done with samples whose class is not known (default: %(default)s)",
    )
    group.add_argument(
        "--boxes",
        metavar="FILE",
        help="bounding boxes: a .csv of name,x1,y1,x2,y2 relative to the image; a folder or tar of"
        f" XML files; '{AUTO_BOXES}': those of Kaggle's layout (default: those of shards)",
    )
    group.add_argument(
        "--merge-boxes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the boxes of a sample become one, their union (default: --merge-boxes)",
    )


def _suffixes(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def open_source_of(options: argparse.Namespace, *, split: str | None) -> SampleTable:
    """Open the source that the arguments name; the caller closes it.

    Args:
        options: With ``source``, and the arguments of `add_source_options` and `add_store_options`.
        split: Which part of it.

    Raises:
        LoaderError: As `open_source`.
    """
    return open_source(
        options.source,
        split=split,
        root=options.root,
        suffixes=options.suffix,
        on_stray=options.on_stray,
        label_rule=options.label_rule,
        class_map=options.class_map,
        meta_mat=options.meta_mat,
        ground_truth=options.ground_truth,
        id_base=options.id_base,
        label_space=options.label_space,
        on_unknown=options.on_unknown,
        boxes=options.boxes,
        merge_boxes=options.merge_boxes,
        limit=options.limit,
        sample_seed=options.sample_seed,
        temporary_folder=options.temporary_folder,
        verify_archives=options.verify_archives,
        client=options.client,
        credentials=options.credentials,
        endpoint_url=options.endpoint_url,
        region=options.region,
        anonymous=options.anonymous,
    )
