"""What crashes leaves no file of its memory, which holds credentials, unless one is asked for."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from concurrent_dataloader import core_files
from tests.dataloader_mod import core_files_program

REPOSITORY = pathlib.Path(__file__).parents[1]

NONE_BYTES = 1 if sys.platform == "linux" else 0
"""A limit below the size of any core file; Linux then calls no program that takes cores either."""

pytestmark = pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_CORE)[1] not in (-1, resource.RLIM_INFINITY)
    and resource.getrlimit(resource.RLIMIT_CORE)[1] < core_files_program.ALLOWED_BYTES,
    reason="this machine allows nobody core files",
)


def run(code: str, **environment: str) -> str:
    names = {name: value for name, value in os.environ.items() if name != core_files.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=names | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_no_worker_leaves_a_core_file_and_its_parent_decides_for_itself() -> None:
    told = json.loads(run(core_files_program.CODE))

    assert told == {
        "fork": NONE_BYTES,
        "spawn": NONE_BYTES,
        "forkserver": NONE_BYTES,
        "torch": NONE_BYTES,
        "parent": core_files_program.ALLOWED_BYTES,
    }


@pytest.mark.slow
def test_workers_leave_core_files_if_they_are_asked_to() -> None:
    told = json.loads(run(core_files_program.CODE, CONCURRENT_DATALOADER_CORE_FILES="1"))

    assert set(told.values()) == {core_files_program.ALLOWED_BYTES}


PROGRAMS = ("concurrent_dataloader.prepare.__main__", "benchmarking.__main__", "imagenet")

COMMAND = """
import resource
from {program} import main
_, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, hard))
try:
    main({arguments})
except SystemExit:
    pass
print(resource.getrlimit(resource.RLIMIT_CORE)[0])
"""


@pytest.mark.parametrize(
    ("program", "arguments", "asked", "limit_bytes"),
    [
        *((program, "", "0", NONE_BYTES) for program in PROGRAMS),
        (PROGRAMS[0], "", "1", 1 << 20),
        *((program, "['--help']", "0", 1 << 20) for program in PROGRAMS),
    ],
)
def test_no_command_leaves_a_core_file(
    program: str, arguments: str, asked: str, limit_bytes: int
) -> None:
    """Where it is one: a function that a program calls changes nothing."""
    code = COMMAND.format(program=program, arguments=arguments)

    told = run(f"import sys; sys.argv = ['x', '--help']{code}", **{core_files.VARIABLE: asked})

    assert told.splitlines()[-1] == str(limit_bytes)


SMALL = """
import resource
from concurrent_dataloader import core_files
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
core_files.forbid()
print(resource.getrlimit(resource.RLIMIT_CORE))
"""


def test_where_none_is_allowed_nothing_changes() -> None:
    assert run(SMALL) == "(0, 0)\n"
