"""Links of a built site that lead nowhere: a file that is not there, or an anchor that its page does not have."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ATTRIBUTES = {"a": "href", "link": "href", "script": "src", "img": "src", "source": "src"}


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.places |= {v for name in ("id", "name") if (v := values.get(name))}
        target = values.get(ATTRIBUTES.get(tag, ""))
        if target and values.get("rel") != "canonical":
            self.links.append(target)


def broken(site: Path) -> list[str]:
    """``page: link`` for every link inside the site that leads nowhere; other hosts are not asked."""
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site).as_posix()}: {link}"
        for path, page in pages.items()
        for link in dict.fromkeys(page.links)
        if not _leads_somewhere(link, path, pages, site)
    ]


def _leads_somewhere(link: str, path: Path, pages: dict[Path, _Page], site: Path) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    base = site if parts.path.startswith("/") else path.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    place = unquote(parts.fragment)
    return target not in pages or place in ("", "__top", "__skip") or place in pages[target].places
