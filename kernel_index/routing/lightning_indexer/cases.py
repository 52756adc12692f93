"""Named calls of ``lightning_indexer``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.lightning_indexer.api import BACKENDS, lightning_indexer


def indexer(m: Maker, t: int, s: int, heads: int, width: int, topk: int, **more: Any) -> dict[str, Any]:
    """Scores grow with the maker's scale; weights of both signs, so that some scores are negative."""
    return {
        "q_idx": m.normal(2, t, heads, width),
        "k_idx": m.normal(2, s, width, scale=1.0),
        "weights": m.normal(2, t, heads, scale=1.0),
        "topk": topk,
        **more,
    }


CASES = (
    Case("causal", "the first queries have fewer keys than topk", lambda m: indexer(m, 13, 13, 4, 8, 5)),
    Case("documents", "documents with padding and a window", lambda m: indexer(
        m, 13, 13, 3, 7, 3, mask=MaskContract(window=(6, 0), doc_ids=packed(13)))),
    Case("many", "more wanted than there are, T ≠ S", lambda m: indexer(m, 4, 9, 2, 8, 12)),
    Case("plateau", "every product negative: all scores are 0", lambda m: {
        **indexer(m, 9, 9, 2, 4, 4), "q_idx": torch.ones_like(m.normal(2, 9, 2, 4)),
        "k_idx": -torch.ones_like(m.normal(2, 9, 4))}),
    Case("no_queries", "no query", lambda m: indexer(m, 0, 5, 2, 4, 3)),
)  # fmt: skip


def scores_of(**call: Any) -> Tensor:
    """What has a gradient; a wrong selection shows in it."""
    return lightning_indexer(**call).scores


def oracle(q_idx: Tensor, k_idx: Tensor, weights: Tensor, topk: int, mask: MaskContract | None = None) -> Tensor:
    """The scores alone, one query at a time, sorted by Python."""
    (batch, queries), keys = q_idx.shape[:2], k_idx.shape[1]
    allowed = dense_oracle(mask or MaskContract(), batch, queries, keys)
    rows = []
    for b in range(batch):
        for t in range(queries):
            score = ((q_idx[b, t] @ k_idx[b].T).relu() * weights[b, t, :, None]).sum(0)
            order = sorted((s for s in range(keys) if allowed[b, t, s]), key=lambda s, own=score: (-float(own[s]), s))
            best = score[order[:topk]]
            rows.append(torch.cat([best, best.new_full((topk - best.shape[0],), -torch.inf)]))
    nothing = (q_idx.sum() + k_idx.sum() + weights.sum()) * 0.0
    scores = torch.stack(rows).view(batch, queries, topk) if rows else nothing.expand(batch, queries, topk)
    return (scores + nothing).to(torch.promote_types(q_idx.dtype, torch.float32))


SUITES = (
    Suite(
        op="lightning_indexer", function=scores_of, backends=BACKENDS, cases=CASES,
        differentiable=("q_idx", "k_idx", "weights"), oracle=oracle,
        sized=lambda m, n: indexer(m, n, n, 2, 4, 3, mask=MaskContract(causal=False)),  # no score of −∞ to differ from
    ),
)  # fmt: skip
