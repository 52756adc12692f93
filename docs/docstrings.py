"""What griffe changes in docstrings for the site: conventions of ours that Markdown and griffe do not know."""

import re

import griffe

TOGETHER = re.compile(r"^(    )(\w+(?:, \w+)+): ((?:.*\n?)(?:     +.*\n?)*)", re.MULTILINE)
"""Several arguments with one explanation, and its further lines."""


class PlainText(griffe.Extension):
    """Applies ``plain`` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """Markdown with Google's sections.

    A paragraph that begins with ``>>>`` becomes a block of code, and a double colon a single one.  Arguments that are
    explained together become arguments with the same explanation.
    """
    text = TOGETHER.sub(_apart, text)
    text = re.sub(r"(^ +)(\*{1,2})(?=\w+:)", lambda m: m[1] + "\\*" * len(m[2]), text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    blocks = (_fenced(block) for block in re.split(r"\n\s*\n", text.strip("\n")))
    return re.sub(r"\n```\n\n```pycon\n", "\n\n", "\n\n".join(blocks))


def _apart(match: re.Match[str]) -> str:
    said = match[3].rstrip("\n")
    return "\n".join(f"{match[1]}{name}: {said}" for name in match[2].split(", ")) + "\n" * match[3].endswith("\n")


def _fenced(block: str) -> str:
    if block.startswith(">>>"):
        return f"```pycon\n{block}\n```"
    return block
