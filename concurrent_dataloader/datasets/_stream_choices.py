"""What counts of a stream's samples: what the user says, the index, or ``metadata.json``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from concurrent_dataloader.datasets._places import METADATA_NAME
from concurrent_dataloader.datasets._shard_list import FoundShards
from concurrent_dataloader.datasets._split import ShardTable


class Length(NamedTuple):
    """How many samples all shards have, where no index tells."""

    num_samples: int
    source: str
    """What said so."""


def choose_length(given: int | None, found: FoundShards) -> Length | None:
    """Choose what the samples are counted by; None where there is an index, or nobody knows."""
    if given is not None and given < 0:
        raise ValueError(f"length: got {given}, expected 0 or more")
    table, said, by = found.table, found.num_samples, METADATA_NAME
    if table is not None:
        said, by = table.num_samples, "the index"
    if given is not None and said not in (None, given):
        raise ValueError(f"length: got {given}, expected {said}, as {by} says")
    if table is not None:
        return None
    if said is not None:
        return Length(said, by)
    return None if given is None else Length(given, "length")


def find_label_base(found: FoundShards) -> int:
    """Give what the field ``cls`` calls the first class, if the user does not say."""
    if not found.shards.is_records(0):
        return 0
    said = None if found.facts is None else found.facts.label_base
    return 1 if said is None else said


def choose_labels(
    labels: NDArray[np.integer[Any]] | None,
    index_labels: NDArray[np.int32] | None,
    label_base: int | None,
    table: ShardTable | None,
) -> NDArray[np.integer[Any]] | None:
    """Choose the labels to deliver; None: those of the field ``cls``."""
    if labels is None:
        return index_labels if label_base is None else None
    if label_base is not None:
        raise ValueError("labels: got them together with label_base, expected one of the two")
    expected = 0 if table is None else table.num_indexed
    if table is None or labels.shape != (expected,):
        raise ValueError(
            f"labels: got an array of shape {labels.shape}, expected ({expected},), one for each "
            "sample of the index"
        )
    return labels
