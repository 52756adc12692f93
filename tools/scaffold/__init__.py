"""``make new FAMILY=… NAME=…``: the folder of a kernel, complete and right, with a placeholder for its formula."""

import ast
import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from kernel_index.index.entries import ENTRIES, entry, find
from kernel_index.index.entry import ROOT

TEMPLATES = Path(__file__).parent
MISUSED = 2
LONGEST = 27
"""With more characters in a name, lines of the templates become too long."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def families() -> dict[str, str]:
    """Folder of a family below ``kernels`` -> its name in the index."""
    folders = (Path(e.folder).parts for e in ENTRIES)
    return {parts[1]: e.family for parts, e in zip(folders, ENTRIES, strict=True) if parts[0] == "kernels"}


def new(family: str, name: str, root: Path = ROOT) -> list[Path]:
    """Write ``root/kernels/family/name``, export its function, add it to the index; return the files it wrote.

    Everything is made in memory first, so nothing is changed by a call that raises.

    >>> import tools.scaffold, tempfile
    >>> tools.scaffold.new("tea", "fused_swish")
    Traceback (most recent call last):
    ValueError: FAMILY must be one of attention, boundary, experts, loss, mla, sparse, state_space, streams, got 'tea'

    Raises:
        ValueError: there is no such family, the name is no lower-case name or is taken, or ``root`` is no checkout.
    """
    if family not in families():
        raise ValueError(f"FAMILY must be one of {', '.join(sorted(families()))}, got {family!r}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or len(name) > LONGEST:
        raise ValueError(f"NAME must be a lower-case Python name of at most {LONGEST} characters, got {name!r}")
    folder = root / "kernels" / family / name
    front, index = root / "__init__.py", root / "index" / "entries.py"
    if folder.exists() or find(name) or name in _exported(front.read_text()):
        raise ValueError(f"NAME must be free, got {name!r}")
    if not (root.parent / "pyproject.toml").is_file():
        raise ValueError(f"new must be run from a checkout, got an installed package in {root}")
    written = {folder / path.stem: _render(path, family, name) for path in sorted(TEMPLATES.glob("*.py.j2"))}
    written[folder / "__init__.py"] = ""
    written[front] = _export(front.read_text(), f"kernel_index.kernels.{family}.{name}.api", name)
    written[index] = _add_entry(index.read_text(), family, name)
    readme = root / "kernels" / family / "README.md"
    if readme.exists():
        written[readme] = readme.read_text() + _render(TEMPLATES / "README.md.j2", family, name)
    folder.mkdir()
    for path, content in written.items():
        path.write_text(content)
    return list(written)


def _render(template: Path, family: str, name: str) -> str:
    from jinja2 import StrictUndefined, Template

    camel = "".join(part.capitalize() for part in name.split("_"))
    source = Template(template.read_text(), undefined=StrictUndefined, keep_trailing_newline=True)
    lines = source.render(family=family, name=name, camel=camel).splitlines(keepends=True)
    own = [i for i, line in enumerate(lines) if line.startswith("from kernel_index")]  # one block, sorted by module
    for i, line in zip(own, sorted((lines[i] for i in own), key=lambda line: line.split()[1]), strict=True):
        lines[i] = line
    return "".join(lines)


def _exported(source: str) -> list[str]:
    return ast.literal_eval(_assigned(source, "__all__"))


def _assigned(source: str, name: str) -> ast.expr:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise ValueError(f"source must assign {name}")


def _export(source: str, module: str, name: str) -> str:
    """The package's front with one more import and one more name, both in their order."""
    lines = source.splitlines(keepends=True)
    listed = _assigned(source, "__all__")
    after = [n for n in ast.literal_eval(listed) if n > name]
    at = source[: source.index("__all__ = [")].count("\n")  # the names follow it, one on each line
    place = next(i for i in range(at, len(lines)) if lines[i].strip() == (f'"{after[0]}",' if after else "]"))
    lines.insert(place, f'    "{name}",\n')
    imports = [n for n in ast.parse(source).body if isinstance(n, ast.ImportFrom)]
    later = [n.lineno - 1 for n in imports if n.module and n.module.startswith("kernel_index.") and n.module > module]
    place = later[0] if later else imports[-1].end_lineno or imports[-1].lineno
    lines.insert(place, f"from {module} import {name}\n")
    return "".join(lines)


def _add_entry(source: str, family: str, name: str) -> str:
    """The index with one more entry, at its end."""
    lines = source.splitlines(keepends=True)
    title, purpose = families()[family], "Say here in one sentence what it is for."
    arguments = (name, title, f"kernels/{family}/{name}", name, purpose, "")
    text = "".join(f'        "{argument}",\n' for argument in arguments)
    lines.insert((_assigned(source, "ENTRIES").end_lineno or 1) - 1, f"    {entry.__name__}(\n{text}    ),\n")
    return "".join(lines)


@app.command()
def new_command(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A family's folder, as `experts`.")],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The kernel's folder and its function, as `fused_swish`.")
    ],
) -> None:
    """Make a kernel's folder, complete and right, with a placeholder formula to replace."""
    try:
        written = new(family, name)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(MISUSED) from None
    for path in written:
        typer.echo(path.relative_to(ROOT.parent))
    typer.echo(f'Next: docs/guides/5-write-a-kernel.md; make test ARGS="tests/test_conformance.py -k {name}"')
