"""The loss of a GPU: rows of logits forward, slices of the vocabulary backward, so no gradient is held twice.

A slice of logits has all tokens, so its rows of the weight's gradient are one product, summed in float32 inside it and
rounded once; only the gradient of the hidden states is summed over slices, in float32.  Logits are formed twice for
that: four products in all.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import (
    Call,
    CrossEntropyOutput,
    rows_per_chunk,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.products import (
    empty_gradients,
    logits_of,
    refuse_create_graph,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.torch_op import (
    outputs,
    shaped,
    tokens_of,
    upstream_rows,
)

SLICE_BYTES = 64 << 20
"""Budget of a slice of logits; the hidden states' bytes, if that is more, so that products stay wide."""

ALIGNED = 128
"""Classes of a slice are a multiple of this."""


def classes_per_slice(hidden: Tensor, vocab: int, chunk_size: int = 0) -> int:
    """With ``chunk_size``, no more logits than that many tokens have."""
    tokens, size = max(1, hidden.shape[0]), hidden.element_size()
    budget = chunk_size * vocab * size or max(SLICE_BYTES, hidden.numel() * size)
    most = budget // (tokens * size)
    return max(1, min(vocab, most // ALIGNED * ALIGNED or most))


class _Slices(NamedTuple):
    """What is the same for every slice of a call: the constants of both ops, as ``_OPTIONS`` lists them."""

    softcap: float
    scale: float
    smoothing: float
    z_loss: float
    vocab: int
    chunk_size: int

    @property
    def terms(self) -> tuple[float, float, float, float]:
        """The constants of the loss's formula."""
        return self.softcap, self.scale, self.smoothing, self.z_loss


def _allocate_losses(hidden, *_):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


def _losses(hidden, weight, targets, bias, *constants):
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton

    slices = _Slices(*constants)
    outputs = _allocate_losses(hidden)
    weight, bias = weight[: slices.vocab], None if bias is None else bias[: slices.vocab]
    chunk = rows_per_chunk(hidden, slices.vocab, slices.chunk_size)
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        z = logits_of(hidden[at], weight, bias)
        triton.losses(z, targets[at], tuple(x[at] for x in outputs), slices.terms)
        del z  # before the next chunk is allocated
    return outputs


def _fake_gradients(hidden, weight, targets, bias, rows, lse_rows, factor, row_max, log_sum, missing, needs, *_):
    return empty_gradients(hidden, weight, needs)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b: the product's own accumulator takes part in the sum, so nothing is rounded between."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _gradients(hidden, weight, targets, bias, rows, lse_rows, factor, row_max, log_sum, missing, needs, *constants):
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton

    slices = _Slices(*constants)
    vocab = slices.vocab
    late = hidden.dtype == torch.float16  # a token's part of a mean would underflow: the sums get the factor
    if not late:
        rows, lse_rows = rows * factor, None if lse_rows is None else lse_rows * factor
    _, d_weight, d_bias = empty_gradients(hidden, weight, [False, *needs[1:]])
    for d in (d_weight, d_bias):
        d[vocab:] = 0  # padding
    sums = hidden.new_zeros(hidden.shape if needs[0] else (0,), dtype=torch.float32)
    step = classes_per_slice(hidden, vocab, slices.chunk_size)
    for first in range(0, vocab, step):
        at = slice(first, min(first + step, vocab))
        z = logits_of(hidden, weight[at], None if bias is None else bias[at])
        triton.gradient(z, targets, rows, (row_max, log_sum, missing), first, vocab, slices.terms, lse_rows)
        if needs[0]:
            _add_product(sums, z, weight[at])
        if needs[1] and late:
            total = torch.zeros_like(d_weight[at], dtype=torch.float32)
            _add_product(total, z.T, hidden)
            d_weight[at] = total * factor
        elif needs[1]:
            torch.mm(z.T, hidden, out=d_weight[at])
        if needs[2]:
            total = z.sum(0, dtype=torch.float32)
            d_bias[at] = total * factor if late else total
        del z  # before the next slice is allocated
    return (sums * factor if late else sums).to(hidden.dtype), d_weight, d_bias


_OPTIONS = "float softcap, float scale, float smoothing, float z_loss, SymInt vocab, SymInt chunk_size"
_EVERYWHERE = ("CompositeExplicitAutograd",)
_losses_op = ops.register(
    "linear_cross_entropy_sliced_losses(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _losses,
    _allocate_losses,
    _EVERYWHERE,
)
_gradients_op = ops.register(
    "linear_cross_entropy_sliced_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor rows, "
    "Tensor? lse_rows, Tensor factor, Tensor row_max, Tensor log_sum, Tensor missing, bool[] needs, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    _EVERYWHERE,
)


class _Sliced(torch.autograd.Function):
    """A loss for each token, or their weighted sum; what is saved are inputs and three numbers of each token."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, factor, needs, slices, reduced):
        ctx.set_materialize_grads(False)
        losses, *saved = _losses_op(hidden, weight, targets, bias, *slices)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, factor, *saved)
        ctx.needs, ctx.slices = needs, slices
        return outputs(losses, saved[0] + saved[1], rows, factor, slices.z_loss, reduced)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None, g_z: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        if g is g_lse is g_z is None:
            return (None,) * 9
        hidden, weight, bias, targets, rows, factor, *saved = ctx.saved_tensors
        upstream = upstream_rows((g, g_lse, g_z), saved[0] + saved[1], rows, factor, ctx.slices.z_loss, hidden.dtype)
        gradients = _gradients_op(hidden, weight, targets, bias, *upstream, *saved, ctx.needs, *ctx.slices)
        out = (d if need else None for d, need in zip(gradients, ctx.needs, strict=True))
        return *out, *[None] * 6


def linear_cross_entropy_triton(call: Call) -> CrossEntropyOutput:
    options = call.options
    tokens = tokens_of(call.hidden, call.weight, call.bias, call.targets, options)
    slices = _Slices(
        softcap=options.softcap,
        scale=options.logit_scale,
        smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        vocab=options.vocab,
        chunk_size=options.chunk_size,
    )
    found = ops.apply(_Sliced, *tokens, tokens.wanted(), slices, options.reduction != "none")
    return shaped(CrossEntropyOutput(*found), call)
