"""``token_stats`` by chunks of tokens: registered ops, opaque to torch.compile, and their autograd Function."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import ops, rules
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import products, stats_pass
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.chunk_pass import loss_pass
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import StatsCall, TokenStats, rows_per_chunk
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.slices import Layout
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.stats_pass import FLOATS, INTS, Constants

_CONSTANTS = (
    "float softcap, float temperature, SymInt top_k, float top_p, SymInt vocab, SymInt first_class, SymInt width, "
    "str group, str passes, bool as_loss"
)


def _allocate(hidden, *_):
    tokens = hidden.shape[0]
    floats = hidden.new_empty((tokens, FLOATS), dtype=products.exact_dtype(hidden))
    return floats, hidden.new_empty((tokens, INTS), dtype=torch.int64)


def _statistics(hidden, weight, targets, bias, *constants):
    c = Constants(*constants)
    found = _allocate(hidden)
    weight, bias = weight[: c.vocab], None if bias is None else bias[: c.vocab]
    chunk = rows_per_chunk(hidden, c.width)
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        z = c.products.logits(hidden[at], weight, bias)
        vectors = (targets[at] - c.first_class, *(out[at] for out in found))
        _by_equal_blocks(_fill, z, vectors, c)
        del z  # before the next chunk is allocated
    return found


def _fill(z: Tensor, targets: Tensor, floats: Tensor, ints: Tensor, c: Constants) -> None:
    for out, value in zip((floats, ints), stats_pass.statistics(z, targets, c), strict=True):
        out.copy_(value)
    if c.as_loss:
        floats[:, 0] = 0.0 - _losses(z, targets, c)


def _losses(z: Tensor, targets: Tensor, c: Constants) -> Tensor:
    terms = (c.softcap, 1 / c.temperature, 0.0, 0.0)
    if c.passes != "triton":
        return loss_pass(z, targets, *terms, f=c.functions)[0]
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton

    found = tuple(z.new_empty(z.shape[0]) for _ in range(4))
    triton.losses(z, targets, found, c.vocab, terms, Layout(c.vocab, c.vocab))
    return found[0]


def _by_equal_blocks(function: Any, z: Tensor, vectors: tuple[Tensor, ...], c: Constants) -> None:
    """By blocks of rows that are the same on every process, although their classes may differ by a few."""
    rows = products.block_rows(z.device, c.width)
    for block in zip(z.split(rows), *(v.split(rows) for v in vectors), strict=True):
        function(*block, c)


def _gradients(hidden, weight, targets, bias, upstream, floats, ints, factor, needs, *constants):
    c = Constants(*constants)

    def to_gradient(at: slice, z: Tensor) -> None:
        vectors = (targets[at] - c.first_class, upstream[at], floats[at], ints[at])
        _by_equal_blocks(stats_pass.gradient, z, vectors, c)

    chunk = rows_per_chunk(hidden, c.width)
    options = (chunk, c.vocab, c.group, factor, to_gradient, c.products)
    return products.gradients(hidden, weight, bias, needs, *options)


def _fake_gradients(hidden, weight, targets, bias, upstream, floats, ints, factor, needs, *_):
    return products.empty_gradients(hidden, weight, needs)


_EVERYWHERE = ("CompositeExplicitAutograd",)
_statistics_op = ops.register(
    f"linear_token_stats(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, {_CONSTANTS}) -> (Tensor, Tensor)",
    _statistics,
    _allocate,
    _EVERYWHERE,
)
_gradients_op = ops.register(
    "linear_token_stats_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor upstream, "
    f"Tensor floats, Tensor ints, Tensor? factor, bool[] needs, {_CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    _EVERYWHERE,
)


class _Stats(torch.autograd.Function):
    """What is saved are the inputs and ten numbers of each token; backward forms each chunk's logits once more."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, valid, needs, constants):
        ctx.set_materialize_grads(False)
        floats, ints = _statistics_op(hidden, weight, targets, bias, *constants)
        ctx.save_for_backward(hidden, weight, bias, targets, valid, floats, ints)
        ctx.needs, ctx.constants = needs, constants
        predicted = ints[:, 0].contiguous()
        ctx.mark_non_differentiable(predicted)
        return *(torch.where(valid, floats[:, i], 0.0) for i in range(3)), predicted

    @staticmethod
    def backward(ctx, *given):
        products.refuse_create_graph()
        if all(g is None for g in given[:3]):
            return (None,) * 7
        hidden, weight, bias, targets, valid, floats, ints = ctx.saved_tensors
        zero = torch.zeros_like(floats[:, 0])
        used = [zero if g is None else torch.where(valid, g, 0.0) for g in given[:3]]
        upstream, factor = torch.stack(used, -1), None
        if hidden.dtype == torch.float16:  # a token's part of a mean would underflow: the sums get the factor
            smallest = zero.new_full((1,), torch.finfo(zero.dtype).tiny)
            factor = torch.cat((upstream.abs().flatten(), smallest)).amax()
            upstream = upstream / factor
        found = _gradients_op(hidden, weight, targets, bias, upstream, floats, ints, factor, ctx.needs, *ctx.constants)
        return *(d if need else None for d, need in zip(found, ctx.needs, strict=True)), None, None, None, None


def token_stats_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, constants: Constants
) -> TokenStats:
    """The statistics of hidden [..., C] in the shape of targets, from the rows of weight that are here."""
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    needs = [rules.wants_gradient(t) for t in (hidden, weight, bias)]
    found = ops.apply(_Stats, hidden, weight, bias, targets, targets != ignore_index, needs, constants)
    return TokenStats(*(x.view(shape) for x in found))


def token_stats_chunked(call: StatsCall) -> TokenStats:
    return _run(call, "plain")


def token_stats_native(call: StatsCall) -> TokenStats:
    return _run(call, "native")


def token_stats_rows(call: StatsCall) -> TokenStats:
    return _run(call, "triton")


def _run(call: StatsCall, passes: str) -> TokenStats:
    o = call.options
    as_loss = is_invariant() and (o.softcap == 0 or o.temperature == 1)  # else it is another function
    constants = Constants(o.softcap, o.temperature, o.top_k, o.top_p, o.vocab, 0, o.vocab, "", passes, as_loss)
    return token_stats_of(call.hidden, call.weight, call.bias, call.targets, o.ignore_index, constants)
