"""Opens samples, wherever they lie and however their classes and boxes are given."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

from concurrent_dataloader import devkit
from concurrent_dataloader.annotations import AUTO_BOXES
from concurrent_dataloader.boxes import BoxLookup, NoBoxesError, boxes_from_table, parse_box_table
from concurrent_dataloader.errors import (
    KeyNotFoundError,
    ShardFormatError,
)
from concurrent_dataloader.index import choose_positions
from concurrent_dataloader.label_rules import LabelRule, check_label_rule
from concurrent_dataloader.labelling import (
    Labelling,
    OnUnknown,
    drop_unknown,
)
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.sources.files import Files, split_file_name
from concurrent_dataloader.prepare.sources.found import IMAGE_SUFFIXES, Found
from concurrent_dataloader.prepare.sources.labeller import NO_LABELS, Labeller
from concurrent_dataloader.prepare.sources.layouts import Search, find_xml
from concurrent_dataloader.prepare.sources.table import SampleTable
from concurrent_dataloader.prepare.sources.tfrecords import (
    find_named_records,
    find_records_of_folder,
)

OnStray = Literal["skip", "error"]

PathOrUrl = str | os.PathLike[str]


def open_source(
    text: PathOrUrl,
    *,
    split: str | None = None,
    root: str | None = None,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    on_stray: OnStray = "skip",
    label_rule: LabelRule | None = None,
    class_map: PathOrUrl | None = None,
    meta_mat: PathOrUrl | None = None,
    ground_truth: PathOrUrl | None = None,
    id_base: int | None = None,
    label_space: LabelSpace | str | None = None,
    on_unknown: OnUnknown = "error",
    boxes: PathOrUrl | None = None,
    merge_boxes: bool = True,
    must_have_boxes: bool = True,
    limit: int | None = None,
    sample_seed: int | None = None,
    temporary_folder: str | os.PathLike[str] | None = None,
    verify_archives: bool = False,
    **store_options: Any,
) -> SampleTable:
    """Open samples to be packed or checked; the caller closes the source.

    What ``text`` may be, as path or ``s3://`` URL (an archive also as ``http(s)://`` URL):

    - a folder or prefix of images, in class folders or flat, nested as deep as you like; links are
      followed, but not into a folder that holds them, and one to nothing is an error; those in
      archives are left out;
    - one with a folder for each split, ``train`` and ``val`` or ``validation``, as torchvision's
      ImageNet has it; with original archives, ``ILSVRC2012_img_*.tar``; with shards
      ``train-*.tar``; or in Kaggle's layout, ``ILSVRC/Data/CLS-LOC``;
    - a JSON or packed index of files below ``root``;
    - a tar: flat, with class folders, of class tars, or a WebDataset shard; ``.tar.gz``,
      ``.tar.bz2`` and ``.tar.xz`` are unpacked to a temporary file, which `close` removes;
    - TFRecord shards of images, in the layout of TensorFlow's builder, or a folder of them;
    - tars or TFRecord shards by pattern: ``shards/train-{000..146}.tar``, ``records/train-*``.

    Samples are sorted by name, but for those of an index and of shards, which keep their order.
    The same content gives the same source on any machine and from any of these.

    Classes are found by the first of these that applies: ``ground_truth``, ``class_map``,
    ``meta_mat``, the labels of shards, ``label_rule``, a ground truth, development kit or Kaggle
    solution that lies beside a flat ImageNet validation set, the folder of each sample: the top
    one, however deep the sample lies in it; in a tar, the top one below those that all samples
    share; for an index, whose keys may begin anywhere, the one that holds the sample. Labels are
    then those of torchvision's ImageFolder, unless a map says otherwise.

    Args:
        text: Where the samples lie.
        split: Which part of it: "train", "val", "test".
        root: What the keys of an index are relative to; None: the folder in which it lies.
        suffixes: Endings of samples, in any case; every file is one when empty.
        on_stray: Whether files that are no samples are listed (`SampleTable.strays`), or are an
            error.
        label_rule: How a name holds its class, as in `labels.LabelRule`: "parent", "prefix",
            "regex:PATTERN", ...; "none": samples have no labels.
        class_map: File of classes: see `parse_class_map`.
        meta_mat: ``meta.mat``, or the archive of the development kit.
        ground_truth: File with the class of each image: see `parse_ground_truth`; or the archive
            of the development kit.
        id_base: Lowest possible id in ``class_map``, where it does not tell.
        label_space: Order of ImageNet's classes. None: that of the class map or the shards; for
            everything else the order of the WordNet ids, as in torchvision's weights.
        on_unknown: Whether a sample whose class is not known is an error, or left out.
        boxes: Bounding boxes: a table ``name,x1,y1,x2,y2``, relative to the image, ending in
            ``.csv``; a folder, prefix or tar of XML files as of Pascal VOC; "auto": the XML files
            of Kaggle's layout. None: those that shards hold, and no others.
        merge_boxes: Whether the boxes of a sample become one, their union, when they come from a
            table or XML.
        must_have_boxes: Whether it is an error if ``boxes`` holds those of no sample; if not,
            `SampleTable.has_boxes` tells.
        limit: Take that many samples.
        sample_seed: Take them from everywhere, by this seed, instead of from the begin.
        temporary_folder: Where compressed archives are unpacked.
        verify_archives: Compare original archives with their published MD5 first.
        **store_options: What `open_store` takes: ``client``, ``credentials``, ``endpoint_url``...

    Raises:
        ValueError: An argument cannot be used, or does not tell which samples are meant.
        StoreError: There is no sample, or the store cannot be read.
        ShardFormatError: An archive is damaged, not the original, or holds stray files.
        ClassesFormatError: A file of classes is none, or not of these samples.
        UnknownClassError: The class of a sample is not known.
    """
    if label_rule is not None and label_rule != NO_LABELS:
        check_label_rule(label_rule)
    files = Files(store_options)
    check = _ArchiveCheck(files)
    search = Search(
        files=files,
        split=split,
        root=root,
        suffixes=suffixes,
        temporary_folder=temporary_folder,
        check_archive=check if verify_archives else _accept,
    )
    takes_labels = (label_rule, class_map, meta_mat, ground_truth) == (None, None, None, None)
    named = find_named_records(search, os.fspath(text), takes_labels=takes_labels)
    place = search.run(os.fspath(text)) if named is None else named
    place = find_records_of_folder(search, place, takes_labels=takes_labels)
    labeller = Labeller(
        search=search,
        place=place,
        label_rule=label_rule,
        class_map=_text(class_map),
        meta_mat=_text(meta_mat),
        ground_truth=_text(ground_truth),
        id_base=id_base,
        label_space=None if label_space is None else LabelSpace(label_space),
    )
    try:
        _check_found(place.found, on_stray)
        found, labelling = _label(place.found, labeller, on_unknown, limit, sample_seed)
        finder = _BoxFinder(
            search,
            _text(boxes),
            place.xml_folder,
            is_merged=merge_boxes,
            must_find=must_have_boxes,
        )
        if verify_archives and not check.checked:
            raise ValueError(
                f"verify_archives: got True for {found.where}, where nothing was read from an"
                " original archive; leave it out"
            )
        return SampleTable(found, labelling, finder.run(found), place.unpacked)
    except BaseException:
        place.close()
        raise


def _label(
    found: Found,
    labeller: Labeller,
    on_unknown: OnUnknown,
    limit: int | None,
    sample_seed: int | None,
) -> tuple[Found, Labelling | None]:
    """Give the samples that are wanted, with their labels."""
    labelling = labeller.run()
    if labelling is not None:
        known = drop_unknown(found.names, labelling, on_unknown, labeller.explain)
        if known is not None:
            num_skipped = len(found.names) - len(known)
            labelling = dataclasses.replace(labelling.select(known), num_skipped=num_skipped)
            found = found.select(known)
    if not len(found.names):
        raise KeyNotFoundError(f"{found.where}: no sample is of a known class")
    chosen = choose_positions(len(found.names), limit, sample_seed)
    if chosen is not None:
        found = found.select(chosen)
        labelling = None if labelling is None else labelling.select(chosen)
    return found, labelling


def _check_found(found: Found, on_stray: OnStray) -> None:
    if found.num_stray and on_stray == "error":
        raise ShardFormatError(
            f"{found.where}: holds {found.num_stray} stray files such as {found.strays[0]!r},"
            " expected samples only; remove them, or let stray files be skipped"
        )
    if not len(found.names):
        strays = f", but other files such as {found.strays[0]!r}" if found.strays else ""
        raise KeyNotFoundError(
            f"{found.where}: holds no sample{strays}; check the source and the suffixes"
        )


def _text(given: PathOrUrl | None) -> str | None:
    return None if given is None else os.fspath(given)


def _accept(archive: str) -> None:
    """Take an archive as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class _ArchiveCheck:
    """Compares archives with their published checksums."""

    files: Files
    checked: list[str] = dataclasses.field(default_factory=list[str])

    def __call__(self, archive: str) -> None:
        self.checked.append(archive)
        with self.files.open_file(archive) as file:
            devkit.check_archive(file, split_file_name(archive).name, archive)


@dataclasses.dataclass(frozen=True, slots=True)
class _BoxFinder:
    """Finds the bounding boxes of samples."""

    search: Search
    text: str | None
    xml_folder: str | None
    _: dataclasses.KW_ONLY
    is_merged: bool
    must_find: bool

    def run(self, found: Found) -> BoxLookup | None:
        try:
            return self._find(found)
        except NoBoxesError:
            if self.must_find:
                raise
            return None

    def _find(self, found: Found) -> BoxLookup | None:
        text = self.text
        if text is None:
            return found.boxes
        if text == AUTO_BOXES:
            if self.xml_folder is None:
                raise ValueError(
                    f"boxes: got {AUTO_BOXES!r} for {found.where}, which is not in Kaggle's layout;"
                    " expected a table or a folder of XML files"
                )
            text = self.xml_folder
        if text.casefold().endswith(".csv"):
            table = parse_box_table(self.search.files.read(text), text)
            return boxes_from_table(found.names, table, text, is_merged=self.is_merged)
        return find_xml(self.search, text, found.names, is_merged=self.is_merged)
