"""Leave out of a transform what was done to the images before they were packed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from torch import nn

log = logging.getLogger(__name__)

Transform: TypeAlias = Callable[[Any], Any]

_HOME = "torchvision.transforms"
# Change how pixels are held, and none of them: steps that were baked in may stand behind these.
_CONVERSIONS = ("ToImage", "PILToTensor", "ToPILImage")
# What packed images are cut or scaled by, always in the same way: by any of these but those that
# were recorded, the result is another one than without packing.
_FIXED = ("Resize", "CenterCrop", "Pad", "FiveCrop", "TenCrop")


class Match(NamedTuple):
    """What is left of a transform, and what that leaves out."""

    transform: Transform | None
    skipped: tuple[str, ...]
    """The steps; none: the transform is whole."""

    conflict: str | None
    """The first fixed step that is not the one recorded, so that pixels are others; or None."""


def skip_baked(transform: Transform | None, steps: Sequence[str]) -> Transform | None:
    """Leave out of a transform the steps that images have had already; logs a line about it.

    They are left out only if all of them, in their order, are what the transform begins with: as
    torchvision's ``Resize(n)`` (bilinear) and ``CenterCrop(n)``, old or v2, in a ``Compose`` or
    ``Sequential``, behind nothing but conversions such as ``ToImage``. Otherwise the transform
    stays whole. Then a warning is logged if it resizes or crops in another fixed way, since the
    pixels are then not those of the images before they were packed; not if it crops at random, or
    not at all.

    Args:
        transform: Of images; None: none.
        steps: As ``metadata.json`` has them, such as ``("Resize(256)", "CenterCrop(224)")``, and
            `ShardDataset.baked_steps`.

    Returns:
        The rest, None if there is none; the transform itself where nothing is left out.
    """
    match = match_baked(transform, steps)
    told = ", ".join(steps)
    if match.skipped:
        log.info("left out %s of the transform: the packed images have had it", told)
    elif match.conflict is not None:
        log.warning(
            "the packed images have had %s, and the transform does %s: the pixels are not those of "
            "images that were not packed; expected a transform that begins with %s",
            told,
            match.conflict,
            told,
        )
    return match.transform


def match_baked(transform: Transform | None, steps: Sequence[str]) -> Match:
    """Compare a transform with steps, as `skip_baked` says; logs nothing."""
    if transform is None or not steps:
        return Match(transform, (), None)
    parts = list(_flatten(transform))
    kept: list[Transform] = []
    num_done = 0
    for place, part in enumerate(parts):
        if num_done == len(steps):
            kept += parts[place:]
            break
        if _describe(part) == _normalize(steps[num_done]):
            num_done += 1
        elif _name(part) in _CONVERSIONS:
            kept.append(part)
        else:
            break
    if num_done == len(steps):
        return Match(_compose(transform, kept), tuple(steps), None)
    return Match(transform, (), _find_conflict(parts))


def _find_conflict(parts: Sequence[Transform]) -> str | None:
    for part in parts:
        name = _name(part) or ""
        if name in _FIXED:
            return repr(part)
        if name.startswith("Random") and ("Crop" in name or "Resize" in name):
            return None
    return None


def _flatten(transform: Transform) -> Iterator[Transform]:
    """Give the parts of what is composed, in their order."""
    if isinstance(transform, nn.Sequential) or _name(transform) == "Compose":
        held: Any = transform
        parts: Sequence[Transform] = (
            list(held) if isinstance(transform, nn.Sequential) else held.transforms
        )
        for part in parts:
            yield from _flatten(part)
    else:
        yield transform


def _compose(like: Transform, parts: Sequence[Transform]) -> Transform | None:
    if not parts:
        return None
    if isinstance(like, nn.Sequential):
        return nn.Sequential(*cast("Sequence[nn.Module]", parts))
    if len(parts) == 1:
        return parts[0]
    return cast("Transform", cast(Any, type(like))(list(parts)))


def _name(part: Transform) -> str | None:
    """Give the name of a transform of torchvision; None for any other function."""
    kind = type(part)
    return kind.__name__ if kind.__module__.startswith(_HOME) else None


def _describe(part: Transform) -> str | None:
    """Write a step as ``metadata.json`` does; None if it is no such step."""
    name = _name(part)
    if name not in ("Resize", "CenterCrop"):
        return None
    settings: Any = part
    size: Any = settings.size
    sides = [size] if isinstance(size, int) else list(size or ())
    if name == "CenterCrop":
        return f"CenterCrop({sides[0]})" if len(set(sides)) == 1 else None
    is_plain = (
        len(sides) == 1
        and getattr(settings.interpolation, "value", settings.interpolation) == "bilinear"
        and settings.max_size is None
        and settings.antialias is not False
    )
    return f"Resize({sides[0]})" if is_plain else None


def _normalize(step: str) -> str:
    return "".join(step.split())
