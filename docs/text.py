"""Docstrings as Markdown, READMEs by section, and links that hold on the site as they do in the tree."""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator

SECTIONS = ("Args", "Returns", "Raises", "Yields")
SHARES = re.compile(r"(``?.+?``?)", re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def of_docstring(text: str) -> str:
    """Markdown of a docstring: sections become bold, arguments a list, examples fenced blocks."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines += [*_block(block.split("\n")), ""]
    joined = "\n".join(lines)
    return re.sub(r"\n```\n\n```pycon\n", "\n\n", joined).rstrip() + "\n"


def _block(block: list[str]) -> Iterator[str]:
    if block[0].lstrip().startswith(">>>"):
        yield from ("```pycon", *(line.removeprefix(_indent(block[0])) for line in block), "```")
    elif block[0].rstrip(":") in SECTIONS and block[0].endswith(":"):
        yield from (f"**{block[0].rstrip(':')}**", "", *_items(block[1:]))
    elif block[0].startswith("    "):  # what follows a double colon
        yield from ("```text", *(line[4:] for line in block), "```")
    else:
        yield from prose("\n".join(block)).split("\n")


def _items(lines: list[str]) -> Iterator[str]:
    """``name: text`` with its continuation lines; text without a name is a paragraph."""
    for line in lines:
        body = line.strip()
        name = re.match(r"(\*{0,2}\w[\w., *]*): (.*)", body) if _indent(line) == "    " else None
        if name:
            yield f"- `{name[1]}`: {prose(name[2])}"
        else:
            yield f"  {prose(body)}"


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


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
