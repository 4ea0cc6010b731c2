"""Names of shards: brace ranges and globs expanded, sorted as people count, told apart by kind.

```text
train-{000000..000489}.tar    train-000000.tar ... train-000489.tar    as wide as the bounds
Data{0..251}.tar              Data0.tar ... Data251.tar                not padded
{train,val}-{0..{1,3}}.tar    nested: the inner ones first             bash's order of the rest
train-*.tar                   a glob: what is listed and fits          ``*`` stays in one folder
train-*                       the same, without train-index.npz or train-FileInfo.json
```
"""

from __future__ import annotations

import collections
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from concurrent_dataloader.errors import KeyNotFoundError, ShardFormatError

Split = Literal["train", "val", "test"]

Kind = Literal["tar", "compressed tar", "tfrecord"]
"""What a shard's name says it is. A compressed tar has no byte ranges: it is read front to back."""

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A folder, a URL, a pattern, or a list of these."""

ListObjects = Callable[[str, str], Iterable[tuple[str, int]]]
"""Gives key and size of all objects below a root, of which the key begins with a prefix."""

MAX_SHARDS = 1_000_000
"""A pattern that names more is a slip of the pen, and would fill the memory."""

METADATA_NAME = "metadata.json"
"""What describes all splits of a set, beside its shards."""

DESCRIPTIONS = ("-index.npz", "-manifest.json", "-FileInfo.json")
"""What the other files that describe shards are called, behind the name of the split."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_TFRECORD = re.compile(r"\.tfrecords?(-\d{5,}-of-\d{5,})?$|-\d{5,}-of-\d{5,}$", re.IGNORECASE)
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", re.ASCII)
_LETTERS = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])", re.ASCII)
_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class ShardSet(NamedTuple):
    """Shards that lie below one root."""

    root: str
    """A folder, or a URL such as ``s3://bucket/prefix``; no slash at its end."""

    names: tuple[str, ...]
    """Keys below the root, in the order given, or as people count where they were listed."""

    sizes: tuple[int | None, ...]
    """Bytes of each, where a listing told."""


# -- brace ranges


def expand_braces(pattern: str) -> list[str]:
    """Expand brace ranges and lists, in the order in which they stand; pure.

    A brace that holds neither a range nor a list stays as it is, as in bash.

    Raises:
        ValueError: A brace has no partner, or the pattern names more than `MAX_SHARDS`.
    """
    texts = [pattern]
    while True:
        expanded: list[str] = []
        has_changed = False
        for text in texts:
            alternatives = _expand_one(text, pattern)
            has_changed |= alternatives is not None
            expanded.extend([text] if alternatives is None else alternatives)
            if len(expanded) > MAX_SHARDS:
                raise _too_many(pattern)
        if not has_changed:
            return texts
        texts = expanded


def expand_shards(source: Source) -> list[str]:
    """Expand a pattern, or a list of them, to names in the order given; globs stay as they are.

    Raises:
        ValueError: As `expand_braces`; or nothing was given.
    """
    patterns = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    names = [name for pattern in patterns for name in expand_braces(os.fspath(pattern))]
    if not names or not all(names):
        raise ValueError(f"shards: got {source!r}, expected at least one name")
    return names


def _expand_one(text: str, whole: str) -> list[str] | None:
    """Expand the first outermost brace that is a range or a list; None if there is none."""
    start = 0
    while (opening := text.find("{", start)) >= 0:
        closing, commas = _find_partner(text, opening, whole)
        before, inside, after = text[:opening], text[opening + 1 : closing], text[closing + 1 :]
        if "{" in inside and not commas:
            inner = _expand_one(inside, whole)  # {0..{1,3}}: the inner one makes the range
            if inner is not None:
                return [f"{before}{{{middle}}}{after}" for middle in inner]
        values = _values(inside, [comma - opening - 1 for comma in commas], whole)
        if values is not None:
            return [f"{before}{value}{after}" for value in values]
        start = closing + 1
    if "}" in text[start:]:
        raise ValueError(f"shards: got {whole!r} with a '}}' too many, expected pairs of braces")
    return None


