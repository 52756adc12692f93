"""Formulas of the built pages as MathML, which browsers show without a script or another host."""

import html
import re
from pathlib import Path

FORMULA = re.compile(r'class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*<', re.DOTALL)
"""What Markdown makes of ``$…$`` and ``$$…$$``: TeX in its own brackets, inside an element of this class."""


def render(site: Path) -> int:
    """Replace the TeX of every page; returns how many formulas there were.

    Raises:
        ValueError: a formula has a command that the converter does not know.
    """
    count = 0
    for page in sorted(site.rglob("*.html")):
        text, found = FORMULA.subn(_mathml, page.read_text())
        if found:
            page.write_text(text)
            count += found
    return count


LETTERS = re.compile(r'(?:<mi mathvariant="(italic|normal)">[^<]+</mi>){2,}')


def _word(match: re.Match[str]) -> str:
    """The letters of a name as one word: letters of their own stand apart."""
    word = re.sub(r"<[^>]+>", "", match[0])
    return f"<mtext>{word}</mtext>" if match[1] == "normal" else f'<mtext style="font-style: italic">{word}</mtext>'


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    tex = html.unescape(match[2]).strip()
    made = convert(tex, display="inline" if match[1] == "(" else "block")
    if "\\" in made or "<mi>&</mi>" in made:
        raise ValueError(f"a formula must be TeX that latex2mathml converts, got {tex}")
    return f'class="arithmatex">{LETTERS.sub(_word, made)}<'
