"""Which samples lie in which shard, and in which bytes of it: every sample is one ranged GET.

The file, beside the shards, is numpy's npz (a zip of arrays, nothing in it is executed):

```text
header        uint8 (n,)     JSON: version, kind, shards, classes, label_space
keys          uint8 (n,)     "<key>.<field>" of each sample's payload, UTF-8, one after the other
key_offsets   int64 (N+1,)   key i is at [key_offsets[i], key_offsets[i + 1])
shard         int32 (N,)     number of its shard in the header's list
extent        int64 (N, 2)   start and stop of the whole sample, headers and padding included
payload       int64 (N, 2)   start and stop of its image, or other payload
label         int32 (N,)     from 0 on; -1: none
crc32c        uint32 (N, 2)  CRC-32C of the bytes of extent and payload; left out where not known
```

Samples stand in the order of the shards, and of their bytes.
"""

from __future__ import annotations

import array
import dataclasses
import io
import itertools
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import numpy as np
import orjson
from numpy.typing import NDArray
from typing_extensions import Buffer

from concurrent_dataloader.errors import IndexFormatError
from concurrent_dataloader.files import write_whole
from concurrent_dataloader.index import Index, choose_positions
from concurrent_dataloader.ranges import ByteRange

ShardKind = Literal["tar", "tfrecord"]

NO_LABEL = -1
MAX_LABEL = 2**31 - 1
NO_CRC = -1
"""In arrays of CRCs: not known."""

_VERSION = 1


class Shard(NamedTuple):
    """A file of samples."""

    name: str
    """Its key, relative to the folder of the index."""

    size_bytes: int
    md5: str | None = None
    """Of the whole file, in hex; None where it is not known."""

    crc32c: str | None = None
    """Of the whole file, in hex; None where it is not known."""


class SampleCrcs(NamedTuple):
    """CRC-32Cs of a sample's bytes."""

    extent: int
    payload: int


