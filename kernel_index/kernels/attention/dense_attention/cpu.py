"""Attention on the CPU, rectangle by rectangle: documents and windows cost what they contain, forward and backward.

Most rectangles are calls of PyTorch's own CPU kernel.  What that kernel lacks (softcap, values of another size than the
keys, a gradient of the log-sum-exp) runs by the README's formula, on rectangles of at most ``QUERIES`` queries.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend, delta_of, sink_gradient
from kernel_index.core.excluded import guarded, guarded_backward
from kernel_index.core.triton.launch import dense_heads
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse, sight_of
from kernel_index.kernels.attention.dense_attention.rectangles import (
    Rectangle,
    allowed_within,
    rectangles_of,
    tree_pieces,
)
from kernel_index.masks.attention_arguments import scale_of
from kernel_index.masks.doc_window_mask.intervals import RowBounds

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Plan(NamedTuple):
    """``rectangles`` for PyTorch's kernel, where it takes the call, and for the formula.

    ``in_pieces``: those for the kernel are the pieces of a tree, of which several have the same queries.
    """

    bounds: RowBounds
    for_kernel: tuple[Rectangle, ...] | None
    for_formula: Callable[[], tuple[Rectangle, ...]]
    in_pieces: bool
    scale: float
    softcap: float


def _forward(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Forward:
    out = (_wide(q) if plan.in_pieces else q).new_zeros(*q.shape[:3], v.shape[3])
    lse = _wide(q).new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    bounds = plan.bounds
    q, k, v = map(dense_heads, (q, k, v))
    for rectangle in plan.for_formula() if plan.for_kernel is None else plan.for_kernel:
        b, t, s = rectangle[:3]
        tiles = q[b, t], k[b, s], v[b, s]
        if plan.for_kernel is not None:
            causal, bias = rectangle.kind == "causal", _bias(rectangle, bounds, q)
            found = _flash(*_heads_first(*tiles), 0.0, causal, **bias, scale=plan.scale)
            part = found[0].transpose(1, 2), found[1]
            out[b, t], lse[b, :, t] = _merged(out[b, t], lse[b, :, t], *part) if plan.in_pieces else part
        else:
            out[b, t], lse[b, :, t] = _attend(*tiles, _allowed(rectangle, bounds), plan.scale, plan.softcap)
    lse.masked_fill_((bounds.start == bounds.end)[:, None], -torch.inf)
    if sink is not None:  # the sink logit is a term of the denominator of every query that has a key
        with_sink = torch.logaddexp(lse, sink.to(lse.dtype)[:, None]).masked_fill(lse.isneginf(), -torch.inf)
        alpha = torch.exp(lse - with_sink).nan_to_num(0.0)  # −inf − (−inf): no key
        out, lse = (out * alpha.transpose(1, 2)[..., None]).to(q.dtype), with_sink
    out = out.to(q.dtype)
    return Forward(out, lse, (lse,))


def _merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from attention to each; −∞ is the log-sum-exp of no key."""
    both = torch.logaddexp(lse, part_lse)
    share, part_share = (
        torch.exp(x - both).nan_to_num(0.0).transpose(1, 2)[..., None] for x in (lse, part_lse)
    )  # −inf − (−inf): no key in either
    return out * share + part * part_share, both


def _backward(plan: _Plan, given: Backward) -> Gradients:
    return guarded_backward(functools.partial(_run_backward, plan), lambda: sight_of(plan.bounds), given)


def _run_backward(plan: _Plan, given: Backward) -> Gradients:
    q, k, v, out, d_out = given.q, given.k, given.v, given.out, given.d_out.contiguous()
    q, k, v = map(dense_heads, (q, k, v))
    by_kernel = plan.for_kernel is not None and given.d_lse is None
    # Empty rows, and rows that overflow: lse = +inf makes exp(z − lse) = 0, so they contribute no gradient, whatever
    # the kernel's scores are.
    lse = given.saved[0].masked_fill(~given.saved[0].isfinite(), torch.inf)
    rectangles = plan.for_kernel if plan.for_kernel is not None and by_kernel else plan.for_formula()
    wide = not _share_no_key(rectangles)  # sums over several rectangles are in float32
    d_q, d_k, d_v = (_zeros(x, w) for x, w in ((q, plan.in_pieces), (k, wide), (v, wide)))
    delta = delta_of(given) if given.sink is not None or not by_kernel else lse.new_zeros(())
    for rectangle in rectangles:
        b, t, s = rectangle[:3]
        tiles = q[b, t], k[b, s], v[b, s]
        if by_kernel:  # it computes δ itself
            up, *heads, result = _heads_first(d_out[b, t], *tiles, out[b, t])
            causal, bias = rectangle.kind == "causal", _bias(rectangle, plan.bounds, q)
            found = _flash_backward(up, *heads, result, lse[b, :, t], 0.0, causal, **bias, scale=plan.scale)
            found = [g.transpose(1, 2) for g in found]
        else:
            allowed = _allowed(rectangle, plan.bounds)
            found = _gradients(d_out[b, t], *tiles, lse[b, :, t], delta[b, :, t], allowed, plan.scale, plan.softcap)
        d_q[b, t] = d_q[b, t] + found[0] if plan.in_pieces else found[0]
        d_k[b, s] += found[1]
        d_v[b, s] += found[2]
    d_sink = None
    if given.sink is not None and given.needs[3]:
        d_sink = sink_gradient(given, torch.exp(given.sink.to(lse.dtype)[:, None] - lse), delta)
    return Gradients(d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_sink)


