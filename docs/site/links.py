"""What is wrong with a rendered site: links that lead nowhere, and parts that need a network."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.remote: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what a tag links or names."""
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                is_remote = bool(urlsplit(value).scheme or urlsplit(value).netloc)
                if not is_remote:
                    self.links.append(value)
                elif tag != "a":
                    self.remote.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def problems(site: Path) -> list[str]:
    """Return a line for each link within the site that leads nowhere, and for each remote part."""
    pages = {path.resolve(): _Page(path.read_text()) for path in site.rglob("*.html")}
    lines = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        lines += [f"{name}: {part} is loaded from the network" for part in page.remote]
        for link in page.links:
            url = urlsplit(link)
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchor = unquote(url.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                lines.append(f"{name}: {link} leads nowhere")
    return lines
