"""The site's pages, as Markdown: the index in front, one page for each kernel, the guides, what was measured."""

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import kernel_index
from benchmarks.figures import saved, show
from docs import states, text
from kernel_index.index.entries import ENTRIES, FAMILIES
from kernel_index.index.entry import ROOT, Entry

REPOSITORY = ROOT.parent

LIBRARIES = ("masks", "kvcache", "routing")
"""Folders below ``kernels``, whose READMEs may hold sections of any entry."""

Nav = list[tuple[str, "str | Nav"]]


def write(folder: Path) -> Nav:
    """Write every page below ``folder`` and return the navigation."""
    seen = states.read()
    _put(folder, "index.md", front(seen))
    for e in ENTRIES:
        _put(folder, _page(e), kernel(e, seen))
    families: Nav = [(f, [(e.name, _page(e)) for e in ENTRIES if e.family == f]) for f in FAMILIES]
    _put(folder, "others.md", others())
    _put(folder, "measured.md", measured())
    for path in sorted(states.RESULTS.glob("*.json")):
        _put(folder, f"results/{path.name}", path.read_text())
    _put(folder, "site.css", (REPOSITORY / "docs" / "site.css").read_text())
    guides, decisions = (_copy_all(folder, name) for name in ("guides", "decisions"))
    listed = "".join(f"- [{title}]({Path(str(page)).name})\n" for title, page in decisions)
    _put(folder, "decisions/index.md", f"# Decisions\n\nWhy things are as they are, one page each.\n\n{listed}")
    about: Nav = [("Receipts, masks and caches", "others.md"), ("Measured", "measured.md")]
    for name in ("docs/reliability.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        if (REPOSITORY / name).exists():
            about.append((_copy(folder, name), str(place(name))))
    decisions = [("All decisions", "decisions/index.md"), *decisions]
    return [("Index", "index.md"), ("Guides", guides), *families, ("More", about), ("Decisions", decisions)]


def _copy_all(folder: Path, name: str) -> Nav:
    found = sorted((REPOSITORY / "docs" / name).glob("*.md"))
    return [(_copy(folder, f"docs/{name}/{path.name}"), f"{name}/{path.name}") for path in found]


def place(path: str) -> str | None:
    """Where the site has a path of the tree, or None."""
    folders = {"docs/decisions": "decisions/index.md", "docs/guides": "index.md", "docs": "index.md"}
    if path in folders:
        return folders[path]
    if path in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        return path.lower()
    if path.startswith("benchmarks/results/"):
        return path.removeprefix("benchmarks/")
    if path.startswith("docs/") and (REPOSITORY / path).exists():
        return path.removeprefix("docs/")
    folder = path.removeprefix("kernel_index/").removesuffix("/README.md").rstrip("/")
    found = [e for e in ENTRIES if folder in (e.folder, Path(e.folder).parent.as_posix())]
    return _page(found[0]) if found else None


def _page(e: Entry) -> str:
    return f"kernels/{e.name}.md"


def _put(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _copy(folder: Path, source: str) -> str:
    """Put a file of the tree on the site, its links rewritten; return its title."""
    content = (REPOSITORY / source).read_text()
    page = str(place(source))
    _put(folder, page, text.relink(content, source, page, place))
    title = re.search(r"^# (.+)$", content, re.MULTILINE)
    return title[1].replace("`", "") if title else Path(source).stem


# The front page


def front(seen: list[states.State]) -> str:
    seed = [e for e in ENTRIES if e.seed]
    done = [e for e in seed if e.implemented]
    parts = [
        "---\nhide:\n  - toc\n---\n\n# Kernel Index\n",
        "The kernels that people who train and serve language models reach for, each with one contract, several "
        "backends, a correct gradient, and a receipt of what really ran.\n",
        f"{len(done)} of {len(seed)} entries are implemented. A cell says what a recorded proof or benchmark saw: "
        "*run* on the hardware that the backend is for, *interpreted* on a CPU, *compiled* ahead of time to machine "
        "code without the hardware. *No record*: no result of this backend is kept. –: the function does not have this "
        "backend. Each kernel's page names machines, versions, counts and what was noted of failures; "
        "[Measured](measured.md) has the times.\n",
    ]
    for family in FAMILIES:
        parts += [f"## {family}\n", _family([e for e in ENTRIES if e.family == family], seen)]
    return "\n".join(parts)


def _family(kernels: list[Entry], seen: list[states.State]) -> str:
    found = [(e, op, names) for e in kernels for op, names in operations(e, seen).items()]
    columns = list(dict.fromkeys(name for *_, names in found for name in names if name != "reference"))
    columns += ["reference"] * any("reference" in names for *_, names in found)
    rows = [[_link(e), op, *(_cell(op, c, names, seen) for c in columns)] for e, op, names in found if names]
    plain = [f"{_link(e)}: `{op}`" for e, op, names in found if not names]
    shown = [text.table(["entry", "function", *columns], rows)] * bool(rows)
    shown += [f"Plain functions, which have no backends: {'; '.join(plain)}.\n"] * bool(plain)
    return "\n".join(shown)


def _link(e: Entry) -> str:
    return f"[{e.name}](kernels/{e.name}.md){'' if e.implemented else ' (not implemented)'}"


def operations(e: Entry, seen: Iterable[states.State]) -> dict[str, list[str]]:
    """The entry's functions, and the backends of each: none for metadata and plain functions."""
    tables = {name: [b.name for b in table] for names, table in e.tables().items() for name in names}
    return {
        op: list(dict.fromkeys([*tables.get(op, ()), *(s.backend for s in seen if s.op == op)])) for op in e.functions
    }


def _cell(op: str, backend: str, names: list[str], seen: Iterable[states.State]) -> str:
    if backend not in names:
        return "–"
    return states.summary(s for s in seen if (s.op, s.backend) == (op, backend)) or "no record"


# One page for each kernel


def kernel(e: Entry, seen: list[states.State]) -> str:
    parts = [f"# {e.name}\n", f"{e.purpose}\n", f"{e.family} · `kernel_index/{e.folder}`\n"]
    if not e.implemented:
        parts.append(f"Not implemented yet: {', '.join(f'`{name}`' for name in e.missing())}.\n")
    signatures = e.signatures()
    for name, contract in e.docstrings().items():
        parts += [f"## {name}\n", f"```python\n{_wrapped(signatures[name])}\n```\n", text.of_docstring(contract)]
    parts += [_evidence(e, seen), _rules(e), _family_readme(e)]
    users = [f"- `kernel_index.{name}`{'' if present else ' (not yet)'}" for name, present in e.users().items()]
    parts += ["## Where it is used\n", "\n".join(users) + "\n"]
    return "\n".join(part for part in parts if part)


def _wrapped(signature: str) -> str:
    return textwrap.fill(
        f"ki.{signature}", 84, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False
    )


def _evidence(e: Entry, seen: list[states.State]) -> str:
    rows = [
        [
            f"`{s.op}`",
            s.backend,
            str(s),
            s.where,
            str(s.passed),
            str(s.failed),
            s.versions,
            f"[{s.source}]({_result(s)})",
        ]
        for s in seen
        if s.op in e.functions
    ]
    if not rows:
        return "## What was seen\n\nNo proof or benchmark of it is recorded.\n"
    head = ["function", "backend", "state", "where", "passed", "failed", "versions and date", "record"]
    said = [f"- {text.prose(note)}\n" for note in states.notes(e.functions)]
    return "\n".join(["## What was seen\n", text.table(head, rows), *said])


def _result(state: states.State) -> str:
    return f"../results/{state.source}"


def _rules(e: Entry) -> str:
    tables = e.tables()
    if not tables:
        return ""
    lines = ['## Backends and their rules\n\nIn the order in which `backend="auto"` tries them.\n']
    for names, table in tables.items():
        if len(tables) > 1:
            lines.append(f"### {', '.join(f'`{name}`' for name in names)}\n")
        for b in table:
            lines.append(f"**{b.name}**\n")
            lines += [f"- declines: {text.prose(rule)}" for rule in b.rules]
            lines += [f"- `auto` passes over it: {text.prose(rule)}" for rule in b.advice]
            lines.append("- runs every legal call\n" if not b.rules + b.advice else "")
    return "\n".join(lines)


def _family_readme(e: Entry) -> str:
    """The entry's sections of the READMEs; of the README above its folder also those that belong to no entry."""
    parent = Path(e.folder).parent.as_posix()
    names = {name for k in ENTRIES for name in _names(k)}
    parts = []
    for folder in dict.fromkeys((parent, *LIBRARIES)):
        legend, found = _readme(folder)
        mine = [h for h in found if h in _names(e) or (folder == parent and h not in names)]
        if mine:
            body = "\n\n".join([legend, *(f"### {h}\n\n{text.deeper(found[h])}" for h in mine)])
            parts.append(text.relink(body, f"kernel_index/{folder}/README.md", _page(e), place))
    return "\n\n".join(["## Mathematics and memory", *parts]) + "\n" if parts else ""


def _readme(folder: str) -> tuple[str, dict[str, str]]:
    """The legend and the sections of a folder's README; empty without one."""
    path = ROOT / folder / "README.md"
    return text.sections(path.read_text()) if path.exists() else ("", {})


def _names(e: Entry) -> set[str]:
    return {e.name, Path(e.folder).name, *e.functions}


# What belongs to no kernel


def others() -> str:
    """The exported names that no kernel's page documents: receipts, masks, caches, results."""
    documented = {name for e in ENTRIES for name in e.functions}
    parts = ["# Receipts, masks and caches\n", "Every other public name of `kernel_index`.\n"]
    for name in kernel_index.__all__:
        if name not in documented:
            parts += [f"## {name}\n", text.of_docstring(inspect.getdoc(getattr(kernel_index, name)) or "")]
    legend, found = _readme("kvcache")
    caches = "\n\n".join([f"## How the caches work\n\n{legend}", *(f"### {h}\n\n{found[h]}" for h in found)])
    parts.append(text.relink(caches, "kernel_index/kvcache/README.md", "others.md", place) + "\n")
    return "\n".join(parts)


def measured() -> str:
    parts = [
        "# Measured\n",
        "Ours ÷ a contender's time, both measured in one process; below 1 we are faster. `make bench` makes "
        "such tables, the README sums them up.\n",
    ]
    for name, content in states.contents():
        if "lines" in content or "verified" in content:
            figures = dataclasses.replace(saved.load(states.RESULTS / name), verified={}, peers={})
            parts += [f"## {Path(name).stem}\n", f"[All figures](results/{name})\n", show.markdown(figures)]
    return "\n".join(parts)


# The builder's configuration


def config(nav: Nav) -> str:
    """Zensical's, with nothing that a browser would load from another host."""
    return (
        "[project]\n"
        'site_name = "Kernel Index"\n'
        'site_description = "Kernels for language models: one contract, several backends, a receipt"\n'
        'docs_dir = "pages"\nsite_dir = "site"\nuse_directory_urls = false\n'
        f'extra_css = ["site.css"]\nnav = {_toml(nav)}\n'
        "[project.theme]\nfont = false\n"
        'features = ["navigation.indexes", "search.highlight", "content.code.copy"]\n'
    )


def _toml(nav: Nav) -> str:
    items = (f"{{{json.dumps(t)} = {json.dumps(v) if isinstance(v, str) else _toml(v)}}}" for t, v in nav)
    return f"[{', '.join(items)}]"
