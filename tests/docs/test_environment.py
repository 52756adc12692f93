"""The page of environment variables has every variable that the package reads, and no other."""

import ast
import re

from docs import place

PAGE = (place.REPOSITORY / "docs" / "site" / "environment.md").read_text()
SHAPE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|CXX|RANK")
NOT_READ = {"JAX_PLATFORMS", "LIBTPU_INIT_ARGS"}
"""What a proof sets for a process of its own."""


def environment_names(tree: ast.AST) -> set[str]:
    """The string beside ``os.environ``: an index, the first argument of a method, or the left side of ``in``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_environment(node.value):
            found.append(node.slice)
        elif isinstance(node, ast.Call) and re.match(r"(os\.)?(environ\.\w+|getenv)$", ast.unparse(node.func)):
            found += node.args[:1]
        elif isinstance(node, ast.Compare) and any(map(_is_environment, node.comparators)):
            found.append(node.left)
    return {n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _is_environment(node: ast.AST) -> bool:
    return ast.unparse(node) in ("os.environ", "environ")


def read_by_the_package() -> set[str]:
    names = set()
    for path in (place.REPOSITORY / "kernel_index").rglob("*.py"):
        source = path.read_text()
        names |= environment_names(ast.parse(source))
        names |= set(re.findall(r"\bKERNEL_INDEX_[A-Z]+", source))  # read by a prefix
    return names - NOT_READ


def test_the_finder_finds_each_way_of_reading():
    source = (
        'import os\nos.environ["AB_C"]\nos.environ.get("D_E", "F_G")\n"H_I" in os.environ\nos.getenv("J_K")\nx["L_M"]'
    )
    assert environment_names(ast.parse(source)) == {"AB_C", "D_E", "H_I", "J_K"}


def test_every_variable_that_is_read_has_a_row():
    named = set(re.findall(r"`(KERNEL_INDEX_[A-Z]+|[A-Z][A-Z0-9_]+)", PAGE))
    assert read_by_the_package() - named == set()


def test_every_row_is_of_a_variable_that_is_read():
    cells = re.findall(r"^\| (`[^|]+) \|", PAGE, re.MULTILINE)
    rows = {name for cell in cells for name in re.findall(r"`([A-Z0-9_]+)`", cell)}
    assert "KERNEL_INDEX_STRICT" in rows
    assert rows - read_by_the_package() == set()
