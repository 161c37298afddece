"""Runs the code blocks of the documentation: those of one page in order, with common names."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core, so each computes on one thread, set before torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # else each process compiles torch anew, for seconds
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parent / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

collect_ignore = ["docs/site"]  # needs the group "docs"
# a block that begins with >>> is a doctest, such as an error with its message, broken into lines
parser = PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)
pytest_collect_file = Sybil(parsers=[parser], patterns=["*.md"]).pytest()
