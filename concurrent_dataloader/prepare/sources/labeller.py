"""Chooses what says the classes of the samples that were found, and asks it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from typing import Any

from concurrent_dataloader import devkit
from concurrent_dataloader.errors import ClassesFormatError
from concurrent_dataloader.label_rules import LabelRule, class_finder
from concurrent_dataloader.labelling import (
    ClassTable,
    Labelling,
    convert,
    imagenet_table,
    label_by_rule,
    label_by_table,
    label_by_truth,
    label_by_values,
    table_of_meta,
)
from concurrent_dataloader.labels import LabelSpace
from concurrent_dataloader.prepare.metadata import Metadata
from concurrent_dataloader.prepare.sources.archives import is_compressed_tar, is_tar
from concurrent_dataloader.prepare.sources.class_map import find_rule, parse_class_map
from concurrent_dataloader.prepare.sources.files import join, split_file_name
from concurrent_dataloader.prepare.sources.layouts import Place, Search, find_xml
from concurrent_dataloader.shard_names import METADATA_NAME

NO_LABELS = "none"
"""The label rule of samples whose classes are not wanted."""

_READERS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Labeller:
    """Finds the labels of what was found."""

    search: Search
    place: Place
    label_rule: LabelRule | None
    class_map: str | None
    meta_mat: str | None
    ground_truth: str | None
    id_base: int | None
    label_space: LabelSpace | None

    def run(self) -> Labelling | None:
        """Give the labels, -1 where a class is not known; None if samples are to have none."""
        if self.label_rule == NO_LABELS:
            return None
        labelling, default = self._find()
        target = self.label_space or default
        if labelling is None or target is None:
            return labelling
        if self.label_space is None and labelling.label_space is None:
            return labelling
        return convert(labelling, target)

    def explain(self, name: str) -> str:
        """Say why a sample has no label."""
        rule = self.label_rule or self.place.label_rule
        value = "" if rule == NO_LABELS else class_finder(rule)(name)
        given = self.ground_truth or self.class_map or self.meta_mat
        what = f"class {value!r} by label_rule {rule!r}" if value else "no class"
        if given is None:
            return (
                f"{name}: names {what}; give label_rule, class_map or ground_truth, or let samples"
                " of unknown classes be skipped"
            )
        inner = ""
        if self.meta_mat is not None:
            number = self._read_meta(self.meta_mat).get(value)
            if number is not None:
                inner = f", which is an inner node of WordNet (ILSVRC2012_ID {number})"
        return (
            f"{name}: got {what}{inner}, expected one of {given}; add it there, choose another"
            " label_rule, or let samples of unknown classes be skipped"
        )

    def _find(self) -> tuple[Labelling | None, LabelSpace | None]:
        """Give the labels, and the label space that they are to be in by default."""
        sorted_wnid = LabelSpace.SORTED_WNID
        names = self.place.found.names
        if self.ground_truth is not None:
            return self._label_by_truth(self.ground_truth), sorted_wnid
        if self.class_map is not None:
            return self._label_by_map(self.class_map), None
        if self.meta_mat is not None:
            table = table_of_meta(self._read_meta(self.meta_mat), self.meta_mat)
            return label_by_table(names, self.label_rule or "parent", table), sorted_wnid
        if self.label_rule is not None:
            return label_by_rule(names, self.label_rule), None
        if self.place.found.labels is not None:
            return self._label_by_shards(self.place.found.labels), None
        if not self.place.has_classes or self._begins_with(devkit.TEST_BASE):
            return None, None
        if self._begins_with(devkit.VAL_BASE) and "/" not in names.key(0):
            truth = self._find_truth()
            if truth is None and self.place.xml_folder is not None:
                return self._label_by_xml(self.place.xml_folder), sorted_wnid
            return self._label_by_truth(truth or self._refuse_flat()), sorted_wnid
        return label_by_rule(names, self.place.label_rule), None

    def _begins_with(self, base: str) -> bool:
        return devkit.stem_of(self.place.found.names.key(0)).startswith(base)

    def _read_meta(self, text: str) -> dict[str, int]:
        if not (is_tar(text) or is_compressed_tar(text)):
            return devkit.parse_meta(self.search.files.read(text), text)
        return devkit.parse_meta(self._read_kit(text)["meta.mat"], text)

    def _read_kit(self, text: str) -> dict[str, bytes]:
        if split_file_name(text).name in devkit.ARCHIVE_MD5:
            self.search.check_archive(text)
        with self.search.files.open_file(text) as file:
            return devkit.read_devkit(file, text)

    def _label_by_truth(self, text: str) -> Labelling:
        meta = None if self.meta_mat is None else self._read_meta(self.meta_mat)
        if is_tar(text) or is_compressed_tar(text):
            kit = self._read_kit(text)
            raw = kit[devkit.GROUND_TRUTH]
            meta = devkit.parse_meta(kit["meta.mat"], text) if meta is None else meta
        else:
            raw = self.search.files.read(text)
        truth = devkit.parse_ground_truth(raw, text)
        return label_by_truth(self.place.found.names, truth, meta)

    def _label_by_map(self, text: str) -> Labelling:
        names = self.place.found.names
        table = parse_class_map(self.search.files.read(text), text, self.id_base)
        if not isinstance(table, ClassTable):
            return label_by_truth(names, table, None)
        return label_by_table(names, self.label_rule or find_rule(names, table), table)

    def _label_by_shards(self, labels: Any) -> Labelling:
        """Take the labels of shards, and the names of their classes from the metadata beside."""
        count = int(labels.max()) + 1
        classes, space = tuple(str(label) for label in range(count)), None
        for folder in self.place.beside:
            text = join(folder, METADATA_NAME)
            if not self.search.files.has(text):
                continue
            splits = Metadata.from_bytes(self.search.files.read(text), text).splits
            told = splits.get(self.search.split or "") or next(iter(splits.values()), None)
            if told is not None and told.classes is not None:
                if len(told.classes) < count:
                    raise ClassesFormatError(
                        f"{text}: names {len(told.classes)} classes, expected {count}, since the"
                        f" shards hold label {count - 1}"
                    )
                return Labelling(labels, told.classes, told.label_space)
        told = self.place.found.classes
        if told is not None and len(told) >= count:
            return Labelling(labels, told, self.place.found.label_space)
        return Labelling(labels, classes, space)

    def _label_by_xml(self, folder: str) -> Labelling:
        """Take the class that the XML file of each image names, as Kaggle's have one."""
        names = self.place.found.names
        xml = find_xml(self.search, folder, names, is_merged=True)
        with contextlib.closing(xml), concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(xml.annotation, range(len(names)))
            wnids = [one.objects[0][0] if one and one.objects else "" for one in found]
        return label_by_values(wnids, imagenet_table())

    def _find_truth(self) -> str | None:
        """Look for the classes of a flat ImageNet validation set beside it."""
        for folder in self.place.beside:
            for name in devkit.TRUTH_NAMES:
                if self.search.files.has(join(folder, name)):
                    return join(folder, name)
        return None

    def _refuse_flat(self) -> str:
        raise ClassesFormatError(
            f"{self.place.found.where}: a flat folder of validation images, and none of"
            f" {', '.join(devkit.TRUTH_NAMES)} in {' or '.join(self.place.beside)}; give"
            " ground_truth"
        )
