"""``./run``: what it does without installing anything."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHECKOUT = Path(__file__).parents[1]
RUN = str(CHECKOUT / "run")


def run(
    *arguments: str, cwd: Path = CHECKOUT, script: str = RUN, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments],
        cwd=cwd,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """Make what looks like an environment that ``./run`` made, around this very Python."""
    return make_venv(tmp_path / "a venv", CHECKOUT)


def make_venv(folder: Path, checkout: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("")
    python = folder / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    files = [CHECKOUT / "pyproject.toml", CHECKOUT / "environment.yaml"]
    content = b"".join(file.read_bytes() for file in files) + os.fsencode(f"{checkout.resolve()}\n")
    stamp = subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout
    (folder / ".installed").write_text(f"{stamp.decode().strip()}\nbench\ndemo\ntest\n")
    return folder


def test_help_says_what_each_verb_does() -> None:
    done = run("help")

    assert done.returncode == 0
    assert done.stdout.startswith("usage: ./run VERB")
    assert run().stdout == run("--help").stdout == done.stdout


def test_an_unknown_verb_is_answered_with_those_that_there_are() -> None:
    done = run("tset")

    assert (done.returncode, done.stdout) == (2, "")
    assert "got 'tset'" in done.stderr
    verbs = set(re.findall(r"^  ([a-z][a-z-]*) ", run("help").stdout, re.MULTILINE))
    assert len(verbs) > 12
    assert verbs == set(re.findall(r"[a-z-]+", done.stderr.partition("one of: ")[2].split(";")[0]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dist"], "expected the number of processes"),
        (["dist", "two"], "got 'two'"),
        (["bench"], "./run bench list"),
        (["plot", "no_such"], "expected one of:"),
        (["plot", "../results"], "expected one of:"),
        (["makeshards", "photos"], "expected SOURCE TARGET"),
        (["makeshards", "photos", "--seed"], "expected SOURCE TARGET"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said_before_anything_is_installed(
    arguments: list[str], said: str
) -> None:
    done = run(*arguments, VENV="no-such-folder")

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (CHECKOUT / "no-such-folder").exists()


def test_a_missing_python_is_named() -> None:
    done = run("venv", PYTHON="no-such-python", VENV="no-such-folder")

    assert done.returncode == 2
    assert "no-such-python" in done.stderr
    assert not (CHECKOUT / "no-such-folder").exists()


def test_an_old_python_is_not_taken(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)

    done = run("venv", PYTHON=str(old), VENV="no-such-folder")

    assert done.returncode == 2
    assert f"{old} is Python 3.9.1" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("1")

    done = run("venv", VENV=str(tmp_path))

    assert done.returncode == 2
    assert (tmp_path / "precious").read_text() == "1"


def test_an_environment_that_is_up_to_date_is_used_as_it_is(venv: Path, tmp_path: Path) -> None:
    done = run("bench", "list", VENV=str(venv), cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("loader_epoch: ")


@pytest.mark.parametrize("verb", ["test", "check"])
def test_all_tests_are_shared_out_and_chosen_ones_run_in_one_process(verb: str, venv: Path) -> None:
    python = shlex.quote(sys.executable)
    (venv / "bin/python").write_text(
        f'#!/bin/sh\ncase "$*" in -m*) echo "$@" ;; *) exec {python} "$@" ;; esac\n'
    )

    whole, chosen = (run(verb, *words, VENV=str(venv)) for words in ((), ("-k", "a b")))

    assert whole.stdout.endswith("-m pytest --numprocesses 3 --dist worksteal\n"), whole.stderr
    assert chosen.stdout.endswith("-m pytest -k a b\n"), chosen.stderr


def test_the_demos_shards_that_are_there_are_checked_again(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = checkout / "runs/demo-data" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.jpg")
    for name in ("run", "pyproject.toml", "environment.yaml"):
        shutil.copy(CHECKOUT / name, checkout)
    variables: dict[str, Any] = {
        "VENV": str(make_venv(tmp_path / "venv", checkout)),
        "PYTHONPATH": str(CHECKOUT),
    }

    def makeshards(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run("makeshards", *arguments, script=str(checkout / "run"), **variables)

    first, again, anew = makeshards(), makeshards(), makeshards("--overwrite")

    said = [done.stdout + done.stderr for done in (first, again, anew)]
    assert [done.returncode for done in (first, again, anew)] == [0, 0, 0], said
    assert ["already" in each for each in said] == [False, True, False]
    assert all("train on them: ./run multi runs/demo-shards" in each for each in said)
    (checkout / "runs/demo-shards/train-000000.tar").unlink()
    broken = makeshards()
    assert broken.returncode == 1
    assert "run: make them anew: ./run makeshards --overwrite" in broken.stderr


def test_the_exit_status_is_that_of_what_was_run(venv: Path) -> None:
    assert run("bench", "no-such-scenario", VENV=str(venv)).returncode == 2


def test_ctrl_c_ends_what_runs_and_gives_130(venv: Path, tmp_path: Path) -> None:
    (tmp_path / "test_that_waits.py").write_text(
        "import threading\n"
        "def test_wait():\n"
        "    print('begun', flush=True)\n"
        "    threading.Event().wait(60)\n"
    )
    command = [RUN, "test", "-q", "-s", "-p", "no:cacheprovider", "-c", os.devnull]
    with subprocess.Popen(
        [*command, str(tmp_path / "test_that_waits.py")],
        env=os.environ | {"VENV": str(venv)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # In the background of a shell the signal is ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "begun" in line:
                break
        else:
            assert process.stderr is not None
            pytest.fail(process.stderr.read())

        began_s = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate()

        assert process.returncode == 130
        assert time.monotonic() - began_s < 30
