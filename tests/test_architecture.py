"""Imports point up the table of docs/architecture.md, and importing the package loads nothing slow."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
TABLE = (PACKAGE.parent / "docs" / "architecture.md").read_text()
RANKS = {
    name: int(rank)
    for rank, cell in re.findall(r"^\| (\d+) \| ([^|]+) \|", TABLE, re.M)
    for name in re.findall(r"`(\w+)\.py`", cell)
}
FILES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "pyro_vae":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae."):
            yield node.module.split(".")[1]


def test_the_table_names_every_file():
    assert set(RANKS) == set(FILES)


def test_imports_point_up_the_table():
    wrong = [(f, g) for f, tree in FILES.items() for g in imported(tree) if RANKS[g] >= RANKS[f]]
    assert not wrong


def test_the_package_is_imported_at_the_top_of_files_alone():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for name, tree in FILES.items():
        inner = [node for node in ast.walk(tree) if isinstance(node, functions)]
        assert not [g for node in inner for g in imported(node)], name


def test_the_judge_knows_torch_and_itself_alone():
    judge = ("operands", "by_hand", "exact_models", "closed_form")
    modules = {
        name
        for file in judge
        for node in ast.walk(FILES[file])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    own = {f"pyro_vae.{file}" for file in judge}
    assert modules <= own | {"torch", "torch.nn.functional", "math", "dataclasses"}


def test_every_file_says_what_is_public():
    for name, tree in FILES.items():
        assert any(isinstance(n, ast.Assign) and n.targets[0].id == "__all__" for n in tree.body), name


def test_the_package_shows_its_public_names_alone():
    assert dir(pyro_vae) == sorted(pyro_vae.__all__)
    assert all(hasattr(pyro_vae, name) for name in pyro_vae.__all__)


def test_importing_the_package_loads_nothing_slow():
    slow = ("torchvision", "matplotlib", "arviz", "zuko", "pandas", "sklearn", "torch.utils.tensorboard")
    slow += ("torch._inductor", "torch._dynamo")
    code = f"import sys, pyro_vae; print([m for m in {slow} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
