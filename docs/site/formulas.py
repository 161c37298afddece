"""Formulas as pictures within the page, drawn when the site is built, without scripts, fonts or a network."""

import re
from xml.etree import ElementTree

import ziamath
from docutils import nodes

SIZE = 17  # pixels, of the text around a formula

ziamath.config.svg2 = False  # else glyphs are shared by ids, which several formulas on a page would repeat
ziamath.config.precision = 2


def inline(translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(drawn(node.astext(), inline=True))
    raise nodes.SkipNode


def block(translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own, which scrolls where it is too wide."""
    translator.body.append(f'<div class="math">{drawn(node.astext(), inline=False)}</div>')
    raise nodes.SkipNode


def drawn(latex: str, inline: bool) -> str:
    """Return a formula as SVG: in the colour of the text, on its line, read aloud as LaTeX."""
    latex = re.sub(r"\\math(bb|cal|rm) (\w)", r"\\math\1{\2}", " ".join(latex.split()))
    if r"\\" in latex and r"\begin" not in latex:  # as Sphinx has it for MathJax
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    picture = ziamath.Latex(latex, size=SIZE, color="currentColor", inline=inline).svgxml()
    _, top, _, height = (float(number) for number in picture.attrib["viewBox"].split())
    picture.set("style", f"vertical-align: {-(top + height):.2f}px")
    picture.set("role", "img")
    picture.set("aria-label", latex)
    return ElementTree.tostring(picture, encoding="unicode")
