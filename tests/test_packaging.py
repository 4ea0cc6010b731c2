"""What a wheel holds, what it needs, and what it does where it is installed."""

from __future__ import annotations

import ast
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("concurrent_dataloader", "benchmarking")
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "google_crc32c": "google-crc32c",
    "typing_extensions": "typing-extensions",
}
OPTIONAL_OF = {
    "_aiobotocore": {"aiobotocore", "aiohttp"},
    "_aiohttp": {"aiohttp", "yarl"},
    "arrays": {"h5py"},
    "devkit": {"scipy"},
    "lmdb_environment": {"lmdb"},
    "lmdb_file": {"lmdb"},
    "lmdb_writer": {"lmdb"},
    "lmdb_record": {"msgpack"},
    "pytest_plugin": {"pytest"},
}
OPTIONAL = [
    *("aiobotocore", "aiohttp", "h5py", "lmdb", "matplotlib", "msgpack", "pytest", "scipy"),
    *("skimage", "sklearn"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, since the build leaves files in its tree; no network."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in (*PACKAGES, "tests"):
        shutil.copytree(CHECKOUT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE", "imagenet.py"):
        shutil.copy(CHECKOUT / file, source)
    script = "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, "dist"],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(folder), str(wheel)], check=True
    )
    return folder


def run_at(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds the installed package, and not this checkout."""
    return subprocess.run(
        command,
        cwd=site.parent,
        env=os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def project() -> dict[str, Any]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[;! ]", each, maxsplit=1)[0].lower() for each in requirements}


@pytest.mark.parametrize("file", ["py.typed", "DESIGN.md", "imagenet_classes.txt"])
def test_the_wheel_holds_what_is_no_code(names: list[str], file: str) -> None:
    assert f"concurrent_dataloader/{file}" in names


def test_the_wheel_holds_every_module(names: list[str]) -> None:
    modules = {
        str(path.relative_to(CHECKOUT))
        for package in PACKAGES
        for path in (CHECKOUT / package).rglob("*.py")
    }

    assert modules | {"imagenet.py"} == {name for name in names if name.endswith(".py")}


def test_the_wheel_holds_no_tests_and_the_licence(names: list[str]) -> None:
    assert not [name for name in names if name.startswith("tests")]
    assert [name for name in names if name.endswith("dist-info/licenses/LICENSE")]


def test_every_data_file_of_the_package_is_in_the_wheel(names: list[str]) -> None:
    package = CHECKOUT / "concurrent_dataloader"
    data = {
        str(path.relative_to(CHECKOUT))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".packed")
    }

    assert data <= set(names)


def test_the_installed_package_tells_its_version(site: Path, wheel: Path) -> None:
    script = "import concurrent_dataloader as c; print(c.__version__, c.__file__)"

    version, file = run_at(site, sys.executable, "-c", script).stdout.split()

    assert Path(file).is_relative_to(site)
    assert version == project()["version"] == wheel.name.split("-")[1]


def test_the_installed_command_runs(site: Path) -> None:
    command = str(site / "bin" / "concurrent-dataloader")

    done = run_at(site, sys.executable, command, "--version")

    assert (done.stdout, done.stderr) == (f"concurrent-dataloader {project()['version']}\n", "")


def test_the_installed_package_names_imagenets_classes(site: Path) -> None:
    script = (
        "from importlib.resources import files\n"
        "print(len(files('concurrent_dataloader').joinpath('imagenet_classes.txt')"
        ".read_text(encoding='utf-8').splitlines()))"
    )

    assert run_at(site, sys.executable, "-c", script).stdout == "1000\n"


def test_the_pytest_plugin_is_found_where_the_package_is_installed(site: Path) -> None:
    (site.parent / "test_of_a_user.py").write_text(
        "def test_bucket(object_server):\n    object_server.create_bucket('b')\n"
    )

    done = run_at(site, sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "test_of_a_user.py")

    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_b12_all_but_the_adapters_can_be_imported_without_what_is_optional(site: Path) -> None:
    script = f"""
import importlib, pkgutil, sys
import concurrent_dataloader

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        is_absent = name.partition(".")[0] in {OPTIONAL!r}
        return None if is_absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
for module in pkgutil.walk_packages(concurrent_dataloader.__path__, "concurrent_dataloader."):
    if module.name.rpartition(".")[2] not in {sorted(OPTIONAL_OF)!r}:
        importlib.import_module(module.name)
from concurrent_dataloader import open_store
from concurrent_dataloader.errors import MissingDependencyError
for client in ("aiobotocore", "aiohttp"):
    try:
        open_store("s3://bucket", client=client, anonymous=True)
    except MissingDependencyError as error:
        print(str(error).rpartition("; ")[2])
"""

    done = run_at(site, sys.executable, "-c", script)

    assert done.stdout.splitlines() == [
        f"install it with `pip install {name}`" for name in ("aiobotocore", "aiohttp")
    ], done.stderr


def imported_packages(path: Path) -> set[str]:
    """Packages outside of the standard library that a file imports, at once or later."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names


def test_b16_what_the_library_imports_is_what_it_depends_on() -> None:
    core = distributions(project()["dependencies"])

    imported = {"concurrent_dataloader"}.union(
        *(
            imported_packages(path) - OPTIONAL_OF.get(path.stem, set())
            for path in (CHECKOUT / "concurrent_dataloader").rglob("*.py")
        )
    )

    assert {DISTRIBUTION_OF.get(name, name) for name in imported} == core | {
        "concurrent_dataloader"
    }


def test_b12_the_trainer_imports_what_the_package_depends_on_and_no_more() -> None:
    core = distributions(project()["dependencies"])

    imported = imported_packages(CHECKOUT / "imagenet.py") - {*PACKAGES}

    assert {DISTRIBUTION_OF.get(name, name) for name in imported} <= core
    assert imported >= {"torch", "torchvision"}


def test_w14_each_dependency_has_a_lower_and_an_upper_bound(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    message = email.parser.Parser().parsestr(archive.read(metadata).decode())

    requirements = [
        each.partition(";")[0]
        for each in message.get_all("Requires-Dist", [])
        if not each.startswith("concurrent-dataloader")
    ]

    assert len(requirements) > 15
    assert [each for each in requirements if ">=" not in each or "<" not in each] == []


def test_the_conda_environment_pins_what_the_package_depends_on() -> None:
    text = (CHECKOUT / "environment.yaml").read_text()
    extras = project()["optional-dependencies"]
    wanted = distributions(project()["dependencies"]) | distributions(
        [each for extra in extras.values() for each in extra]
    )

    pinned = set(re.findall(r"^\s+- ([\w-]+)(?:\[\w+\])?==[\d.]+$", text, re.MULTILINE))

    assert wanted - {"concurrent-dataloader"} == pinned
