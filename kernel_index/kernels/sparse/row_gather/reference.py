"""The specification: ``index_select``, with gradients of low-precision rows added up in float32."""

from torch import Tensor

from kernel_index.core.rows import sum_dtype


def gather_reference(a: Tensor, b: Tensor | None, idx: Tensor) -> tuple[Tensor, ...]:
    return tuple(_select(t, idx) for t in (a, b) if t is not None)


def _select(source: Tensor, idx: Tensor) -> Tensor:
    if not (source.is_floating_point() and source.requires_grad):
        return source.index_select(0, idx)
    return source.to(sum_dtype(source.dtype)).index_select(0, idx).to(source.dtype)
