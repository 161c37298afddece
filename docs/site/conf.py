"""How Sphinx reads the pages and docstrings, and how the site looks; build.py calls it."""

import re

import docstrings
import formulas
import rooms
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.ext.napoleon import Config, GoogleDocstring

project = "pyro_vae"
root_doc = "index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
highlight_language = "text"  # of blocks without a language

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 120
toc_object_entries = False
sections = Config(napoleon_custom_sections=["Source"], napoleon_use_ivar=True, napoleon_use_rtype=False)

html_theme = "furo"
html_title = "pyro_vae"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "pictures"


def read_docstring(*event) -> None:
    """Replace the lines of a docstring by reStructuredText."""
    lines = event[-1]
    lines[:] = GoogleDocstring(docstrings.to_rst(lines), sections).lines()


def link_names(app, doctree) -> None:
    """Link code such as `pv.fit(...)`, `VAE.model` or `guides` to that entry of the reference."""
    for code in list(doctree.findall(nodes.literal)):
        target = rooms.reference_of(code.astext(), app.env.docname)
        if target and not isinstance(code.parent, nodes.title | nodes.reference | pending_xref):
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=target, refdoc=app.env.docname)
            code.replace_self(link)
            link += code


def mend_backlinks(app, page: str, template: str, context: dict, doctree) -> None:
    """Lead from shown source to the entry of each name; viewcode assumes one path for all names of a file."""
    if page.startswith("_modules/"):
        context["body"] = re.sub(
            r"(?<=\.html#)pyro_vae[\w.]*", lambda path: rooms.public_path(path[0]), context["body"]
        )


def setup(app) -> None:
    """Connect what Sphinx lacks: docstrings with single backticks, linked names, formulas as pictures."""
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("doctree-read", link_names)
    app.connect("html-page-context", mend_backlinks)
    app.add_html_math_renderer("pictures", (formulas.inline, None), (formulas.block, None))
