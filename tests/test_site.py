"""The documentation site: an entry for every public name, docstrings as meant, links that lead somewhere."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

import pyro_vae

SITE = Path(pyro_vae.__file__).parents[1] / "docs" / "site"


@pytest.fixture
def site(monkeypatch):
    monkeypatch.syspath_prepend(str(SITE))
    yield import_module
    for name in ("rooms", "docstrings", "links"):
        sys.modules.pop(name, None)


def test_the_reference_has_every_public_name(site):
    rooms = site("rooms")
    text = "\n".join(rooms.pages().values())
    for name in pyro_vae.__all__:
        assert f":: pyro_vae.{name}\n" in text, name
    for room in (pyro_vae.likelihoods, pyro_vae.data, pyro_vae.plots, pyro_vae.applications):
        for name in room.__all__:
            assert f":: {room.__name__}.{name}\n" in text, name


def test_every_page_is_in_the_side_bar():
    listed = (SITE / "build.py").read_text().split()
    assert not [page.stem for page in SITE.parent.glob("*.md") if f"docs/{page.stem}" not in listed]


def test_code_leads_to_the_entry_that_it_names(site):
    rooms = site("rooms")
    for code, page, entry in [
        ("pv.fit(vae, x)", "docs/anomalies", "pyro_vae.fit"),
        ("fit", "docs/scale", "pyro_vae.fit"),
        ("fit", "docs/anomalies", None),
        ("VAE.model", "reference/vae", "pyro_vae.VAE.model"),
        ("guides", "index", "pyro_vae.guides"),
        ("StudentT", "docs/choosing", "pyro_vae.likelihoods.StudentT"),
        ("Normal", "docs/choosing", None),  # of likelihoods, or of corruptions
        ("SVI(model, guide)", "docs/migration", None),
        ("log_evidence", "reference/evaluation", None),
        ("data", "reference/training", None),
        ("fit it", "docs/scale", None),
    ]:
        assert rooms.reference_of(code, page) == entry, code
    assert rooms.public_path("pyro_vae.Estimator.loss") == "pyro_vae.objectives.Estimator.loss"
    assert rooms.public_path("pyro_vae.VAE.model") == "pyro_vae.VAE.model"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return `x`s of (*, K), |v| < 1.", r"Return ``x``\ s of (\*, K), \|v\| < 1."),
        ("Sum.\n\n    z ~ p(z)\n\nEnd.", "Sum.\n\n::\n\n    z ~ p(z)\n\nEnd."),
        ("Sum.\n\n.. math:: p(x|z)\n\nof |x|", "Sum.\n\n.. math:: p(x|z)\n\nof \\|x\\|"),
        ("Args:\n    num: S.\n    *x: `y`", "Args:\n    num: \\S.\n    \\*x: ``y``"),
        ("Source: A. B (2000),\n    C.", "Source:\n    \\A. B (2000),\n    \\C."),
        (
            "Source:\n    A. B et al.\n    (2000), C, arXiv:1312.6114.\n    D. E (2001).",
            "Source:\n    \\A. B et al.\n    (2000), C, `arXiv:1312.6114 <https://arxiv.org/abs/1312.6114>`__.\n\n"
            "    \\D. E (2001).",
        ),
        ("With :math:`x_{*}` and `y`", "With :math:`x_{*}` and ``y``"),
        (">>> f(*x) | `y`\n3 | 4", ">>> f(*x) | `y`\n3 | 4"),
    ],
)
def test_docstrings_are_read_as_they_are_meant(site, docstring, expected):
    assert "\n".join(site("docstrings").to_rst(docstring.split("\n"))) == expected


def test_links_that_lead_nowhere_and_remote_parts_are_found(site, tmp_path):
    links = '<a href="b.html#here">x</a> <a href="b.html#there">x</a> <a href="#no">x</a>'
    (tmp_path / "a.html").write_text(links + '<script src="https://a.b/c.js"></script>')
    (tmp_path / "b.html").write_text('<p id="here"><img src="c.png"><a href="https://pyro.ai">x</a></p>')
    assert {line.split()[1] for line in site("links").problems(tmp_path)} == {
        "b.html#there",
        "#no",
        "c.png",
        "https://a.b/c.js",
    }
