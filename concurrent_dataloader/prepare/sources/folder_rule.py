"""Which folder of a sample is its class: the one that ImageFolder of torchvision takes. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from concurrent_dataloader.label_rules import LabelRule


def find_folder_rule(names: Iterable[str], leading: Collection[str] | None = None) -> LabelRule:
    """Find the rule by which the folder at the top is the class, however deep a sample lies.

    Folders that all samples share stand above the classes, as in a tar of a whole folder, and are
    passed over. Each sample keeps one folder at least.

    Args:
        names: Paths of the samples.
        leading: Which shared folders are passed over; None: any.
    """
    shared: list[str] | None = None
    for name in names:
        folders = name.split("/")[:-1]
        if shared is None:
            shared = folders[:-1]
        while shared and (len(folders) <= len(shared) or folders[: len(shared)] != shared):
            shared.pop()
        if not shared:
            break
    passed = shared or []
    if leading is not None:
        count = next((n for n, each in enumerate(passed) if each not in leading), len(passed))
        passed = passed[:count]
    return rf"regex:^{re.escape(''.join(f'{each}/' for each in passed))}([^/]+)/"
