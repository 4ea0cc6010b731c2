"""Fixtures for pytest: an S3 object server for each test.

The plugin is found by itself where this package is installed; elsewhere a ``conftest.py`` names it
in ``pytest_plugins``. Nothing is started before a test asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from concurrent_dataloader.testing.object_server import ObjectServer


@pytest.fixture(scope="session")
def _session_object_server() -> Iterator[ObjectServer]:
    from concurrent_dataloader.testing.object_server import ObjectServer

    with ObjectServer() as server:
        yield server


@pytest.fixture
def object_server(_session_object_server: ObjectServer) -> ObjectServer:
    """Give an object server without buckets, latency and faults; one process serves the session."""
    _session_object_server.restore()
    return _session_object_server


@pytest.fixture
def make_object_server() -> Iterator[Callable[..., ObjectServer]]:
    """Give a function that starts a server of the test's own; takes what `ObjectServer` takes."""
    from concurrent_dataloader.testing.object_server import ObjectServer

    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> ObjectServer:
            return stack.enter_context(ObjectServer(**settings))

        yield start
