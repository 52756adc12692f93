"""Named calls of ``importance_route``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.importance_router.api import BACKENDS, importance_route
from kernel_index.routing.membership import membership


def call(m: Maker, queries: int, keys: int, heads: int, kv_heads: int, width: int, **more: Any) -> dict[str, Any]:
    return {
        "q": m.normal(2, queries, heads, width),
        "block_keys": m.normal(2, keys // 4, kv_heads, width, scale=1.0),
        "lse": m.normal(2, heads, queries, scale=1.0),
        "block_size": 4,
        "topk": 4,
        "kv_len": keys,
        **more,
    }


CASES = (
    Case("causal", "four heads share a selection; the last block is short", lambda m: call(m, 30, 30, 8, 2, 8)),
    Case("heads", "three heads, odd sizes, no block but the current is forced", lambda m: call(
        m, 30, 30, 3, 1, 7, forced=("current",))),
    Case("documents", "documents that end inside blocks, padding, a window", lambda m: call(
        m, 30, 30, 2, 2, 8, mask=MaskContract(window=(17, 0), doc_ids=packed(30)))),
    Case("prefix", "valid prefixes, a row without a token", lambda m: call(
        m, 30, 30, 2, 1, 8, mask=MaskContract(validity=attention_validity(valid_token_counts=[19, 0]).to(m.device)))),
    Case("chunk", "the last queries of a longer row, past blocks alone", lambda m: call(
        m, 7, 41, 2, 1, 8, forced=())),
    Case("everything", "more wanted than there are blocks", lambda m: call(m, 13, 13, 2, 1, 8, topk=9)),
    Case("short", "no complete block", lambda m: call(m, 3, 3, 2, 1, 8)),
    Case("no_queries", "no query", lambda m: call(m, 0, 20, 2, 1, 8)),
)  # fmt: skip


def outcome(*, backend: Any = "auto", **kwargs: Any) -> Tensor:
    """Which blocks were selected, as numbers [B, T, K, blocks]."""
    selection = importance_route(**kwargs, backend=backend)
    complete = kwargs["block_keys"].shape[1]
    return membership(selection.indices, selection.valid, complete + 1).to(torch.float32)


def oracle(
    q: Tensor,
    block_keys: Tensor,
    lse: Tensor,
    block_size: int,
    topk: int,
    kv_len: int,
    mask: MaskContract | None = None,
    forced: tuple[str, ...] = ("current", "sink", "local"),
) -> Tensor:
    """Query by query, in plain Python: its forced blocks, then a sort of the others."""
    (batch, queries, heads, width), kv_heads = q.shape, block_keys.shape[2]
    mask = mask or MaskContract()
    allowed = dense_oracle(mask, batch, queries, kv_len)
    offset = mask.sizes(batch, queries, kv_len, q.device).one_offset
    chosen = torch.zeros(batch, queries, kv_heads, block_keys.shape[1] + 1)

    def importance(b: int, t: int, g: int, j: int) -> float:
        per = heads // kv_heads
        rows = range(g * per, (g + 1) * per)
        return sum(float((q[b, t, h] @ block_keys[b, j, g] * width**-0.5 - lse[b, h, t]).exp()) for h in rows)

    for b in range(batch):
        for t in range(queries):
            seen = {s // block_size for s in allowed[b, t].nonzero().flatten().tolist()}
            current = (t + offset) // block_size
            past = sorted(j for j in seen if j < current)
            named = {
                "current": [current] if seen else [],
                "sink": past[:1],
                "local": [j for j in past if j == current - 1],
            }
            first = {j for name in forced for j in named[name]}
            for g in range(kv_heads):
                others = sorted((j for j in past if j not in first), key=lambda j, g=g: (-importance(b, t, g, j), j))
                for j in [*first, *others[: topk - len(first)]]:
                    chosen[b, t, g, j] = 1.0
    return chosen


SUITES = (
    Suite(
        op="importance_route", function=outcome, backends=BACKENDS, cases=CASES, differentiable=(), oracle=oracle,
        sized=lambda m, n: call(m, n, n + 16, 2, 1, 4, topk=3),
        scales=(1e-3, 1.0),
        real=lambda m: call(m, 8192, 8192, 32, 4, 128) | {"block_size": 64, "topk": 16, "block_keys": m.normal(
            2, 128, 4, 128, scale=1.0)},
    ),
)  # fmt: skip
