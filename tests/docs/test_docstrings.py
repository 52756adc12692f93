"""What the site changes in docstrings before griffe reads them."""

import pytest


def test_a_docstring_becomes_markdown_with_sections():
    pytest.importorskip("griffe")
    from docs.docstrings import plain

    source = """Sum.

With::

    y = x * 2

Args:
    a, b: numbers,
        of any kind.
    *rest: more.

Returns:
    A tensor.

>>> 1 + 1
2

>>> [1.0][0]
1.0
"""
    assert (
        plain(source)
        == """Sum.

With:

    y = x * 2

Args:
    a: numbers,
        of any kind.
    b: numbers,
        of any kind.
    \\*rest: more.

Returns:
    A tensor.

```pycon
>>> 1 + 1
2

>>> [1.0][0]
1.0
```"""
    )
