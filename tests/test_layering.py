"""Imports point one way, and each client library is imported by its one adapter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import concurrent_dataloader

PACKAGE = Path(concurrent_dataloader.__file__).parent
LAYERS = [
    {"core_files", "errors", "ranges", "shared_memory", "threads"},
    {"classes_file", "files", "label_rules", "packed", "shard_names"},
    {"stores", "formats", "index", "labels"},
    {"shard_index", "devkit"},
    {"labelling", "boxes", "distribution"},
    {"annotations"},
    {"datasets"},
    {"dataloader_mod", "prepare"},
    {"imagenet_loader", "training"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ALONE = {"testing"}
MODULES = sorted(PACKAGE.rglob("*.py"))
CLIENTS = {
    "aiobotocore": {"_aiobotocore"},
    "aiohttp": {"_aiohttp", "_aiobotocore"},
    "boto3": {"_boto3"},
    "lmdb": {"lmdb_environment", "lmdb_file", "lmdb_writer"},
    "obstore": {"_obstore"},
}
MAY_IMPORT_TORCH = {
    *("datasets", "dataloader_mod", "formats", "imagenet_loader", "shared_memory", "training")
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, with whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text())
    later = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_types(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by a relative name"
            assert node.module is not None
            yield node.module, id(node) not in later
            if node.module == PACKAGE.name:
                for alias in node.names:
                    yield f"{node.module}.{alias.name}", id(node) not in later
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in later


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def in_package(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=in_package)
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    imported_rooms = {
        module.split(".")[1]
        for module, _ in imports(path)
        if module.startswith(f"{PACKAGE.name}.") and module.split(".")[1] != "__version__"
    } - {room}

    if room == "__init__":
        return
    if room in ALONE:
        assert not imported_rooms, f"{room} stands alone, and imports {imported_rooms}"
        return
    for imported in imported_rooms:
        assert imported in LEVEL, f"{room} imports {imported}, which is in no layer"
        assert LEVEL[imported] < LEVEL[room], f"{room} imports {imported}"


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in MODULES} == set(LEVEL) | ALONE | {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=in_package)
def test_only_rooms_of_samples_and_batches_import_torch(path: Path) -> None:
    torch_imports = [
        at_once
        for module, at_once in imports(path)
        if module.partition(".")[0] in ("torch", "torchvision")
    ]

    if torch_imports:
        assert room_of(path) in MAY_IMPORT_TORCH
    if room_of(path) == "formats":
        assert not any(torch_imports), "formats import torch only where it decodes"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_imported_by_its_adapter_alone(client: str) -> None:
    importers = {
        path.stem
        for path in MODULES
        if any(module.partition(".")[0] == client for module, _ in imports(path))
    }

    assert importers, f"nobody imports {client}"
    assert importers <= CLIENTS[client]


@pytest.mark.parametrize("path", MODULES, ids=in_package)
def test_the_library_knows_neither_its_benchmarks_nor_its_trainer(path: Path) -> None:
    outside = {module.partition(".")[0] for module, _ in imports(path)}

    assert outside.isdisjoint({"benchmarking", "imagenet", "tests"})
