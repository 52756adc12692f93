"""Where the site has what the tree has."""

from pathlib import Path

from kernel_index.index.entries import ENTRIES
from kernel_index.index.entry import ROOT

REPOSITORY = ROOT.parent
TOP = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""Files of the root that are pages; the README is none, since the site's first page says the same."""


def place(path: str) -> str | None:
    """The page of the site for a path of the tree, or None."""
    folders = {"docs/decisions": "decisions/index.md", "docs/guides": "index.md", "docs": "index.md"}
    if path in folders:
        return folders[path]
    if path in TOP:
        return path.lower()
    if path == "README.md":
        return "index.md"
    if path.startswith("benchmarks/results/"):
        return path.removeprefix("benchmarks/")
    if path.startswith("docs/site/"):
        return path.removeprefix("docs/site/")  # pages that are generated have no file there
    if path.startswith("docs/") and (REPOSITORY / path).exists():
        return path.removeprefix("docs/")
    folder = path.removeprefix("kernel_index/").removesuffix("/README.md").rstrip("/")
    found = [e for e in ENTRIES if folder in (e.folder, Path(e.folder).parent.as_posix())]
    return f"kernels/{found[0].name}.md" if found else None
