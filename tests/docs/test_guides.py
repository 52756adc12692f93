"""Every Python block of a guide runs, in order, in one namespace for each guide."""

import re
from pathlib import Path

import pytest

import docs

FOLDER = Path(docs.__file__).parent
GUIDES = [
    *sorted((FOLDER / "guides").glob("*.md")),
    *(FOLDER / "site" / f"{name}.md" for name in ("concepts", "install")),
]


def test_there_are_guides():
    assert len(GUIDES) >= 8


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_code_of_a_guide_runs(guide):
    text = guide.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks, "a guide shows code"
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        lines = "\n" * text[: block.start(1)].count("\n")  # so that a traceback names the guide's own line
        exec(compile(lines + block[1], str(guide), "exec"), namespace)
