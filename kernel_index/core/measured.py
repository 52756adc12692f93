"""Which backend was faster where: times of one card of an architecture, kept as data with their date.

``kernel-index tune`` writes a file of ``crossovers``; a backend's ``not_worth`` asks ``slower``.  A row holds the times
of one call: its ``kind``, which must be the asked call's, and its ``sizes``, of which the nearest row counts.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kernel_index.core.target import Target

FOLDER = Path(__file__).parent / "crossovers"

EQUAL = 0.97
"""A backend is passed over where another takes less than this share of its time: closer times may be noise."""

SLOWER = "measured slower on this architecture than another backend that may run"

Faster = tuple[tuple[str, str], ...]
"""Backends that were faster, the fastest first, each with the row that says so."""


def slower(
    op: str, backend: str, target: Target, kind: tuple[str, ...], sizes: tuple[int, ...], may_run: Callable[[str], bool]
) -> str | None:
    """The measured row in which a backend that may run this call is faster than ``backend``, as a sentence, or None.

    Of the backends that ``may_run`` allows, the fastest of a row is never passed over.  While ``torch.compile`` traces,
    sizes are unknown, and another backend must have been faster in every row of the kind.
    """
    for rival, row in _faster(op, backend, name_of(target), kind, () if torch.compiler.is_compiling() else sizes):
        if may_run(rival):
            rule = SLOWER  # a fixed sentence, for whoever lists the rules
            return f"{rule}: {row}"
    return None


def known(op: str, target: Target, kind: tuple[str, ...], backend: str = "") -> bool:
    """Whether calls of this kind were measured on this architecture, with this backend."""
    return _known(op, name_of(target), kind, backend)


def name_of(target: Target) -> int | str:
    """What a file is called by: 90 for ``sm_90.json``, ``gfx942``, ``cpu``."""
    return target.arch or target.kind


def file_name(arch: int | str) -> str:
    return f"sm_{arch}.json" if isinstance(arch, int) else f"{arch}.json"


def forget() -> None:
    """Read the files again at the next question."""
    for cached in (_content, _rows, _faster_in):
        cached.cache_clear()


def _known(op: str, arch: int | str, kind: tuple[str, ...], backend: str) -> bool:
    return any(not backend or backend in row["us"] for row in _rows(op, arch, kind))


def _faster(op: str, backend: str, arch: int | str, kind: tuple[str, ...], sizes: tuple[int, ...]) -> Faster:
    return _faster_in(op, backend, arch, kind, _octaves(sizes))


def _octaves(sizes: Sequence[int]) -> tuple[int, ...]:
    """Logarithms to base two, rounded up: a service with many lengths then asks few questions."""
    return tuple([(n - 1).bit_length() for n in sizes])


@functools.lru_cache(maxsize=4096)
def _faster_in(op: str, backend: str, arch: int | str, kind: tuple[str, ...], octaves: tuple[int, ...]) -> Faster:
    rows = [r for r in _rows(op, arch, kind) if backend in r["us"]]
    if not rows:
        return ()
    if octaves:
        rows = [min(rows, key=lambda r: [abs(a - b) for a, b in zip(octaves, _octaves(r["sizes"]), strict=True)])]
    content = _content(arch)
    found = []
    for rival in rows[0]["us"]:
        ratios = [r["us"][backend] / r["us"][rival] if rival in r["us"] else 0.0 for r in rows]
        if rival != backend and min(ratios) * EQUAL > 1:
            row = rows[ratios.index(min(ratios))]
            where = f"{content['device']}, {row.get('date', content['date'])}"
            found.append((min(ratios), rival, f"{min(ratios):.2f}x of {rival} at {row['cell']} ({where})"))
    return tuple((rival, said) for _, rival, said in sorted(found, reverse=True))


@functools.cache
def _rows(op: str, arch: int | str, kind: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(r for r in _content(arch).get(op, ()) if tuple(r["kind"]) == kind)


@functools.cache
def _content(arch: int | str) -> dict[str, Any]:
    path = FOLDER / file_name(arch)
    return json.loads(path.read_text()) if path.exists() else {}


# See dispatch.py: Dynamo runs these as plain Python while it traces and keeps the result.
for _constant in (_faster, _known):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
