"""``shard``: pack samples into tar or TFRecord shards."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import get_args

from concurrent_dataloader.prepare.metadata import Metadata, Payload, ShardMetadata, SplitMetadata
from concurrent_dataloader.prepare.nesting import refuse_target_in_samples
from concurrent_dataloader.prepare.shard import write_shards
from concurrent_dataloader.prepare.shard_settings import (
    DEFAULT_MAX_BYTES,
    KeyStyle,
    ShardSettings,
)
from concurrent_dataloader.prepare.source import check_same_classes
from concurrent_dataloader.prepare.sources import SampleTable
from concurrent_dataloader.prepare.steps import (
    DEFAULT_QUALITY,
    STEPS,
    Preparation,
    Step,
    parse_steps,
)
from concurrent_dataloader.prepare.survey import check_splits, survey_source
from concurrent_dataloader.prepare.target import ShardTarget
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    check_at_least,
    check_processes,
    store_opener,
)
from concurrent_dataloader.prepare.verbs._config import (
    BOOL,
    INT,
    SIZE,
    TEXT,
    Kind,
    add_config_option,
    apply_config,
    list_of,
    one_of,
    parse_size,
)
from concurrent_dataloader.prepare.verbs._source import (
    SOURCE_KINDS,
    add_source_options,
    check_apart,
    check_boxes,
    check_source_options,
    is_sample,
    open_samples,
    parse_list,
    parse_splits,
    print_left_out,
    write_strays,
)
from concurrent_dataloader.shard_index import ShardKind

DESCRIPTION = (
    "Pack the samples of SOURCE into shards in TARGET, shuffled as a whole by a seed, with an index"
    " of byte ranges and metadata.json. SOURCE is a folder, a bucket, an index, a tar, a tar of"
    " class tars, tar or TFRecord shards, or ImageNet as Kaggle or torchvision lays it out; TARGET"
    " is a folder or s3://bucket/prefix. Files are packed as they are unless a payload, steps or a"
    " function are asked for. The same seed gives the same bytes on any machine, with any number of"
    " processes. A run that was stopped goes on when the command is given again."
)

CALLED_IN_MESSAGES = {"field": "data_type", "num_readers": "readers", "split": "splits"}

_DEFAULT_SPLITS = ("train",)


def _steps(text: str) -> tuple[Step, ...]:
    try:
        return parse_steps(parse_list(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


KINDS: dict[str, Kind] = {
    "splits": list_of(parse_splits),
    "format": one_of(*get_args(ShardKind)),
    "pattern": TEXT,
    "maxcount": INT,
    "maxsize": SIZE,
    "samples_per_shard": INT,
    "shuffle": BOOL,
    "seed": INT,
    "key_style": one_of(*get_args(KeyStyle)),
    "key_prefix": TEXT,
    "data_type": TEXT,
    "payload": one_of(*get_args(Payload)),
    "quality": INT,
    "steps": list_of(_steps),
    "function": TEXT,
    "file_info": BOOL,
    "md5": BOOL,
    "processes": INT,
    "readers": INT,
    "in_memory": BOOL,
    "scratch": TEXT,
    "overwrite": BOOL,
    "resume": BOOL,
    "endpoint_url": TEXT,
    "credentials": TEXT,
    "region": TEXT,
    "anonymous": BOOL,
    "client": TEXT,
    **SOURCE_KINDS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help="where the samples are")
    parser.add_argument("target", metavar="TARGET", help="folder, or s3://bucket/prefix, to write")
    parser.add_argument(
        "--splits",
        "--split",
        type=parse_splits,
        metavar="LIST",
        help="split to write, or several, parted by commas, as train,val: each from its part of"
        " SOURCE (default: train, from all of SOURCE)",
    )
    _add_shard_options(parser.add_argument_group("the shards"))
    _add_payload_options(parser.add_argument_group("what is packed"))
    _add_run_options(parser.add_argument_group("the run"))
    add_source_options(parser)
    add_store_options(parser)
    add_config_option(parser, KINDS)


def _add_shard_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--format",
        choices=get_args(ShardKind),
        default="tar",
        help="tar in the layout of WebDataset, or tfrecord as TensorFlow's ImageNet"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--pattern",
        metavar="NAME",
        help="names of shards, such as imagenet-train-%%06d.tar (default: SPLIT-%%06d.tar, or"
        " SPLIT-%%05d-of-%%05d)",
    )
    group.add_argument(
        "--maxcount", type=int, metavar="N", help="samples of a shard, at most (default: no limit)"
    )
    group.add_argument(
        "--maxsize",
        type=parse_size,
        default=DEFAULT_MAX_BYTES,
        metavar="SIZE",
        help="bytes of a shard, as 3e9, 300MB, 1GiB, or none; only a sample that is larger alone"
        " exceeds it (default: %(default)s)",
    )
    group.add_argument(
        "--samples-per-shard",
        type=int,
        metavar="N",
        help="put exactly N into each shard but the last, whatever its size; not with --maxcount"
        " (default: as many as fit)",
    )
    group.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether all samples are shuffled (default: --shuffle)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the shuffling, recorded in metadata.json (default: %(default)s)",
    )
    group.add_argument(
        "--key-style",
        choices=get_args(KeyStyle),
        default="path",
        help="what a sample is called: its path in SOURCE, its file name's stem, or SPLIT- and its"
        " number; dots in names become underscores (default: %(default)s)",
    )
    group.add_argument(
        "--key-prefix",
        metavar="TEXT",
        help="what stands before each key (default: SPLIT- for numbers; SPLIT/ for paths where"
        " --splits is given; else nothing)",
    )
    group.add_argument(
        "--data-type",
        metavar="NAME",
        help="field of the image, as jpg (default: the file's ending in lower case, or that of the"
        " payload)",
    )
    group.add_argument(
        "--file-info",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write SPLIT-FileInfo.json: class, shard and offset of each source file"
        " (default: --file-info)",
    )
    group.add_argument(
        "--md5",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also record the MD5 of each shard, of which the checksum of older systems is made;"
        " slower (default: --no-md5, CRC-32C only)",
    )


def _add_payload_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--payload",
        choices=get_args(Payload),
        help="file as it is, JPEG encoded anew, uint8 tensor (CHW), raw RGB of one size, or PPM"
        " (default: file; jpeg with --steps or --quality)",
    )
    group.add_argument(
        "--quality",
        type=int,
        metavar="N",
        help=f"of JPEG encoding, 0 to 100 (default: {DEFAULT_QUALITY}, if there is any)",
    )
    group.add_argument(
        "--steps",
        type=_steps,
        default=(),
        metavar="LIST",
        help=f"steps to bake in, of {', '.join(f'{name}(n)' for name in STEPS)}, parted by commas;"
        " recorded in metadata.json (default: none)",
    )
    group.add_argument(
        "--function",
        metavar="MODULE:NAME",
        help="function of yours that gets the bytes of each file and gives others, called first"
        " (default: none)",
    )


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="shards written at once (default: %(default)s)",
    )
    group.add_argument(
        "--readers",
        type=int,
        default=64,
        metavar="N",
        help="samples read at once in each process, where reading waits (default: %(default)s)",
    )
    group.add_argument(
        "--in-memory",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compose shards in memory instead of a file (default: --no-in-memory)",
    )
    group.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="for temporary files: shards for a bucket, archives that are unpacked (default: the"
        " system's)",
    )
    group.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="remove what TARGET holds of the split first (default: --no-overwrite, refuse)",
    )
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on after a run of the same command that was stopped (default: --resume)",
    )


def run(options: argparse.Namespace) -> None:
    """Pack each split."""
    apply_config(options, KINDS)
    check_processes(options)
    check_at_least(options, readers=1, samples_per_shard=1, maxcount=1)
    check_source_options(options)
    if os.getcwd() not in sys.path:  # where users have their module; an installed command lacks it
        sys.path.append(os.getcwd())
    settings = {split: _settings(options, split) for split in options.splits or _DEFAULT_SPLITS}
    names = [wanted.names.names(1)[0] for wanted in settings.values()]
    refuse_target_in_samples(
        options.source,
        options.target,
        splits=options.splits or (),
        is_taken=any(is_sample(options, name) for name in names),
    )
    finished = {} if options.overwrite else _find_finished(options, settings)
    with contextlib.ExitStack() as stack:
        sources: dict[str, SampleTable] = {}
        for split in settings:
            part = split if options.splits else None
            source = open_samples(options, options.source, part, must_have_boxes=len(settings) == 1)
            sources[split] = stack.enter_context(contextlib.closing(source))
        check_apart(options.source, sources)
        check_boxes(options, sources)
        write_strays(options, sources.values())
        labelled = {split: each for split, each in sources.items() if each.classes is not None}
        if len(labelled) > 1:  # test images often have no labels
            check_same_classes(labelled)
        if len(settings) > 1:
            check_splits([(sources[split], settings[split]) for split in settings])
        for split in settings:
            if split in finished and _is_from(sources[split], settings[split], finished[split]):
                print(f"{options.target}: {split}: there already")
            else:
                _write(options, sources[split], settings[split])


def _find_finished(
    options: argparse.Namespace, settings: dict[str, ShardSettings]
) -> dict[str, Metadata]:
    """Tell which splits are there as a whole, before any sample is looked at.

    Raises:
        FileExistsError: All of them are.
    """
    finished: dict[str, Metadata] = {}
    with contextlib.closing(store_opener(options)(options.target)) as store:
        for split, wanted in settings.items():
            target = ShardTarget(store, split)
            try:
                target.refuse_finished(wanted.names)
            except FileExistsError:
                metadata = target.read_metadata()
                if metadata is None or len(finished) == len(settings) - 1:
                    raise
                finished[split] = metadata
    return finished


def _is_from(source: SampleTable, settings: ShardSettings, metadata: Metadata) -> bool:
    """Tell whether a split that is there is what would be written."""
    split = metadata.splits.get(settings.split)
    return split is not None and split.fingerprint == survey_source(source, settings).fingerprint


def _settings(options: argparse.Namespace, split: str) -> ShardSettings:
    if options.samples_per_shard is not None and options.maxcount is not None:
        raise ValueError(
            f"--samples-per-shard: got {options.samples_per_shard} and --maxcount"
            f" {options.maxcount}, expected one of the two"
        )
    is_exact = options.samples_per_shard is not None
    is_encoded = bool(options.steps) or options.quality is not None
    prefix = options.key_prefix
    if prefix is None and options.splits and options.key_style == "path":
        # Names count from the split's part of the source, and are often the same in each.
        prefix = f"{split}/"
    return ShardSettings(
        split=split,
        kind=options.format,
        pattern=options.pattern,
        seed=options.seed if options.shuffle else None,
        max_count=options.samples_per_shard if is_exact else options.maxcount,
        max_bytes=None if is_exact else options.maxsize,
        key_style=options.key_style,
        key_prefix=prefix,
        field=options.data_type,
        boxes=options.boxes is not None,
        md5=options.md5,
        preparation=Preparation(
            payload=options.payload or ("jpeg" if is_encoded else "file"),
            steps=options.steps,
            quality=options.quality,
            function=options.function,
        ),
    )


def _write(options: argparse.Namespace, source: SampleTable, settings: ShardSettings) -> None:
    target = store_opener(options)(options.target)
    with contextlib.closing(target), _shard_progress(settings.split) as on_shard:
        split = write_shards(
            source,
            target,
            settings,
            num_processes=options.processes,
            num_readers=options.readers,
            overwrite=options.overwrite,
            resume=options.resume,
            in_memory=options.in_memory,
            scratch=options.scratch,
            file_info=options.file_info,
            on_shard=on_shard,
        )
    print(f"{options.target}: {_total(settings.split, split)}")
    print_left_out(options, source)


def _total(name: str, split: SplitMetadata) -> str:
    shards = split.shards or ()
    size_bytes = sum(shard.size_bytes for shard in shards)
    return f"{name}: {split.num_samples} samples, {len(shards)} shards, {size_bytes} bytes"


@contextlib.contextmanager
def _shard_progress(split: str) -> Generator[Callable[[ShardMetadata, int], None]]:
    """Show a bar on a terminal, else a line for each shard."""
    if not sys.stderr.isatty():
        yield _print_shard
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    done = TextColumn("shards, {task.fields[samples]} samples, {task.fields[size]:.1f} MB")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), done)
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        samples, size_bytes = 0, 0
        task = bar.add_task(split, total=None, samples=0, size=0.0)

        def on_shard(shard: ShardMetadata, num_shards: int) -> None:
            nonlocal samples, size_bytes
            samples += shard.num_samples
            size_bytes += shard.size_bytes
            bar.update(task, advance=1, total=num_shards, samples=samples, size=size_bytes / 1e6)

        yield on_shard


def _print_shard(shard: ShardMetadata, num_shards: int) -> None:
    print(
        f"{shard.name}: {shard.num_samples} samples, {shard.size_bytes} bytes, of {num_shards}"
        " shards",
        file=sys.stderr,
    )
