"""The registered ops of the kernels that go by lists, and their autograd Function."""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan, allocate_list_plan, launch_of, list_plan


def dense_heads(x: Tensor) -> Tensor:
    """The kernels take any stride but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _allocate(q, k, v, order, items, parts, k_start, k_end, block_size, scale, softcap):
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _launch(q, k, v, order, items, parts, k_start, k_end, block_size, scale, softcap):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_lists

    outputs = _allocate(q, k, v, order, items, parts, k_start, k_end, block_size, scale, softcap)
    q, k, v = map(dense_heads, (q, k, v))
    how = launch_of("forward", q, k, v, block_size, scale, softcap)
    return triton_lists.forward(q, k, v, ListPlan(order, items, parts), (k_start, k_end), how, outputs)


def _allocate_backward(
    d_out, d_lse, q, k, v, out, log2_sum, order, items, parts, k_start, k_end, block_size, scale, softcap
):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _launch_backward(
    d_out, d_lse, q, k, v, out, log2_sum, order, items, parts, k_start, k_end, block_size, scale, softcap
):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_lists_backward

    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    d_out, q, k, v = map(dense_heads, (d_out, q, k, v))
    how = launch_of("backward", q, k, v, block_size, scale, softcap)
    plan, bounds = ListPlan(order, items, parts), (k_start, k_end)
    triton_lists_backward.backward(d_out, d_lse, q, k, v, out, log2_sum, plan, bounds, how, (d_q, d_k, d_v))
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


_plan_op = ops.register(
    "block_sparse_list_plan(Tensor selected, Tensor? selected_valid, SymInt num_blocks) -> (Tensor, Tensor, Tensor)",
    list_plan,
    allocate_list_plan,
)
_forward_op = ops.register(
    "block_sparse_lists(Tensor q, Tensor k, Tensor v, Tensor order, Tensor items, Tensor parts, Tensor k_start, "
    "Tensor k_end, int block_size, float? scale, float softcap) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_backward_op = ops.register(
    "block_sparse_lists_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor log2_sum, Tensor order, Tensor items, Tensor parts, Tensor k_start, Tensor k_end, int block_size, "
    "float? scale, float softcap) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_backward,
)


class _BlockSparseLists(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """``rest``: a ``ListPlan``, each query's interval of keys, then block size, scale and softcap."""
        ctx.set_materialize_grads(False)
        out, log2_sum = _forward_op(q, k, v, *rest)
        ctx.save_for_backward(q, k, v, out, log2_sum, *rest[:5])
        ctx.tail = rest[5:]
        return out, (log2_sum * math.log(2)).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the triton backend of block-sparse attention cannot differentiate twice: use backend='reference'"
            )
        q, k, v, out, *rest = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        return *_backward_op(d_out, d_lse, q, k, v, out, *rest, *ctx.tail), *[None] * 8


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    selected_valid: Tensor | None,
    num_blocks: int,
    bounds: tuple[Tensor, Tensor],
    block_size: int,
    scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``selected`` [B, T, H, n] of blocks of at most ``lists.STEP`` keys."""
    with torch.no_grad():
        plan = _plan_op(selected, selected_valid, num_blocks)
    return _BlockSparseLists.apply(q, k, v, *plan, *bounds, block_size, scale, softcap)
