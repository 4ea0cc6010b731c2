"""Pages of keys, as ListObjects (both versions) gives them, and of uploads under way."""

from __future__ import annotations

import bisect
import sys
from typing import NamedTuple

from concurrent_dataloader.testing._objects import Bucket, StoredObject, Upload

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


class UploadPage(NamedTuple):
    """One answer to a listing of uploads, in order of their keys, then of when they began."""

    uploads: list[Upload]
    prefixes: list[str]
    last_key: str
    """That of the last upload, or the last common prefix; the next page begins after it."""
    last_id: str
    """Of the last upload; empty after a common prefix."""
    is_truncated: bool


def list_uploads(
    bucket: Bucket, prefix: str, delimiter: str, after_key: str, after_id: str, max_uploads: int
) -> UploadPage:
    """List the uploads whose keys begin with ``prefix``, folded by ``delimiter`` as by `list_page`.

    Args:
        bucket: Where they are under way.
        prefix: Of their keys.
        delimiter: Keys that share their beginning up to it count as one; empty: none do.
        after_key: Uploads of this key, and those before, are left out.
        after_id: Those of ``after_key`` that come after this one are not. Without a key it says
            nothing.
        max_uploads: Uploads and common prefixes together, at most.
    """
    shown: list[Upload] = []
    prefixes: list[str] = []
    last_key = last_id = ""
    for upload in sorted(bucket.uploads.values(), key=lambda one: (one.key, one.upload_id)):
        key = upload.key
        is_passed = key < after_key or (
            key == after_key and (not after_id or upload.upload_id <= after_id)
        )
        if not key.startswith(prefix) or (after_key and is_passed):
            continue
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        common = key[: end + len(delimiter)] if end >= 0 else ""
        if common and common in (after_key, last_key):
            continue
        if len(shown) + len(prefixes) >= max_uploads:
            return UploadPage(shown, prefixes, last_key, last_id, is_truncated=max_uploads > 0)
        if common:
            prefixes.append(common)
            last_key, last_id = common, ""
        else:
            shown.append(upload)
            last_key, last_id = key, upload.upload_id
    return UploadPage(shown, prefixes, last_key, last_id, is_truncated=False)
