"""The chunk loops as registered ops, opaque to torch.compile: a compiled model keeps the memory bound."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops, rules, stable
from kernel_index.core.inductor import Region
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import products
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.chunk_pass import (
    gradient_pass,
    loss_pass,
    row_losses,
    row_max,
    row_sums,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import (
    Call,
    CrossEntropyOutput,
    Options,
    rows_per_chunk,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.products import (
    all_reduce,
    by_blocks,
    empty_gradients,
    exact_dtype,
    refuse_create_graph,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.slices import Layout

_loss_region = Region(loss_pass, z=(0,), targets=(0,))
_gradient_region = Region(
    gradient_pass, z=(0,), targets=(0,), rows=(0,), row_max=(0,), log_sum=(0,), missing=(0,), lse_rows=(0,)
)

FUSED = "fused"
"""The passes that are Triton kernels."""

_OPTIONS = (
    "float softcap, float scale, float smoothing, float z_loss, SymInt vocab, SymInt chunk_size, str passes, "
    "SymInt first_class, SymInt classes, str group"
)
"""This process has ``vocab`` of the ``classes``, from ``first_class`` on; other processes of ``group`` the rest."""


class _Chunks(NamedTuple):
    """What is the same for every chunk of a call: the constants of both ops, as ``_OPTIONS`` lists them."""

    softcap: float
    scale: float
    smoothing: float
    z_loss: float
    vocab: int
    chunk_size: int
    passes: str
    first_class: int
    classes: int
    group: str

    @property
    def products(self) -> products.Products:
        return products.by_name(self.passes)[0]

    @property
    def functions(self) -> Any:
        return products.by_name(self.passes)[1]

    @property
    def terms(self) -> Any:
        """The constants of the loss's formula."""
        return self.softcap, self.scale, self.smoothing, self.z_loss

    def losses(self, z: Tensor, targets: Tensor, losses: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Fill losses and lse; returns row_max, log_sum and 1 − p."""
        if self.passes == FUSED:
            from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton

            saved = tuple(torch.empty_like(losses) for _ in range(3))
            whole = Layout(z.shape[1], z.shape[1])
            triton.losses(z, targets, (losses, *saved), self.vocab, self.terms, whole)
            torch.add(saved[0], saved[1], out=lse)
            return saved
        loss, row_max, log_sum, missing = self._statistics(z, targets)
        losses.copy_(loss)
        torch.add(row_max, log_sum, out=lse)
        return row_max, log_sum, missing

    def gradient(
        self, z: Tensor, targets: Tensor, rows: Tensor, lse_rows: Tensor | None, saved: tuple[Tensor, ...]
    ) -> None:
        """z becomes the gradient of Σ (rows·loss + lse_rows·lse) with respect to the logits."""
        if self.passes == FUSED:
            from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton

            row_max, log_sum, missing = saved
            triton.gradient(z, targets, rows, (row_max, log_sum, missing), 0, self.vocab, self.terms, lse_rows)
            return
        vectors: Any = (targets - self.first_class, rows, *saved, lse_rows)
        constants: Any = (self.softcap, self.scale, (self.smoothing, self.z_loss, self.classes))
        if self.passes == "inductor":
            _gradient_region(z, *vectors, *constants)
            return
        by_blocks(lambda *block: gradient_pass(*block, *constants, f=self.functions), z, *vectors)

    def _statistics(self, z: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Loss, row_max, log_sum and 1 − p of each row; two small all-reduces where a group has the classes."""
        if self.passes == "inductor":
            return _loss_region(z, targets, *self.terms)
        if not self.group:
            blocks = by_blocks(lambda *block: loss_pass(*block, *self.terms, f=self.functions), z, targets)
            return tuple(torch.cat(rows) for rows in zip(*blocks, strict=True))
        cap: Any = (self.softcap, self.scale)
        maxima = all_reduce(torch.cat(by_blocks(lambda block: row_max(block, *cap), z)), "max", self.group)
        local = targets - self.first_class
        sums = torch.cat(by_blocks(lambda *block: row_sums(*block, *cap), z, local, maxima))
        return row_losses(maxima, all_reduce(sums, "sum", self.group), self.smoothing, self.z_loss, self.classes)


def _all_losses(hidden, weight, targets, bias, *options):
    chunks = _Chunks(*options)
    weight, bias = weight[: chunks.vocab], None if bias is None else bias[: chunks.vocab]
    losses, lse = _allocate_losses(hidden)
    chunk = rows_per_chunk(hidden, chunks.vocab, chunks.chunk_size)
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        z = chunks.products.logits(hidden[at], weight, bias)
        chunks.losses(z, targets[at], losses[at], lse[at])
        del z  # before the next chunk is allocated
    return losses, lse


def _gradients(hidden, weight, targets, bias, rows, lse_rows, factor, needs, *options):
    chunks = _Chunks(*options)
    if hidden.dtype != torch.float16:  # a token's part of a mean would underflow there: the sums get the factor
        rows, lse_rows, factor = rows * factor, None if lse_rows is None else lse_rows * factor, None
    losses, lse = _allocate_losses(hidden)
    chunk = rows_per_chunk(hidden, chunks.vocab, chunks.chunk_size)

    def to_gradient(at: slice, z: Tensor) -> None:
        saved = chunks.losses(z, targets[at], losses[at], lse[at])
        chunks.gradient(z, targets[at], rows[at], None if lse_rows is None else lse_rows[at], saved)

    tensors, options = (hidden, weight, bias, needs), (chunk, chunks.vocab, chunks.group, factor)
    found = products.gradients(*tensors, *options, to_gradient, chunks.products)
    return losses, lse, *found


def _allocate_losses(hidden, *_):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=exact_dtype(hidden)) for _ in range(2))


