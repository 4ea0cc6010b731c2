"""The README's code runs, and its commands exist with the flags that it gives them."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarking.photos import make_demo_set
from concurrent_dataloader.prepare.__main__ import main
from concurrent_dataloader.testing import ObjectServer

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text()
DOCUMENTS = [
    CHECKOUT / name
    for name in ("README.md", "CHANGELOG.md", "indexes/README.md", "benchmarking/README.md")
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for block in blocks("shell") for line in block.splitlines()]


def run(
    folder: Path, *command: str, text: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    paths = filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables,
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder that the examples speak of."""
    folder = tmp_path_factory.mktemp("reader")
    photos = make_demo_set(folder / "photos", num_train=120, num_val=10)
    keys = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("train/*/*.jpg"))
    (folder / "train.json").write_text(json.dumps(keys))
    assert main(["shard", str(photos), str(folder / "shards"), "--splits", "train,val"]) == 0
    assert main(["distribute", str(folder / "shards"), "-n", "4", "--split", "train"]) == 0
    assert main(["lmdb", str(photos), str(folder / "databases"), "--splits", "train,val"]) == 0
    return folder


def test_the_readme_opens_with_the_two_commands() -> None:
    assert shell_lines()[:2] == ["./run demo", "./run test"]
    assert README.index("./run demo") < 60


# Each block is run as a program by a child of one process, which imports for all of them.
RUN_EACH = """
import json, os, sys, traceback
import torchvision
codes, outcomes = json.load(sys.stdin), []
for number, code in enumerate(codes):
    with open(f"{number}.out", "w+") as output:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        outcomes.append((os.waitstatus_to_exitcode(status), output.read()))
json.dump(outcomes, sys.stdout)
"""


def is_for_pytest(code: str) -> bool:
    return "def test_" in code


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, tuple[int, str]]:
    """Run each block; gives its exit status and output."""
    pytest.importorskip("skimage", reason="scikit-image, which has the photographs, is missing")
    programs = {code: code for code in blocks("python") if not is_for_pytest(code)}
    for code in programs:
        for letter, path in zip("ab", (folder / "photos/train/cat").iterdir(), strict=False):
            url = f"https://example.org/{letter}.jpg"
            programs[code] = programs[code].replace(url, path.as_uri())
        if "class WebImages" in code:
            programs[code] += "\nprint(next(iter(loader)).shape)\n"
    with ObjectServer() as server:
        server.put_folder("photos", folder / "photos")
        command = (sys.executable, "-W", "error", "-c", RUN_EACH)
        text = json.dumps(list(programs.values()))
        done = run(folder, *command, text=text, **server.environment())
    assert done.returncode == 0, done.stderr
    return dict(zip(programs, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "code",
    [code for code in blocks("python") if not is_for_pytest(code)],
    ids=lambda code: code.splitlines()[-1].strip(),
)
def test_python_in_the_readme_runs(code: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes[code]

    assert status == 0, output
    assert output


@pytest.mark.slow
def test_the_tests_in_the_readme_pass(folder: Path) -> None:
    [code] = [code for code in blocks("python") if is_for_pytest(code)]
    (folder / "test_of_a_user.py").write_text(code)
    plugin = ["-p", "concurrent_dataloader.testing.pytest_plugin", "-c", os.devnull]
    no_entry_points = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    command = [sys.executable, "-m", "pytest", "-q", *plugin, "test_of_a_user.py"]
    done = run(folder, *command, **no_entry_points)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@cache
def help_of(*command: str) -> str:
    done = run(CHECKOUT, *command, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def verbs_of_run() -> frozenset[str]:
    done = run(CHECKOUT, "./run", "help")
    return frozenset(re.findall(r"^  ([a-z][a-z-]*) ", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("line", shell_lines())
def test_a20_a_command_of_the_readme_exists_with_its_flags(line: str) -> None:
    words = shlex.split(line)
    flags = [word for word in words if word.startswith("--")]

    if words[0] == "./run":
        assert words[1] in verbs_of_run()
        if words[1] == "bench":
            words = ["python", "-m", "benchmarking"]
        elif words[1] == "plot":
            words = ["python", "-m", f"benchmarking.plots.{words[2]}"]
        else:
            words = ["python", "imagenet.py"] if flags else []
    elif words[0] == "concurrent-dataloader":
        words = ["python", "-m", "concurrent_dataloader.prepare", words[1]]
    if not words:
        return
    assert words[0] == "python"
    program = words[1:3] if words[1] == "-m" else words[1:2]
    verb = words[3:4] if program[-1] == "concurrent_dataloader.prepare" else []
    text = help_of(sys.executable, *program, *verb)

    assert text.startswith("usage:")
    assert [flag for flag in flags if flag not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_g19_files_that_a_document_names_are_there(document: Path) -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|ipynb|yaml|json|toml))`", document.read_text()))
    made = {"metadata.json", "s3.json", "train.json", "classes.json", "runs/results.md"}

    missing = {
        name
        for name in named - made
        if not (CHECKOUT / name).exists() and not (document.parent / name).exists()
    }

    assert missing == set()


def test_g19_what_the_readme_imports_can_be_imported() -> None:
    for module, names in re.findall(
        r"^from ((?:concurrent_dataloader|benchmarking)[\w.]*) import (.+)$", README, re.MULTILINE
    ):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name)


def test_the_settings_of_the_readme_are_those_of_the_loader() -> None:
    from concurrent_dataloader.dataloader_mod.settings import (
        DEFAULT_NUM_FETCH_WORKERS,
        MAX_CHOSEN_FETCH_WORKERS,
    )

    assert f"| `num_fetch_workers` | `None`: up to {MAX_CHOSEN_FETCH_WORKERS} |" in README
    assert f"to {DEFAULT_NUM_FETCH_WORKERS} samples in flight" in README
