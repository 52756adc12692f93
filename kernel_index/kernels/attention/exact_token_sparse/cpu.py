"""Exact-token attention on the CPU: 64 queries at a time, over the union of the tokens that they selected.

The queries of a chunk select many of the same tokens, so their union is fetched once, and each query masks the tokens
that only its neighbours selected.  Scores of a chunk are one matrix product; query by query they would be as many
products of a few rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.attention_function import (
    Backward,
    Forward,
    Gradients,
    Passes,
    add_sink,
    attend,
    delta_of,
    gradient_of_sink,
)
from kernel_index.core.excluded import guarded, guarded_backward, sight_of_blocks
from kernel_index.kernels.attention.exact_token_sparse.contract import ExactTokenCall, Scoring
from kernel_index.kernels.sparse.row_gather.api import GIANT, gather_eager

CHUNK = 64
"""Queries that are staged together."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Stage(NamedTuple):
    """One row of the batch, its queries ``t``, query heads ``h`` and KV heads ``p``; the staged keys and values.

    ``k`` and ``v`` are [U, heads, D]; ``rows`` int64 [U], ascending, says where they come from; ``bias`` [queries, U]
    is 0 for the tokens that a query selected and −∞ for the others; ``empty`` bool [queries] marks a query without one.
    """

    b: int
    t: slice
    h: slice
    p: slice
    rows: Tensor
    bias: Tensor
    empty: Tensor
    k: Tensor
    v: Tensor