def _fake_gradients(hidden, weight, targets, bias, rows, lse_rows, factor, needs, *_):
    return *_allocate_losses(hidden), *empty_gradients(hidden, weight, needs)


_EVERYWHERE = ("CompositeExplicitAutograd",)
_losses_op = ops.register(
    "linear_cross_entropy_losses(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _all_losses,
    _allocate_losses,
    _EVERYWHERE,
)
_gradients_op = ops.register(
    "linear_cross_entropy_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor rows, "
    f"Tensor? lse_rows, Tensor factor, bool[] needs, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    _EVERYWHERE,
)


class Tokens(NamedTuple):
    """The tensors of a call, hidden [N, C] and targets [N], and the reduction's weights.

    ``rows`` [N] are 0 for ignored tokens, else 1; the sum over tokens is multiplied by ``factor``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rows: Tensor
    factor: Tensor

    def wanted(self) -> list[bool]:
        """Whether hidden, weight and bias need a gradient."""
        return [rules.wants_gradient(t) for t in (self.hidden, self.weight, self.bias)]


def tokens_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options) -> Tokens:
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept = targets != options.ignore_index
    rows = kept.to(exact_dtype(hidden))
    factor = 1 / kept.sum().clamp(min=1).to(rows.dtype) if options.reduction == "mean" else rows.new_ones(())
    return Tokens(hidden, weight, bias, targets, rows, factor)


def outputs(
    losses: Tensor, lse: Tensor, rows: Tensor, factor: Tensor, z_loss: float, reduced: bool, f: Any = stable.PYTORCH
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of ``CrossEntropyOutput`` for flat tokens; ignored ones are 0, whatever their logits hold."""
    losses, lse = (torch.where(rows == 0, 0.0, x) for x in (losses, lse))
    z_losses = z_loss * lse.square() if z_loss else torch.zeros_like(lse)
    return (f.total(losses) * factor, lse, f.total(z_losses) * factor) if reduced else (losses, lse, z_losses)


Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The gradients of ``outputs``; None where one is not used."""


def upstream_rows(
    given: Upstream, lse: Tensor, rows: Tensor, factor: Tensor, z_loss: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(rows, lse_rows, factor)`` of the gradient op: upstream of each token's loss and lse, times one factor.

    The z-loss's own output is ζ·lse², so its gradient is one of lse.
    """
    g, g_lse, g_z = given
    if g is not None and g_lse is None and g_z is None:
        return (rows, None, factor * g) if g.ndim == 0 else (torch.where(rows == 0, 0.0, g), None, rows.new_ones(()))
    of_loss = torch.zeros_like(rows) if g is None else g * factor
    of_lse = torch.zeros_like(rows) if g_lse is None else g_lse
    if g_z is not None:
        of_lse = of_lse + 2 * z_loss * lse * (g_z * factor)
    of_loss, of_lse = (torch.where(rows == 0, 0.0, x) for x in (of_loss, of_lse))
    if dtype != torch.float16:
        return of_loss, of_lse, rows.new_ones(())
    # A token's part of a mean would underflow in float16: the largest part becomes 1 and the sums get the factor.
    smallest = rows.new_full((1,), torch.finfo(rows.dtype).tiny)
    largest = torch.cat((of_loss.abs(), of_lse.abs(), smallest)).amax()
    return of_loss / largest, of_lse / largest, largest


