"""Attention on the CPU in C++: a tile of scores never leaves a core's cache, and only keys that somebody sees are read.

64 queries of one head meet the keys of their intervals in blocks of 128; an online softmax stands between the two
products.  Backward recomputes the weights from each row's peak and sum, and makes five products of a tile; key and
value gradients are summed in a fixed number of lanes, so that results do not depend on the number of threads.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract

SOURCE = Path(__file__).with_name("attention.cpp")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        bounds: tuple[Tensor, Tensor],
        scoring: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k, v = (x.contiguous() for x in (q, k, v))
        heads = q.shape[2]
        single = q.new_empty(0, dtype=torch.float32)
        joins = single.new_full((heads,), -torch.inf) if sink is None else native.floats(sink.detach())
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse, peaks, shares = (single.new_empty(q.shape[0], heads, q.shape[1]) for _ in range(3))
        _call("forward", (q, k, v), bounds, scoring, q, k, v, joins, out, lse, peaks, shares)
        ctx.save_for_backward(q, k, v, sink, out, peaks, shares, *bounds)
        ctx.scoring = scoring
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the native backend of attention cannot differentiate twice: use backend='reference'")
        q, k, v, sink, out, peaks, shares, *bounds = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        delta = (d_out.to(torch.float32) * out).sum(-1).transpose(1, 2)
        delta = (delta if d_lse is None else delta - d_lse).contiguous()
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        _call("backward", (q, k, v), bounds, ctx.scoring, d_out, q, k, v, peaks, shares, delta, d_q, d_k, d_v)
        d_sink = None
        if sink is not None and ctx.needs_input_grad[3]:
            share = torch.exp(sink.to(torch.float32)[:, None] - peaks) * shares
            d_sink = -(share * delta).sum((0, 2)).to(sink.dtype)
        return d_q, d_k, d_v, d_sink, None, None


def _call(
    what: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    bounds: Any,
    scoring: tuple[float, float],
    *tensors: Tensor,
) -> None:
    q, k, v = qkv
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], v.shape[3], bounds[0].shape[0])
    function = f"attention_{what}_{native.suffix(q.dtype)}"
    native.call(SOURCE, function, (*sizes, torch.get_num_threads()), scoring, *bounds, *tensors)


def attention_with_lse_native(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    bounds = tuple(x.contiguous() for x in mask.row_intervals(sizes_of(q, k, mask)))
    return _Attention.apply(q, k, v, sink, bounds, (scale_of(q, scale), softcap))


def attention_native(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> Tensor:
    return attention_with_lse_native(q, k, v, mask, scale, softcap, sink)[0]
