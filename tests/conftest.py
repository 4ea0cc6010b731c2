"""Fixtures for all tests."""

from __future__ import annotations

import importlib.metadata

PLUGIN = "concurrent_dataloader.testing.pytest_plugin"


def _is_installed() -> bool:
    """Tell whether pytest finds the plugin by its entry point."""
    return any(entry.value == PLUGIN for entry in importlib.metadata.entry_points(group="pytest11"))


# pytest takes a plugin that is named twice for two, with two names; hence only where it must be
# named.
pytest_plugins = [] if _is_installed() else [PLUGIN]
