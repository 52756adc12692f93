"""The site's pages, as Markdown: those written by hand, one for each kernel, the reference, status and figures."""

import re
from pathlib import Path

from docs import kernels, measured, reference, states, status, text
from docs.config import Nav
from docs.place import REPOSITORY, TOP, place
from kernel_index.index.entries import ENTRIES, FAMILIES

BY_HAND = {"index.md": "Home", "install.md": "Install", "concepts.md": "Concepts", "glossary.md": "Glossary"}
BY_HAND |= {"environment.md": "Environment variables"}
PICTURE = re.compile(r"^!\[([^\]]*)\]\((\w+\.svg)\)$", re.MULTILINE)


def write(folder: Path) -> Nav:
    """Write every page below ``folder`` and return the navigation."""
    seen = states.read()
    for name in BY_HAND:
        _put(folder, name, _by_hand(name))
    for e in ENTRIES:
        _put(folder, kernels.page(e), kernels.write(e, seen))
    for name, content in reference.pages().items():
        _put(folder, name, content)
    _put(folder, "status.md", status.write(seen))
    _put(folder, "measured.md", text.relink(measured.write(), "docs/site/measured.md", "measured.md", place))
    _put(folder, "times.md", measured.tables())
    for path in sorted(states.RESULTS.glob("*.json")):
        _put(folder, f"results/{path.name}", path.read_text())
    _put(folder, "site.css", (REPOSITORY / "docs" / "site" / "site.css").read_text())
    guides, decisions = (_copy_all(folder, name) for name in ("guides", "decisions"))
    listed = "".join(f"- [{title}]({Path(str(page)).name})\n" for title, page in decisions)
    _put(folder, "decisions/index.md", f"# Decisions\n\nWhy things are as they are, one page each.\n\n{listed}")
    project: Nav = [
        (_copy(folder, name), str(place(name)))
        for name in ("docs/reliability.md", *TOP)
        if (REPOSITORY / name).exists()
    ]
    families: Nav = [(f, [(kernels.title(e), kernels.page(e)) for e in kernels.of_family(f)]) for f in FAMILIES]
    titles: Nav = [(title, f"reference/{name}.md") for name, (title, *_) in reference.PACKAGES.items()]
    return [
        ("Home", "index.md"),
        ("Install", "install.md"),
        ("Guides", [("Concepts", "concepts.md"), *guides, ("Environment variables", "environment.md")]),
        ("Kernels", families),
        ("API", [("All names", "reference/index.md"), ("Receipts, masks and caches", "reference/others.md"), *titles]),
        ("Evidence", [("Status", "status.md"), ("Measured", "measured.md"), ("All times", "times.md")]),
        (
            "Project",
            [("Glossary", "glossary.md"), *project, ("Decisions", [("All", "decisions/index.md"), *decisions])],
        ),
    ]


def _by_hand(name: str) -> str:
    """A page of ``docs/site``, its pictures put into it: there their colours follow the page's."""
    content = (REPOSITORY / "docs" / "site" / name).read_text()
    content = PICTURE.sub(lambda m: _inline(m[2]), content)
    return text.relink(content, f"docs/site/{name}", name, place)


def _inline(name: str) -> str:
    drawing = " ".join((REPOSITORY / "docs" / "site" / name).read_text().split())
    return f'<figure class="ki-picture" markdown="0">{drawing}</figure>'


def _copy_all(folder: Path, name: str) -> Nav:
    found = sorted((REPOSITORY / "docs" / name).glob("*.md"))
    return [(_copy(folder, f"docs/{name}/{path.name}"), f"{name}/{path.name}") for path in found]


def _put(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _copy(folder: Path, source: str) -> str:
    """Put a file of the tree on the site, its links rewritten; return its title."""
    content = (REPOSITORY / source).read_text()
    page = str(place(source))
    _put(folder, page, text.relink(content, source, page, place))
    title = re.search(r"^# (.+)$", content, re.MULTILINE)
    return title[1].replace("`", "") if title else Path(source).stem
