"""The notebook runs from its first cell to its last."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]
NOTEBOOK = CHECKOUT / "notebooks/colab.ipynb"
NEEDED = ("nbclient", "nbformat", "ipykernel", "sklearn", "skimage")

EXECUTE = """
import sys

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
manager = AsyncKernelManager()
# Not the kernel that is installed for all of this user's notebooks: that of this Python.
manager.kernel_spec.argv = [sys.executable, *manager.kernel_spec.argv[1:]]
try:
    NotebookClient(notebook, km=manager, timeout=100).execute()
finally:
    nbformat.write(notebook, "executed.ipynb")
"""


def read_code(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED),
    reason=f"not all of {', '.join(NEEDED)} are installed",
)
@pytest.mark.timeout(300)
def test_the_notebook_trains_from_a_bucket(tmp_path: Path) -> None:
    # In a process of its own: Jupyter's packages warn, of themselves and of what they left open.
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(tmp_path / name.lower()) for name in folders}
    paths = (str(CHECKOUT), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXECUTE, str(NOTEBOOK)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    printed = "".join(
        "".join(output["text"])
        for cell in read_code(tmp_path / "executed.ipynb")
        for output in cell["outputs"]
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )
    assert "GPU: " in printed
    assert "train.json: 320 samples" in printed
    assert re.search(r"ours: +\d+ images/s", printed)
    assert "80 images validated" in printed


def test_the_notebook_is_kept_without_results() -> None:
    code = read_code(NOTEBOOK)

    assert len(code) > 5
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert [cell["execution_count"] for cell in code] == [None] * len(code)
