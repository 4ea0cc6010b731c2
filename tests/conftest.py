"""Fixtures for all tests."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import signal

PLUGIN = "concurrent_dataloader.testing.pytest_plugin"


def _is_installed() -> bool:
    """Tell whether pytest finds the plugin by its entry point."""
    return any(entry.value == PLUGIN for entry in importlib.metadata.entry_points(group="pytest11"))


# pytest takes a plugin that is named twice for two, with two names; hence only where it must be
# named.
pytest_plugins = [] if _is_installed() else [PLUGIN]

# On cores that others use as well, threads of tiny convolutions wait for each other. It stands here
# since torch looks only when it is imported; the programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what it starts in the background, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what is there for good out of each collection of garbage: torch, and the tests.

    A collection would look through it, and in a forked worker copy it, page by page.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let all of it go at the exit; extension modules complain of what stays."""
    gc.unfreeze()
