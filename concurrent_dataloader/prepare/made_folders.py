"""Makes the folders of a target, and takes back those into which nothing came."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def make_folders(folder: Path) -> Generator[None]:
    """Make a folder and those above it; at the end, remove those of them that are still empty.

    Raises:
        OSError: It cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()