def _find_partner(text: str, opening: int, whole: str) -> tuple[int, list[int]]:
    depth, commas = 0, list[int]()
    for at in range(opening, len(text)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at, commas
        elif text[at] == "," and depth == 1:
            commas.append(at)
    raise ValueError(f"shards: got {whole!r} with a '{{' too many, expected pairs of braces")


def _values(inside: str, commas: list[int], whole: str) -> Iterable[str] | None:
    if commas:
        bounds = [-1, *commas, len(inside)]
        return [inside[first + 1 : last] for first, last in itertools.pairwise(bounds)]
    if found := _NUMBERS.fullmatch(inside):
        first, last, step_text = found.groups()
        step = abs(int(step_text)) if step_text else 1
        if step == 0 or abs(int(last) - int(first)) // step >= MAX_SHARDS:
            raise _too_many(whole)
        is_padded = any(re.match(r"-?0\d", bound) for bound in (first, last))
        width = max(len(first), len(last)) if is_padded else 0
        begin, end = int(first), int(last)
        numbers = range(begin, end + 1, step) if begin <= end else range(begin, end - 1, -step)
        return (f"{number:0{width}d}" for number in numbers)
    if found := _LETTERS.fullmatch(inside):
        begin, end = map(ord, found.groups())
        letters = range(begin, end + 1) if begin <= end else range(begin, end - 1, -1)
        return map(chr, letters)
    return None


def _too_many(whole: str) -> ValueError:
    return ValueError(f"shards: got {whole!r}, expected at most {MAX_SHARDS} names")


# -- what a name says


def find_kind(name: str) -> Kind | None:
    """Tell what a shard is by the ending of its name; None if it is none."""
    lower = name.lower()
    if lower.endswith(".tar"):
        return "tar"
    if lower.endswith(_COMPRESSED):
        return "compressed tar"
    return "tfrecord" if _TFRECORD.search(name) else None


def describes_shards(name: str) -> bool:
    """Tell whether a file is one that this library writes beside shards, to describe them."""
    base = name[name.rfind("/") + 1 :]
    return base == METADATA_NAME or base.endswith(DESCRIPTIONS)


def find_split(name: str) -> Split | None:
    """Tell of which split a file is by a word in its name, such as ``imagenet-train-000000.tar``.

    Returns:
        ``"val"`` for ``validation-00000-of-00128`` too; None where no word says, or two do.
    """
    words = re.split(r"[^a-z]+", name.rpartition("/")[2].lower())
    found: set[Split] = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def sort_shards(names: Iterable[str]) -> list[str]:
    """Sort names as people count: ``a2.tar`` before ``a10.tar``."""
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> tuple[list[tuple[str, int]], str]:
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    numbers = [int(number) for number in parts[1::2]] + [-1]
    return list(zip(parts[::2], numbers, strict=True)), name


# -- globs


def has_glob(name: str) -> bool:
    """Tell whether a name is a glob, to be matched against a listing."""
    return any(mark in name for mark in "*?[")


def match_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Give the names that fit a glob, sorted as people count.

    ``*`` and ``?`` stay within one folder, ``**/`` goes through any, ``[0-9]`` is one character.
    """
    compiled = re.compile(_translate_glob(pattern))
    return sort_shards(name for name in names if compiled.fullmatch(name))


def _translate_glob(pattern: str) -> str:
    pieces: list[str] = []
    for token in re.findall(r"\*\*/|\*+|\?|\[!?\]?[^\]/]*\]|.", pattern, flags=re.DOTALL):
        if token == "**/":
            pieces.append("(?:.*/)?")
        elif token[0] == "*":
            pieces.append("[^/]*")
        elif token == "?":
            pieces.append("[^/]")
        elif token[0] == "[" and len(token) > 1:
            body = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
            negated = body.startswith("!")
            body = body[1:] if negated else body.replace("^", "\\^", 1)
            body = f"\\]{body[1:]}" if body.startswith("]") else body
            pieces.append(f"[{'^/' if negated else ''}{body}]")
        else:
            pieces.append(re.escape(token))
    return "".join(pieces)


# -- where they lie


def split_url(url: str) -> tuple[str, str]:
    """Part a path or URL at its last slash, into root and key: ``s3://bucket/a``, ``b.tar``.

    The root of a name without a slash is the folder ``.``, and of ``/b.tar`` it is ``/``.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        root, slash, key = url.rpartition("/")
        return (root or ("/" if slash else ".")), key
    root, slash, key = rest.rpartition("/")
    return (f"{scheme}://{root}", key) if slash else (url, "")


UNFINISHED = ".unfinished-"
"""Begin of the name of a folder beside shards, of a run that writes a split and has not ended."""


def check_finished(names: Iterable[str], where: str) -> None:
    """Look among the names in a folder for what says that its shards are not all there.

    Raises:
        ShardFormatError: A run that writes shards there is under way, or was stopped.
    """
    for name in names:
        if name.startswith(UNFINISHED):
            split = name.partition("/")[0].removeprefix(UNFINISHED)
            raise ShardFormatError(
                f"{where}: holds an unfinished run of split {split!r}, expected whole sets of "
                "shards; give the command that writes them again, and it goes on"
            )


def locate_shards(source: Source, list_objects: ListObjects) -> ShardSet:
    """Find the shards that a source names, below one root.

    Lists only for a glob or a folder; what is named outright is taken as it stands.

    Args:
        source: Names, brace ranges, globs, folders (or ``s3://bucket/prefix/``), or a list of
            these. What ends in no shard's ending and is no glob is a folder; the shards that lie
            in it directly are meant.
        list_objects: Lists a root.

    Raises:
        ValueError: The source cannot be expanded, or its shards share no root.
        KeyNotFoundError: A glob fits nothing, or a folder holds no shard.
        ShardFormatError: A run that writes shards there has not ended.
    """
    found: list[tuple[str, int | None]] = []
    for name in expand_shards(source):
        is_folder = not has_glob(name) and find_kind(name) is None
        if is_folder or has_glob(name):
            found.extend(_list_shards(name, is_folder, list_objects))
        else:
            found.append((name.removeprefix("./"), None))
    return _below_one_root(found)


def _list_shards(
    name: str, is_folder: bool, list_objects: ListObjects
) -> list[tuple[str, int | None]]:
    root, pattern = (name.rstrip("/") or "/", "*") if is_folder else _split_glob(name)
    begin_of_names = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    listed = dict(list_objects(root, begin_of_names))
    check_finished(dict(list_objects(root, UNFINISHED)) if begin_of_names else listed, name)
    names = [key for key in match_names(pattern, listed) if not describes_shards(key)]
    shards = [key for key in names if not is_folder or find_kind(key) is not None]
    if not shards:
        raise KeyNotFoundError(
            f"{name}: no shard there, expected files that end in .tar or .tfrecord, or such as "
            "train-00000-of-01024"
        )
    begin = "" if root == "." else f"{root.rstrip('/')}/"
    return [(begin + key, listed[key]) for key in shards]


def _split_glob(pattern: str) -> tuple[str, str]:
    """Part a glob before its first folder that is a pattern."""
    scheme, separator, rest = pattern.rpartition("://")
    parts = rest.split("/")
    first = next(number for number, part in enumerate(parts) if has_glob(part))
    root = "/".join(parts[:first])
    if not root and not separator:
        root = "/" if first else "."
    return f"{scheme}{separator}{root}", "/".join(parts[first:])


def _below_one_root(found: Sequence[tuple[str, int | None]]) -> ShardSet:
    roots = sorted({split_url(name)[0] for name, _ in found})
    if len({_place(root) for root in roots}) > 1:
        raise ValueError(
            f"shards: got shards below {', '.join(roots[:3])}, expected all in one bucket, on one "
            "host, or below one folder; copy them to one place, or open each place by itself"
        )
    root = _common_folder(roots)
    cut = 0 if root == "." else len(root.rstrip("/")) + 1
    names = tuple(name[cut:] for name, _ in found)
    most_common = collections.Counter(names).most_common(1)
    if most_common[0][1] > 1:
        raise ValueError(f"shards: got {most_common[0][0]!r} twice, expected each shard once")
    return ShardSet(root, names, tuple(size for _, size in found))


def _place(root: str) -> tuple[str, str]:
    """Give scheme and bucket or host; what one store cannot span."""
    scheme, separator, rest = root.partition("://")
    return (scheme, rest.partition("/")[0]) if separator else ("", "/" * root.startswith("/"))


def _common_folder(roots: Sequence[str]) -> str:
    if len(roots) == 1:
        return roots[0]
    columns = zip(*(root.split("/") for root in roots), strict=False)
    shared = [column[0] for column in itertools.takewhile(lambda it: len(set(it)) == 1, columns)]
    return "/".join(shared) or ("/" if roots[0].startswith("/") else ".")
