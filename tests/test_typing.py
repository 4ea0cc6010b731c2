"""The public interface, as a type checker sees it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None,
    reason="pyright is not installed; ./run test has it",
)


def check_strictly(folder: Path, script: str) -> list[str]:
    """Check a user's file in a project of its own; give what is wrong, by rule and line."""
    (folder / "script.py").write_text(script)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(CHECKOUT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] == 1
    return [
        f"{each['range']['start']['line'] + 1}: {each.get('rule')}: {each['message']}"
        for each in said["generalDiagnostics"]
    ]


def test_a_users_script_passes_strictly(tmp_path: Path) -> None:
    script = (CHECKOUT / "tests/typing/user_script.py").read_text()

    assert check_strictly(tmp_path, script) == []


def test_misuse_is_seen(tmp_path: Path) -> None:
    script = (
        "from concurrent_dataloader import DataLoader, ScratchDataset\n"
        "dataset = ScratchDataset('photos')\n"
        "DataLoader(dataset, fetch_impl='async')\n"
        "DataLoader(dataset, num_fetch_worker=8)\n"
        "dataset.label('0')\n"
    )

    found = [each.split(":")[0] for each in check_strictly(tmp_path, script)]

    assert sorted(set(found)) == ["3", "4", "5"]


def test_the_package_says_that_it_is_typed() -> None:
    assert (CHECKOUT / "concurrent_dataloader/py.typed").is_file()
