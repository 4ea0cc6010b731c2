"""The fixtures, as other projects' tests get them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PLUGIN = "concurrent_dataloader.testing.pytest_plugin"
OTHERS_TEST = """
import urllib.request

left = []

def test_one_test_stores(object_server):
    object_server.create_bucket("bucket", public=True)
    object_server.put_objects("bucket", {"a": b"12345"})
    object_server.set_latency(0.01)
    left.append(object_server)

    with urllib.request.urlopen(f"{object_server.endpoint_url}/bucket/a") as answer:
        assert answer.read() == b"12345"

def test_the_next_one_finds_nothing_of_it(object_server):
    assert object_server is left[0]
    assert object_server.counters().num_requests == 0
    object_server.create_bucket("bucket", public=True)
    with urllib.request.urlopen(f"{object_server.endpoint_url}/bucket") as answer:
        assert b"<Key>" not in answer.read()

def test_servers_of_ones_own(make_object_server):
    first, second = make_object_server(access_key="a"), make_object_server(access_key="b")
    assert first.port != second.port
    left.extend([first, second])

def test_those_are_closed_with_their_test():
    assert [repr(server) for server in left[1:]] == ["<ObjectServer stopped>"] * 2
"""


def run_pytest(
    folder: pathlib.Path, *arguments: str, takes_entry_points: bool = True
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    if not takes_entry_points:  # as if nothing were installed, whatever is
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("is_installed", [True, False])
def test_other_projects_get_the_fixtures(tmp_path: pathlib.Path, is_installed: bool) -> None:
    (tmp_path / "test_others.py").write_text(OTHERS_TEST)
    if is_installed:
        install_entry_point(tmp_path)
        arguments: list[str] = []
    else:
        arguments = ["-p", PLUGIN]

    result = run_pytest(tmp_path, "-W", "error", *arguments, takes_entry_points=is_installed)

    assert "4 passed" in result.stdout, result.stdout + result.stderr


def test_our_own_conftest_takes_the_plugin_once_where_it_is_installed(
    tmp_path: pathlib.Path,
) -> None:
    install_entry_point(tmp_path)
    test = "tests/testing/test_object_server.py::test_objects_are_stored_from_a_lazy_source"

    result = run_pytest(tmp_path, "-c", str(ROOT / "pyproject.toml"), str(ROOT / test))

    assert "1 passed" in result.stdout, result.stdout + result.stderr


def install_entry_point(folder: pathlib.Path) -> None:
    """Put what an installation leaves for pytest into a folder of Python's path."""
    described = folder / "concurrent_dataloader_again-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: concurrent-dataloader-again\nVersion: 1\n"
    )
    (described / "entry_points.txt").write_text(f"[pytest11]\nconcurrent_dataloader = {PLUGIN}\n")
