"""``validate``: is a data set whole, and can every sample be used?"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

from concurrent_dataloader.files import write_whole
from concurrent_dataloader.prepare.check import check_dataset, check_samples_again
from concurrent_dataloader.prepare.check_settings import (
    CheckSettings,
    Outcome,
    Place,
    Unit,
    list_place,
    locate,
)
from concurrent_dataloader.prepare.checksums import digest_objects, write_checksums
from concurrent_dataloader.prepare.metadata import checksum
from concurrent_dataloader.prepare.samples import BadSample, read_report
from concurrent_dataloader.prepare.validate import Report
from concurrent_dataloader.prepare.verbs._bar import LOG_EVERY, show_progress
from concurrent_dataloader.prepare.verbs._common import (
    add_store_options,
    check_at_least,
    check_output_files,
    store_settings,
)
from concurrent_dataloader.stores import WritableStore, open_writable_store

DESCRIPTION = (
    "Say OK, or corrupted and what is wrong: which file or sample is missing, extra, renamed,"
    " swapped or damaged; the exit status is 0 or 1. Shards are compared with their index and"
    " metadata.json, LMDB databases are read record by record, folders of single files are compared"
    " with an index or with recorded checksums."
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
        help="what TFRecords call the first class (default: as metadata.json says, or 1)",
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


def run(options: argparse.Namespace) -> int:
    """Check, and say what is wrong."""
    check_at_least(options, concurrency=1, num_classes=1)
    check_output_files(options, "report", "write_checksums")
    place = locate(options.source)
    with contextlib.closing(open_writable_store(place.root, **store_settings(options))) as store:
        if options.write_checksums is not None:
            return _record(options, store, place)
        settings = _settings(options)
        if options.from_report is not None:
            report, bad = _check_again(options, store, place, settings)
        else:
            outcome = check_dataset(store, place, settings)
            report, bad = outcome.report, outcome.tally.bad
            if options.deep:
                _print_counts(outcome)
    if options.report is not None:
        write_whole(options.report, (sample.to_line() for sample in bad))
    if options.from_report is not None and not report.counted:
        # It is no failure: a loader whose samples were all well leaves an empty file.
        print(
            f"{options.source}: nothing was checked: {options.from_report} names no sample; leave"
            " --from out to look at all"
        )
        return 0
    return _conclude(options.source, report)


def _settings(options: argparse.Namespace) -> CheckSettings:
    @contextlib.contextmanager
    def steps(what: str, total: int | None, unit: Unit) -> Generator[Callable[[str], None]]:
        log_every = 1 if unit in ("shards", "databases") else LOG_EVERY
        shown = f"{what} {options.source}"
        with show_progress(shown, unit, total, log_every=log_every) as progress:
            yield progress.advance

    return CheckSettings(
        index=options.index,
        checksums=options.checksums,
        checksum=options.checksum,
        imagenet=options.imagenet,
        deep=options.deep,
        classes=options.classes,
        num_classes=options.num_classes,
        label_base=options.label_base,
        allow_pickle=options.allow_pickle,
        concurrency=options.concurrency,
        steps=steps,
    )


def _record(options: argparse.Namespace, store: WritableStore, place: Place) -> int:
    path: Path = options.write_checksums
    itself = path.absolute()
    infos = [info for info in list_place(store, place) if place.path(info.key) != itself]
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


def _check_again(
    options: argparse.Namespace, store: WritableStore, place: Place, settings: CheckSettings
) -> tuple[Report, list[BadSample]]:
    samples = read_report(options.from_report.read_bytes(), str(options.from_report))
    bad = check_samples_again(store, place, samples, settings)
    report = Report(findings=[sample.to_finding() for sample in bad], num_samples=len(samples))
    report.counted = {sample.key: 0 for sample in samples}
    return report, bad


def _print_counts(outcome: Outcome) -> None:
    for split, counts in sorted(outcome.tally.counts.items()):
        prefix = f"{split} " if split else ""
        classes = outcome.names.get(split, ())
        for label, count in sorted(counts.items(), key=lambda item: (item[0] is None, item[0])):
            what = "no class" if label is None else f"class {label}"
            if label is not None and label < len(classes):
                what += f" ({classes[label]})"
            print(f"{prefix}{what}: {count} samples")


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
