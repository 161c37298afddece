"""Progress bars are drawn in terminals and notebooks only."""

import io
import sys

import pytest

from pyro_vae.utils.display import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "notebook", "shown", "drawn"),
    [
        (Terminal, False, True, True),
        (io.StringIO, False, True, False),
        (io.StringIO, True, True, True),  # a notebook's streams are not terminals
        (Terminal, False, False, False),
        (io.StringIO, True, False, False),
    ],
)
def test_a_bar_is_drawn_only_in_a_terminal_or_a_notebook(monkeypatch, stream, notebook, shown, drawn):
    monkeypatch.setattr("sys.stderr", stream())
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", io)
    with progress_bar(7, shown=shown, unit=" data", desc="reading") as bar:
        bar.update(3)
        bar.refresh()
    assert ("reading" in sys.stderr.getvalue()) == drawn
    assert ("3/7" in sys.stderr.getvalue()) == drawn
