"""Build the documentation site from README, pages and docstrings; warnings and broken links are errors.

uv run --group docs docs/site/build.py

writes build/site/index.html, to be opened from the file system.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import links
import rooms
from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
SOURCE, SITE = BUILD / "site-source", BUILD / "site"
PAGES = {  # the side bar
    "Start": """
        docs/start
        docs/data
        docs/choosing
        docs/judging
        docs/troubleshooting
    """,
    "Go on": """
        docs/own-guide
        docs/own-model
        docs/estimators
        docs/migration
        docs/gallery
    """,
    "Use": """
        docs/tables
        docs/anomalies
        docs/missing
        docs/compression
        docs/scikit-learn
        docs/scale
        docs/export
        docs/command-line
    """,
    "Understand": """
        docs/derivation
        docs/architecture
        docs/codec-format
    """,
    "Reference": """
        reference/index
    """,
    "Project": """
        CONTRIBUTING
        CHANGELOG
        benchmarks/README
        benchmarks/published/README
        benchmarks/results/peers
        benchmarks/results/growth
        benchmarks/results/startup
    """,
}
LINK = re.compile(r"\]\((?P<path>[^)#:]+)(?P<anchor>#[^)]*)?\)")


def stage() -> None:
    """Collect in build/site-source what Sphinx reads: pages, placed as in the repository, and reference."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    names = ["README", *(name for part in PAGES.values() for name in part.split())]
    for page in (ROOT / f"{name}.md" for name in names if not name.startswith("reference")):
        _write(page.relative_to(ROOT), _with_links_of_the_site(page))
    shutil.copytree(ROOT / "docs" / "gallery", SOURCE / "docs" / "gallery")
    for name, text in rooms.pages().items():
        _write(Path("reference") / name, text)
    contents = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *pages.split(), "```", ""])
        for part, pages in PAGES.items()
    ]
    _write(Path("index.md"), "\n".join([(SOURCE / "README.md").read_text(), *contents]))
    (SOURCE / "README.md").unlink()


def _write(path: Path, text: str) -> None:
    place = SOURCE / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def _with_links_of_the_site(page: Path) -> str:
    """Return a page whose links lead to README as the index, and to code as a page that shows it."""

    def linked(link: re.Match) -> str:
        path = link["path"]
        target = (page.parent / path).resolve()
        if target == ROOT / "README.md":
            path = path.replace("README.md", "index.md")
        elif target.suffix == ".py" and target.exists():
            path = f"{path}.rst"
            _show(target)
        return f"]({path}{link['anchor'] or ''})"

    return LINK.sub(linked, page.read_text())


def _show(code: Path) -> None:
    """Write a page that shows a file of code."""
    name = code.relative_to(ROOT)
    title = f"{name}\n{'=' * len(str(name))}"
    path = os.path.relpath(code, (SOURCE / name).parent)
    _write(Path(f"{name}.rst"), f":orphan:\n\n{title}\n\n.. literalinclude:: {path}\n   :language: python\n")


def main() -> int:
    """Build the site and return 0, or print what is wrong and return another number."""
    stage()
    shutil.rmtree(SITE, ignore_errors=True)
    folders = ["-c", str(Path(__file__).parent), "-d", str(BUILD / "doctrees"), str(SOURCE), str(SITE)]
    if status := build_main(["--fail-on-warning", "--quiet", "--fresh-env", *folders]):
        return status
    problems = links.problems(SITE)
    print("\n".join(problems) or SITE / "index.html")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