class _Reduced(torch.autograd.Function):
    """Mean or sum: the gradients are formed with the loss, in one pass over the logits, and scaled in backward.

    Where ``lse`` or ``z_loss`` is used too, backward forms the logits of each chunk once more for all three.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, factor, needs, chunks, with_lse):
        ctx.set_materialize_grads(False)
        losses, lse, *gradients = _gradients_op(hidden, weight, targets, bias, rows, None, factor, needs, *chunks)
        out = outputs(losses, lse, rows, factor, chunks.z_loss, True, chunks.functions)
        again = (hidden, weight, bias, targets, rows, factor, out[1]) if with_lse else ()
        ctx.save_for_backward(*gradients, *again)
        ctx.needs, ctx.chunks, ctx.with_lse = needs, chunks, with_lse
        return out

    @staticmethod
    def backward(ctx, g, g_lse, g_z):
        refuse_create_graph()
        if g is g_lse is g_z is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # once: what a checkpoint makes again it gives once
        *gradients, factor = *saved[:3], g
        if ctx.with_lse and not (g_lse is None and g_z is None):
            gradients, factor = _formed_again(ctx, saved[3:], (g, g_lse, g_z)), None
        # Out of place: a second backward must find the unscaled gradients.
        scaled = (d if factor is None else d * factor for d in gradients)
        return *(d if need else None for d, need in zip(scaled, ctx.needs, strict=True)), *[None] * 6


class _PerToken(torch.autograd.Function):
    """Unreduced: upstream gradients differ by token, so backward forms the logits of each chunk once more."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, factor, needs, chunks):
        ctx.set_materialize_grads(False)
        losses, lse = _losses_op(hidden, weight, targets, bias, *chunks)
        out = outputs(losses, lse, rows, factor, chunks.z_loss, False)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, factor, out[1])
        ctx.needs, ctx.chunks = needs, chunks
        return out

    @staticmethod
    def backward(ctx, *given):
        refuse_create_graph()
        if all(g is None for g in given):
            return (None,) * 8
        gradients = _formed_again(ctx, ctx.saved_tensors, given)
        return *(d if need else None for d, need in zip(gradients, ctx.needs, strict=True)), *[None] * 5


def _formed_again(ctx, saved, given):
    """The gradients of hidden, weight and bias, for any upstream, by forming the logits of each chunk again."""
    hidden, weight, bias, targets, rows, factor, lse = saved
    upstream = upstream_rows(given, lse, rows, factor, ctx.chunks.z_loss, hidden.dtype)
    return _gradients_op(hidden, weight, targets, bias, *upstream, ctx.needs, *ctx.chunks)[2:]


class VocabShard(NamedTuple):
    """The classes of this process: the first one, how many, and the name of the process group."""

    first_class: int
    vocab: int
    group: str


def by_chunks(
    tokens: Tokens, options: Options, passes: str, shard: VocabShard | None = None, chunk_size: int = 0
) -> CrossEntropyOutput:
    """The loss of flat tokens, in chunks of them, of ``chunk_size`` where the options have none."""
    shard = shard or VocabShard(0, options.vocab, "")
    chunks = _Chunks(
        softcap=options.softcap,
        scale=options.logit_scale,
        smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        vocab=shard.vocab,
        chunk_size=options.chunk_size or chunk_size,
        passes=passes,
        first_class=shard.first_class,
        classes=options.vocab,
        group=shard.group,
    )
    needs = tokens.wanted()
    if options.reduction != "none" and any(needs):
        return CrossEntropyOutput(*ops.apply(_Reduced, *tokens, needs, chunks, options.with_lse))
    losses, lse, z_losses = ops.apply(_PerToken, *tokens, needs, chunks)
    if options.reduction == "none":
        return CrossEntropyOutput(losses, lse, z_losses)
    total = chunks.functions.total
    return CrossEntropyOutput(total(losses) * tokens.factor, lse, total(z_losses) * tokens.factor)


def _run(call: Call, passes: str) -> CrossEntropyOutput:
    tokens = tokens_of(call.hidden, call.weight, call.bias, call.targets, call.options)
    return shaped(by_chunks(tokens, call.options, passes), call)


def shaped(found: CrossEntropyOutput, call: Call) -> CrossEntropyOutput:
    """What flat tokens have in the shape of targets; a reduced loss is a scalar already."""
    return CrossEntropyOutput(*(x if x.ndim == 0 else x.view(call.targets.shape) for x in found))


def linear_cross_entropy_chunked(call: Call) -> CrossEntropyOutput:
    return _run(call, "plain")


def linear_cross_entropy_native(call: Call) -> CrossEntropyOutput:
    return _run(call, "native")


def linear_cross_entropy_inductor(call: Call) -> CrossEntropyOutput:
    return _run(call, "inductor")
