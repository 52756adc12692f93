"""Block-sparse attention on the CPU in C++: by key block, as ``cpu``, with scores that never leave a core's cache.

Queries are cut into chunks whose float32 sums fit the L2 cache.  A chunk sorts its own picks by block and walks over
the blocks: up to 64 rows are gathered, multiplied with the block's keys, turned into weights by an online softmax,
multiplied with its values, and added to their sums.  Nothing else is planned, and nothing is kept.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import native
from kernel_index.kernels.sparse.block_sparse_attention.contract import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.intervals import Intervals
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps

SOURCE = Path(__file__).with_name("block_sparse.cpp")


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selected: Tensor,
        bounds: Intervals,
        block_size: int,
        scoring: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, rows = q.new_empty(*q.shape[:3], v.shape[3]), (q.shape[0], q.shape[2], q.shape[1])
        lse, peaks, shares = (q.new_empty(rows, dtype=torch.float32) for _ in range(3))
        _call("forward", (q, k, v), selected, bounds, block_size, scoring, q, k, v, out, lse, peaks, shares)
        ctx.save_for_backward(q, k, v, out, peaks, shares, selected, *bounds)
        ctx.statics = block_size, scoring
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the native backend of block_sparse_attention cannot differentiate twice: use backend='reference'"
            )
        q, k, v, out, peaks, shares, selected, *bounds = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        delta = (d_out.to(torch.float32) * out).sum(-1)
        delta = delta if d_lse is None else delta - d_lse.transpose(1, 2)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        tensors = (d_out, q, k, v, peaks, shares, delta.contiguous(), d_q, d_k, d_v)
        _call("backward", (q, k, v), selected, Intervals(*bounds), *ctx.statics, *tensors)
        return d_q, d_k, d_v, None, None, None, None


def _call(
    what: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    selected: Tensor,
    bounds: Intervals,
    block_size: int,
    scoring: tuple[float, float],
    *tensors: Tensor,
) -> None:
    q, k, v = qkv
    (batch, queries, heads, width), (keys, kv_heads) = q.shape, k.shape[1:3]
    block_size = min(block_size, max(keys, 1))  # one block that holds all is as long as they are
    sizes = (batch, queries, keys, heads, kv_heads, selected.shape[2], width, v.shape[3], selected.shape[3], block_size)
    sizes = (*sizes, bounds.start.shape[0], torch.get_num_threads())
    function = f"block_sparse_{what}_{native.suffix(q.dtype)}"
    native.call(SOURCE, function, sizes, scoring, selected, *bounds, *tensors)


def block_sparse_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    selected_valid: Tensor | None,
    block_size: int,
    mask: MaskContract,
    scale: float | None,
    softcap: float,
    query_tile_size: int,
    maps: UnionMaps | None,
) -> tuple[Tensor, Tensor]:
    picks = selected if selected_valid is None else torch.where(selected_valid, selected, -1)
    bounds = Intervals(*(x.to(torch.int32).contiguous() for x in mask.row_intervals(sizes_of(q, k, mask))))
    scoring = (scale_of(q, scale), softcap)
    return _BlockSparse.apply(q, k, v, picks.to(torch.int32).contiguous(), bounds, block_size, scoring)
