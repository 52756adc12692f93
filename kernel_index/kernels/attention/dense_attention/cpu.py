"""Attention on the CPU, piece by piece: documents and windows cost what they contain, forward and backward.

Most pieces are calls of PyTorch's own CPU kernel.  Where that has no answer (softcap, values of another size than the
keys, a gradient of the log-sum-exp) the README's formula runs on pieces of at most ``QUERIES`` queries.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from kernel_index.kernels.attention.dense_attention.pieces import Piece, allowed_within, pieces_of
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.intervals import Intervals
from kernel_index.masks.doc_window_mask.mask import MaskContract

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        mask: MaskContract,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        sizes = sizes_of(q, k, mask)
        kernel_takes = softcap == 0 and q.shape[3] == v.shape[3]
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = _wide(q).new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
        bounds = mask.row_intervals(sizes)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        for piece in pieces_of(mask, sizes, whole=kernel_takes):
            b, t, s = piece[:3]
            call = q[b, t], k[b, s], v[b, s]
            if kernel_takes:
                parts = _flash(
                    *_heads_first(*call), 0.0, piece.kind == "causal", **_bias(piece, bounds, q), scale=scale
                )
                out[b, t], lse[b, :, t] = parts[0].transpose(1, 2), parts[1]
            else:
                out[b, t], lse[b, :, t] = _forward(*call, _allowed(piece, bounds), scale, softcap)
        lse.masked_fill_((bounds.start == bounds.end)[:, None], -torch.inf)
        if sink is not None:  # it joins the denominator of every query that has a key
            total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None]).masked_fill(lse.isneginf(), -torch.inf)
            share = torch.exp(lse - total).nan_to_num(0.0)  # −inf − (−inf): no key
            out = (out * share.transpose(1, 2)[..., None]).to(q.dtype)
            lse = total
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.mask, ctx.bounds, ctx.sizes, ctx.scale, ctx.softcap = mask, bounds, sizes, scale, softcap
        ctx.pieces = {whole: pieces_of(mask, sizes, whole=whole) for whole in {kernel_takes, False}}
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the cpu backend of attention cannot differentiate twice: use backend='reference'")
        q, k, v, sink, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        kernel_takes = True in ctx.pieces and d_lse is None
        # exp(z − ∞) = 0: what a query without keys sends backward, whatever the kernel makes of its scores
        lse = lse.masked_fill(lse.isneginf(), torch.inf)
        pieces = ctx.pieces[kernel_takes]
        wide = not _share_no_key(pieces)  # where sums meet, they meet in float32
        d_q, d_k, d_v = (_zeros(x, w) for x, w in ((q, False), (k, wide), (v, wide)))
        delta = lse.new_zeros(())  # PyTorch's kernel makes its own
        if sink is not None or not kernel_takes:
            delta = (_wide(out) * d_out).sum(-1).transpose(1, 2)
            delta = delta if d_lse is None else delta - d_lse
        for piece in pieces:
            b, t, s = piece[:3]
            call = q[b, t], k[b, s], v[b, s]
            if kernel_takes:
                up, *heads, result = _heads_first(d_out[b, t], *call, out[b, t])
                bias = _bias(piece, ctx.bounds, q)
                grads = _flash_backward(
                    up, *heads, result, lse[b, :, t], 0.0, piece.kind == "causal", **bias, scale=ctx.scale
                )
                grads = [g.transpose(1, 2) for g in grads]
            else:
                tail = lse[b, :, t], delta[b, :, t], _allowed(piece, ctx.bounds), ctx.scale, ctx.softcap
                grads = _backward(d_out[b, t], *call, *tail)
            d_q[b, t] = grads[0]
            d_k[b, s] += grads[1]
            d_v[b, s] += grads[2]
        d_sink = None
        if sink is not None and ctx.needs_input_grad[3]:
            d_sink = -(torch.exp(sink.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2)).to(sink.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sink, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _zeros(x: Tensor, wide: bool) -> Tensor:
    return torch.zeros_like(
        x, dtype=torch.promote_types(x.dtype, torch.float32) if wide else x.dtype, memory_format=torch.contiguous_format
    )


def _share_no_key(pieces: tuple[Piece, ...]) -> bool:
    """Pieces come in the order of their rows and queries, and so of their keys."""
    return all(a.batch != b.batch or a.k.stop <= b.k.start for a, b in itertools.pairwise(pieces))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _allowed(piece: Piece, bounds: Intervals) -> Tensor | None:
    return None if piece.kind == "full" else allowed_within(bounds, piece)


def _bias(piece: Piece, bounds: Intervals, q: Tensor) -> dict[str, Tensor]:
    """The kernel's additive mask; none where its own flag says it all."""
    if piece.kind != "masked":
        return {}
    allowed = allowed_within(bounds, piece)[:, None]
    return {"attn_mask": q.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)}


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """[1, n, H, D] as [K, G, n, D], at least float32."""
    return _wide(x)[0].unflatten(1, (heads, x.shape[2] // heads)).permute(1, 2, 0, 3)


def _scores(q_KGTD: Tensor, k_KSD: Tensor, allowed: Tensor | None, scale: float, softcap: float) -> Tensor:
    z = torch.einsum("kgtd,ksd->kgts", q_KGTD, k_KSD).mul_(scale)
    if softcap:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z if allowed is None else z.masked_fill_(~allowed, -torch.inf)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    heads = k.shape[2]
    k_KSD, v_KSD = (_wide(x)[0].transpose(0, 1) for x in (k, v))
    z = _scores(_by_key_head(q, heads), k_KSD, allowed, scale, softcap)
    lse = z.logsumexp(-1, keepdim=True)
    p = z.sub_(lse.masked_fill(lse.isneginf(), 0.0)).exp_()
    out = torch.einsum("kgts,ksd->tkgd", p, v_KSD)
    return out.flatten(1, 2)[None], lse.flatten(0, 1)[None, ..., 0]


def _backward(
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
    q_KGTD, d_out_KGTD = _by_key_head(q, heads), _by_key_head(d_out, heads)
    k_KSD, v_KSD = (_wide(x)[0].transpose(0, 1) for x in (k, v))
    lse, delta = (x[0].unflatten(0, (heads, -1))[..., None] for x in (lse, delta))
    z = _scores(q_KGTD, k_KSD, allowed, scale, softcap)
    p = torch.exp(z - lse)
    d_z = torch.einsum("kgtd,ksd->kgts", d_out_KGTD, v_KSD).sub_(delta).mul_(p)
    if softcap:  # where a score is forbidden p is 0 and the capped score −inf
        slope = 1 - (z / softcap).square_()
        d_z.mul_(slope if allowed is None else slope.masked_fill_(~allowed, 0.0))
    d_z.mul_(scale)
    d_q = torch.einsum("kgts,ksd->tkgd", d_z, k_KSD).flatten(1, 2)
    d_k = torch.einsum("kgts,kgtd->skd", d_z, q_KGTD)
    d_v = torch.einsum("kgts,kgtd->skd", p, d_out_KGTD)
    return d_q[None], d_k[None], d_v[None]


def attention_with_lse_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _Attention.apply(q, k, v, sink, mask, scale_of(q, scale), softcap)


def attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> Tensor:
    return attention_with_lse_cpu(q, k, v, mask, scale, softcap, sink)[0]
