"""Rows laid end to end for kernels that take cumulative lengths, padding left out, and back."""

from torch import Tensor

from kernel_index.masks.doc_window_mask.lowerings import Varlen


def packed(x: Tensor, lengths: Varlen) -> Tensor:
    """[B, T, H, D] as [tokens, H, D]."""
    flat = x.flatten(0, 1)
    return flat.contiguous() if lengths.kept is None else flat.index_select(0, lengths.kept)


def unpacked(x: Tensor, lengths: Varlen, batch: int, queries: int, fill: float = 0.0) -> Tensor:
    """[tokens, …] as [B, T, …]; what was left out becomes ``fill``."""
    if lengths.kept is not None:
        x = x.new_full((batch * queries, *x.shape[1:]), fill).index_copy(0, lengths.kept, x)
    return x.reshape(batch, queries, *x.shape[1:]).contiguous()


def no_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output [0, H, Dv] where padding is all there is: no kernel is asked, and each input has its gradient, 0."""
    return v.new_zeros(0, q.shape[2], v.shape[3]) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
