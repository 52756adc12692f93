"""Zensical's configuration, with nothing that a browser would load from another host."""

import json
from typing import Any

from docs import SOURCE
from docs.place import REPOSITORY

Nav = list[tuple[str, "str | Nav"]]

PALETTE = (
    {"media": "(prefers-color-scheme: light)", "scheme": "default", "toggle": ("lucide/sun", "Switch to dark mode")},
    {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "toggle": ("lucide/moon", "Switch to light mode")},
)
FEATURES = ("navigation.indexes", "navigation.tabs", "navigation.top", "navigation.footer", "toc.follow")
FEATURES += ("search.highlight", "content.code.copy")

OPTIONS: dict[str, Any] = {
    "docstring_style": "google",
    "docstring_section_style": "list",
    "extensions": ["docs.docstrings:PlainText"],
    "filters": ["!^_"],
    "heading_level": 2,
    "line_length": 84,
    "members_order": "source",
    "separate_signature": True,
    "show_bases": False,
    "show_if_no_docstring": False,
    "show_root_full_path": False,
    "show_root_heading": True,
    "show_signature_annotations": True,
    "show_source": True,
}
"""How mkdocstrings shows a function or class."""


def write(nav: Nav) -> str:
    """The file's text."""
    lines = [
        "[project]",
        'site_name = "Kernel Index"',
        'site_description = "Fast kernels for language models that say what ran: one contract, several backends"',
        'docs_dir = "pages"\nsite_dir = "site"\nuse_directory_urls = false',
        f'extra_css = ["site.css"]\nnav = {_toml(nav)}',
        f"[project.theme]\nfont = false\nfeatures = {json.dumps(FEATURES)}",
    ]
    for entry in PALETTE:
        lines += ["[[project.theme.palette]]", *(f'{k} = "{entry[k]}"' for k in ("media", "scheme"))]
        lines += [f'toggle.icon = "{entry["toggle"][0]}"', f'toggle.name = "{entry["toggle"][1]}"']
    templates = json.dumps(str(REPOSITORY / "docs" / "templates"))
    lines += [
        f"[project.plugins.mkdocstrings]\ncustom_templates = {templates}",
        f"[project.plugins.mkdocstrings.handlers.python]\npaths = {json.dumps([str(REPOSITORY)])}",
        "[project.plugins.mkdocstrings.handlers.python.options]",
        *(f"{name} = {json.dumps(value)}" for name, value in OPTIONS.items()),
        f'extra.source = "{SOURCE}/blob/main"',
    ]
    return "\n".join(lines) + "\n"


def _toml(nav: Nav) -> str:
    items = (f"{{{json.dumps(t)} = {json.dumps(v) if isinstance(v, str) else _toml(v)}}}" for t, v in nav)
    return f"[{', '.join(items)}]"
