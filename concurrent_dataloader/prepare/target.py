"""Where shards go: whole files only, what an unfinished run left, and what was there before."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import mmap
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
from typing_extensions import Buffer

from concurrent_dataloader.errors import KeyNotFoundError, LoaderError
from concurrent_dataloader.prepare.made_folders import make_folders
from concurrent_dataloader.prepare.metadata import Metadata, ShardMetadata
from concurrent_dataloader.prepare.plan import NamePattern
from concurrent_dataloader.prepare.shard_file import GatheringFile, ShardFile, WrittenShard
from concurrent_dataloader.shard_index import ShardIndex
from concurrent_dataloader.shard_names import METADATA_NAME, UNFINISHED
from concurrent_dataloader.stores import WritableStore, open_writable_store
from concurrent_dataloader.stores._local import LocalStore


class ShardTarget:
    """A folder, or a prefix of a bucket, that gets the shards of a split. It pickles."""

    def __init__(
        self,
        target: str | os.PathLike[str] | WritableStore,
        split: str,
        *,
        in_memory: bool = False,
        scratch: str | None = None,
    ) -> None:
        """Name the place; nothing is written yet.

        Args:
            target: Folder, URL or store.
            split: Of the shards.
            in_memory: Whether a shard is composed in memory, not in a temporary file.
            scratch: Folder of temporary files for a bucket; None: the system's.
        """
        is_place = isinstance(target, (str, os.PathLike))
        self.store = open_writable_store(target) if is_place else target
        self.folder = Path(self.store.root) if isinstance(self.store, LocalStore) else None
        self.split = split
        self._in_memory = in_memory
        self._scratch = scratch
        self._planned: tuple[Sequence[str], NamePattern] | None = None

    @property
    def state(self) -> str:
        """Folder of what an unfinished run needs to go on."""
        return f"{UNFINISHED}{self.split}"

    @property
    def index_name(self) -> str:
        """Name of the index of byte ranges."""
        return f"{self.split}-index.npz"

    @property
    def info_name(self) -> str:
        """Name of the map from source names to places in shards."""
        return f"{self.split}-FileInfo.json"

    # -- whole shards

    @contextlib.contextmanager
    def compose(self, name: str) -> Generator[ShardFile]:
        """Give a file to write; it becomes the shard ``name`` at the end, unless something raised.

        Raises:
            OSError: The target cannot be written, or is full.
        """
        if self.folder is not None:
            with _explain(self.folder / name), self._compose_in_folder(self.folder, name) as file:
                yield file
        elif self._in_memory:
            memory = io.BytesIO()
            yield memory
            self.store.put(name, memory.getbuffer())
        else:
            where = Path(self._scratch or tempfile.gettempdir())
            with _explain(where), tempfile.TemporaryFile(dir=where) as file:
                yield file
                file.flush()
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    self.store.put(name, content)

    @contextlib.contextmanager
    def _compose_in_folder(self, folder: Path, name: str) -> Generator[ShardFile]:
        partial = folder / self.state / f"{name}.partial"
        try:
            with contextlib.closing(GatheringFile(partial)) as file:
                if self._in_memory:
                    memory = io.BytesIO()
                    yield memory
                    file.writelines([memory.getbuffer()])
                else:
                    yield file
                file.sync()
            os.replace(partial, folder / name)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(partial)
            raise

    # -- runs

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Keep other runs from writing the same split into the same folder.

        What is of no use to a later run is removed at the end: a plan of which no shard was
        written, and folders that were made for nothing.

        Raises:
            BlockingIOError: Another run is writing there.
            OSError: The folder cannot be made or written.
        """
        with contextlib.ExitStack() as stack:
            if self.folder is not None:
                self._lock_folder(self.folder, stack)
            try:
                yield
            except BaseException:
                with contextlib.suppress(
                    LoaderError, OSError
                ):  # the first error is the one to tell
                    self._forget_fruitless_plan()
                raise

    def _lock_folder(self, folder: Path, stack: contextlib.ExitStack) -> None:
        state = folder / self.state
        try:
            stack.enter_context(make_folders(folder))
            state.mkdir(parents=True, exist_ok=True)  # another run may just have removed it
            descriptor = os.open(state / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise type(error)(
                error.errno, f"{error.strerror}; check the target and its rights", str(folder)
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)  # and leave the folder, which is the other run's
            raise BlockingIOError(
                error.errno, f"another run is writing the split {self.split!r}", str(state)
            ) from error
        except OSError:  # a file system without locks: nobody is kept out
            pass
        stack.callback(self._remove_empty_state)
        stack.callback(os.close, descriptor)

    def _remove_empty_state(self) -> None:
        if self.folder is not None:
            state = self.folder / self.state
            with contextlib.suppress(OSError):
                if set(os.listdir(state)) <= {"lock"}:
                    (state / "lock").unlink(missing_ok=True)
                    state.rmdir()

    def _forget_fruitless_plan(self) -> None:
        """Remove the plan of this run, unless a shard of it is there, with a receipt or without."""
        if self._planned is None:  # it did not come so far, and what is there is another run's
            return
        names, pattern = self._planned
        if not set(self._list(pattern.begin)) & set(names):
            self._clean_state()

    def discard(self) -> None:
        """Remove the shards of this run, if a run after it would do the same and fail as it did.

        For callers that then raise; an error of the store is not raised in the place of theirs.
        """
        if self._planned is not None:
            names, pattern = self._planned
            with contextlib.suppress(LoaderError, OSError):
                for name in set(self._list(pattern.begin)) & set(names):
                    self.store.delete(name)

    def read_metadata(self) -> Metadata | None:
        """Read ``metadata.json``, if it is there.

        Raises:
            IndexFormatError: It is there, and is something else.
        """
        raw = self._read(METADATA_NAME)
        return None if raw is None else Metadata.from_bytes(raw, self.store.describe(METADATA_NAME))

    def refuse_finished(self, pattern: NamePattern) -> None:
        """Raise if the split is there, and no run of it that could go on; writes nothing.

        For callers to whom it costs much to find out what `begin` is to be told.

        Args:
            pattern: What shards of this split are called.

        Raises:
            FileExistsError: It is.
        """
        if self._read(f"{self.state}/plan.json") is None:
            metadata = self.read_metadata()
            others = self._name_others(metadata)
            present = self._find_present(metadata, pattern)
            self._refuse([name for name in present if name not in others])

    def begin(
        self,
        fingerprint: str,
        names: Sequence[str],
        pattern: NamePattern,
        *,
        overwrite: bool,
        resume: bool,
    ) -> dict[str, WrittenShard]:
        """Make sure that nothing but this run's shards will be there at its end.

        Args:
            fingerprint: Of source and settings.
            names: Of the shards that are to be written.
            pattern: What shards of this split are called.
            overwrite: Remove what is there of this split.
            resume: Take shards that a run with the same fingerprint has left.

        Returns:
            Shards that are there already, by name.

        Raises:
            FileExistsError: There is something of this split.
            ValueError: ``metadata.json`` does not list its shards, so that a split cannot be added;
                or another split has shards of these names.
        """
        metadata = self.read_metadata()
        if metadata is not None and metadata.version is None:
            raise ValueError(
                f"{self.store.describe(METADATA_NAME)}: written by an older system, which lists no"
                " shards; choose another target, or remove that data set by hand"
            )
        others = self._name_others(metadata)
        taken = next((name for name in names if name in others), None)
        if taken is not None:
            raise ValueError(
                f"{self.store.describe(taken)}: a shard of split {others[taken]!r}, expected"
                f" another name for those of {self.split!r}; choose another pattern"
            )
        present = [name for name in self._find_present(metadata, pattern) if name not in others]
        begun = self._read(f"{self.state}/plan.json")
        if overwrite:
            self._clean(metadata, present)
        elif begun is not None and resume and self._is_same_plan(begun, fingerprint, present):
            self._refuse([name for name in present if name not in names])
            self._planned = names, pattern
            return self._read_receipts(names)
        else:
            self._refuse(present)
        self._clean_state()
        self._planned = names, pattern
        self.store.put(f"{self.state}/plan.json", orjson.dumps({"fingerprint": fingerprint}))
        return {}

    def _name_others(self, metadata: Metadata | None) -> dict[str, str]:
        """Give the split of each shard that belongs to another one."""
        splits = {} if metadata is None else metadata.splits
        return {
            shard.name: name
            for name, split in splits.items()
            if name != self.split
            for shard in split.shards or ()
        }

    def _is_same_plan(self, begun: Buffer, fingerprint: str, present: Sequence[str]) -> bool:
        try:
            is_same = orjson.loads(bytes(begun))["fingerprint"] == fingerprint
        except (ValueError, TypeError, KeyError):
            is_same = False
        if not is_same and present:
            raise FileExistsError(
                f"{self.store.describe(self.state)}: a run with another source or other settings"
                f" did not finish there; repeat its command, or replace split {self.split!r} with"
                " --overwrite"
            )
        return is_same

    def _refuse(self, present: Sequence[str]) -> None:
        if present:
            raise FileExistsError(
                f"{self.store.describe(present[0])}: already there"
                + (f", and {len(present) - 1} more files" if len(present) > 1 else "")
                + f" of split {self.split!r}; choose another target, or replace the split with"
                " --overwrite"
            )

    def _find_present(self, metadata: Metadata | None, pattern: NamePattern) -> list[str]:
        """Give all files of this split that are not the state's."""
        found = [name for name in self._list(pattern.begin) if pattern.matches(name)]
        others = [name for name in self._list(f"{self.split}-") if name not in found]
        found += [name for name in others if name in (self.index_name, self.info_name)]
        split = None if metadata is None else metadata.splits.get(self.split)
        listed = () if split is None else (split.shards or ())
        found += [shard.name for shard in listed if shard.name not in found]
        # Of an unfinished run, which may have had another pattern.
        receipts = [key for key in self._list_state() if key.endswith(".json")]
        for receipt in receipts:
            name = receipt.removeprefix(f"{self.state}/").removesuffix(".json")
            if name not in ("plan", *found) and self._exists(name):
                found.append(name)
        return found

    def _exists(self, name: str) -> bool:
        try:
            self.store.head(name)
        except KeyNotFoundError:
            return False
        return True

    def _list(self, prefix: str) -> list[str]:
        try:
            return [info.key for info in self.store.list(prefix) if "/" not in info.key]
        except KeyNotFoundError:  # no such folder yet
            return []

    def _clean(self, metadata: Metadata | None, present: Sequence[str]) -> None:
        """Remove a split, its mention first, so that a run that is killed leaves nothing mixed."""
        if metadata is not None and self.split in metadata.splits:
            rest = metadata.with_split(self.split, None)
            if rest.splits:
                self.store.put(METADATA_NAME, rest.to_bytes())
            else:
                self.store.delete(METADATA_NAME)
        for name in present:
            self.store.delete(name)

    def put_receipt(self, written: WrittenShard) -> None:
        """Keep what a later run must know of a shard that is there."""
        content = {
            "shard": dataclasses.asdict(written.shard),
            "extents": written.extents,
            "payloads": written.payloads,
            "crcs": written.crcs,
        }
        raw = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        self.store.put(self._receipt_name(written.shard.name), raw)

    def _receipt_name(self, name: str) -> str:
        return f"{self.state}/{name}.json"

    def _read_receipts(self, names: Sequence[str]) -> dict[str, WrittenShard]:
        kept = set(self._list_state())
        found: dict[str, WrittenShard] = {}
        for name in names:
            if self._receipt_name(name) not in kept:
                continue
            receipt = orjson.loads(bytes(self.store.get(self._receipt_name(name))))
            shard = ShardMetadata(**receipt["shard"])
            try:
                size_bytes = self.store.head(name).size_bytes
            except KeyNotFoundError:
                continue
            if size_bytes == shard.size_bytes and "crcs" in receipt:
                places = (
                    np.array(receipt[what], np.int64).reshape(-1, 2)
                    for what in ("extents", "payloads", "crcs")
                )
                found[name] = WrittenShard(shard, *places)
        return found

    def _list_state(self) -> list[str]:
        try:
            return [info.key for info in self.store.list(f"{self.state}/")]
        except KeyNotFoundError:
            return []

    def _clean_state(self) -> None:
        if self.folder is not None:  # listings leave out what a killed `put` has left
            for name in os.listdir(self.folder / self.state):
                if name != "lock":
                    (self.folder / self.state / name).unlink()
            return
        for name in self._list_state():
            self.store.delete(name)

    def finish(
        self,
        index: bytes,
        file_info: Iterable[bytes] | None,
        add: Callable[[Metadata], Metadata],
    ) -> None:
        """Write what lies beside the shards, ``metadata.json`` last, and forget the run."""
        self.store.put(self.index_name, index)
        if file_info is not None:
            with self.compose(self.info_name) as file:
                file.writelines(file_info)
        metadata = self.read_metadata() or Metadata(splits={})
        self.store.put(METADATA_NAME, add(metadata).to_bytes())
        self._clean_state()

    def read_other_indexes(self) -> Iterator[tuple[str, ShardIndex]]:
        """Give the index of each other split that is whole.

        Raises:
            IndexFormatError: One is damaged.
        """
        metadata = self.read_metadata()
        for split in metadata.splits if metadata is not None else ():
            name = f"{split}-index.npz"
            raw = self._read(name) if split != self.split else None
            if raw is not None:
                yield split, ShardIndex.from_bytes(raw, self.store.describe(name))

    def _read(self, name: str) -> Buffer | None:
        try:
            return self.store.get(name)
        except KeyNotFoundError:
            return None


@contextlib.contextmanager
def _explain(path: Path) -> Generator[None]:
    """Give an error of the file system the name of what was written."""
    try:
        yield
    except LoaderError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise type(error)(
            error.errno,
            f"{error.strerror}; the shard was not written, make room and run the command again",
            str(path),
        ) from error
