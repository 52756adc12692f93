"""Prose as Markdown, READMEs by section, and links that hold on the site as they do in the tree."""

import os
import posixpath
import re
from collections.abc import Callable, Iterable

SHARES = re.compile(r"(``?.+?``?)", re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """Double backticks to single ones; outside of them no sign is markup."""
    parts = SHARES.split(re.sub(r"::$", ":", text))
    return "".join(
        f"`{part.strip('`')}`" if part.startswith("`") else re.sub(r"([*<|\[\]])", r"\\\1", part) for part in parts
    )


def sections(text: str) -> tuple[str, dict[str, str]]:
    """The text before the first heading of level two, without the title; then each such section."""
    head, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    found = {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in rest}
    return head.partition("\n")[2].strip(), found


def deeper(text: str, by: int = 1) -> str:
    """The same with its headings a level down, code blocks left alone."""
    fenced, lines = False, []
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        lines.append("#" * by + line if re.match(r"#+ ", line) and not fenced else line)
    return "\n".join(lines)


def relink(text: str, source: str, page: str, where: Callable[[str], str | None]) -> str:
    """Rewrite relative links of a file of the tree for a page of the site.

    ``where`` maps a path of the tree to one of the site; a link to a path that has none becomes its text.
    """

    def replace(match: re.Match[str]) -> str:
        path, _, place = match[2].partition("#")
        if ":" in match[2] or not path:
            return match[0]
        target = where(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if target is None:
            return match[1]
        relative = os.path.relpath(target, posixpath.dirname(page) or ".")
        return f"[{match[1]}]({relative}{'#' + place if place else ''})"

    return LINK.sub(replace, text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
