"""Named calls of ``attention`` and ``attention_with_lse``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.kernels.attention.dense_attention.api import BACKENDS, attention, attention_with_lse
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.cases import CASES as MASKS
from kernel_index.masks.doc_window_mask.cases import dense_oracle, packed
from kernel_index.masks.doc_window_mask.mask import MaskContract


def qkv(m: Maker, b: int, t: int, s: int, h: int, k: int, d: int, dv: int | None = None) -> dict[str, Any]:
    """Scores grow with the square root of the maker's scale: beyond a few tens softmax only selects the largest."""
    k_BSKD = m.normal(b, s, k, d, scale=m.scale**-0.5)
    return {"q": m.normal(b, t, h, d), "k": k_BSKD, "v": m.normal(b, s, k, dv or d)}


def _transposed(m: Maker) -> dict[str, Any]:
    return {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in qkv(m, 2, 11, 11, 4, 2, 8).items()}


def _expanded(m: Maker) -> dict[str, Any]:
    kv = m.normal(2, 9, 1, 8).expand(2, 9, 4, 8)
    return {"q": m.normal(2, 9, 4, 8), "k": kv, "v": kv}


def _sink(m: Maker) -> dict[str, Any]:
    mask = MaskContract(doc_ids=packed(13))
    return {**qkv(m, 2, 13, 13, 4, 2, 8), "mask": mask, "sink": m.normal(4, dtype=torch.float32)}


EMPTY = attention_validity(valid_token_counts=[0, 5])

CASES = (
    *(
        Case(c.name, c.why, lambda m, c=c: {**qkv(m, 2, 13, 13, 4, 2, 8), "mask": c.build(13, 13)})
        for c in MASKS
        if c.name != "self_only"
    ),
    Case("default", "no mask given, one head", lambda m: qkv(m, 1, 7, 7, 1, 1, 16)),
    Case("decode", "one query at the end of the keys", lambda m: qkv(m, 2, 1, 17, 6, 2, 8)),
    Case("chunk", "the second chunk of a prefill: bottom-right", lambda m: qkv(m, 2, 5, 12, 4, 4, 8)),
    Case(
        "more_queries",
        "T > S: the first queries have no key",
        lambda m: {**qkv(m, 2, 12, 9, 4, 1, 8), "mask": MaskContract()},
    ),
    Case(
        "cross",
        "not causal, T ≠ S, values of another size, odd sizes",
        lambda m: {**qkv(m, 3, 5, 9, 6, 3, 7, 5), "mask": MaskContract(causal=False)},
    ),
    Case(
        "empty_rows",
        "a row without a token, a softcap and a scale",
        lambda m: {**qkv(m, 2, 8, 8, 2, 2, 4), "mask": MaskContract(validity=EMPTY), "softcap": 2.0, "scale": 0.7},
    ),
    Case("sink", "a float32 sink beside any dtype, documents, padding", _sink),
    Case(
        "heads_of_64",
        "the smallest head size of the kernels for Hopper",
        lambda m: {**qkv(m, 1, 12, 12, 2, 1, 64), "mask": MaskContract(doc_ids=packed(12)[:1])},
    ),
    Case("no_rows", "an empty batch", lambda m: qkv(m, 0, 5, 5, 2, 1, 8)),
    Case("no_queries", "no query", lambda m: qkv(m, 2, 0, 5, 2, 1, 8)),
    Case("no_keys", "no key: every row is empty", lambda m: {**qkv(m, 2, 3, 0, 2, 1, 8), "mask": MaskContract(False)}),
    Case("transposed", "heads before tokens in memory", _transposed),
    Case("expanded", "one KV head expanded to four, keys and values the same tensor", _expanded),
)


def oracle_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskContract | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One batch row at a time: torch's softmax over all keys and, last, the sink; K and V repeated for each head."""
    (batch, queries, heads, width), keys, groups = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    allowed_BTS = dense_oracle(mask or MaskContract(), batch, queries, keys)
    nothing = (q[:0].sum() + k[:0].sum() + v[:0].sum()).to(q.dtype)  # so that an empty batch has a gradient too
    outs, lses = [nothing.expand(0, queries, heads, v.shape[-1])], [nothing.expand(0, heads, queries)]
    for b in range(batch):
        k_SHD, v_SHD = (x[b].repeat_interleave(groups, 1) for x in (k, v))
        z_HTS = torch.einsum("thd,shd->hts", q[b], k_SHD) * (width**-0.5 if scale is None else scale)
        z_HTS = softcap * (z_HTS / softcap).tanh() if softcap else z_HTS
        z_HTS = z_HTS.masked_fill(~allowed_BTS[b], -torch.inf)
        last = -torch.inf if sink is None else sink.to(q.dtype)[:, None, None]
        z_HTS = torch.cat([z_HTS, z_HTS.new_zeros(heads, queries, 1) + last], -1)
        some_T = allowed_BTS[b].any(-1)
        opened = z_HTS.masked_fill(~some_T[:, None], 0.0)
        p_HTS = opened.softmax(-1).masked_fill(~some_T[:, None], 0.0)[..., :keys]
        outs.append(torch.einsum("hts,shd->thd", p_HTS, v_SHD)[None])
        lses.append(opened.logsumexp(-1).masked_fill(~some_T, -torch.inf)[None])
    return torch.cat(outs), torch.cat(lses).to(torch.promote_types(q.dtype, torch.float32))


def oracle(**call: Any) -> Tensor:
    return oracle_with_lse(**call)[0]


def sized(m: Maker, n: int) -> dict[str, Any]:
    return {**qkv(m, 2, n, n, 4, 2, 8), "mask": MaskContract(window=(5, 0), doc_ids=packed(n))}


def real(m: Maker, width: int) -> dict[str, Any]:
    """A local layer of production size; its bytes depend on the tiles, so no compulsory ones are stated."""
    return {**qkv(m, 1, 8192, 8192, 32, 8, width), "mask": MaskContract(window=(1023, 0))}


# At 300 scores pass 50, and a backward that recomputes probabilities from the log-sum-exp has lost that many units.
SCALES = (1e-3, 1.0, 16.0)

# Backward takes δ from the rounded output and dp from v, and p·(dp − δ) cancels: the two dot products of D = 8 terms
# are rounded apart, each by 1 + log2(D) units, where the plain formula has exactly 0 for a single key.  So does
# FlexAttention, whose float32 error on a GPU is largest in the case with D = 64.
UNITS = dict.fromkeys(("triton", "native"), 2.0 * (1 + 3)) | {"flex": 2.0 * (1 + 6)}

ROUNDING = tuple(b.name for b in BACKENDS if b.name != "reference")  # each rounds scores or weights to q's dtype

SUITES = (
    Suite(
        op="attention", function=attention, backends=BACKENDS, cases=CASES,
        differentiable=("q", "k", "v", "sink"), oracle=oracle, sized=sized,
        scales=SCALES, rounding=ROUNDING, real=lambda m: real(m, 128), units=UNITS,
    ),
    Suite(
        op="attention_with_lse", function=attention_with_lse,
        backends=tuple(b for b in BACKENDS if b.name not in ("sdpa", "varlen")), cases=CASES,
        differentiable=("q", "k", "v", "sink"), oracle=oracle_with_lse, sized=sized,  # they return no log-sum-exp
        scales=SCALES, rounding=ROUNDING, real=lambda m: real(m, 64), units=UNITS,
    ),
)  # fmt: skip
