"""Named calls of ``union_selection``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.routing.union_selection_query_mask.api import BACKENDS, union_selection


def call(m: Maker, queries: int, entries: int, blocks: int, tile: int, **more: Any) -> dict[str, Any]:
    return {
        "selected": m.integers(-1, blocks, 2, queries, 2, entries),
        "query_tile_size": tile,
        "num_blocks": blocks,
        **more,
    }


CASES = (
    Case("tiles", "the last tile is short; duplicates and −1", lambda m: call(m, 13, 3, 7, 4)),
    Case("sort", "many blocks, sorted", lambda m: call(m, 13, 3, 1000, 5, mode="sort")),
    Case("bitmap", "many blocks, as a bitmap", lambda m: call(m, 13, 3, 1000, 5, mode="bitmap")),
    Case("validity", "entries that are not valid", lambda m: call(
        m, 13, 3, 7, 64, selected_valid=m.integers(0, 2, 2, 13, 2, 3) > 0)),
    Case("alone", "each query alone, more entries than blocks", lambda m: call(m, 5, 4, 2, 1)),
    Case("no_queries", "no query", lambda m: call(m, 0, 3, 7, 4)),
)  # fmt: skip


def outcome(*, backend: Any = "auto", **kwargs: Any) -> tuple[Tensor, ...]:
    """The maps as numbers."""
    return tuple(x.to(torch.float32) for x in union_selection(**kwargs, backend=backend))


def oracle(
    selected: Tensor,
    query_tile_size: int,
    num_blocks: int,
    selected_valid: Tensor | None = None,
    mode: str = "auto",
) -> tuple[Tensor, ...]:
    """Python's own sets, tile by tile."""
    batch, queries, groups, entries = selected.shape
    tiles, width = -(-queries // query_tile_size), min(query_tile_size * entries, num_blocks)
    valid = selected >= 0 if selected_valid is None else (selected >= 0) & selected_valid
    union = torch.full((batch, tiles, groups, width), -1.0)
    sizes, own = torch.zeros(batch, tiles, groups), torch.full(selected.shape, -1.0)
    for b in range(batch):
        for i in range(tiles):
            at = slice(i * query_tile_size, (i + 1) * query_tile_size)
            for g in range(groups):
                found = sorted(set(selected[b, at, g][valid[b, at, g]].tolist()))
                union[b, i, g, : len(found)] = torch.tensor(found, dtype=torch.float32)
                sizes[b, i, g] = len(found)
                for t in range(at.start, min(at.stop, queries)):
                    for n in range(entries):
                        if valid[b, t, g, n]:
                            own[b, t, g, n] = found.index(int(selected[b, t, g, n]))
    return union, sizes, own, valid.to(torch.float32)


def real(m: Maker) -> dict[str, Any]:
    """A layer of 64k tokens: 16 of 1024 blocks for each query of 4 groups."""
    return {"selected": m.integers(0, 1024, 1, 65_536, 4, 16), "query_tile_size": 64, "num_blocks": 1024}


def compulsory(call: dict[str, Any]) -> tuple[int, int]:
    """Indices are read once, all maps are written once."""
    selected, tile = call["selected"], call["query_tile_size"]
    batch, queries, groups, count = selected.shape
    width = min(tile * count, call["num_blocks"])
    lists = batch * -(-queries // tile) * groups
    return size_of(selected) + 5 * selected.numel() + 4 * lists * (width + 1), 0


SUITES = (
    Suite(
        op="union_selection", function=outcome, backends=BACKENDS, cases=CASES, differentiable=(),
        oracle=oracle, sized=lambda m, n: call(m, n, 3, 7, 4),
        scales=(1.0,), real=real, compulsory=compulsory,
    ),
)  # fmt: skip
