"""What the error of a call says that no backend takes: every rule that was broken, and by whom."""

from collections.abc import Iterable, Sequence
from typing import Any

from kernel_index.core.numerics import NO_RECIPE


def refusal(
    op: str, backends: Sequence[Any], wanted: str, forced_by: str | None, declined: Iterable[tuple[str, str]]
) -> str:
    """Backends that break one rule are named together; those that have no recipe come last, since no caller can
    change that."""
    names: dict[str, list[str]] = {}
    for name, rule in sorted(declined, key=lambda one: one[1] == NO_RECIPE):
        names.setdefault(rule, []).append(name)
    known = ", ".join(backend.name for backend in backends)
    rules = "; ".join(f"{', '.join(group)}: {rule}" for rule, group in names.items())
    origin = f" (forced by {forced_by})" if forced_by else ""
    return f"{op}: backend={wanted!r}{origin} cannot run this call ({rules or f'expected auto or one of: {known}'})"
