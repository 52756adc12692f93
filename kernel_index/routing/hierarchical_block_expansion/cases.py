"""Named calls of ``hierarchical_block_select``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.hierarchical_block_expansion.api import BACKENDS, hierarchical_block_select
from kernel_index.routing.membership import membership


def call(m: Maker, queries: int, keys: int, heads: int, groups: int, width: int, **more: Any) -> dict[str, Any]:
    return {
        "q": m.normal(2, queries, heads, width),
        "block_keys": m.normal(2, -(-keys // 4), groups, width, scale=1.0),
        "coarse_ratio": 3,
        "coarse_topc": 2,
        "final_topk": 4,
        "block_size": 4,
        "kv_len": keys,
        **more,
    }


CASES = (
    Case("causal", "groups are cut off by each query's position; the last block is short", lambda m: call(
        m, 45, 45, 4, 2, 8)),
    Case("documents", "documents with padding and a window", lambda m: call(
        m, 45, 45, 2, 1, 7, mask=MaskContract(window=(17, 0), doc_ids=packed(45)))),
    Case("forced", "the first legal block and the one before the current are forced too", lambda m: call(
        m, 9, 45, 2, 2, 8, forced=("current", "sink", "local"))),
    Case("past", "past blocks alone, a row without a token", lambda m: call(
        m, 45, 45, 2, 1, 8, forced=(), mask=MaskContract(
            validity=attention_validity(valid_token_counts=[31, 0]).to(m.device)))),
    Case("exhaustive", "no more groups than are expanded", lambda m: call(m, 45, 45, 2, 1, 8, coarse_topc=4)),
    Case("no_queries", "no query", lambda m: call(m, 0, 45, 2, 1, 8)),
)  # fmt: skip


def outcome(*, backend: Any = "auto", **kwargs: Any) -> Tensor:
    """Which blocks were selected, as numbers [B, T, K, blocks]."""
    selection = hierarchical_block_select(**kwargs, backend=backend)
    return membership(selection.indices, selection.valid, kwargs["block_keys"].shape[1]).to(torch.float32)


def oracle(
    q: Tensor,
    block_keys: Tensor,
    coarse_ratio: int,
    coarse_topc: int,
    final_topk: int,
    block_size: int,
    kv_len: int,
    mask: MaskContract | None = None,
    forced: tuple[str, ...] = ("current",),
) -> Tensor:
    """Query by query: legal blocks, mean scores of their groups, and two of Python's own sorts."""
    (batch, queries, heads, _), (blocks, groups) = q.shape, block_keys.shape[1:3]
    mask, dtype = mask or MaskContract(), torch.promote_types(q.dtype, torch.float32)
    allowed = dense_oracle(mask, batch, queries, kv_len)
    out = torch.zeros(batch, queries, groups, blocks)
    for b in range(batch):
        for t in range(queries):
            seen, current = allowed[b, t], (t + kv_len - queries) // block_size
            legal = [j for j in range(current) if seen[j * block_size : (j + 1) * block_size].any()]
            named = {
                "current": [current] if seen.any() else [],
                "sink": legal[:1],
                "local": [current - 1] if current - 1 in legal else [],
            }
            kept = {j for name in forced for j in named[name]}
            for g in range(groups):
                at = slice(g * heads // groups, (g + 1) * heads // groups)
                score = (block_keys[b, :, g].to(dtype) @ q[b, t, at].to(dtype).mean(0)).tolist()
                of_group: dict[int, list[float]] = {}
                for j in legal:
                    of_group.setdefault(j // coarse_ratio, []).append(score[j])
                means = {m: sum(scores) / len(scores) for m, scores in of_group.items()}
                best = sorted(means, key=lambda m, means=means: (-means[m], m))[:coarse_topc]
                candidates = [j for j in legal if j // coarse_ratio in best and j not in kept]
                candidates.sort(key=lambda j, score=score: (-score[j], j))
                out[b, t, g, [*kept, *candidates[: final_topk - len(kept)]]] = 1.0
    return out


SUITES = (
    Suite(
        op="hierarchical_block_select", function=outcome, backends=BACKENDS, cases=CASES, differentiable=(),
        oracle=oracle, sized=lambda m, n: call(m, n, n, 2, 1, 4, coarse_ratio=2, coarse_topc=1, final_topk=2),
        scales=(1e-3, 1.0, 16.0),
        real=lambda m: call(m, 8192, 8192, 32, 4, 128) | {"block_size": 8, "coarse_ratio": 8, "coarse_topc": 16,
            "final_topk": 16, "block_keys": m.normal(2, 1024, 4, 128, scale=1.0)},
    ),
)  # fmt: skip