PASSES = Passes("the cpu backend of attention", _forward, _backward)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _zeros(x: Tensor, wide: bool) -> Tensor:
    return torch.zeros_like(
        x, dtype=torch.promote_types(x.dtype, torch.float32) if wide else x.dtype, memory_format=torch.contiguous_format
    )


def _share_no_key(rectangles: tuple[Rectangle, ...]) -> bool:
    """Pieces come in the order of their rows and queries, and so of their keys, but in a tree."""
    return all(
        a.batch != b.batch or (isinstance(a.k, slice) and isinstance(b.k, slice) and a.k.stop <= b.k.start)
        for a, b in itertools.pairwise(rectangles)
    )


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _allowed(rectangle: Rectangle, bounds: RowBounds) -> Tensor | None:
    return None if rectangle.kind == "full" else allowed_within(bounds, rectangle)


def _bias(rectangle: Rectangle, bounds: RowBounds, q: Tensor) -> dict[str, Tensor]:
    """The kernel's additive mask; none where a flag of the kernel suffices."""
    if rectangle.kind != "masked":
        return {}
    allowed = allowed_within(bounds, rectangle)[:, None]
    return {"attn_mask": q.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)}


def _by_kv_head(x: Tensor, heads: int) -> Tensor:
    """[1, n, H, D] as [K, G, n, D], at least float32."""
    return _wide(x)[0].unflatten(1, (heads, x.shape[2] // heads)).permute(1, 2, 0, 3)


def _scores(q_KGTD: Tensor, k_KSD: Tensor, allowed: Tensor | None, scale: float, softcap: float) -> Tensor:
    z = torch.einsum("kgtd,ksd->kgts", q_KGTD, k_KSD).mul_(scale)
    if softcap:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z if allowed is None else z.masked_fill_(~allowed, -torch.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    heads = k.shape[2]
    k_KSD, v_KSD = (_wide(x)[0].transpose(0, 1) for x in (k, v))
    z = _scores(_by_kv_head(q, heads), k_KSD, allowed, scale, softcap)
    lse = z.logsumexp(-1, keepdim=True)
    p = z.sub_(lse.masked_fill(lse.isneginf(), 0.0)).exp_()
    out = torch.einsum("kgts,ksd->tkgd", p, v_KSD)
    return out.flatten(1, 2)[None], lse.flatten(0, 1)[None, ..., 0]


def _gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    allowed: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = k.shape[2]
    q_KGTD, d_out_KGTD = _by_kv_head(q, heads), _by_kv_head(d_out, heads)
    k_KSD, v_KSD = (_wide(x)[0].transpose(0, 1) for x in (k, v))
    lse, delta = (x[0].unflatten(0, (heads, -1))[..., None] for x in (lse, delta))
    z = _scores(q_KGTD, k_KSD, allowed, scale, softcap)
    p = torch.exp(z - lse)
    d_z = torch.einsum("kgtd,ksd->kgts", d_out_KGTD, v_KSD).sub_(delta).mul_(p)
    if softcap:
        d_z.mul_(1 - (z / softcap).square_())
    d_z.mul_(scale)
    if allowed is not None:  # p is 0 there, but the capped score −inf, and d_out·v may overflow
        d_z.masked_fill_(~allowed, 0.0)
    d_q = torch.einsum("kgts,ksd->tkgd", d_z, k_KSD).flatten(1, 2)
    d_k = torch.einsum("kgts,kgtd->skd", d_z, q_KGTD)
    d_v = torch.einsum("kgts,kgtd->skd", p, d_out_KGTD)
    return d_q[None], d_k[None], d_v[None]


@guarded
def attention_cpu(call: AttentionCall) -> OutAndLse:
    q, k, v, sizes = call.q, call.k, call.v, call.sizes
    by_kernel = call.softcap == 0 and q.shape[3] == v.shape[3]
    pieces = tree_pieces(call.mask, sizes) if by_kernel else ()
    plan = _Plan(
        call.mask.row_bounds(sizes),
        pieces or (rectangles_of(call.mask, sizes, whole=True) if by_kernel else None),
        functools.partial(rectangles_of, call.mask, sizes, whole=False),
        bool(pieces),
        scale_of(q, call.scale),
        call.softcap,
    )
    return attend(PASSES, plan, q, k, v, call.sink)
