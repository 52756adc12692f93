"""The chunk loops as registered ops, opaque to torch.compile: a compiled model keeps the memory bound."""

import torch
from torch import Tensor

from kernel_index import gpu
from kernel_index.inductor import Region
from kernel_index.loss.fused_linear_cross_entropy_chunked.chunk_pass import gradient_pass, loss_pass
from kernel_index.loss.fused_linear_cross_entropy_chunked.contract import Options, rows_per_chunk

WEIGHT_TILE = 8192
"""Rows of a low-precision weight gradient formed at a time before they are added to the float32 sum."""

BLOCK_BYTES = 1 << 20
"""Float32 bytes of the rows that a plain pass works on at a time: its temporaries are of this size, not the chunk's."""

_loss_region = Region(loss_pass, z=(0,), targets=(0,))
_gradient_region = Region(gradient_pass, z=(0,), targets=(0,), rows=(0,), lse=(0,), missing=(0,))

_OPTIONS = "float softcap, float scale, float smoothing, float z_loss, SymInt vocab, SymInt chunk_size, str passes"


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(hidden, weight.T) if bias is None else torch.addmm(bias, hidden, weight.T)


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _block_rows(z: Tensor) -> int:
    return max(1, BLOCK_BYTES // (4 * z.shape[1]))


def _statistics(z: Tensor, targets: Tensor, constants: tuple, passes: str) -> tuple[Tensor, ...]:
    if passes == "inductor":
        return _loss_region(z, targets, *constants)
    rows = _block_rows(z)
    blocks = (loss_pass(a, b, *constants) for a, b in zip(z.split(rows), targets.split(rows), strict=True))
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _chunk_losses(z: Tensor, targets: Tensor, losses: Tensor, constants: tuple, passes: str) -> None:
    if passes == "triton":
        from kernel_index.loss.fused_linear_cross_entropy_chunked import triton

        triton.chunk(z, targets, None, losses, constants)
        return
    losses.copy_(_statistics(z, targets, constants, passes)[0])


def _chunk_gradient(z: Tensor, targets: Tensor, rows: Tensor, losses: Tensor, constants: tuple, passes: str) -> None:
    """Fill losses; z becomes the gradient of Σ rows·loss with respect to the logits."""
    if passes == "triton":
        from kernel_index.loss.fused_linear_cross_entropy_chunked import triton

        triton.chunk(z, targets, rows, losses, constants)
        return
    loss, *saved = _statistics(z, targets, constants, passes)
    losses.copy_(loss)
    vectors = (targets, rows, *saved)
    if passes == "inductor":
        _gradient_region(z, *vectors, *constants)
        return
    height = _block_rows(z)
    for block in zip(z.split(height), *(v.split(height) for v in vectors), strict=True):
        gradient_pass(*block, *constants)


def _all_losses(hidden, weight, targets, bias, softcap, scale, smoothing, z_loss, vocab, chunk_size, passes):
    weight, bias = weight[:vocab], None if bias is None else bias[:vocab]
    losses = hidden.new_empty(hidden.shape[0], dtype=_loss_dtype(hidden))
    chunk = rows_per_chunk(hidden, vocab, chunk_size)
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        z = _logits(hidden[at], weight, bias)
        _chunk_losses(z, targets[at], losses[at], (softcap, scale, smoothing, z_loss), passes)
        del z  # before the next chunk is allocated
    return losses


def _gradients(
    hidden, weight, targets, bias, rows, factor, needs, softcap, scale, smoothing, z_loss, vocab, chunk_size, passes
):
    constants = (softcap, scale, smoothing, z_loss)
    if hidden.dtype != torch.float16:  # float16 would lose a token's share of the mean: there it is applied to the sums
        rows, factor = rows * factor, None
    losses, d_hidden, d_weight, d_bias = _allocate(hidden, weight, needs)
    exact = _loss_dtype(hidden)
    weight_sum = torch.zeros_like(d_weight, dtype=exact) if needs[1] else d_weight
    bias_sum = torch.zeros_like(d_bias, dtype=exact) if needs[2] else d_bias
    used, used_bias = weight[:vocab], None if bias is None else bias[:vocab]
    chunk = rows_per_chunk(hidden, vocab, chunk_size)
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        z = _logits(hidden[at], used, used_bias)
        _chunk_gradient(z, targets[at], rows[at], losses[at], constants, passes)
        if needs[0]:
            product = torch.mm(z, used)
            d_hidden[at] = product if factor is None else product.to(exact) * factor
        if needs[1]:
            _add_outer(weight_sum[:vocab], z, hidden[at])
        if needs[2]:
            for block in z.split(_block_rows(z)):
                bias_sum[:vocab] += block.sum(0, dtype=exact)
        del z  # before the next chunk is allocated
    sums = (weight_sum, bias_sum) if factor is None else (weight_sum * factor, bias_sum * factor)
    d_weight, d_bias = (total.to(weight.dtype) for total in sums)
    return losses, d_hidden, d_weight, d_bias


def _add_outer(total: Tensor, z: Tensor, hidden: Tensor) -> None:
    """total += zᵀ·hidden, summed in total's dtype whatever the factors' own."""
    if z.dtype == total.dtype:
        total.addmm_(z.T, hidden)
        return
    if z.is_cuda:  # the product's own accumulator takes part in the sum: no rounding, no tensor between
        torch.addmm(total, z.T, hidden, out_dtype=total.dtype, out=total)
        return
    for start in range(0, total.shape[0], WEIGHT_TILE):
        at = slice(start, start + WEIGHT_TILE)
        if z.dtype == torch.float16:  # a sum over tokens may pass 65504 before it is scaled
            total[at].addmm_(z[:, at].T.to(total.dtype), hidden.to(total.dtype))
        else:
            total[at] += torch.mm(z[:, at].T, hidden)


def _allocate(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = (0,)
    return (
        hidden.new_empty(hidden.shape[0], dtype=_loss_dtype(hidden)),
        hidden.new_empty(hidden.shape if needs[0] else nothing),
        weight.new_empty(weight.shape if needs[1] else nothing),
        weight.new_empty((weight.shape[0],) if needs[2] else nothing),
    )


def _fake_losses(hidden, *_):
    return hidden.new_empty(hidden.shape[0], dtype=_loss_dtype(hidden))


def _fake_gradients(hidden, weight, targets, bias, rows, factor, needs, *_):
    return _allocate(hidden, weight, needs)


_EVERYWHERE = ("CompositeExplicitAutograd",)
_losses_op = gpu.register(
    f"linear_cross_entropy_losses(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, {_OPTIONS}) -> Tensor",
    _all_losses,
    _fake_losses,
    _EVERYWHERE,
)
_gradients_op = gpu.register(
    "linear_cross_entropy_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor rows, "
    f"Tensor factor, bool[] needs, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    _EVERYWHERE,
)


def _refuse_create_graph() -> None:
    """Grad mode is on in a backward only under create_graph=True, which would get gradients without a history."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the chunked linear cross-entropy has no double backward: create_graph=True needs backend='reference'"
        )


class _Reduced(torch.autograd.Function):
    """Mean or sum: the gradients are formed with the loss, in one pass over the logits, and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, factor, needs, constants):
        losses, *gradients = _gradients_op(hidden, weight, targets, bias, rows, factor, needs, *constants)
        ctx.save_for_backward(*gradients)
        ctx.needs = needs
        return torch.where(rows == 0, 0.0, losses).sum() * factor

    @staticmethod
    def backward(ctx, g):
        _refuse_create_graph()
        # Out of place: a second backward must find the unscaled gradients.
        scaled = (d * g if need else None for d, need in zip(ctx.saved_tensors, ctx.needs, strict=True))
        return *scaled, None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """Unreduced: upstream gradients differ by token, so backward forms the logits of each chunk once more."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, factor, needs, constants):
        ctx.save_for_backward(hidden, weight, bias, targets, rows, factor)
        ctx.needs, ctx.constants = needs, constants
        losses = _losses_op(hidden, weight, targets, bias, *constants)
        return torch.where(rows == 0, 0.0, losses)

    @staticmethod
    def backward(ctx, g):
        _refuse_create_graph()
        hidden, weight, bias, targets, rows, factor = ctx.saved_tensors
        _, *gradients = _gradients_op(
            hidden, weight, targets, bias, torch.where(rows == 0, 0.0, g), factor, ctx.needs, *ctx.constants
        )
        out = (d if need else None for d, need in zip(gradients, ctx.needs, strict=True))
        return *out, None, None, None, None, None


def run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    reduction: str,
    chunk_size: int,
    passes: str,
) -> Tensor:
    """The loss of flat tokens: hidden [N, C], targets [N]."""
    valid = targets != options.ignore_index
    rows = valid.to(_loss_dtype(hidden))
    factor = rows.new_ones(())
    if reduction == "mean":
        factor = 1 / rows.sum().clamp(min=1)
    constants = (*options[1:], chunk_size, passes)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if reduction == "none" or not any(needs):
        losses = _PerToken.apply(hidden, weight, bias, targets, rows, factor.new_ones(()), needs, constants)
        return losses if reduction == "none" else losses.sum() * factor
    return _Reduced.apply(hidden, weight, bias, targets, rows, factor, needs, constants)
