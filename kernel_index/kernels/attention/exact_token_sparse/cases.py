"""Named calls of ``exact_token_attention``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.kernels.attention.dense_attention.cases import qkv
from kernel_index.kernels.attention.exact_token_sparse.api import (
    BACKENDS,
    exact_token_attention,
    exact_token_attention_with_lse,
)
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed, tree_fields
from kernel_index.masks.doc_window_mask.mask import MaskContract


def tokens(m: Maker, *shape: int, keys: int) -> Tensor:
    """Indices of keys, the future among them, with duplicates and −1 in between."""
    return m.integers(-1, keys, *shape)


def call(m: Maker, t: int, s: int, h: int, k: int, d: int, n: int, dv: int | None = None, **more: Any) -> dict:
    return {**qkv(m, 2, t, s, h, k, d, dv), "indices": tokens(m, 2, t, k, n, keys=s), **more}


def _valid(m: Maker) -> dict[str, Any]:
    """Invalid entries hold an index out of range."""
    made = call(m, 7, 7, 4, 2, 8, 5)
    valid = m.integers(0, 3, 2, 7, 2, 5) > 0
    return {**made, "indices": torch.where(valid, made["indices"], 99).int(), "indices_valid": valid}


CASES = (
    Case("groups", "a selection for each KV head", lambda m: call(m, 6, 6, 4, 2, 8, 4)),
    Case("documents", "one selection for all heads, documents with padding, a window", lambda m: {
        **qkv(m, 2, 9, 9, 4, 2, 8), "indices": tokens(m, 2, 9, 6, keys=9),
        "mask": MaskContract(window=(4, 0), doc_ids=packed(9))}),
    Case("tree", "shared prompts: selected tokens beside the path are dropped; a window along it", lambda m: call(
        m, 12, 12, 4, 2, 8, 7, mask=MaskContract(window=(5, 0), **tree_fields(12)).to(m.device))),
    Case("everything", "all keys selected twice: dense attention", lambda m: {
        **qkv(m, 2, 9, 9, 2, 1, 8), "indices": torch.arange(9, device=m.device).repeat(2, 9, 2)}),
    Case("options", "softcap, scale, values of another size, T ≠ S, odd sizes", lambda m: call(
        m, 5, 11, 6, 3, 7, 4, 5, softcap=2.0, scale=0.7, mask=MaskContract(causal=False))),
    Case("validity", "int32, and no invalid entry is read", _valid),
    Case("sink", "a float32 sink for each head, documents with padding", lambda m: call(
        m, 9, 9, 4, 2, 8, 4, mask=MaskContract(doc_ids=packed(9)), sink=m.normal(4, dtype=torch.float32))),
    Case("no_picks", "a selection of no tokens: exactly 0", lambda m: call(m, 3, 3, 2, 1, 8, 0)),
    Case("no_queries", "no query", lambda m: call(m, 0, 5, 2, 1, 8, 2)),
)  # fmt: skip


def oracle_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    indices_valid: Tensor | None = None,
    mask: MaskContract | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query and one head at a time, over a Python set of keys; without a selection every key is in it."""
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    if indices is None:
        indices = torch.arange(keys).expand(batch, queries, keys)
    allowed = dense_oracle(mask or MaskContract(), batch, queries, keys)
    outs, lses = [], []
    for b in range(batch):
        for t in range(queries):
            for h in range(heads):
                kv_head = h * kv_heads // heads
                at = (b, t, kv_head) if indices.ndim == 4 else (b, t)
                row = indices[at] if indices_valid is None else indices[at][indices_valid[at]]
                seen = sorted({int(s) for s in row} - {-1})
                seen = [s for s in seen if allowed[b, t, s]]
                z = k[b, seen, kv_head] @ q[b, t, h] * (width**-0.5 if scale is None else scale)
                z = softcap * (z / softcap).tanh() if softcap else z
                logits = torch.cat([z, sink[h : h + 1].to(z.dtype)]) if sink is not None and seen else z
                outs.append(logits.softmax(0)[: len(seen)] @ v[b, seen, kv_head])
                lses.append(logits.logsumexp(0))
    nothing = (q.sum() + k.sum() + v.sum()) * 0.0  # so that a call without a selection has a gradient too
    shape = (batch, queries, heads, v.shape[3])
    if not outs:
        return nothing.expand(shape), nothing.expand(batch, heads, queries)
    lse_BTH = torch.stack(lses).view(shape[:3]).to(torch.promote_types(q.dtype, torch.float32))
    return torch.stack(outs).view(shape) + nothing, lse_BTH.transpose(1, 2)


def oracle(**call: Any) -> Tensor:
    return oracle_with_lse(**call)[0]


def sized(m: Maker, n: int) -> dict[str, Any]:
    return {**qkv(m, 1, n, n, 2, 1, 8), "indices": m.integers(0, n, 1, n, 3)}


def real(m: Maker, width: int = 128) -> dict[str, Any]:
    """A layer of production size; what it moves depends on the selection, so no compulsory bytes are stated."""
    return {**qkv(m, 1, 8192, 8192, 32, 4, width), "indices": m.integers(0, 8192, 1, 8192, 4, 512)}


# Backward takes δ from the rounded output and dp from v, as in dense attention: two dot products of D = 8 terms, each
# rounded by 1 + log2(D) units, where the plain formula of a single key has exactly 0.  It forms p again from the
# log-sum-exp: both are up to 4 here and off by half a unit of themselves, in base 2 by 4·log2(e) ≈ 6 together.
UNITS = {"triton": 2.0 * (1 + 3) + 6, "cpu": 2.0 * (1 + 3) + 6, "native": 2.0 * (1 + 3)}
"""``native`` keeps row maxima and sums instead, as that of dense attention."""

SUITES = (
    Suite(
        op="exact_token_attention", function=exact_token_attention, backends=BACKENDS, cases=CASES,
        differentiable=("q", "k", "v", "sink"), oracle=oracle, sized=sized,
        scales=(1e-3, 1.0, 16.0),  # as in dense attention
        rounding=("triton", "native", "cpu"), real=real, units=UNITS,
    ),
    Suite(
        op="exact_token_attention_with_lse", function=exact_token_attention_with_lse, backends=BACKENDS,
        cases=tuple(c for c in CASES if c.name in ("groups", "options", "sink", "no_picks")),
        differentiable=("q", "k", "v", "sink"), oracle=oracle_with_lse, sized=sized,
        scales=(1e-3, 1.0, 16.0), rounding=("triton", "native", "cpu"), units=UNITS, real=lambda m: real(m, 64),
    ),
)  # fmt: skip
