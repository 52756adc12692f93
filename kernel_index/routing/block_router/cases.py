"""Named calls of ``block_router``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.api import BACKENDS, block_router
from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.block_router.scores import block_scores, means_and_legal
from kernel_index.routing.legal_blocks import TopBlocks


def call(m: Maker, t: int, s: int, heads: int, kv_heads: int, width: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        "q": m.normal(2, t, heads, width),
        "k": m.normal(2, s, kv_heads, width, scale=1.0),
        "block_size": 4,
        "topk": 3,
        "groups": groups,
        **more,
    }


PREFIX = attention_validity(valid_token_counts=[13, 0])

CASES = (
    Case("heads", "a selection for each query head; the last block is short", lambda m: call(m, 22, 22, 4, 2, 8, 4)),
    Case("groups", "the heads of a KV head share a selection", lambda m: call(m, 22, 22, 4, 2, 8, 2)),
    Case("documents", "documents that end inside blocks, padding, a window", lambda m: call(
        m, 22, 22, 6, 1, 7, 3, mask=MaskContract(window=(9, 0), doc_ids=packed(22)))),
    Case("prefix", "valid prefixes, a row without a token", lambda m: call(
        m, 22, 22, 2, 2, 8, 2, mask=MaskContract(validity=PREFIX.to(m.device)))),
    Case("chunk", "the last queries of a longer row", lambda m: call(m, 7, 30, 2, 1, 8, 1)),
    Case("everything", "more wanted than there are blocks", lambda m: call(m, 13, 13, 2, 1, 8, 1, topk=9)),
    Case("no_queries", "no query", lambda m: call(m, 0, 5, 2, 1, 8, 1)),
)  # fmt: skip


def past_scores(selection: TopBlocks, scores: Tensor, current: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The scores [B, T, G, topk] of the selected past blocks, descending, then −∞: the same however ties are broken.

    And whether the current block [B or 1, T] was selected, as a number [B, T, G].
    """
    is_current = (selection.indices == current[:, :, None, None]) & selection.valid
    past = selection.valid & ~is_current
    found = torch.where(past, scores.gather(-1, selection.indices.clamp(min=0).long()), -torch.inf)
    found = torch.nn.functional.pad(found, (0, topk - found.shape[-1]), value=-torch.inf)
    return found.sort(-1, descending=True).values.contiguous(), is_current.any(-1).to(torch.float32)


ARGUMENTS = ("q", "k", "block_size", "topk", "groups")


def outcome(*, backend: Any = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What can be compared where selections may differ by rounding."""
    selection = block_router(**kwargs, backend=backend)
    mask, (q, k, size, topk, groups) = kwargs.get("mask", MaskContract()), (kwargs[n] for n in ARGUMENTS)
    routed = RouterCall(q, k, size, topk, mask, groups)
    means, legal = means_and_legal(routed)
    return past_scores(selection, block_scores(routed.q, means, routed.groups), legal.current, routed.topk)


def oracle(
    q: Tensor, k: Tensor, block_size: int, topk: int, groups: int, mask: MaskContract | None = None
) -> tuple[Tensor, Tensor]:
    """Query by query: the mean keys of the past blocks, in plain Python, and its own sort."""
    (batch, queries, heads, _), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    mask, dtype = mask or MaskContract(), torch.promote_types(q.dtype, torch.float32)
    allowed = dense_oracle(mask, batch, queries, keys)
    document = dense_oracle(MaskContract(doc_ids=mask.doc_ids), batch, keys, keys)
    offset = mask.sizes(batch, queries, keys, q.device).one_offset
    out = torch.full((batch, queries, groups, topk), -torch.inf, dtype=dtype)
    has_current = torch.zeros(batch, queries, groups)

    def score(b: int, t: int, g: int, j: int) -> float:
        last = j * block_size + block_size - 1  # where documents meet in a block, the later one's keys
        inside = [s for s in range(j * block_size, last + 1) if document[b, last, s]]
        at = slice(g * heads // groups, (g + 1) * heads // groups)
        return float(q[b, t, at].to(dtype).mean(0) @ k[b, inside, g * kv_heads // groups].to(dtype).mean(0))

    for b in range(batch):
        for t in range(queries):
            seen, current = {s // block_size for s in allowed[b, t].nonzero().flatten().tolist()}, t + offset
            current = current // block_size
            exists = bool(seen) and current * block_size < keys
            for g in range(groups):
                best = sorted((score(b, t, g, j) for j in seen if j < current), reverse=True)[: topk - exists]
                out[b, t, g, : len(best)] = torch.tensor(best, dtype=dtype)
                has_current[b, t, g] = float(exists)
    return out, has_current


SUITES = (
    Suite(
        op="block_router", function=outcome, backends=BACKENDS, cases=CASES, differentiable=(), oracle=oracle,
        sized=lambda m, n: call(m, n, n, 2, 1, 4, 1, topk=2),
        scales=(1e-3, 1.0, 16.0),
    ),
)  # fmt: skip
