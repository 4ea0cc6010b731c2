"""Pages of keys, as ListObjects (both versions) gives them."""

from __future__ import annotations

import bisect
import sys
from typing import NamedTuple

from concurrent_dataloader.testing._objects import Bucket, StoredObject

_AFTER_ALL = chr(sys.maxunicode)


class Page(NamedTuple):
    """One answer to a listing: objects and common prefixes, each in order of their UTF-8."""

    objects: list[StoredObject]
    prefixes: list[str]
    last: str
    """The last key or common prefix of the page; the next page begins after it."""
    is_truncated: bool


def list_page(bucket: Bucket, prefix: str, delimiter: str, after: str, max_keys: int) -> Page:
    """List what begins with ``prefix`` and comes after ``after``.

    Keys that share their beginning up to the first ``delimiter`` behind the prefix count as one,
    and are given as a common prefix. An ``after`` that is such a prefix leaves out all that begins
    with it.
    """
    keys = bucket.sorted_keys()
    position = bisect.bisect_left(keys, prefix)
    if after:
        position = max(position, bisect.bisect_right(keys, after))
        if delimiter and after.endswith(delimiter) and after.startswith(prefix) and after != prefix:
            position = max(position, bisect.bisect_left(keys, after + _AFTER_ALL))
    objects: list[StoredObject] = []
    prefixes: list[str] = []
    last = ""
    while position < len(keys) and keys[position].startswith(prefix):
        if len(objects) + len(prefixes) >= max_keys:
            return Page(objects, prefixes, last, is_truncated=max_keys > 0)
        key = keys[position]
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        if end < 0:
            last = key
            objects.append(bucket.objects[key])
            position += 1
        else:
            last = key[: end + len(delimiter)]
            prefixes.append(last)
            position = bisect.bisect_left(keys, last + _AFTER_ALL, position + 1)
    return Page(objects, prefixes, last, is_truncated=False)
