"""The registered ops of the indexer, and the gradient of its scores, which ``native`` and ``chunked`` share."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.autocast import without_autocast
from kernel_index.core.numerics import is_invariant
from kernel_index.core.rules import wants_gradient
from kernel_index.routing.lightning_indexer import chunked
from kernel_index.routing.lightning_indexer.contract import IndexerCall
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


class _Scores(torch.autograd.Function):
    """Scores that are known already, with the gradient of their formula at the selected tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, weights: Tensor, indices: Tensor, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, weights, indices)
        return _scores_op(q, k, weights, indices) if known is None else known.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("lightning_indexer cannot differentiate twice: use backend='reference'")
        with without_autocast(g):  # for a backward() that is called inside of it
            return *_backward_op(g, *ctx.saved_tensors), None, None


def lightning_indexer_native(call: IndexerCall) -> TokenSelection:
    topk_op = _rows_topk_op if is_invariant() else _native_topk_op
    indices, scores = topk_op(*_detached(call), *call.intervals(), call.topk)
    return _selection(call, indices, scores)


def lightning_indexer_chunked(call: IndexerCall) -> TokenSelection:
    start, end = call.intervals()
    if call.replay is not None:
        return _selection(call, replayed(call.replay, start, end), None)
    left, right = (-1 if side is None else side for side in call.mask.window_bounds)
    indices, scores = _topk_op(*_detached(call), start, end, call.topk, call.sizes.one_offset, left, right)
    return _selection(call, indices, scores if call.q.dtype != torch.float64 else None)  # they are float32


def _detached(call: IndexerCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.q.detach(), call.k.detach(), call.weights.detach()


def _selection(call: IndexerCall, indices: Tensor, scores: Tensor | None) -> TokenSelection:
    """``scores`` are those of the indices where they are known already."""
    if scores is not None and not wants_gradient(call.q, call.k, call.weights):
        return TokenSelection(indices, indices >= 0, scores)
    return TokenSelection(indices, indices >= 0, ops.apply(_Scores, call.q, call.k, call.weights, indices, scores))
