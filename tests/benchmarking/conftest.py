import pathlib

import pytest


@pytest.fixture(scope="session")
def photo_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Made once for all tests; the user's own is left alone."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _keep_the_users_cache(photo_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(photo_cache))
