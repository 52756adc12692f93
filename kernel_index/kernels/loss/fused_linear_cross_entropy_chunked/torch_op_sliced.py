"""The loss of a GPU, by ``slices``: gradients are formed with the upstream factor, so none is held twice.

With many tokens for each channel a float32 sum of the weight's gradient is small beside their logits: then chunks of
tokens, whose gradients are formed with the loss, save the fourth product.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops, stable
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import slices
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import (
    CHUNK_BYTES,
    Call,
    CrossEntropyOutput,
    Options,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.products import empty_gradients, refuse_create_graph
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.torch_op import (
    FUSED,
    Tokens,
    by_chunks,
    outputs,
    shaped,
    tokens_of,
    upstream_rows,
)

NOTHING_HELD = [False] * 3

MANY = 4
"""Tokens for each channel from which on chunks of them are taken."""


class _Constants(NamedTuple):
    """What is the same for every slice of a call: the constants of both ops, as ``_OPTIONS`` lists them."""

    softcap: float
    scale: float
    smoothing: float
    z_loss: float
    vocab: int
    chunk_size: int
    invariant: bool

    @property
    def terms(self) -> tuple[float, float, float, float]:
        """The constants of the loss's formula."""
        return self.softcap, self.scale, self.smoothing, self.z_loss

    def plan(self, hidden: Tensor, weight: Tensor, needs: list[bool]) -> slices.Plan:
        return slices.plan_of(hidden, weight, self.vocab, self.chunk_size, needs, invariant=self.invariant)


def _allocate_losses(hidden, *_):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


def _fill_losses(targets: Tensor, found: tuple[Tensor, ...], c: _Constants) -> slices.FillRows:
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton

    return lambda z, at, layout: triton.losses(z, targets[at], tuple(x[at] for x in found), c.vocab, c.terms, layout)


def _losses(hidden, weight, targets, bias, *constants):
    c, found = _Constants(*constants), _allocate_losses(hidden)
    plan = c.plan(hidden, weight, NOTHING_HELD)
    slices.by_rows(hidden, weight, bias, plan, c.chunk_size, _fill_losses(targets, found, c))
    return found


def _fake_gradients(hidden, weight, targets, bias, rows, lse_rows, factor, row_max, log_sum, missing, needs, *_):
    return empty_gradients(hidden, weight, needs)


def _gradients(hidden, weight, targets, bias, rows, lse_rows, factor, row_max, log_sum, missing, needs, *constants):
    c = _Constants(*constants)
    upstream = (targets, rows, lse_rows, factor, (row_max, log_sum, missing))
    return _gradients_of(hidden, weight, bias, upstream, needs, c, c.plan(hidden, weight, NOTHING_HELD), None)


def _gradients_of(hidden, weight, bias, upstream, needs, c: _Constants, plan: slices.Plan, memory: Tensor | None):
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton

    targets, rows, lse_rows, factor, statistics = upstream
    if hidden.dtype != torch.float16:  # a token's part of a mean would underflow there: the sums get the factor
        rows, lse_rows, factor = rows * factor, None if lse_rows is None else lse_rows * factor, None

    def fill(z: Tensor, at: slice, first: int, out: Tensor) -> None:
        of_tokens = targets[at], rows[at], tuple(x[at] for x in statistics)
        triton.gradient(z, *of_tokens, first, c.vocab, c.terms, None if lse_rows is None else lse_rows[at], out)

    return slices.by_slices(hidden, weight, bias, needs, plan, c.vocab, memory, factor, fill)


_OPTIONS = "float softcap, float scale, float smoothing, float z_loss, SymInt vocab, SymInt chunk_size, bool invariant"
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
    """A loss for each token, or their weighted sum; what is saved are inputs and three numbers of each token.

    Held logits are an attribute, not a saved tensor: backward writes over them, and a second one forms them again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, factor, needs, c: _Constants, reduced):
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.memory = c.plan(hidden, weight, needs), None
        if ctx.plan.held and not ops.are_seen() and not slices.are_kept_elsewhere():
            losses, *saved = found = _allocate_losses(hidden)
            ctx.memory = slices.hold(hidden, weight, bias, ctx.plan, _fill_losses(targets, found, c))
        else:
            losses, *saved = _losses_op(hidden, weight, targets, bias, *c)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, factor, *saved)
        ctx.needs, ctx.constants = needs, c
        functions = stable.ON_DEVICE if c.invariant else stable.PYTORCH
        return outputs(losses, saved[0] + saved[1], rows, factor, c.z_loss, reduced, functions)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None, g_z: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        if g is g_lse is g_z is None:
            return (None,) * 9
        hidden, weight, bias, targets, rows, factor, *saved = ctx.saved_tensors
        upstream = upstream_rows((g, g_lse, g_z), saved[0] + saved[1], rows, factor, ctx.constants.z_loss, hidden.dtype)
        memory, ctx.memory = ctx.memory, None
        if memory is None:
            gradients = _gradients_op(hidden, weight, targets, bias, *upstream, *saved, ctx.needs, *ctx.constants)
        else:
            given = (targets, *upstream, tuple(saved))
            gradients = _gradients_of(hidden, weight, bias, given, ctx.needs, ctx.constants, ctx.plan, memory)
        out = (d if need else None for d, need in zip(gradients, ctx.needs, strict=True))
        return *out, *[None] * 6


def goes_by_tokens(tokens: Tokens, options: Options) -> bool:
    """Whether to form gradients with the loss, chunk by chunk: where the caller has set no limit to the logits.

    A chunk has as many tokens as there are channels, so its logits take what the weight does; a shorter one would read
    and write the float32 sum more often than its product hides.
    """
    (count, channels), size = tokens.hidden.shape, tokens.hidden.element_size()
    if options.chunk_size or options.with_lse or options.reduction == "none" or is_invariant():
        return False
    is_aligned = options.vocab % slices.PADDED == 0  # rows of logits are then those of the classes alone
    is_large = count >= MANY * channels and count * options.vocab * size > CHUNK_BYTES
    return is_aligned and is_large and tokens.wanted()[1]


def linear_cross_entropy_triton(call: Call) -> CrossEntropyOutput:
    options = call.options
    tokens = tokens_of(call.hidden, call.weight, call.bias, call.targets, options)
    if goes_by_tokens(tokens, options):
        return shaped(by_chunks(tokens, options, FUSED, chunk_size=tokens.hidden.shape[1]), call)
    constants = _Constants(
        softcap=options.softcap,
        scale=options.logit_scale,
        smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        vocab=options.vocab,
        chunk_size=options.chunk_size,
        invariant=is_invariant(),
    )
    found = ops.apply(_Sliced, *tokens, tokens.wanted(), constants, options.reduction != "none")
    return shaped(CrossEntropyOutput(*found), call)
