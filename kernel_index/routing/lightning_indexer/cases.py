"""Named calls of ``lightning_indexer``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.masks.doc_window_mask.cases import dense_oracle, forest, packed
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.lightning_indexer.api import BACKENDS, lightning_indexer
from kernel_index.routing.lightning_indexer.loss import LOSS_BACKENDS, lightning_indexer_loss
from kernel_index.routing.lightning_indexer.selection import TokenSelection


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
    Case("tree", "shared prompts: the tokens of each path", lambda m: indexer(
        m, 13, 13, 3, 8, 4, mask=MaskContract(subtree_end=forest(13).subtree_end).to(m.device))),
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


def loss_call(m: Maker, t: int, heads: int, kv_heads: int, width: int, n: int, **more: Any) -> dict[str, Any]:
    """Selected tokens without repeats, of which some are not valid."""
    order = torch.rand(2, t, t, generator=m.generator).argsort(-1)[..., :n].to(m.device)
    return {
        "scores": m.normal(2, t, n, dtype=torch.promote_types(m.dtype, torch.float32), scale=1.0),
        "indices": order,
        "valid": m.integers(0, 4, 2, t, n) > 0,
        "q": m.normal(2, t, heads, width),
        "k": m.normal(2, t, kv_heads, width, scale=1.0),
        **more,
    }


def _with_an_empty_query(m: Maker) -> dict[str, Any]:
    made = loss_call(m, 9, 2, 1, 8, 5)
    made["valid"][:, 3] = False
    return made


def _real_loss(m: Maker) -> dict[str, Any]:
    made = {
        "indices": m.integers(0, 8192, 1, 8192, 512),
        "q": m.normal(1, 8192, 32, 128),
        "k": m.normal(1, 8192, 4, 128),
    }
    made["scores"] = m.normal(1, 8192, 512, dtype=torch.float32)
    return {"valid": made["indices"] >= 0, **made}


LOSS_CASES = (
    Case("groups", "three heads of each of two KV heads", lambda m: loss_call(m, 19, 6, 2, 8, 7)),
    Case("options", "softcap, scale, an odd width", lambda m: loss_call(m, 9, 2, 2, 7, 4, softcap=2.0, scale=0.7)),
    Case("empty", "a query without a token does not count", _with_an_empty_query),
    Case("no_queries", "no query", lambda m: loss_call(m, 0, 2, 1, 8, 0)),
)


def loss_of(scores: Tensor, indices: Tensor, valid: Tensor, **call: Any) -> Tensor:
    return lightning_indexer_loss(TokenSelection(indices, valid, scores), **call)


def loss_oracle(
    scores: Tensor,
    indices: Tensor,
    valid: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Query by query, the target head by head."""
    (batch, queries, heads, width), kv_heads = q.shape, k.shape[2]
    dtype, losses = torch.promote_types(q.dtype, torch.float32), []
    for b in range(batch):
        for t in range(queries):
            at = indices[b, t][valid[b, t]]
            if not len(at):
                continue
            target = torch.zeros(len(at), dtype=dtype)
            for h in range(heads):
                z = k[b, at, h * kv_heads // heads].to(dtype) @ q[b, t, h].to(dtype)
                z = z * (width**-0.5 if scale is None else scale)
                target += (softcap * torch.tanh(z / softcap) if softcap else z).softmax(0).detach() / heads
            share = scores[b, t][valid[b, t]].log_softmax(0)
            losses.append((torch.special.xlogy(target, target) - target * share).sum())
    return torch.stack(losses).mean() if losses else scores.sum() * 0.0


SUITES = (
    Suite(
        op="lightning_indexer", function=scores_of, backends=BACKENDS, cases=CASES,
        differentiable=("q_idx", "k_idx", "weights"), oracle=oracle,
        sized=lambda m, n: indexer(m, n, n, 2, 4, 3, mask=MaskContract(causal=False)),  # no score of −∞ to differ from
        real=lambda m: indexer(m, 8192, 8192, 4, 64, 512),
    ),
    Suite(
        op="lightning_indexer_loss", function=loss_of, backends=LOSS_BACKENDS, cases=LOSS_CASES,
        differentiable=("scores",), oracle=loss_oracle, sized=lambda m, n: loss_call(m, n, 2, 1, 4, min(n, 3)),
        scales=(1e-3, 1.0), real=_real_loss,
    ),
)  # fmt: skip
