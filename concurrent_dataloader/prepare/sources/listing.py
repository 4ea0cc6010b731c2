"""Samples that are objects of a store each: below a prefix or a folder, or named by an index."""

from __future__ import annotations

import array
from collections.abc import Iterable

from concurrent_dataloader.index import Index
from concurrent_dataloader.prepare.sources.found import Found, Sieve, refuse_unsafe
from concurrent_dataloader.prepare.sources.places import ObjectPlaces
from concurrent_dataloader.stores import ObjectInfo, Store


def find_listed(store: Store, objects: Iterable[ObjectInfo], sieve: Sieve) -> Found:
    """Take the samples of a listing, which is sorted; markers of folders are left out.

    Of a folder on this machine, links are followed, but not into one that holds them.
    """
    names: list[str] = []
    sizes = array.array("q")
    for info in objects:
        if info.key.endswith("/"):
            continue
        if sieve.keeps(info.key):
            refuse_unsafe(info.key, sieve.where)
            names.append(info.key)
            sizes.append(info.size_bytes)
        else:
            sieve.count_stray(info.key)
    return _found(store, Index.from_keys(names, sizes), sieve)


def find_indexed(store: Store, index: Index, sieve: Sieve) -> Found:
    """Take the samples that an index names, in its order."""
    positions: list[int] = []
    for position, key in enumerate(index.keys()):
        if sieve.keeps(key):
            refuse_unsafe(key, sieve.where)
            positions.append(position)
        else:
            sieve.count_stray(key)
    if len(positions) < len(index):
        index = index.select(positions)
    return _found(store, index, sieve)


def _found(store: Store, index: Index, sieve: Sieve) -> Found:
    return Found(
        where=sieve.where,
        names=index,
        places=ObjectPlaces(store=store, keys=index),
        num_stray=sieve.num_stray,
        strays=tuple(sieve.strays),
    )
