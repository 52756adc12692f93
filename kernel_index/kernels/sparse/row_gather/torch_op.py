"""The autograd Function of the row gathers: by ``index_select``, and by the registered ops of ``triton``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.rows import add_up
from kernel_index.core.triton import launch


def _allocate(a, b, idx):
    """A second tensor that is not asked for is empty: an op's outputs have a fixed number."""
    rows = idx.shape[0]
    return a.new_empty((rows, *a.shape[1:])), a.new_empty((0,)) if b is None else b.new_empty((rows, *b.shape[1:]))


def _launch(a, b, idx):
    from kernel_index.kernels.sparse.row_gather import triton

    outputs = _allocate(a, b, idx)
    triton.gather(a, b, idx.contiguous(), *outputs)
    return outputs


def _allocate_sums(g, h, idx, rows):
    return tuple(idx.new_empty((0,)) if t is None else t.new_empty((rows, *t.shape[1:])) for t in (g, h))


def _launch_sums(g, h, idx, rows):
    from kernel_index.kernels.sparse.row_gather import triton

    outputs = _allocate_sums(g, h, idx, rows)
    g, h = launch.dense((g, h))
    triton.add_up(g, h, idx, *outputs)
    return outputs


_gather_op = ops.register("gather_rows(Tensor a, Tensor? b, Tensor idx) -> (Tensor, Tensor)", _launch, _allocate)
_sums_op = ops.register(
    "gather_rows_backward(Tensor? g, Tensor? h, Tensor idx, SymInt rows) -> (Tensor, Tensor)",
    _launch_sums,
    _allocate_sums,
)


def _gather(a: Tensor, b: Tensor | None, idx: Tensor, backend: str) -> tuple[Tensor, ...]:
    if backend == "triton":
        outputs = _gather_op(a, b, idx)
        return outputs[:1] if b is None else outputs
    return tuple(t.index_select(0, idx) for t in (a, b) if t is not None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, idx: Tensor, backend: str) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(idx)
        ctx.rows, ctx.backend = a.shape[0], backend
        return _gather(a, b, idx, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (idx,) = ctx.saved_tensors
        g, h = (t if need else None for t, need in zip((g, h), ctx.needs_input_grad, strict=False))
        if g is None and h is None:
            return None, None, None, None
        if ctx.backend == "triton" and not torch.is_grad_enabled():
            sums = _sums_op(g, h, idx, ctx.rows)
            first, second = (s if t is not None else None for s, t in zip(sums, (g, h), strict=True))
        else:
            first, second = (None if t is None else add_up(t, idx, ctx.rows) for t in (g, h))
        return first, second, None, None


def gather_triton(a: Tensor, b: Tensor | None, idx: Tensor) -> tuple[Tensor, ...]:
    return ops.apply(_Gather, a, b, idx, "triton")


def gather_eager(a: Tensor, b: Tensor | None, idx: Tensor) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled():
        return ops.apply(_Gather, a, b, idx, "eager")
    return _gather(a, b, idx, "eager")
