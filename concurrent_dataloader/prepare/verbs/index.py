"""``index``: list the samples of a bucket, a folder or of shards, and write an index file."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

from concurrent_dataloader.files import is_written_as_it_stands
from concurrent_dataloader.index import PACK_ABOVE_KEYS, packed_path
from concurrent_dataloader.label_rules import check_label_rule
from concurrent_dataloader.labels import Classes, LabelSpace
from concurrent_dataloader.prepare.index import (
    IMAGE_SUFFIXES,
    check_object_url,
    find_samples,
    is_folder,
    upload,
)
from concurrent_dataloader.prepare.scan import CONCURRENCY, find_shards, rebase, scan_shards
from concurrent_dataloader.prepare.verbs._bar import show_progress
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    count_progress,
    store_opener,
    store_settings,
)
from concurrent_dataloader.shard_names import (
    ShardSet,
    expand_braces,
    find_kind,
    find_split,
    has_glob,
    split_url,
)
from concurrent_dataloader.stores import open_store

SHARD_INDEX_SUFFIX = ".npz"

DESCRIPTION = (
    "List the samples of a bucket or a folder and write an index file: a JSON list of keys, sorted."
    f" One of more than {PACK_ABOVE_KEYS} keys is packed as well. For shards, tar or TFRecord, read"
    " where their samples lie and their labels, and write an index of byte ranges, .npz."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="s3://bucket[/prefix], or a folder; for shards also names, brace ranges such as"
        " 'train-{000000..000489}.tar', globs, and several of these",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="index file to write (required)"
    )
    parser.add_argument(
        "--suffix",
        type=_suffixes,
        default=",".join(IMAGE_SUFFIXES),
        metavar="LIST",
        help="endings of the samples, parted by commas; '' takes every object"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore-case",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether .jpeg also takes .JPEG (default: --ignore-case)",
    )
    parser.add_argument(
        "--relative",
        action="store_true",
        help="write keys relative to SOURCE, as for a folder, so that the same index serves a copy"
        " elsewhere (default: relative to the bucket)",
    )
    parser.add_argument(
        "--classes-output",
        type=Path,
        metavar="FILE",
        help="also write a classes file: the classes that occur, numbered from 0 on in the order of"
        " their names (default: none is written)",
    )
    parser.add_argument(
        "--label-rule",
        default="parent",
        metavar="RULE",
        help="how a key names its class, for --classes-output: parent (its last folder), prefix"
        " (its file name up to the first '_'), or regex:PATTERN (the first group)"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--upload",
        metavar="URL",
        help="put the index into a bucket, under exactly this name, s3://bucket/key (default: do"
        " not)",
    )
    parser.add_argument(
        "--classes-upload",
        metavar="URL",
        help="put the classes file of --classes-output into a bucket likewise (default: do not)",
    )
    shards = parser.add_argument_group("shards (if FILE ends in .npz)")
    shards.add_argument(
        "--payload",
        metavar="FIELDS",
        help="which field of a sample is its image, alternatives parted by semicolons, such as"
        " 'jpg;png' (default: the first that is an image, else that is neither cls, json nor txt)",
    )
    shards.add_argument(
        "--label-space",
        choices=[space.value for space in LabelSpace],
        help="what the labels mean (default: found out from WordNet ids in keys or records, if"
        " there are any)",
    )
    shards.add_argument(
        "--label-base",
        type=int,
        choices=(0, 1),
        help="what the first class is called (default: as --label-space has it, else 0, and 1 in"
        " TFRecords)",
    )
    shards.add_argument(
        "--concurrency",
        type=_positive,
        default=CONCURRENCY,
        metavar="N",
        help="shards that are read at once (default: %(default)s)",
    )
    add_store_options(parser)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected 1 or more")
    return number


def _suffixes(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _names_shards(source: str) -> bool:
    if Path(source).is_dir():
        return False
    names = expand_braces(source)
    return len(names) > 1 or find_kind(names[0]) is not None or has_glob(names[0])


def _check_source(options: argparse.Namespace) -> None:
    if options.output.suffix != SHARD_INDEX_SUFFIX:
        shards = [name for name in options.source if _names_shards(name)]
        if shards:
            raise ValueError(
                f"--output: got {options.output} for shards such as {shards[0]!r}, expected a name"
                " that ends in .npz, such as train-index.npz"
            )
        if len(options.source) > 1:
            raise ValueError(f"SOURCE: got {len(options.source)} of them, expected one, or shards")
    elif options.classes_output is not None:
        raise ValueError("--classes-output: an index of shards holds its classes; leave it out")


def _check(options: argparse.Namespace) -> None:
    """Raise for what would fail only after the listing, which may take minutes."""
    _check_source(options)
    if options.classes_upload is not None and options.classes_output is None:
        raise ValueError("--classes-upload: there is nothing to put; give --classes-output too")
    outputs = {"--output": options.output, "--classes-output": options.classes_output}
    for flag, path in outputs.items():
        if path is not None and path.is_dir():
            raise ValueError(f"{flag}: {path} is a folder, expected the name of a file")
    if options.classes_output is not None and (
        options.classes_output.absolute() == options.output.absolute()
    ):
        raise ValueError(
            f"--classes-output: got {options.classes_output}, which --output is too; "
            "expected another file"
        )
    check_label_rule(options.label_rule)
    uploads = {"--upload": options.upload, "--classes-upload": options.classes_upload}
    for (flag, url), (output, path) in zip(uploads.items(), outputs.items(), strict=True):
        if url is not None:
            check_object_url(url)
            if is_written_as_it_stands(path):
                raise ValueError(
                    f"{flag}: got {output} {path}, which is no file that could be read again;"
                    " write a file, or leave it out"
                )


def run(options: argparse.Namespace) -> None:
    """List, and write what was asked for."""
    _check(options)
    if options.output.suffix == SHARD_INDEX_SUFFIX:
        _index_shards(options)
    else:
        _index_objects(options)


def _index_shards(options: argparse.Namespace) -> None:
    open_root = functools.partial(open_store, **store_settings(options))
    shards = _of_one_split(find_shards(options.source, open_root), options.output)
    if options.upload is not None:
        folder = split_url(options.upload)[0]
    elif is_folder(shards.root):
        folder = os.path.abspath(options.output.parent)
        root = os.path.abspath(os.path.expanduser(shards.root.removeprefix("file://")))
        shards = shards._replace(root=root)
    else:
        folder = shards.root
    shards = rebase(shards, folder)
    what = f"reading {shards.root}"
    with show_progress(what, "shards", len(shards.names), log_every=1) as progress:
        index = scan_shards(
            shards,
            open_root,
            payload=options.payload,
            label_space=None if options.label_space is None else LabelSpace(options.label_space),
            label_base=options.label_base,
            concurrency=options.concurrency,
            on_shard=lambda name, num_samples: progress.advance(f"{name}, {num_samples} samples"),
        )
    index.save(options.output)
    labels = index.labels
    of_classes = "no labels" if labels is None else f"labels 0 to {int(labels.max())}"
    space = "" if index.label_space is None else f" ({index.label_space})"
    print(
        f"{options.output}: {len(index)} samples in {len(index.shards)} shards, {of_classes}{space}"
    )
    if shards.root != folder:
        print(f"{options.output}: names are relative to {shards.root}; open that folder with it")
    if options.upload is not None:
        upload(options.output, options.upload, store_opener(options))
        print(f"{options.upload}: uploaded")


def _of_one_split(shards: ShardSet, output: Path) -> ShardSet:
    """Keep the shards of the split that the index is named after, if there are several."""
    splits = {find_split(name) for name in shards.names}
    if len(splits) == 1:
        return shards
    wanted = find_split(output.name)
    if wanted not in splits or wanted is None:
        names = sorted(split or "neither" for split in splits)
        raise ValueError(
            f"{shards.root}: has shards of {', '.join(names)}, expected those of one split; name"
            f" them by a pattern, or call --output such as {names[-1]}-index.npz"
        )
    kept = [number for number, name in enumerate(shards.names) if find_split(name) == wanted]
    return ShardSet(
        shards.root,
        tuple(shards.names[number] for number in kept),
        tuple(shards.sizes[number] for number in kept),
    )


def _index_objects(options: argparse.Namespace) -> None:
    (source,) = options.source
    open_root = store_opener(options)
    with count_progress(f"listing {source}") as on_progress:
        index = find_samples(
            source,
            open_root,
            suffixes=options.suffix,
            ignore_case=options.ignore_case,
            relative=options.relative,
            on_progress=on_progress,
        )
    classes, classes_output = None, options.classes_output
    if classes_output is not None:  # before anything is written, since it may fail
        classes = Classes.from_keys(index.keys(), label_rule=options.label_rule)
    index.save_json(options.output)
    print(f"{options.output}: {len(index)} samples")
    if len(index) > PACK_ABOVE_KEYS and not is_written_as_it_stands(options.output):
        packed = packed_path(options.output)
        index.save_packed(packed, json_path=options.output)
        print(f"{packed}: packed")
    if options.upload is not None:
        upload(options.output, options.upload, open_root)
        print(f"{options.upload}: uploaded")
    if classes is not None and classes_output is not None:
        classes.save_json(classes_output)
        print(f"{classes_output}: {classes.count} classes")
        if options.classes_upload is not None:
            upload(classes_output, options.classes_upload, open_root)
            print(f"{options.classes_upload}: uploaded")
