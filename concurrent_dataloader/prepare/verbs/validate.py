"""``validate``: is a data set whole, and can every sample be used?"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.index import Index
from concurrent_dataloader.labels import Classes
from concurrent_dataloader.prepare.checksums import (
    digest_objects,
    read_checksums,
    write_checksums,
)
from concurrent_dataloader.prepare.deep import (
    SampleTally,
    ShardResult,
    check_files,
    check_shard,
)
from concurrent_dataloader.prepare.index import IMAGE_SUFFIXES, is_folder
from concurrent_dataloader.prepare.metadata import checksum
from concurrent_dataloader.prepare.parallel import call_concurrently
from concurrent_dataloader.prepare.samples import BadSample, Rules, check_again, read_report
from concurrent_dataloader.prepare.validate import (
    IMAGENET_TREES,
    Report,
    ShardFiles,
    expect_index,
    find_shard_files,
    is_packed,
    list_files,
    validate_checksum,
    validate_shards,
    validate_tree,
)
from concurrent_dataloader.prepare.verbs._bar import show_progress
from concurrent_dataloader.prepare.verbs._common import add_store_options, store_settings
from concurrent_dataloader.shard_names import find_split
from concurrent_dataloader.stores import WritableStore, open_writable_store
from concurrent_dataloader.stores.base import ObjectInfo

DESCRIPTION = (
    "Say OK, or corrupted and what is wrong: which file or sample is missing, extra, renamed,"
    " swapped or damaged; the exit status is 0 or 1. Shards are compared with their index and"
    " metadata.json, LMDB databases are read record by record, folders of single files are compared"
    " with an index or with recorded checksums."
)

_NEITHER = (
    "nothing says what should be there; give --index, --checksums, --checksum or --imagenet,"
    " decode all with --deep, or record checksums with --write-checksums"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "source", metavar="PATH_OR_URL", help="s3://bucket[/prefix], a folder, or one shard"
    )
    group = parser.add_argument_group("single files")
    group.add_argument(
        "--index",
        type=Path,
        metavar="FILE",
        help="index of the files, with keys relative to PATH_OR_URL (default: none)",
    )
    group.add_argument(
        "--checksums",
        type=Path,
        metavar="FILE",
        help="MD5s of the files, as --write-checksums or md5sum wrote them (default: none)",
    )
    group.add_argument(
        "--checksum",
        metavar="MD5",
        help="checksum of all files together: the MD5 of their sorted MD5s (default: none)",
    )
    group.add_argument(
        "--imagenet",
        action="store_true",
        help="compare the folders train and val (or validation) with the checksums of ImageNet"
        " (default: do not)",
    )
    group.add_argument(
        "--write-checksums",
        type=Path,
        metavar="FILE",
        help="compare nothing, but record the MD5 of each file for later (default: do not)",
    )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="classes file; with --deep each file must be of one of them (default: none)",
    )
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--deep",
        action="store_true",
        help="also decode every sample, look at its class, and count classes (default: do not)",
    )
    group.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="classes must be 0 to N - 1 (default: what the index or metadata.json says)",
    )
    group.add_argument(
        "--label-base",
        type=int,
        choices=(0, 1),
        default=1,
        help="what TFRecords call the first class (default: %(default)s)",
    )
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read LMDB databases of the older system (default: do not)",
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write bad samples to this file, a line of JSON each (default: do not)",
    )
    group.add_argument(
        "--from",
        dest="from_report",
        type=Path,
        metavar="FILE",
        help="look only at the samples that such a report names (default: at all)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="files or shards under way at once (default: %(default)s)",
    )
    add_store_options(parser)


ClassNames = dict[str, Sequence[str]]
"""Names of the classes by split, in the order of the labels."""


class _Place(NamedTuple):
    """Where the data set lies, and which one file of it is meant."""

    root: str
    name: str | None


def run(options: argparse.Namespace) -> int:
    """Check, and say what is wrong."""
    place = _locate(options.source)
    with contextlib.closing(open_writable_store(place.root, **store_settings(options))) as store:
        if options.from_report is not None:
            return _check_report(options, store)
        infos = [
            info
            for info in list_files(store)
            if place.name is None or info.key == place.name or _is_data_of(info.key, place.name)
        ]
        if not infos:
            raise KeyNotFoundError(f"{options.source}: holds no file; check the path")
        if options.write_checksums is not None:
            return _record(options, store, infos)
        tally = SampleTally()
        names: ClassNames = {}
        report = _check(options, store, infos, tally, names)
    if options.deep:
        _print_counts(tally, names)
    report.findings += tally.findings
    if options.report is not None:
        write_whole(options.report, (bad.to_line() for bad in tally.bad))
    return _conclude(options.source, report)


def _locate(source: str) -> _Place:
    if is_folder(source):
        path = Path(source.removeprefix("file://")).expanduser()
        if path.is_file():
            return _Place(str(path.parent), path.name)
        if path.suffix == ".lmdb" and path.is_dir():
            return _Place(str(path.parent), path.name)
        return _Place(source, None)
    name = source.rpartition("/")[2]
    if is_packed([ObjectInfo(name, 0)] if name else []) or name.endswith(".lmdb"):
        return _Place(source.rpartition("/")[0], name)
    return _Place(source, None)


def _is_data_of(key: str, name: str) -> bool:
    return key == f"{name}/data.mdb"


def _conclude(source: str, report: Report) -> int:
    for finding in report.findings:
        print(finding)
    for note in report.notes:
        print(f"note: {note}")
    samples = "" if report.num_samples is None else f", {report.num_samples} samples"
    checked = f"{report.num_files} files{samples}, {report.size_bytes / 1e6:.1f} MB of 10^6 bytes"
    if report.is_ok:
        print(f"{source}: OK ({checked})")
        return 0
    print(f"{source}: corrupted: {len(report.findings)} problems ({checked})")
    return 1


# -- what there is to check


def _check(
    options: argparse.Namespace,
    store: WritableStore,
    infos: list[ObjectInfo],
    tally: SampleTally,
    names: ClassNames,
) -> Report:
    compared = [options.index, options.checksums, options.checksum, options.imagenet or None]
    if any(value is not None for value in compared):
        report = _check_tree(options, store, infos)
    elif databases := [info for info in infos if _is_database(info.key)]:
        return _check_databases(options, databases, tally)
    elif is_packed(infos):
        return _check_shards(options, store, infos, tally, names)
    elif options.deep:
        report = Report(notes=["nothing says which files should be there: only decoded"])
        report.count([info for info in infos if _is_image(info.key)])
    else:
        raise ValueError(f"{options.source}: {_NEITHER}")
    if options.deep:
        _check_deep_files(options, store, infos, tally, report)
    return report


def _is_image(key: str) -> bool:
    return key.lower().endswith(IMAGE_SUFFIXES)


def _is_database(key: str) -> bool:
    return key.endswith(".lmdb") or key.rpartition("/")[2] == "data.mdb"


def _is_within(path: Path, options: argparse.Namespace, key: str) -> bool:
    """Whether a file of the data set is the file of checksums itself."""
    return is_folder(options.source) and path.absolute() == Path(options.source).absolute() / key


def _record(options: argparse.Namespace, store: WritableStore, infos: list[ObjectInfo]) -> int:
    path: Path = options.write_checksums
    infos = [info for info in infos if not _is_within(path, options, info.key)]
    with show_progress(f"reading {options.source}", "files", len(infos)) as progress:
        files = digest_objects(
            store,
            infos,
            concurrency=options.concurrency,
            on_file=lambda key, size_bytes: progress.advance(key),
        )
    write_checksums(path, files)
    total = checksum(facts.md5 for facts in files.values() if facts.md5 is not None)
    print(f"{path}: MD5s of {len(files)} files, all together {total}")
    return 0


def _check_tree(
    options: argparse.Namespace, store: WritableStore, infos: list[ObjectInfo]
) -> Report:
    report = Report()
    with show_progress(f"reading {options.source}", "files", None) as progress:

        def on_file(key: str, size_bytes: int) -> None:
            progress.advance(key)

        concurrency: int = options.concurrency
        compare = functools.partial(validate_tree, store, concurrency=concurrency, on_file=on_file)
        if options.index is not None:
            expected = expect_index(Index.load(options.index))
            _merge(report, compare(infos, expected, by=str(options.index), is_complete=False))
        if options.checksums is not None:
            recorded = read_checksums(options.checksums)
            others = [
                info for info in infos if not _is_within(options.checksums, options, info.key)
            ]
            by = str(options.checksums)
            _merge(report, compare(others, recorded, by=by, is_complete=True))
        for where, expected_checksum, members in _checksums(options, infos):
            other = validate_checksum(
                store,
                members,
                expected_checksum,
                where=where,
                concurrency=concurrency,
                on_file=on_file,
            )
            _merge(report, other)
    return report


def _checksums(
    options: argparse.Namespace, infos: list[ObjectInfo]
) -> Iterator[tuple[str, str, list[ObjectInfo]]]:
    if options.checksum is not None:
        yield options.source, options.checksum.lower(), infos
    if not options.imagenet:
        return
    folders = {"train": "train", "validation": "validation", "val": "validation"}
    found = False
    for folder, tree in folders.items():
        members = [info for info in infos if info.key.startswith(f"{folder}/")]
        if members:
            found = True
            yield folder, IMAGENET_TREES[tree], members
    if not found:
        raise KeyNotFoundError(
            f"{options.source}: --imagenet: got no folder train, val or validation, expected one"
        )


def _merge(report: Report, other: Report) -> None:
    report.findings += [found for found in other.findings if found not in report.findings]
    report.notes += other.notes
    report.num_files = max(report.num_files, other.num_files)
    report.size_bytes = max(report.size_bytes, other.size_bytes)


def _check_deep_files(
    options: argparse.Namespace,
    store: WritableStore,
    infos: list[ObjectInfo],
    tally: SampleTally,
    report: Report,
) -> None:
    present = {info.key for info in infos}
    if options.index is not None:
        keys = [key for key in dict.fromkeys(Index.load(options.index).keys()) if key in present]
    else:
        keys = [info.key for info in infos if _is_image(info.key)]
    classes = None if options.classes is None else Classes.load(options.classes)
    rules = Rules(num_classes=options.num_classes, classes=classes)
    with show_progress(f"decoding {options.source}", "files", len(keys)) as progress:

        def on_file(result: ShardResult) -> None:
            tally.add("", result)
            progress.advance(result.name)

        check_files(store, keys, rules, concurrency=options.concurrency, on_file=on_file)
    report.num_samples = tally.num_samples


# -- packed data


def _check_shards(
    options: argparse.Namespace,
    store: WritableStore,
    infos: list[ObjectInfo],
    tally: SampleTally,
    names: ClassNames,
) -> Report:
    files = find_shard_files(store, infos)
    with show_progress(
        f"reading {options.source}", "shards", len(files.shards), log_every=1
    ) as progress:
        report = validate_shards(
            store,
            files,
            concurrency=options.concurrency,
            on_file=lambda key, size_bytes: progress.advance(key),
        )
    if not options.deep:
        return report
    split_of = {
        shard.name: split for split, index in files.indexes.items() for shard in index.shards
    }
    work = [(info, split_of.get(info.key)) for info in files.shards.values()]

    def check(item: tuple[ObjectInfo, str | None]) -> tuple[str, ShardResult]:
        info, split = item
        index = None if split is None else files.indexes[split]
        name = split or find_split(info.key) or ""
        rules = _rules_of(options, files, name)
        return name, check_shard(store, info, rules, index)

    with (
        show_progress(f"decoding {options.source}", "shards", len(work), log_every=1) as progress,
        contextlib.closing(call_concurrently(check, work, options.concurrency)) as results,
    ):
        for split, result in results:
            tally.add(split, result)
            progress.advance(result.name)
    report.num_samples = tally.num_samples
    for split, counts in sorted(tally.counts.items()):
        classes = _class_names(files, split)
        if classes is not None:
            names[split] = classes
            num_empty = sum(label not in counts for label in range(len(classes)))
            if num_empty:
                report.notes.append(
                    f"{split}: {num_empty} of {len(classes)} classes have no sample"
                )
    if tally.num_unchecked:
        report.notes.append(f"{tally.num_unchecked} samples hold no image file: not decoded")
    if tally.num_shared_keys:
        report.notes.append(
            f"{tally.num_shared_keys} keys stand in two splits, for different samples"
        )
    return report


def _rules_of(options: argparse.Namespace, files: ShardFiles, split: str) -> Rules:
    classes = _class_names(files, split)
    num_classes = options.num_classes
    if num_classes is None and classes is not None:
        num_classes = len(classes)
    known = None if files.metadata is None else files.metadata.splits.get(split)
    raw_bytes = None
    if known is not None and known.payload == "raw" and known.image_size is not None:
        raw_bytes = 3 * known.image_size[0] * known.image_size[1]
    return Rules(num_classes=num_classes, label_base=options.label_base, raw_bytes=raw_bytes)


def _class_names(files: ShardFiles, split: str) -> Sequence[str] | None:
    """Give the classes of a split whose samples have classes."""
    index = files.indexes.get(split)
    if index is not None:
        return None if index.labels is None else index.classes
    known = None if files.metadata is None else files.metadata.splits.get(split)
    return None if known is None else known.classes


def _check_databases(
    options: argparse.Namespace, databases: list[ObjectInfo], tally: SampleTally
) -> Report:
    from concurrent_dataloader.prepare.deep_lmdb import check_database

    if not is_folder(options.source):
        raise ValueError(f"{options.source}: an LMDB database must lie in a folder of this machine")
    report = Report()
    report.count(databases)
    rules = Rules(num_classes=options.num_classes)
    root = Path(_locate(options.source).root.removeprefix("file://")).expanduser()
    with show_progress(
        f"reading {options.source}", "databases", len(databases), log_every=1
    ) as progress:
        for info in databases:
            path = (root / info.key.removesuffix("data.mdb")).absolute()
            result = check_database(
                path, rules, is_deep=options.deep, allow_pickle=options.allow_pickle
            )
            tally.add(find_split(path.name) or path.name, result)
            progress.advance(info.key)
    report.num_samples = tally.num_samples
    return report


def _print_counts(tally: SampleTally, names: ClassNames) -> None:
    for split, counts in sorted(tally.counts.items()):
        prefix = f"{split} " if split else ""
        classes = names.get(split, ())
        for label, count in sorted(counts.items(), key=lambda item: (item[0] is None, item[0])):
            what = "no class" if label is None else f"class {label}"
            if label is not None and label < len(classes):
                what += f" ({classes[label]})"
            print(f"{prefix}{what}: {count} samples")


# -- again


def _check_report(options: argparse.Namespace, store: WritableStore) -> int:
    samples = read_report(options.from_report.read_bytes(), str(options.from_report))
    rules = Rules(
        num_classes=options.num_classes,
        label_base=options.label_base,
        classes=None if options.classes is None else Classes.load(options.classes),
    )
    root = _locate(options.source).root

    def check(sample: BadSample) -> tuple[BadSample, BadSample | None]:
        if sample.kind != "lmdb":
            return sample, check_again(store, sample, rules)
        from concurrent_dataloader.prepare.deep_lmdb import check_record_again

        path = Path(root.removeprefix("file://")).expanduser() / sample.key
        return sample, check_record_again(path, sample, rules, allow_pickle=options.allow_pickle)

    bad: list[BadSample] = []
    with (
        show_progress(f"reading {options.source}", "samples", len(samples)) as progress,
        contextlib.closing(call_concurrently(check, samples, options.concurrency)) as results,
    ):
        for sample, problem in results:
            progress.advance(sample.key)
            if problem is not None:
                bad.append(problem)
    report = Report(findings=[sample.to_finding() for sample in bad], num_samples=len(samples))
    report.num_files = len({sample.key for sample in samples})
    if options.report is not None:
        write_whole(options.report, (sample.to_line() for sample in bad))
    return _conclude(options.source, report)