class ShardIndex:
    """Which samples exist, in which shard and bytes. Immutable; a sample may stand in it twice.

    It pickles with its arrays, 60 to 120 bytes a sample; forked workers share them.
    """

    def __init__(
        self,
        kind: ShardKind,
        shards: Sequence[Shard],
        names: Index,
        arrays: dict[str, NDArray[Any]],
        classes: Sequence[str] | None,
        label_space: str | None,
    ) -> None:
        """Not for callers: use `load` or a `ShardIndexBuilder`."""
        self.kind: ShardKind = kind
        self.shards = tuple(shards)
        self.names = names
        """``<key>.<field>`` of each sample's payload, as an index of single files would have it."""
        self.classes = None if classes is None else tuple(classes)
        """Name of each class in the order of the labels, where the writer knew them."""
        self.label_space = label_space
        """A `LabelSpace`'s value where the classes are ImageNet's; None where that is not known."""
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ShardIndex({len(self)} samples in {len(self.shards)} {self.kind} shards)"

    def shard_of(self, position: int) -> Shard:
        """Give the shard that holds the sample at ``position``."""
        return self.shards[int(self._arrays["shard"][position])]

    def payload(self, position: int) -> ByteRange:
        """Give the bytes of the sample's image, or other payload, in its shard."""
        return ByteRange(*self._arrays["payload"][position].tolist())

    def extent(self, position: int) -> ByteRange:
        """Give the bytes of the whole sample, headers and padding included."""
        return ByteRange(*self._arrays["extent"][position].tolist())

    def payload_crc(self, position: int) -> int | None:
        """Give the CRC-32C of the bytes of `payload`; None where it is not known."""
        return self._crc(position, 1)

    def extent_crc(self, position: int) -> int | None:
        """Give the CRC-32C of the bytes of `extent`; None where it is not known."""
        return self._crc(position, 0)

    def sample_crcs(self, position: int) -> SampleCrcs | None:
        """Give both; None where they are not known."""
        extent, payload = self.extent_crc(position), self.payload_crc(position)
        return None if extent is None or payload is None else SampleCrcs(extent, payload)

    def _crc(self, position: int, column: int) -> int | None:
        crcs = self._arrays.get("crc32c")
        if crcs is None:
            return None
        crc = int(crcs[position, column])
        return None if crc == NO_CRC else crc

    @property
    def crcs(self) -> NDArray[np.int64] | None:
        """CRC-32C of each sample's extent and payload, (N, 2) int64; `NO_CRC`: not known.

        None if none is known.
        """
        return self._arrays.get("crc32c")

    @property
    def shard_numbers(self) -> NDArray[np.int32]:
        """Number of each sample's shard, (N,) int32."""
        return self._arrays["shard"]

    @property
    def extents(self) -> NDArray[np.int64]:
        """Start and stop of each sample in its shard, (N, 2) int64, in bytes."""
        return self._arrays["extent"]

    @property
    def payloads(self) -> NDArray[np.int64]:
        """Start and stop of each sample's payload in its shard, (N, 2) int64, in bytes."""
        return self._arrays["payload"]

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """Label of each sample, (N,) int32; None if no sample has one."""
        labels = self._arrays["label"]
        return labels if len(labels) and bool((labels != NO_LABEL).any()) else None

    def select(self, positions: Iterable[int] | NDArray[np.integer[Any]]) -> ShardIndex:
        """Give a view of some positions, in the order given; all shards stay named."""
        chosen = np.asarray(
            positions if isinstance(positions, np.ndarray | Sequence) else list(positions)
        ).astype(np.int64)
        arrays = {name: values[chosen] for name, values in self._arrays.items()}
        return ShardIndex(
            self.kind,
            self.shards,
            self.names.select(chosen),
            arrays,
            self.classes,
            self.label_space,
        )

    def limit(self, n: int | None, sample_seed: int | None = None) -> ShardIndex:
        """Give a view of at most ``n`` samples, chosen as `Index.limit` chooses."""
        chosen = choose_positions(len(self), n, sample_seed)
        return self if chosen is None else self.select(chosen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index, whole or not at all; the same index gives the same bytes."""
        write_whole(Path(path), [self.to_bytes()])

    def to_bytes(self) -> bytes:
        """Give the content of the file."""
        keys = [key.encode("utf-8") for key in self.names.keys()]  # noqa: SIM118 - no dict
        offsets = np.zeros(len(keys) + 1, np.int64)
        np.cumsum([len(key) for key in keys], out=offsets[1:])
        header = {
            "version": _VERSION,
            "kind": self.kind,
            "shards": [shard._asdict() for shard in self.shards],
            "classes": self.classes,
            "label_space": self.label_space,
        }
        arrays = dict(self._arrays)
        crcs = arrays.pop("crc32c", None)
        if crcs is not None and not bool((crcs == NO_CRC).any()):
            arrays["crc32c"] = crcs.astype(np.uint32)
        file = io.BytesIO()
        np.savez(
            file,
            allow_pickle=False,
            header=np.frombuffer(orjson.dumps(header), np.uint8),
            keys=np.frombuffer(b"".join(keys), np.uint8),
            key_offsets=offsets,
            **arrays,
        )
        return file.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an index file.

        Raises:
            FileNotFoundError: There is no such file.
            IndexFormatError: It is no index of shards.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: no such index of shards; write it with `concurrent-dataloader index`"
            ) from error
        return cls.from_bytes(raw, str(path))

    @classmethod
    def from_bytes(cls, raw: Buffer, where: str) -> Self:
        """Read the content of an index file.

        Args:
            raw: The content.
            where: What errors call it.

        Raises:
            IndexFormatError: It is no index of shards, or of a later version.
        """
        try:
            with np.load(io.BytesIO(raw), allow_pickle=False) as file:
                header = orjson.loads(file["header"].tobytes())
                blob, offsets = file["keys"].tobytes(), file["key_offsets"].tolist()
                arrays = {name: file[name] for name in ("shard", "extent", "payload", "label")}
                if "crc32c" in file:
                    arrays["crc32c"] = file["crc32c"].astype(np.int64)
            if header["version"] != _VERSION or header["kind"] not in get_args(ShardKind):
                raise IndexFormatError(
                    f"{where}: got version {header['version']!r} and kind {header['kind']!r}, "
                    f"expected version {_VERSION} and one of {', '.join(get_args(ShardKind))}; "
                    "update the library, or write the index anew"
                )
            keys = [blob[start:stop].decode("utf-8") for start, stop in itertools.pairwise(offsets)]
            shards = [Shard(**shard) for shard in header["shards"]]
            _check_arrays(arrays, len(keys), len(shards))
            return cls(
                header["kind"],
                shards,
                Index.from_keys(keys),
                arrays,
                header["classes"],
                header["label_space"],
            )
        except IndexFormatError:
            raise
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise IndexFormatError(
                f"{where}: no index of shards ({error}); write it anew with "
                "`concurrent-dataloader index`"
            ) from error


def _check_arrays(arrays: dict[str, NDArray[Any]], num_samples: int, num_shards: int) -> None:
    shapes = {"shard": (), "extent": (2,), "payload": (2,), "label": (), "crc32c": (2,)}
    for name, shape in shapes.items():
        if name == "crc32c" and name not in arrays:
            continue
        if arrays[name].shape != (num_samples, *shape) or arrays[name].dtype.kind != "i":
            raise ValueError(f"array {name}: got {arrays[name].dtype} {arrays[name].shape}")
    shard, extent, payload = arrays["shard"], arrays["extent"], arrays["payload"]
    if num_samples and not (
        bool((shard >= 0).all())
        and bool((shard < num_shards).all())
        and bool((extent[:, 0] >= 0).all())
        and bool((extent[:, 0] <= payload[:, 0]).all())
        and bool((payload[:, 0] <= payload[:, 1]).all())
        and bool((payload[:, 1] <= extent[:, 1]).all())
    ):
        raise ValueError("a sample lies outside of its shard")


class ShardIndexBuilder:
    """Collects an index, shard after shard."""

    def __init__(self, kind: ShardKind) -> None:
        self._kind: ShardKind = kind
        self._shards: list[Shard] = []
        self._keys: list[str] = []
        self._shard = array.array("i")
        self._label = array.array("i")
        self._extent = array.array("q")
        self._payload = array.array("q")
        self._crcs = array.array("q")

    def add_sample(
        self,
        name: str,
        extent: ByteRange,
        payload: ByteRange,
        label: int | None,
        crcs: SampleCrcs | None = None,
    ) -> None:
        """Add a sample of the shard that `add_shard` will end.

        Args:
            name: ``<key>.<field>`` of its payload.
            extent: The whole sample.
            payload: Its image, or other payload.
            label: From 0 on, or None.
            crcs: Of extent and payload, where they are known.

        Raises:
            IndexFormatError: The label is larger than 32 bits hold.
        """
        if label is not None and label > MAX_LABEL:
            raise IndexFormatError(f"{name}: got label {label}, expected {MAX_LABEL} at most")
        self._crcs.extend((NO_CRC, NO_CRC) if crcs is None else crcs)
        self._keys.append(name)
        self._shard.append(len(self._shards))
        self._extent.extend(extent)
        self._payload.extend(payload)
        self._label.append(NO_LABEL if label is None else label)

    def add_shard(self, shard: Shard) -> None:
        """End a shard: the samples added since the last one are its."""
        self._shards.append(shard)

    def build(
        self, classes: Sequence[str] | None = None, label_space: str | None = None
    ) -> ShardIndex:
        """Give the index.

        Args:
            classes: Name of each class in the order of the labels, if known.
            label_space: A `LabelSpace`'s value, if the classes are ImageNet's.
        """
        arrays: dict[str, NDArray[Any]] = {
            "shard": np.array(self._shard, np.int32),
            "extent": np.array(self._extent, np.int64).reshape(-1, 2),
            "payload": np.array(self._payload, np.int64).reshape(-1, 2),
            "label": np.array(self._label, np.int32),
        }
        crcs = np.array(self._crcs, np.int64).reshape(-1, 2)
        if bool((crcs != NO_CRC).any()):
            arrays["crc32c"] = crcs
        sizes = (arrays["payload"][:, 1] - arrays["payload"][:, 0]).tolist()
        names = Index.from_keys(self._keys, cast(list[int], sizes))
        return ShardIndex(self._kind, self._shards, names, arrays, classes, label_space)


@dataclasses.dataclass(frozen=True, slots=True)
class IndexPiece:
    """Some samples of an index, to be joined with those of others."""

    index: ShardIndex
    shard_numbers: Sequence[int]
    """Shards to name, also if they have no sample here."""

    positions: NDArray[np.int64]
    """Samples, in the order of the index; all in these shards."""

    folder: str = ""
    """Put in front of the names of the shards, with a slash at its end."""


def join_indexes(pieces: Sequence[IndexPiece]) -> ShardIndex:
    """Make one index of samples of several, piece after piece, their shards numbered anew.

    Classes are those of the first.

    Raises:
        ValueError: They are of different kinds of shards, or there is none.
    """
    kinds = sorted({piece.index.kind for piece in pieces})
    if len(kinds) != 1:
        raise ValueError(f"pieces: got shards of kind {kinds!r}, expected one kind")
    shards: list[Shard] = []
    keys: list[str] = []
    arrays: dict[str, list[NDArray[Any]]] = {name: [] for name in ("extent", "payload", "label")}
    numbers: list[NDArray[np.int32]] = []
    crcs: list[NDArray[np.int64]] = []
    for piece in pieces:
        index, chosen, positions = piece.index, piece.shard_numbers, piece.positions
        renumbered = np.full(len(index.shards), -1, np.int32)
        renumbered[list(chosen)] = np.arange(len(chosen)) + len(shards)
        numbers.append(renumbered[index.shard_numbers[positions]])
        shards += [
            index.shards[number]._replace(name=piece.folder + index.shards[number].name)
            for number in chosen
        ]
        keys += index.names.select(positions).keys()
        for name, values in arrays.items():
            values.append(index._arrays[name][positions])
        none = np.full((len(index), 2), NO_CRC, np.int64)
        crcs.append((none if index.crcs is None else index.crcs)[positions])
    joined: dict[str, NDArray[Any]] = {
        name: np.concatenate(values) for name, values in arrays.items()
    }
    joined["shard"] = np.concatenate(numbers)
    all_crcs = np.concatenate(crcs)
    if bool((all_crcs != NO_CRC).any()):
        joined["crc32c"] = all_crcs
    first = pieces[0].index
    sizes = (joined["payload"][:, 1] - joined["payload"][:, 0]).tolist()
    names = Index.from_keys(keys, cast(list[int], sizes))
    return ShardIndex(first.kind, shards, names, joined, first.classes, first.label_space)
