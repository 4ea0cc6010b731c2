"""Core files: what a process of ours leaves when it crashes must hold no credentials."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping

VARIABLE = "CONCURRENT_DATALOADER_CORE_FILES"

# Linux hands the memory to a program where one is to have it (systemd-coredump, apport), whatever
# the limit, unless that is 1; and 1 makes no file either, since a file takes a page or more.
_NONE_BYTES = 1 if sys.platform == "linux" else 0


def forbid(environment: Mapping[str, str] = os.environ) -> None:
    """Have this process, and those that it starts, leave no core file when they crash.

    Lowers the soft limit alone, which whoever wants one may raise again. Not called in a process of
    the user's own: that decides for itself.

    Args:
        environment: ``CONCURRENT_DATALOADER_CORE_FILES`` set to anything but 0 leaves the limit as
            it is, for those who look for the reason of a crash.
    """
    if environment.get(VARIABLE, "0") not in ("", "0"):
        return
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_CORE)
    soft_bytes = 0 if hard_bytes == 0 else _NONE_BYTES
    resource.setrlimit(resource.RLIMIT_CORE, (soft_bytes, hard_bytes))
