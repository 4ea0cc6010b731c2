"""What is to be checked and how, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from concurrent_dataloader.errors import KeyNotFoundError
from concurrent_dataloader.prepare.deep import SampleTally
from concurrent_dataloader.prepare.index import is_folder
from concurrent_dataloader.prepare.validate import Report, is_packed, list_files
from concurrent_dataloader.stores import WritableStore
from concurrent_dataloader.stores.base import ObjectInfo

Unit = Literal["files", "shards", "databases", "samples"]


class Steps(Protocol):
    """How far a step is."""

    def __call__(
        self, what: str, total: int | None, unit: Unit
    ) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        """Begin a step; what is given is called with the name of each thing that is done."""
        ...


@contextlib.contextmanager
def _say_nothing(what: str, total: int | None, unit: Unit) -> Generator[Callable[[str], None]]:
    del what, total, unit
    yield lambda name: None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckSettings:
    """What a data set is compared with, and how closely it is looked at."""

    index: Path | None = None
    """Names single files that should be there."""

    checksums: Path | None = None
    """MD5s of single files, as `checksums.write_checksums` or ``md5sum`` wrote them."""

    checksum: str | None = None
    """`metadata.checksum` of all files together."""

    imagenet: bool = False
    """Compare the raw trees of ImageNet with their fixed checksums."""

    deep: bool = False
    """Decode every sample, look at its class, and count classes."""

    classes: Path | None = None
    """Classes file that single files must belong to, if ``deep``."""

    num_classes: int | None = None
    """Labels are 0 to this, less one; None: as the index or metadata.json says."""

    label_base: int | None = None
    """What TFRecords call the first class; None: as metadata.json says, else 1, as TensorFlow's
    builder counts."""

    allow_pickle: bool = False
    """Also read LMDB databases of the older system."""

    concurrency: int = 8
    """Files or shards under way at once."""

    steps: Steps = _say_nothing
    """Shows how far it is."""

    @property
    def compares_files(self) -> bool:
        """Whether single files are compared with something."""
        given = (self.index, self.checksums, self.checksum)
        return self.imagenet or any(value is not None for value in given)


class Place(NamedTuple):
    """Where a data set lies, and which one file of it is meant."""

    root: str
    name: str | None

    @property
    def source(self) -> str:
        """What is checked, as the user calls it."""
        if self.name is None:
            return self.root
        is_path = is_folder(self.root)
        return str(Path(self.root) / self.name) if is_path else f"{self.root}/{self.name}"

    def path(self, key: str) -> Path | None:
        """Give the file of this machine that a key stands for; None in a bucket."""
        if not is_folder(self.root):
            return None
        return (Path(self.root.removeprefix("file://")).expanduser() / key).absolute()


class Outcome(NamedTuple):
    """What was found."""

    report: Report
    tally: SampleTally
    """Of samples; empty but for LMDB databases where they were not looked at."""

    names: dict[str, Sequence[str]]
    """Names of the classes by split, in the order of the labels, where known."""


def locate(source: str) -> Place:
    """Part the place of a data set, or of one shard or database of it."""
    if is_folder(source):
        path = Path(source.removeprefix("file://")).expanduser()
        if path.is_file() or (path.suffix == ".lmdb" and path.is_dir()):
            return Place(str(path.parent), path.name)
        return Place(source, None)
    root, _, name = source.rpartition("/")
    if name and (is_packed([ObjectInfo(name, 0)]) or name.endswith(".lmdb")):
        return Place(root, name)
    return Place(source, None)


def list_place(store: WritableStore, place: Place) -> list[ObjectInfo]:
    """List what lies there.

    Raises:
        FileNotFoundError: Nothing does.
        StoreError: It cannot be listed.
    """
    infos = [
        info
        for info in list_files(store)
        if place.name is None or info.key in (place.name, f"{place.name}/data.mdb")
    ]
    if not infos:
        raise KeyNotFoundError(f"{place.source}: holds no file; check the path")
    return infos
