"""Rows that are moved to other places on a GPU: the registered op of ``core/triton/rows.py``."""

from torch import Tensor

from kernel_index.core import ops


def _launch(x: Tensor, index: Tensor) -> Tensor:
    from kernel_index.core.triton.rows import rows_at

    return rows_at(x.contiguous(), index.contiguous(), _allocate(x, index))


def _allocate(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(*index.shape, *x.shape[1:])


_op = ops.register("device_rows_at(Tensor x, Tensor index) -> Tensor", _launch, _allocate)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """[..., C] for ``index`` [...] of x [n, C]; zeros where that is −1."""
    return ops.run(_op, _launch, x, index)
