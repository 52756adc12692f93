"""Attention and decoding by cell: tables from the newest record that has such rows."""

from collections.abc import Callable
from typing import Any

from docs import states, text

OURS = "kernel_index "
FUNCTIONS = ("kernel_index dense",)
"""Other functions of ours that a row is compared with."""


def newest(kind: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the record of the latest day that has rows of this kind; empty without one."""
    found = [(c["machine"]["date"], name, c) for name, c in states.contents() if c.get(kind)]
    return max(found, key=lambda f: f[:2])[1:] if found else ("", {})


def table(kind: str) -> str:
    """Where and when, then a row for each cell; empty where no record has such rows."""
    name, content = newest(kind)
    if not content:
        return ""
    machine = content["machine"]
    where = f"{machine['device']}, {machine['date']} ([data](../../benchmarks/results/{name}))"
    head, row = KINDS[kind]
    shown = text.table([*head, "by", "÷ our best", "÷ best peer"], [row(r) for r in content[kind]])
    return f"{where}. *÷ our best*: `auto` ÷ the fastest of our backends by name.\n\n{shown}"


def sparse_table() -> str:
    """Sparse attention by length: dense times, and the ratios of ours to them, forward / forward and backward."""
    name, content = newest("exact_tokens")
    if not content:
        return ""
    columns = {"clustered": "sparse", "moba query_head": "sparse", "attend": "sparse", "exact_token": "exact_tokens"}
    cells = {(r["tokens"], r["heads"], r["selection"]): {} for r in content["sparse"] + content["exact_tokens"]}
    for kind in ("sparse", "exact_tokens"):
        for r in content[kind]:
            cells[r["tokens"], r["heads"], r["selection"]][r["contender"]] = r
    rows = []
    for (tokens, heads, selection), found in sorted(cells.items()):
        dense = cells.get((tokens, heads, "random"), {}).get("dense FA4", {})
        ours = [_both(found.get(OURS + column, {}), "of_dense", 3) for column in columns]
        memory = str(found.get(OURS + "clustered", {}).get("MiB", ""))
        rows.append([f"{tokens / 1024:g}k, {heads} heads", selection, _both(dense, "ms", 2), *ours, memory])
    machine = content["machine"]
    where = f"{machine['device']}, {machine['date']} ([data](../../benchmarks/results/{name}))"
    head = ["tokens", "selections", "flash-attn-4, ms", "clustered", "MoBA, per head", "blocks given", "2048 tokens",
            "MiB, clustered"]  # fmt: skip
    said = "Ours is ÷ flash-attn-4's time; each cell is forward / forward and backward."
    return f"{where}. {said}\n\n{text.table(head, rows)}"


def _both(row: dict[str, Any], what: str, digits: int) -> str:
    return " / ".join(f"{row[f'{way}_{what}']:.{digits}f}" for way in ("forward", "train") if f"{way}_{what}" in row)


def _attention(row: dict[str, Any]) -> list[str]:
    ours = {name: ms for name, ms in row["all_ms"].items() if name.islower()}  # peers are written with capitals
    regret = row.get("regret") or (row["ms"] / min(ours.values()) if ours else None)
    return [row["case"], f"{row['ms']:.3f}", row["ran"], _ratio(regret, row.get("best") or _least(ours)),
            _ratio(row.get("ratio"), row.get("peer", ""))]  # fmt: skip


def _step(first: Callable[[dict[str, Any]], list[str]]) -> Callable[[dict[str, Any]], list[str]]:
    def line(row: dict[str, Any]) -> list[str]:
        auto, us = auto_of(row["us"])
        rest = {n: t for n, t in row["us"].items() if n != auto}
        ours = {n.removeprefix(OURS): t for n, t in rest.items() if n.startswith(OURS) and n not in FUNCTIONS}
        peers = {n.removeprefix(OURS): t for n, t in rest.items() if n in FUNCTIONS or not n.startswith(OURS)}
        ran = row.get("ran") or auto.removeprefix(OURS + "auto(").removesuffix(")")
        regret = us / min(ours.values()) if ours else None
        ratio = us / min(peers.values()) if peers else None
        return [*first(row), f"{us:.1f}", ran, _ratio(regret, _least(ours)), _ratio(ratio, _least(peers))]

    return line


def auto_of(us: dict[str, float]) -> tuple[str, float]:
    """The name and time of the contender that ``auto`` chose: ``kernel_index auto(…)``."""
    return next((name, t) for name, t in us.items() if name.startswith(OURS + "auto"))


def _least(times: dict[str, float]) -> str:
    return min(times, key=times.__getitem__) if times else ""


def _ratio(value: float | None, of: str) -> str:
    return "" if value is None else f"{value:.2f} {of}"


def _size(row: dict[str, Any]) -> list[str]:
    return [str(row["rows"]), f"{row['tokens'] // 1024}k"]


KINDS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], list[str]]]] = {
    "attention": (("case", "ms"), _attention),
    "decode": (("rows", "tokens", "page", "µs"), _step(lambda row: [*_size(row), str(row["page"])])),
    "moba_decode": (("rows", "tokens", "routed for each", "µs"), _step(lambda row: [*_size(row), row["route_per"]])),
}
"""The columns of each kind of row before the backend, and a row's cells."""
