"""What was measured: plots, then tables, each from a committed file with its date and machine."""

import dataclasses
import json
from typing import Any

from benchmarks.figures import saved, show
from docs import cells, plots, states
from docs.place import REPOSITORY

PEERS = "nvidia-h200-peers-2026-11-28.json"
"""Beside the strongest peers on one GPU: what the plots are drawn from."""


def peers() -> dict[str, Any]:
    return json.loads((states.RESULTS / PEERS).read_text())


def content() -> dict[str, Any]:
    """The record beside the peers, with the newest rows of what was measured again."""
    again = ("attention", "decode", "sparse", "exact_tokens")
    return peers() | {kind: found[kind] for kind in again if (found := cells.newest(kind)[1])}


def write() -> str:
    """The page as Markdown: the text of ``docs/site/measured.md`` with the plots and the tables of every record."""
    page = (REPOSITORY / "docs" / "site" / "measured.md").read_text()
    for name, plot in drawn(content()).items():
        page = page.replace(f"<!-- plot: {name} -->", plot)
    for kind in cells.KINDS:
        page = page.replace(f"<!-- table: {kind} -->", cells.table(kind) or "Not measured yet.\n")
    return page.replace("<!-- table: sparse -->", cells.sparse_table())


def tables() -> str:
    """Every time of the newest record of each machine."""
    parts = [
        "# All times\n",
        "Ours ÷ a contender's time, both measured in one process; below 1 we are faster. `make bench` makes "
        "such tables on your machine. [Measured](measured.md) has the plots and the summary.\n",
    ]
    newest: dict[str, str] = {}
    for name, content in states.contents():
        if "lines" in content or "verified" in content:
            machine = content.get("environment") or content["machine"]
            newest[str(machine.get("device") or machine.get("processor"))] = name  # names end in their dates
    for name in newest.values():
        figures = dataclasses.replace(saved.load(states.RESULTS / name), verified={}, peers={})
        parts += [f"## {name.removesuffix('.json')}\n", f"[All figures](results/{name})\n", show.markdown(figures)]
    return "\n".join(parts)


def drawn(content: dict[str, Any]) -> dict[str, str]:
    """Every plot by name."""
    share = "Share of a copy's bandwidth over the width of a row"
    return {
        "share forward": plots.svg(plots.share_by_width("forward"), content, 3.2, f"{share}, forward"),
        "share backward": plots.svg(plots.share_by_width("backward"), content, 3.2, f"{share}, backward"),
        "attention": plots.svg(plots.ratios_of_attention, content, 6.2, "Attention: our time by the fastest peer's"),
        "memory-bound": plots.svg(
            plots.ratios_of_memory_bound, content, 4.2, "Fused kernels: our time by the best peer's"
        ),
        "sparse": plots.svg(plots.sparse_over_tokens, content, 3.4, "Sparse attention: time over tokens"),
        "tokens": plots.svg(plots.tokens_over_tokens, content, 3.0, "Exact tokens: time over tokens"),
        "decode": plots.svg(plots.decode_over_tokens, content, 3.4, "Decoding: time over tokens in the cache"),
    }
