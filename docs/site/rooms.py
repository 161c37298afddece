"""The reference: a page for each room, an entry for each of its public names."""

import importlib
import inspect
import re
from functools import cache

ERRORS = "errors"  # what is public and in none of the rooms
RETURNED = {  # what public names return, and nobody imports
    "pyro_vae.evaluation.result.PerDatum": "evaluation",
    "pyro_vae.evaluation.whole.WholeEvaluation": "evaluation",
    "pyro_vae.evaluation.annealed_importance.AnnealedEvidence": "evaluation",
    "pyro_vae.evaluation.importance_weights.WeightSummary": "evaluation",
    "pyro_vae.evaluation.latents.AggregatePosterior": "evaluation",
    "pyro_vae.utils.display.Estimate": "evaluation",
}
ELSEWHERE = {  # names that are not ours on pages that match
    "data": "",  # an argument
    "vae": "",
    "fit": "anomalies|scikit-learn|applications",  # a method of estimators
    "evaluate": "command-line",  # a command
    "SVI": "index|docs/",  # Pyro's
    "VAE": "docs/",
}
ROOMS = {
    "VAE": ["vae", "conditional"],
    "Parts of a VAE": ["priors", "likelihoods", "guides", "networks", "distributions"],
    "Train": ["training", "inference", "data"],
    "Bounds": ["objectives", "comparison", "closed_form"],
    "Evaluate and draw": ["evaluation", "plots"],
    "Use": ["applications", "applications.corruptions", "applications.sklearn", "applications.units"],
    "Errors": [ERRORS],
}


@cache
def public_names() -> dict[str, str]:
    """Return the room of every public name, by the shortest path that users type, such as "pyro_vae.fit"."""
    package = importlib.import_module("pyro_vae")
    names: dict[str, str] = {}
    for room in _rooms():
        module = package if room == ERRORS else importlib.import_module(f"pyro_vae.{room}")
        for name in module.__all__:
            path = f"pyro_vae.{name}" if name in package.__all__ else f"pyro_vae.{room}.{name}"
            if not inspect.ismodule(getattr(module, name)):
                names.setdefault(path, room)
    return names | RETURNED


def reference_of(code: str, page: str) -> str | None:
    """Return the entry that code on a page names, such as `pv.fit(...)`, `VAE.model` or `guides`, or None."""
    match = re.match(r"(pv\.|pyro_vae\.)?([A-Za-z_.]+)(?:\(.*)?$", code, re.DOTALL)
    if match is None or (not match[1] and re.search(ELSEWHERE.get(match[2], "$^"), page)):
        return None
    names, path = public_names(), f"pyro_vae.{match[2]}"
    owner, _, name = path.rpartition(".")
    if path in names or match[2] in names.values():
        return path
    if owner in names:
        return None if name.startswith("_") else path
    if match[1] or not name[0].isupper():
        return None
    same = [other for other in names if other.rpartition(".")[2] == name and names[other] != "distributions"]
    return same[0] if len(same) == 1 else None


def public_path(path: str) -> str:
    """Return the path in the reference of a name, or of a method, that is given by another path."""
    names = public_names()
    parts = path.split(".")
    if any(".".join(parts[:end]) in names for end in range(len(parts) + 1)):
        return path
    known = {name.rpartition(".")[2]: name for name in names}
    start = next(i for i, part in enumerate(parts) if part in known)
    return ".".join([known[parts[start]], *parts[start + 1 :]])


def directive(path: str) -> str:
    """Return the directive of Sphinx that shows what a public name stands for."""
    module, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "autodata"


def pages() -> dict[str, str]:
    """Return the text of each page of the reference, in reStructuredText, by file name."""
    entries: dict[str, list[str]] = {room: [] for room in _rooms()}
    for path, room in public_names().items():
        entries[room].append(path)
    return {"index.rst": _contents(entries), **{f"{r}.rst": _page(r, e) for r, e in entries.items()}}


def _rooms() -> list[str]:
    return [room for rooms in ROOMS.values() for room in rooms]


def _contents(entries: dict[str, list[str]]) -> str:
    lines = [_title("Reference"), ".. automodule:: pyro_vae\n   :no-members:\n"]
    for part, rooms in ROOMS.items():
        lines += [_title(part, "-"), ".. list-table::\n   :widths: 20 80\n"]
        for room in rooms:
            names = ", ".join(f":py:obj:`~{path}`" for path in entries[room])
            lines += [f"   * - :doc:`{room}`\n     - {names}"]
        lines += ["", ".. toctree::\n   :hidden:\n", *(f"   {room}" for room in rooms), ""]
    return "\n".join(lines)


def _page(room: str, paths: list[str]) -> str:
    lines = [_title(room), "" if room == ERRORS else f".. automodule:: pyro_vae.{room}\n   :no-members:\n"]
    for path in paths:
        lines += [_title(path.rpartition(".")[2], "-"), f".. {directive(path)}:: {path}"]
        lines += ["   :members:"] * (directive(path) == "autoclass") + [""]
    return "\n".join(lines)


def _title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n"
