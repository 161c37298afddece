"""Runs the code blocks of the documentation: those of one page in order, with common names."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core, so each computes on one thread, set before torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()