def stages(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor
) -> Iterator[Stage]:
    """The chunks with at least one selected token, in a fixed order."""
    batch, queries, heads, _ = q.shape
    kv_heads, shared = k.shape[2], indices.shape[2]
    q_heads, served = heads // shared, kv_heads // shared  # heads of a selection
    step = max(1, min(CHUNK, GIANT // max(1, indices.shape[3])))
    low, high = start.tolist(), end.tolist()
    for b in range(batch):
        row = b if start.shape[0] > 1 else 0
        for t0 in range(0, queries, step):
            t = slice(t0, min(t0 + step, queries))
            first, last = low[row][t.start], high[row][t.stop - 1]
            if first >= last:
                continue
            bounds = start[row, t, None], end[row, t, None]
            for p in range(shared):
                is_selected = (indices[b, t, p] >= bounds[0]) & (indices[b, t, p] < bounds[1])
                if valid is not None:
                    is_selected &= valid[b, t, p]
                rows, bias = _union(indices[b, t, p], is_selected, first, last, q.dtype)
                if rows.shape[0] == 0:
                    continue
                kv = slice(p * served, (p + 1) * served)
                staged = gather_eager(k[b, :, kv], v[b, :, kv], rows)
                yield Stage(b, t, slice(p * q_heads, (p + 1) * q_heads), kv, rows, bias, ~is_selected.any(1), *staged)


def _union(indices: Tensor, is_selected: Tensor, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys in ``first … last − 1`` that some query selected, and the bias; costs O(entries + keys)."""
    nothing = last - first  # one column more, for entries that select nothing
    key = torch.where(is_selected, indices.long() - first, nothing)
    member = key.new_zeros(nothing + 1, dtype=torch.bool).index_fill_(0, key.flatten(), True)
    member[nothing] = False
    union = member.nonzero()[:, 0]
    column = key.new_full((nothing + 1,), union.shape[0])
    column[union] = torch.arange(union.shape[0], device=key.device)
    bias = key.new_full((key.shape[0], union.shape[0] + 1), -torch.inf, dtype=dtype)
    return union + first, bias.scatter_(1, column[key], 0.0)[:, :-1]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1)[None] for x in tensors]


def _as_rows(x: Tensor, heads: int) -> Tensor:
    """[n, H, D] as [1, K, G·n, D]: the query heads of a KV head are further rows of it."""
    return x.unflatten(1, (heads, x.shape[1] // heads)).permute(1, 2, 0, 3).flatten(1, 2)[None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _lse(q: Tensor) -> Tensor:
    return _wide(q).new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), _lse(q)
    q = q if q.stride(-1) == 1 else q.contiguous()
    kernel_takes = softcap == 0 and q.shape[3] == v.shape[3]
    for s in stages(q, k, v, indices, valid, start, end):
        q_part = q[s.b, s.t, s.h]
        if kernel_takes:
            heads = _heads_first(q_part, s.k, s.v)
            parts = _flash(*heads, 0.0, False, attn_mask=s.bias[None, None], scale=scale)
            part, of_part = parts[0][0].transpose(0, 1), parts[1][0]
        else:
            part, of_part = _attend(q_part, s.k, s.v, s.bias, scale, softcap)
        out[s.b, s.t, s.h] = part.masked_fill(s.empty[:, None, None], 0.0).to(q.dtype)
        lse[s.b, s.h, s.t] = of_part.masked_fill(s.empty, -torch.inf)
    return out, lse


def _run_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, indices: Tensor,
    valid: Tensor | None, start: Tensor, end: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def run(given: Backward) -> Gradients:
        return _staged_gradients(given, lse, indices, valid, start, end, scale, softcap)

    given = Backward(d_out, d_lse, q, k, v, None, out, (), (True, True, True, False))
    found = guarded_backward(run, lambda: sight_of_blocks(indices, valid, 1, start, end), given)
    return found.q, found.k, found.v  # type: ignore[return-value]  # a gradient for each


def _staged_gradients(
    given: Backward, lse: Tensor, indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor, scale: float,
    softcap: float,
) -> Gradients:  # fmt: skip
    """dK and dV are added up chunk by chunk in float32 at least: the same order, and so the same bits, every time."""
    d_out, d_lse, q, k, v, _, out = given[:7]
    d_q = q.new_zeros(q.shape)
    d_k, d_v = (x.new_zeros(x.shape, dtype=_wide(x[:0]).dtype) for x in (k, v))
    q = q if q.stride(-1) == 1 else q.contiguous()
    lse = lse.masked_fill(~lse.isfinite(), torch.inf)  # empty rows: lse = +inf makes exp(z − lse) = 0
    # PyTorch's kernel has no gradient of the log-sum-exp.
    kernel_takes = softcap == 0 and q.shape[3] == v.shape[3] and d_lse is None
    delta = None if kernel_takes else delta_of(given)
    for s in stages(q, k, v, indices, valid, start, end):
        q_part, up, result, of_part = q[s.b, s.t, s.h], d_out[s.b, s.t, s.h], out[s.b, s.t, s.h], lse[s.b, s.h, s.t]
        if delta is None:
            # One head of many rows takes half the time of many heads with the same keys; in forward it does not.
            heads, group = s.k.shape[1], q_part.shape[1] // s.k.shape[1]
            up, rows, result = (_as_rows(x, heads) for x in (up, q_part, result))
            staged = _heads_first(s.k, s.v)
            bias = s.bias.repeat(group, 1)[None, None]
            of_rows = of_part.reshape(1, heads, -1)
            grads = _flash_backward(up, rows, *staged, result, of_rows, 0.0, False, attn_mask=bias, scale=scale)
            d_rows = [g[0].transpose(0, 1) for g in grads]
            d_rows[0] = grads[0][0].unflatten(1, (group, q_part.shape[0])).permute(2, 0, 1, 3).flatten(1, 2)
        else:
            d_rows = _gradients(up, q_part, s.k, s.v, of_part, delta[s.b, s.h, s.t], s.bias, scale, softcap)
        d_q[s.b, s.t, s.h] = d_rows[0].to(q.dtype)
        for total, part in zip((d_k, d_v), d_rows[1:], strict=True):
            total[s.b, :, s.p].index_add_(0, s.rows, part.to(total.dtype))  # every row of a union occurs once
    return Gradients(d_q, d_k.to(k.dtype), d_v.to(v.dtype))


def _by_kv_head(x: Tensor, heads: int) -> Tensor:
    """[n, H, D] as [K, G, n, D], at least float32."""
    return _wide(x).unflatten(1, (heads, x.shape[1] // heads)).permute(1, 2, 0, 3)


def _scores(q_KGTD: Tensor, k_KUD: Tensor, bias: Tensor, scale: float, softcap: float) -> Tensor:
    z = torch.einsum("kgtd,kud->kgtu", q_KGTD, k_KUD).mul_(scale)
    if softcap:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z.add_(bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The formula, for a softcap and for values of another size than the keys."""
    k_KUD, v_KUD = (_wide(x).transpose(0, 1) for x in (k, v))
    z = _scores(_by_kv_head(q, k.shape[1]), k_KUD, bias, scale, softcap)
    lse = z.logsumexp(-1, keepdim=True)
    p = z.sub_(lse.masked_fill(lse.isneginf(), 0.0)).exp_()
    out = torch.einsum("kgtu,kud->tkgd", p, v_KUD).flatten(1, 2)
    return out, lse.flatten(0, 1)[..., 0]


def _gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, bias: Tensor, scale: float,
    softcap: float,
) -> list[Tensor]:  # fmt: skip
    heads = k.shape[1]
    q_KGTD, up_KGTD = _by_kv_head(q, heads), _by_kv_head(d_out, heads)
    k_KUD, v_KUD = (_wide(x).transpose(0, 1) for x in (k, v))
    z = _scores(q_KGTD, k_KUD, bias, scale, softcap)
    lse, delta = (x.unflatten(0, (heads, -1))[..., None] for x in (lse, delta))
    p = torch.exp(z - lse)
    d_z = torch.einsum("kgtd,kud->kgtu", up_KGTD, v_KUD).sub_(delta).mul_(p)
    if softcap:
        d_z.mul_(1 - (z / softcap).square_())
    d_z.mul_(scale).masked_fill_(bias.isneginf(), 0.0)  # p is 0 there, but the capped score −∞
    d_q = torch.einsum("kgtu,kud->tkgd", d_z, k_KUD).flatten(1, 2)
    return [d_q, torch.einsum("kgtu,kgtd->ukd", d_z, q_KGTD), torch.einsum("kgtu,kgtd->ukd", p, up_KGTD)]


def _fake_forward(q, k, v, *_):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, _wide(q.new_empty(0)).new_empty(q.shape[0], q.shape[2], q.shape[1])


def _fake_backward(d_out, d_lse, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_CALL = "Tensor indices, Tensor? valid, Tensor start, Tensor end, float scale, float softcap"
_forward_op = ops.register(
    f"exact_token_staged(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)", _run_forward, _fake_forward,
    ("CPU",),
)  # fmt: skip
_backward_op = ops.register(
    f"exact_token_staged_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    ("CPU",),
)


class _Statics(NamedTuple):
    scoring: Scoring
    with_lse: bool


def _forward(
    statics: _Statics, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, start: Tensor, end: Tensor,
    indices: Tensor, *valid: Tensor,
) -> Forward:  # fmt: skip
    selection = (indices, valid[0] if valid else None, start, end)
    out, lse = _forward_op(q, k, v, *selection, *statics.scoring)
    if sink is not None:
        lse, _ = add_sink(out, lse, sink)
    return Forward(out, lse, (lse, *selection))


def _backward(statics: _Statics, given: Backward) -> Gradients:
    if not statics.with_lse:  # torch.compile makes zeros of the gradient of what is not handed out
        given = given._replace(d_lse=None)
    tensors = given.d_out, given.d_lse, given.q, given.k, given.v, given.out, *given.saved
    d_sink = gradient_of_sink(given, given.saved[0], delta_of(given)) if given.needs[3] else None
    d_q, d_k, d_v = _backward_op(*tensors, *statics.scoring)
    return Gradients(d_q, d_k, d_v, d_sink)


PASSES = Passes("the cpu backend of exact_token_attention", _forward, _backward)


@guarded
def exact_token_cpu(call: ExactTokenCall) -> tuple[Tensor, Tensor]:
    return attend(PASSES, _Statics(call.scoring, call.with_lse), call.q, call.k, call.v, call.sink, *call.selection)
