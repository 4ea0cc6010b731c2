"""Compare samples of a stream with the checksums of the index beside their shards."""

from __future__ import annotations

from typing_extensions import Buffer

from concurrent_dataloader.formats.crc32c import IS_FAST, check_crc, crc32c
from concurrent_dataloader.formats.tar import Sample
from concurrent_dataloader.shard_index import ShardIndex


class SampleChecks:
    """What the index says of the payload of each sample. Pickles."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    @classmethod
    def of(cls, index: ShardIndex) -> SampleChecks | None:
        """Make one, where there is something to compare, and comparing is cheap.

        Records have CRCs of their own, which reading compares.
        """
        return cls(index) if IS_FAST and index.kind == "tar" and index.crcs is not None else None

    def is_changed(self, position: int, sample: Sample) -> bool:
        """Tell whether a payload is not the one that was written."""
        payload, expected = self._find(position, sample)
        return payload is not None and expected is not None and crc32c(payload) != expected

    def refuse_changed(self, position: int, sample: Sample, where: str) -> None:
        """Raise if it is not.

        Raises:
            ChecksumError: It is not.
        """
        payload, expected = self._find(position, sample)
        if payload is not None and expected is not None:
            start, stop = sample.extent
            what = f"{where} [{start}, {stop}) {self._index.names.key(position)!r}"
            check_crc(payload, expected, what, "the index of the shards")

    def _find(self, position: int, sample: Sample) -> tuple[Buffer | None, int | None]:
        field = self._index.names.key(position).removeprefix(f"{sample.key}.")
        return sample.fields.get(field), self._index.payload_crc(position)
