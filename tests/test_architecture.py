"""Imports go strictly downwards, from floor to floor, and importing the package loads nothing slow."""

import ast
import subprocess
import sys
from pathlib import Path

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
FLOORS = {
    0: {"utils", "closed_form"},
    1: {"networks", "distributions", "objectives", "engine", "data", "plots"},
    2: {"priors", "likelihoods", "guides", "vae", "inference"},
    3: {"conditional", "training", "evaluation"},
    4: {"comparison"},
    5: {"applications"},
    6: {"__main__"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
KNOWS_UTILS_ALONE = {"engine", "plots"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
del FILES[""]


def imported(tree: ast.AST):
    """The package's modules that a piece of code imports, such as "utils.display"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("pyro_vae"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro_vae":
            inside = node.module.partition(".")[2]
            for alias in node.names:
                whole = f"{inside}.{alias.name}".strip(".")
                yield whole if whole in FILES else inside


def room(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def test_every_room_has_a_floor():
    assert set(FLOOR_OF) == {room(name) for name in FILES}
    assert len(FLOOR_OF) <= 19  # and __init__
    assert len(FLOORS) <= 7


def test_imports_go_down():
    wrong = [
        (name, other)
        for name, tree in FILES.items()
        for other in imported(tree)
        if room(other) != room(name) and FLOOR_OF[room(other)] >= FLOOR_OF[room(name)]
    ]
    assert not wrong


def test_plots_and_engine_import_utils_alone_and_closed_form_nothing():
    for name, tree in FILES.items():
        others = {room(other) for other in imported(tree)} - {room(name)}
        if room(name) in KNOWS_UTILS_ALONE:
            assert others <= {"utils"}, name
        if room(name) in FLOORS[0]:
            assert not others, name


def test_no_room_has_a_cycle():
    inner = {
        name: {other for other in imported(tree) if room(other) == room(name)}
        for name, tree in FILES.items()
        if "." in name
    }
    while inner:
        free = [name for name, others in inner.items() if not others & set(inner)]
        assert free, f"a cycle among {sorted(inner)}"
        for name in free:
            del inner[name]


def test_the_package_is_imported_at_the_top_of_files_alone():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for name, tree in FILES.items():
        inner = [node for node in ast.walk(tree) if isinstance(node, functions)]
        assert not [g for node in inner for g in imported(node)], name


def test_closed_form_uses_torch_arithmetic_alone():
    modules = {
        name
        for file, tree in FILES.items()
        if room(file) == "closed_form"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    own = {f"pyro_vae.{file}" for file in FILES if room(file) == "closed_form"}
    assert modules <= own | {"torch", "torch.nn.functional", "math", "dataclasses"}


def test_every_file_says_what_is_public():
    rooms_without_names = {"utils"}
    for name, tree in FILES.items():
        if name not in rooms_without_names:
            assert any(isinstance(n, ast.Assign) and n.targets[0].id == "__all__" for n in tree.body), name


def test_no_file_hides_behind_a_public_function():
    names = {name.rpartition(".")[2] for name in FILES if "." in name}
    functions = {name for name in pyro_vae.__all__ if callable(getattr(pyro_vae, name))}
    assert not names & functions


def test_the_package_shows_its_public_names_alone():
    assert dir(pyro_vae) == sorted(pyro_vae.__all__)
    assert all(hasattr(pyro_vae, name) for name in pyro_vae.__all__)


def test_importing_the_package_loads_nothing_slow():
    slow = ("torchvision", "matplotlib", "arviz", "zuko", "pandas", "sklearn", "torch.utils.tensorboard")
    slow += ("torch._inductor", "torch._dynamo")
    code = f"import sys, pyro_vae; print([m for m in {slow} if m in sys.modules], end=' ')\n"
    code += "pyro_vae.applications; print('sklearn' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] False"
