"""``token_stats`` of a GPU without truncation, by ``slices``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops, rules
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import products, slices
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import StatsCall, TokenStats
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.torch_op_stats import token_stats_rows


class _Constants(NamedTuple):
    """What is the same for every row."""

    softcap: float
    temperature: float
    vocab: int

    def plan(self, hidden: Tensor, weight: Tensor, needs: list[bool]) -> slices.Plan:
        return slices.plan_of(hidden, weight, self.vocab, 0, needs)


def _allocate(hidden, *_):
    """log_prob, entropy, row_max, log_sum, 1 − p of the target, and predicted."""
    tokens = hidden.shape[0]
    floats = tuple(hidden.new_empty(tokens, dtype=torch.float32) for _ in range(5))
    return *floats, hidden.new_empty(tokens, dtype=torch.int64)


def _fill(targets: Tensor, found: tuple[Tensor, ...], c: _Constants) -> slices.FillRows:
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton_stats

    def fill(z: Tensor, at: slice, layout: slices.Layout) -> None:
        rows = tuple(x[at] for x in found)
        triton_stats.statistics(z, targets[at], rows, c.vocab, c.softcap, c.temperature, layout)

    return fill


def _statistics(hidden, weight, targets, bias, *constants):
    c, found = _Constants(*constants), _allocate(hidden)
    plan = c.plan(hidden, weight, [False] * 3)
    slices.by_rows(hidden, weight, bias, plan, 0, _fill(targets, found, c))
    return found


def _gradients(
    hidden,
    weight,
    targets,
    bias,
    of_log_prob,
    of_entropy,
    entropy,
    row_max,
    log_sum,
    missing,
    factor,
    needs,
    *constants,
):
    c = _Constants(*constants)
    given = targets, (of_log_prob, of_entropy), (entropy, row_max, log_sum, missing), factor
    return _gradients_of(hidden, weight, bias, given, needs, c, c.plan(hidden, weight, [False] * 3), None)


def _gradients_of(hidden, weight, bias, given, needs, c: _Constants, plan: slices.Plan, memory: Tensor | None):
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton_stats

    targets, upstream, statistics, factor = given

    def fill(z: Tensor, at: slice, first: int, out: Tensor) -> None:
        given, saved = (tuple(x[at] for x in group) for group in (upstream, statistics))
        triton_stats.gradient(z, targets[at], given, saved, first, c.vocab, c.softcap, c.temperature, out)

    return slices.by_slices(hidden, weight, bias, needs, plan, c.vocab, memory, factor, fill)


def _fake_gradients(
    hidden, weight, targets, bias, of_log_prob, of_entropy, entropy, row_max, log_sum, missing, factor, needs, *_
):
    return products.empty_gradients(hidden, weight, needs)


_CONSTANTS = "float softcap, float temperature, SymInt vocab"
_EVERYWHERE = ("CompositeExplicitAutograd",)
_statistics_op = ops.register(
    f"linear_token_stats_sliced(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, {_CONSTANTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _statistics,
    _allocate,
    _EVERYWHERE,
)
_gradients_op = ops.register(
    "linear_token_stats_sliced_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "Tensor of_log_prob, Tensor of_entropy, Tensor entropy, Tensor row_max, Tensor log_sum, Tensor missing, "
    f"Tensor? factor, bool[] needs, {_CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    _EVERYWHERE,
)


class _Stats(torch.autograd.Function):
    """What is saved are the inputs and four numbers of each token; held logits as in the loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, valid, needs, c: _Constants):
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.memory = c.plan(hidden, weight, needs), None
        if ctx.plan.held and not ops.are_seen() and not slices.are_kept_elsewhere():
            found = _allocate(hidden)
            ctx.memory = slices.hold(hidden, weight, bias, ctx.plan, _fill(targets, found, c))
        else:
            found = _statistics_op(hidden, weight, targets, bias, *c)
        log_prob, entropy, row_max, log_sum, missing, predicted = found
        ctx.save_for_backward(hidden, weight, bias, targets, valid, entropy, row_max, log_sum, missing)
        ctx.needs, ctx.constants = needs, c
        ctx.mark_non_differentiable(predicted)
        return torch.where(valid, log_prob, 0.0), torch.where(valid, entropy, 0.0), predicted

    @staticmethod
    def backward(ctx, g: Tensor | None, g_entropy: Tensor | None, _: Any):
        products.refuse_create_graph()
        if g is None and g_entropy is None:
            return (None,) * 7
        hidden, weight, bias, targets, valid, *statistics = ctx.saved_tensors
        zero = torch.zeros_like(statistics[0])
        upstream = [zero if x is None else torch.where(valid, x, 0.0) for x in (g, g_entropy)]
        factor = None
        if hidden.dtype == torch.float16:  # a token's part of a mean would underflow: the sums get the factor
            smallest = zero.new_full((1,), torch.finfo(zero.dtype).tiny)
            factor = torch.cat((*(x.abs() for x in upstream), smallest)).amax()
            upstream = [x / factor for x in upstream]
        memory, ctx.memory = ctx.memory, None
        if memory is None:
            given = (*upstream, *statistics, factor)
            found = _gradients_op(hidden, weight, targets, bias, *given, ctx.needs, *ctx.constants)
        else:
            given = (targets, tuple(upstream), tuple(statistics), factor)
            found = _gradients_of(hidden, weight, bias, given, ctx.needs, ctx.constants, ctx.plan, memory)
        return *(d if need else None for d, need in zip(found, ctx.needs, strict=True)), *[None] * 4


def token_stats_triton(call: StatsCall) -> TokenStats:
    if is_invariant():  # one form, with truncation and without
        return token_stats_rows(call)
    o, shape = call.options, call.targets.shape
    hidden, targets = call.hidden.reshape(-1, call.hidden.shape[-1]), call.targets.reshape(-1)
    needs = [rules.wants_gradient(t) for t in (hidden, call.weight, call.bias)]
    constants = _Constants(o.softcap, o.temperature, o.vocab)
    tokens = hidden, call.weight, call.bias, targets, targets != o.ignore_index
    log_prob, entropy, predicted = (x.view(shape) for x in ops.apply(_Stats, *tokens, needs, constants))
    return TokenStats(log_prob, entropy, torch.zeros_like(log_prob), predicted)
