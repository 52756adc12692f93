"""The status matrix: each function with its backends, and what the records say of each."""

import html
from collections.abc import Iterable

from docs import kernels, states, text
from kernel_index.index.entries import FAMILIES
from kernel_index.index.entry import Entry

HEAD = """# Status

A backend is green if a record shows that it *ran* and was right on the hardware that it is for.

| mark | meaning |
|---|---|
| <span class="ki-chip ki-run">run</span> | It ran on the hardware that it is for, within its error budget. |
| <span class="ki-chip ki-interpreted">interpreted</span> | It ran on a CPU, through an interpreter, and was right. |
| <span class="ki-chip ki-compiled">compiled</span> | It was compiled to machine code for hardware that was not there. |
| <span class="ki-chip ki-failed">failed</span> | A recorded call was not right. |
| <span class="ki-chip ki-none">no record</span> | Nothing is recorded. |

Only the newest record of each kind counts. The page of a function has the machines, versions and counts.
`kernel-index list` prints what your own machine can run.
"""


def write(seen: list[states.State]) -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for family in FAMILIES:
        parts += [f"## {family}\n", _family(kernels.of_family(family), seen)]
    parts += ["## Records\n", _records(seen)]
    return "\n".join(parts)


def _family(entries: list[Entry], seen: list[states.State]) -> str:
    found = [(e, op, names) for e in entries for op, names in kernels.operations(e, seen).items()]
    rows = [[_link(e, op), " ".join(_chip(op, b, seen) for b in names)] for e, op, names in found if names]
    plain = [_link(e, op) for e, op, names in found if not names]
    shown = [text.table(["function", "backends, in the order in which `auto` tries them"], rows)] * bool(rows)
    shown += [f"Plain functions, which have no backends: {', '.join(plain)}.\n"] * bool(plain)
    return "\n".join(shown)


def _link(e: Entry, op: str) -> str:
    name = op.replace("_", "\\_<wbr>")  # where a narrow table may break it
    return f"[<code>{name}</code>]({kernels.page(e)}){'' if e.implemented else ' (not implemented)'}"


def _chip(op: str, backend: str, seen: Iterable[states.State]) -> str:
    """One backend: its name, the kinds of record with the strongest first, and as a tooltip where and when."""
    found = states.current(s for s in seen if (s.op, s.backend) == (op, backend))
    kinds = [kind for kind in states.KINDS if any(s.kind == kind for s in found)]
    failed = sum(s.failed for s in found)
    best = "failed" if failed else kinds[0] if kinds else "none"
    said = [*kinds, f"{failed} failed"] if failed else kinds
    tip = "; ".join(dict.fromkeys(f"{s} on {s.where}, {s.date}" for s in found)) or "no record"
    label = f"{backend} · {', '.join(said)}" if said else backend
    return f'<span class="ki-chip ki-{best}" title="{html.escape(tip)}">{label}</span>'


def _records(seen: list[states.State]) -> str:
    files = {s.source: s for s in seen}
    rows = [[f"[{name}](results/{name})", s.date, s.where, s.versions] for name, s in sorted(files.items())]
    for row, name in zip(rows, sorted(files), strict=True):
        row[2] = ", ".join(sorted({s.where for s in seen if s.source == name}))
    return text.table(["record", "date", "machine or target", "versions"], rows)
