"""Data is never unpickled or evaluated, but where it is ours or an unpickler allows values only."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

import concurrent_dataloader

PACKAGE = pathlib.Path(concurrent_dataloader.__file__).parent
REPOSITORY = PACKAGE.parent
MODULES = sorted(
    [
        *PACKAGE.rglob("*.py"),
        *(REPOSITORY / "benchmarking").rglob("*.py"),
        REPOSITORY / "imagenet.py",
    ]
)

DANGEROUS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "np.load",
    "numpy.load",
    "torch.load",
    "torch.jit.load",
}

ALLOWED = {
    # A batch of our own worker, as all that comes through torch's queue.
    ("concurrent_dataloader/dataloader_mod/loans.py", "pickle.loads"): 1,
    # A copy of a state, pickled by this loader in this process or in a worker of it.
    ("concurrent_dataloader/dataloader_mod/resume.py", "pickle.loads"): 1,
    # What a process that packs is told by the one that started it, and an error it sends back.
    ("concurrent_dataloader/prepare/pool.py", "pickle.loads"): 2,
}
"""How often each may stand where; whatever else is used has to be harmless by its arguments."""


def find_names(tree: ast.AST) -> dict[str, str]:
    """Give what each imported name stands for, such as ``pickle`` for ``p`` after ``as p``."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname: each.name for each in node.names if each.asname is not None}
        elif isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return names


def find_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Give all calls, by the whole names of what they call, whatever it is imported as."""
    names = find_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield find_whole_name(node.func, names), node


def find_references(tree: ast.AST) -> Iterator[str]:
    """Give what is named, neither called nor derived from there, as in ``map(pickle.loads, x)``."""
    names = find_names(tree)
    others = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    others |= {
        id(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in others:
            yield find_whole_name(node, names)


def find_whole_name(node: ast.expr, names: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return f"{names.get(first, first)}{dot}{rest}".removeprefix("builtins.")


def is_harmless(name: str, call: ast.Call) -> bool:
    """Say whether its arguments keep the call from executing what it reads."""
    given = {each.arg: ast.unparse(each.value) for each in call.keywords}
    if name == "torch.load":
        return given.get("weights_only") == "True"
    if name in ("np.load", "numpy.load"):
        return given.get("allow_pickle") == "False"
    return False


def find_dangers(source: str) -> list[str]:
    """Name the calls, names, imports and shells of a module that execute what they are given."""
    tree = ast.parse(source)
    found = [
        name for name, call in find_calls(tree) if name in DANGEROUS and not is_harmless(name, call)
    ]
    found += [name for name in find_references(tree) if name in DANGEROUS]
    found += [
        "shell=True"
        for _, call in find_calls(tree)
        for each in call.keywords
        if each.arg == "shell" and ast.unparse(each.value) != "False"
    ]
    return found + [
        f"{node.module}.{each.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for each in node.names
        if f"{node.module}.{each.name}" in DANGEROUS
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_w08_b09_a_module_executes_no_data(path: pathlib.Path) -> None:
    where = path.relative_to(REPOSITORY).as_posix()
    found = find_dangers(path.read_text())

    for (module, name), times in ALLOWED.items():
        if module == where:
            assert found.count(name) == times
            found = [each for each in found if each != name]
    if where == "concurrent_dataloader/datasets/_shard_streams.py":
        found.remove("shell=True")  # `pipe:`, which is refused unless the caller allows it

    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(x)",
        "import pickle as p\np.loads(x)",
        "import pickle as p\nload = p.loads\nload(x)",
        "def f(x):\n    import pickle as p\n    return p.Unpickler(x).load()",
        "from pickle import loads",
        "from pickle import loads\nloads(x)",
        "from pickle import loads as read\nread(x)",
        "from torch import load as read\nread(x)",
        "from torch import jit as j\nj.load(x)",
        "import torch.jit as j\nj.load(x)",
        "import numpy as n\nn.load(x, allow_pickle=True)",
        "import builtins\nbuiltins.eval(x)",
        "import os as o\no.system(x)",
        "map(pickle.loads, x)",
        "eval(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "np.load(x)",
        "subprocess.run(x, shell=True)",
        "pickle.Unpickler(x).load()",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert find_dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p\np.dumps(x)",
        "from json import loads\nloads(x)",
        "import json as pickle\npickle.loads(x)",
        "import torch as t\nt.load(x, weights_only=True)",
        "import numpy as n\nn.load(x, allow_pickle=False)",
        "model.eval()",
        "import re\nre.compile(x)",
        "import pickle\nclass A(pickle.Unpickler): pass",  # looked for by a test of its own
    ],
)
def test_the_search_finds_nothing_in_what_is_harmless(source: str) -> None:
    assert not find_dangers(source)


def test_the_search_counts_each_call_that_is_allowed_once() -> None:
    assert find_dangers("import pickle\npickle.loads(x)\npickle.loads(y)") == ["pickle.loads"] * 2


def test_the_one_unpickler_of_foreign_data_allows_values_only() -> None:
    tree = ast.parse((PACKAGE / "formats" / "lmdb_record.py").read_text())

    made = [name for name, _ in find_calls(tree) if name.endswith("Unpickler")]
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    methods = {each.name for each in ast.walk(classes["_Unpickler"]) if hasattr(each, "name")}  # pyright: ignore[reportAttributeAccessIssue]: asked for in the condition

    assert made == ["_Unpickler"]
    assert "find_class" in methods, "it would load any class"


def test_nothing_else_derives_from_an_unpickler() -> None:
    derived = [
        path.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if ast.unparse(base).endswith("Unpickler")
    ]

    assert derived == ["lmdb_record.py"]
