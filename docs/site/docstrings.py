"""Docstrings as reStructuredText: single backticks are code, indented paragraphs are blocks of code."""

import re
from textwrap import indent

SOURCES = re.compile(r"^Sources?:(.*(?:\n.+)*)", re.MULTILINE)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
SPAN = re.compile(r"(?P<role>:math:)?(?P<ticks>`+)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)", re.DOTALL)
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Source|Example|Examples|Note|Notes):$")


def to_rst(lines: list[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText, but for the names of Google's sections."""
    result: list[str] = []
    lines = SOURCES.sub(_sources, "\n".join(lines)).split("\n")
    for is_verbatim, block in _blocks(_with_code_marked(lines)):
        result += block if is_verbatim else _prose("\n".join(block)).split("\n")
    return result


def _sources(section: re.Match) -> str:
    """Return the section "Source" with a paragraph for each source, whose lines stand below each other."""
    lines = "\n".join(line.strip() for line in section[1].strip().split("\n"))
    apart = re.sub(r"(?<=[^l]\.)\n(?=[A-Z]\. )", "\n\n", lines)  # after a full stop, but for that of "et al."
    return "Source:\n" + indent(apart, "    ")


def _with_code_marked(lines: list[str]) -> list[str]:
    """Put "::" before indented paragraphs of the introduction, which Markdown's readers see as code."""
    result: list[str] = []
    section = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
    for i, line in enumerate(lines):
        starts = 1 < i < section and line.startswith("    ") and not lines[i - 1].strip()
        before = next((other for other in reversed(lines[:i]) if other.strip()), "")
        if starts and not before.startswith((" ", "-", "..")):
            result += ["::", ""]
        result.append(line)
    return result


def _blocks(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """Divide lines into prose and what is shown or set as it stands: doctests, formulas, blocks of code."""
    blocks: list[tuple[bool, list[str]]] = []
    opened: int | None = None  # the indentation of the line that opened a verbatim block
    in_doctest = False
    for line in lines:
        depth = len(line) - len(line.lstrip())
        text = line.strip()
        in_doctest = text.startswith(">>>") or (in_doctest and bool(text))
        if opened is not None and text and depth <= opened:
            opened = None
        opens = opened is None and (text.startswith("..") or text == "::") and not text.startswith("...")
        if opens:
            opened = depth
        verbatim = in_doctest or opened is not None
        if blocks and blocks[-1][0] == verbatim:
            blocks[-1][1].append(line)
        else:
            blocks.append((verbatim, [line]))
    return blocks


def _prose(text: str) -> str:
    """Double single backticks and take their meaning from `*`, `|` and trailing underscores outside code."""
    parts, position = [], 0
    for span in SPAN.finditer(text):
        parts.append(_plain(text[position : span.start()]))
        before, after = text[span.start() - 1 : span.start()], text[span.end() : span.end() + 1]
        space_before = r"\ " if before and not re.match(r"[\s'\"(\[{<\-/:]", before) else ""
        space_after = r"\ " if after and not re.match(r"[\s'\")\]}>\-/:.,;!?]", after) else ""
        code = span[0] if span["role"] else f"``{span['code']}``"
        parts.append(f"{space_before}{code}{space_after}")
        position = span.end()
    return "".join([*parts, _plain(text[position:])])


def _plain(text: str) -> str:
    text = re.sub(r"(?m)(^\s*|: )(?=[A-Za-z]\.(\s|$))", r"\1" + r"\\", text)  # "S." starts no list
    text = re.sub(r"[*|]|(?<=\w)_(?!\w)", lambda sign: "\\" + sign[0], text)
    return ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)
