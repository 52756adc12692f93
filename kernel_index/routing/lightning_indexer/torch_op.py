"""The registered ops of the indexer, and the gradient of its scores, which ``native`` and ``chunked`` share."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.autocast import without_autocast
from kernel_index.core.numerics import is_invariant
from kernel_index.core.rules import wants_gradient
from kernel_index.core.triton import launch
from kernel_index.routing.lightning_indexer import chunked
from kernel_index.routing.lightning_indexer.contract import IndexerCall, LossCall
from kernel_index.routing.lightning_indexer.native import native_topk
from kernel_index.routing.lightning_indexer.rows import rows_topk
from kernel_index.routing.lightning_indexer.selection import TokenSelection, replayed

_EVERYWHERE = ("CompositeExplicitAutograd",)
_topk_op = ops.register(
    "lightning_topk(Tensor q, Tensor k, Tensor weights, Tensor start, Tensor end, SymInt topk, SymInt offset, "
    "SymInt left, SymInt right) -> (Tensor, Tensor)",
    chunked.run_topk,
    chunked.allocate_topk,
    _EVERYWHERE,
)
_native_topk_op = ops.register(
    "lightning_topk_native(Tensor q, Tensor k, Tensor weights, Tensor start, Tensor end, SymInt topk) "
    "-> (Tensor, Tensor)",
    native_topk,
    chunked.allocate_topk,
    ("CPU",),
)
_rows_topk_op = ops.register(
    "lightning_topk_rows(Tensor q, Tensor k, Tensor weights, Tensor start, Tensor end, SymInt topk) "
    "-> (Tensor, Tensor)",
    rows_topk,
    chunked.allocate_topk,
    ("CPU",),
)


def _launch_rows_topk(q, k, weights, start, end, topk):
    from kernel_index.core.device_products import launch_rows

    return rows_topk(q, k, weights, start, end, topk, launch_rows)


_device_rows_topk_op = ops.register(
    "lightning_topk_device_rows(Tensor q, Tensor k, Tensor weights, Tensor start, Tensor end, SymInt topk) "
    "-> (Tensor, Tensor)",
    _launch_rows_topk,
    chunked.allocate_topk,
)


def _launch_topk(q, k, weights, start, end, topk):
    from kernel_index.routing.lightning_indexer import triton_best

    q, k = map(launch.dense_heads, (q, k))
    outputs = chunked.allocate_topk(q, k, weights, start, end, topk)
    return triton_best.best(q, k, weights, start.contiguous(), end.contiguous(), topk, outputs)


_triton_topk_op = ops.register(
    "lightning_topk_triton(Tensor q, Tensor k, Tensor weights, Tensor start, Tensor end, SymInt topk) "
    "-> (Tensor, Tensor)",
    _launch_topk,
    chunked.allocate_topk,
)
_scores_op = ops.register(
    "lightning_scores(Tensor q, Tensor k, Tensor weights, Tensor indices) -> Tensor",
    chunked.run_scores,
    chunked.allocate_scores,
    _EVERYWHERE,
)
_backward_op = ops.register(
    "lightning_scores_backward(Tensor g, Tensor q, Tensor k, Tensor weights, Tensor indices) "
    "-> (Tensor, Tensor, Tensor)",
    chunked.run_backward,
    chunked.allocate_backward,
    _EVERYWHERE,
)


def _launch_backward(g, q, k, weights, indices):
    from kernel_index.routing.lightning_indexer import triton_backward

    outputs = chunked.allocate_backward(g, q, k, weights, indices)
    q, k = map(launch.dense_heads, (q, k))
    return triton_backward.backward(g.contiguous(), q, k, weights, indices.contiguous(), outputs)


_triton_backward_op = ops.register(
    "lightning_scores_triton_backward(Tensor g, Tensor q, Tensor k, Tensor weights, Tensor indices) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    chunked.allocate_backward,
)


class _Scores(torch.autograd.Function):
    """Scores that are known already, with the gradient of their formula at the selected tokens."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, weights: Tensor, indices: Tensor, known: Tensor | None, backward_op: Any
    ) -> Tensor:
        ctx.save_for_backward(q, k, weights, indices)
        ctx.op = backward_op
        return _scores_op(q, k, weights, indices) if known is None else known.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("lightning_indexer cannot differentiate twice: use backend='reference'")
        with without_autocast(g):  # for a backward() that is called inside of it
            return *ctx.op(g, *ctx.saved_tensors), None, None, None


def lightning_indexer_native(call: IndexerCall) -> TokenSelection:
    topk_op = _rows_topk_op if is_invariant() else _native_topk_op
    indices, scores = topk_op(*_detached(call), *call.intervals(), call.topk)
    return _selection(call, indices, scores)


def lightning_indexer_triton(call: IndexerCall) -> TokenSelection:
    topk_op = _device_rows_topk_op if is_invariant() else _triton_topk_op
    indices, scores = topk_op(*_detached(call), *call.intervals(), call.topk)
    return _selection(call, indices, scores, _triton_backward_op)


def lightning_indexer_chunked(call: IndexerCall) -> TokenSelection:
    start, end = call.intervals()
    if call.replay is not None:
        return _selection(call, replayed(call.replay, start, end), None)
    left, right = (-1 if side is None else side for side in call.mask.window_bounds)
    indices, scores = _topk_op(*_detached(call), start, end, call.topk, call.sizes.one_offset, left, right)
    return _selection(call, indices, scores if call.q.dtype != torch.float64 else None)  # they are float32


def _detached(call: IndexerCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.q.detach(), call.k.detach(), call.weights.detach()


def _selection(
    call: IndexerCall, indices: Tensor, scores: Tensor | None, backward_op: Any = _backward_op
) -> TokenSelection:
    """``scores`` are those of the indices where they are known already."""
    operands = (call.q, call.k, call.weights)
    if scores is not None and not wants_gradient(*operands):
        return TokenSelection(indices, indices >= 0, scores)
    return TokenSelection(indices, indices >= 0, ops.apply(_Scores, *operands, indices, scores, backward_op))


def _allocate_loss(scores, indices, valid, q, k, scale, softcap):
    return scores.new_empty(indices.shape[:2]), scores.new_empty(indices.shape)


def _launch_loss(scores, indices, valid, q, k, scale, softcap):
    from kernel_index.routing.lightning_indexer import triton_loss

    outputs = _allocate_loss(scores, indices, valid, q, k, scale, softcap)
    q, k = map(launch.dense_heads, (q, k))
    scores, indices, valid = (x.contiguous() for x in (scores, indices, valid))
    return triton_loss.loss_rows(scores, indices, valid, q, k, (scale, softcap), outputs)


_loss_op = ops.register(
    "lightning_loss_rows(Tensor scores, Tensor indices, Tensor valid, Tensor q, Tensor k, float scale, "
    "float softcap) -> (Tensor, Tensor)",
    _launch_loss,
    _allocate_loss,
)


class _Loss(torch.autograd.Function):
    """The mean divergence over the queries that selected something."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, *call: Any) -> Tensor:
        rows, grads = _loss_op(scores, *call)
        count = call[1].any(-1).sum().clamp(min=1)
        ctx.save_for_backward(grads, count)
        return rows.sum() / count

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("lightning_indexer_loss cannot differentiate twice: use backend='reference'")
        grads, count = ctx.saved_tensors
        return grads * (g / count), None, None, None, None, None, None


def loss_triton(call: LossCall) -> Tensor:
    selection, q, k, scale, softcap = call
    given = (selection.scores, selection.indices, selection.valid, q.detach(), k.detach(), float(scale), float(softcap))
    return ops.apply(_Loss, *given)
