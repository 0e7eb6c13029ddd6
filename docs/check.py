"""Does every internal link of the built site resolve, file and anchor? `python docs/check.py [FOLDER]`."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ATTRIBUTES = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src"}


class Page(HTMLParser):
    """What a page links to and which anchors it has."""

    def __init__(self):
        super().__init__()
        self.links = []
        self.anchors = set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.update(filter(None, (values.get("id"), values.get("name") if tag == "a" else None)))
        link = values.get(ATTRIBUTES.get(tag, ""))
        if link:
            self.links.append(link)


def read(path):
    """Parse one page."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8", errors="replace"))
    return page


def target_of(path, link, folder):
    """The file that a link leads to; None for a link that leaves the site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    if not parts.path:
        return path
    base = folder if parts.path.startswith("/") else path.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve()
    return target / "index.html" if target.is_dir() else target


def broken_links(folder):
    """Lines about each internal link without a file or without its anchor."""
    folder = Path(folder).resolve()
    # the theme leaves templates among its static files
    paths = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.relative_to(folder).parts]
    pages = {path: read(path) for path in paths}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target = target_of(path, link, folder)
            if target is None:
                continue
            anchor = unquote(urlsplit(link).fragment)
            if not target.exists():
                broken.append(f"{path.relative_to(folder)}: {link} leads to no file")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                broken.append(f"{path.relative_to(folder)}: {link} leads to no place on its page")
    return broken


if __name__ == "__main__":
    found = broken_links(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "_docs" / "html")
    print("\n".join(found) or "every internal link resolves")
    sys.exit(bool(found))
