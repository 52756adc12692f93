"""Argument checks and backend eligibility of the stream-mixing functions and of ``sinkhorn``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, native, rules
from kernel_index.core.numerics import is_invariant

STREAMS = 4
"""What the fused backends are written for."""


class Call(NamedTuple):
    """A checked call.  branch_out, h_post and h_res are None where nothing is merged, h_pre where nothing is read."""

    hidden: Tensor
    branch_out: Tensor | None
    h_post: Tensor | None
    h_res: Tensor | None
    h_pre: Tensor | None


class Rows(NamedTuple):
    """A call with its leading dimensions flattened, as every pass reads it; None for what the pass does not need.

    hidden ``[batches, N, 4, C]``, branch_out ``[batches, N, C]``; ``batches`` is 1 where every coefficient is shared.
    """

    hidden: Tensor | None
    branch_out: Tensor | None
    h_post: Tensor | None
    h_res: Tensor | None
    h_pre: Tensor | None


def check(
    hidden: Any, branch_out: Any, h_post: Any, h_res: Any, h_pre: Any, *, merges: bool = True, reads: bool = True
) -> Call:
    checks.is_floating("hidden", hidden)
    if hidden.ndim < 2:
        raise ValueError(f"hidden must be [..., streams, C], got shape {tuple(hidden.shape)}")
    if merges:
        checks.is_floating("branch_out", branch_out)
        checks.has_shape(
            "branch_out", branch_out, (*hidden.shape[:-2], hidden.shape[-1]), "hidden without its streams,"
        )
        checks.on_device("branch_out", branch_out, hidden, "hidden")
        _check_coefficient("h_post", h_post, hidden, 1)
        _check_coefficient("h_res", h_res, hidden, 2)
    if reads:
        _check_coefficient("h_pre", h_pre, hidden, 1)
    return Call(hidden, branch_out, h_post, h_res, h_pre)


def _check_coefficient(name: str, value: Any, hidden: Tensor, rank: int) -> None:
    """One coefficient for the whole call, for each batch row, or for each token: its rank alone says which."""
    checks.is_floating(name, value)
    checks.on_device(name, value, hidden, "hidden")
    shared = (hidden.shape[-2],) * rank
    if hidden.ndim < 4:  # [T, streams] could be meant for rows as well as for tokens
        checks.has_shape(name, value, shared, "shared by the whole of a hidden without a batch dimension,")
    else:
        forms = [shared, (hidden.shape[0], *shared), (*hidden.shape[:-2], *shared)][: 3 if hidden.ndim == 4 else 2]
        if tuple(value.shape) not in forms:
            legends = ("", "for each batch row ", "or for each token ")
            named = ", ".join(f"{legend}{form}" for legend, form in zip(legends, forms, strict=False))
            raise ValueError(f"{name} must be {named}, got shape {tuple(value.shape)}")


def by_rows(call: Call) -> Call:
    """The call itself, or one whose batch rows are the tokens where a coefficient is one for each of them."""
    ranks = (1, 2, 1)
    if not any(c is not None and c.ndim == rank + 2 for c, rank in zip(call[2:], ranks, strict=True)):
        return call
    batch, tokens = call.hidden.shape[:2]

    def of_tokens(value: Tensor | None, rank: int) -> Tensor | None:
        if value is None or value.ndim == rank:
            return value
        if value.ndim == rank + 1:
            value = value[:, None].expand(batch, tokens, *value.shape[1:])
        return value.reshape(batch * tokens, *value.shape[2:])

    branch_out = None if call.branch_out is None else call.branch_out.reshape(batch * tokens, 1, -1)
    hidden = call.hidden.reshape(batch * tokens, 1, *call.hidden.shape[2:])
    return Call(hidden, branch_out, *(of_tokens(c, rank) for c, rank in zip(call[2:], ranks, strict=True)))


def is_per_row(value: Tensor | None, rank: int) -> bool:
    return value is not None and value.ndim > rank


def _form_why_not(call: Call) -> str | None:
    if (rule := _shape_why_not(call)) is not None:
        return rule
    coefficients = (call.h_post, call.h_res, call.h_pre)
    if any(c is not None and c.dtype not in (torch.float32, torch.float64) for c in coefficients):
        return "needs float32 coefficients"
    return None


def _shape_why_not(call: Call) -> str | None:
    if call.hidden.ndim != 4:
        return "needs hidden [B, T, streams, C]"
    if call.hidden.shape[2] != STREAMS:
        return "needs 4 streams"
    return None


def triton_why_not(call: Call) -> str | None:
    if is_invariant():
        return _shape_why_not(call) or rules.triton_why_not(*call)
    return _form_why_not(call) or rules.triton_why_not(*call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.hidden)


def inductor_why_not(call: Call) -> str | None:
    return _form_why_not(call) or inductor.why_not_or_traced(*call)


def inductor_not_worth(call: Call) -> str | None:
    return inductor.not_worth_or_traced(call.hidden)


def native_why_not(call: Call) -> str | None:
    if is_invariant():
        return _shape_why_not(call) or native.op_why_not(*call)
    if (rule := _form_why_not(call)) is not None:
        return rule
    rows = (call.hidden,) if call.branch_out is None else (call.hidden, call.branch_out)
    return native.rows_why_not(rows, *(c for c in (call.h_post, call.h_res, call.h_pre) if c is not None))


def native_not_worth(call: Call) -> str | None:
    return native.rows_not_worth(call.hidden)


def native_sinkhorn_why_not(logits: Tensor, iters: int, temperature: float, eps: float, eps_in: str) -> str | None:
    if eps_in != "sums":
        return "needs eps_in='sums'"
    return native.op_why_not(logits)


MOST_MIXED = 32
"""Streams whose matrix a program of Sinkhorn's iterations holds in registers."""


def triton_sinkhorn_why_not(logits: Tensor, iters: int, temperature: float, eps: float, eps_in: str) -> str | None:
    if eps_in != "sums":
        return "needs eps_in='sums'"
    if logits.shape[-1] == 0:
        return "needs at least one stream"
    if logits.shape[-1] > MOST_MIXED:
        return "needs at most 32 streams"  # MOST_MIXED
    return rules.triton_why_not(logits)


def triton_sinkhorn_not_worth(logits: Tensor, *_: Any) -> str | None:
    return rules.triton_not_worth(logits)


EPS_IN = ("sums", "elements")


def check_sinkhorn(logits: Any, iters: Any, temperature: Any, eps: Any, eps_in: Any) -> None:
    checks.is_floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be square matrices [..., n, n], got shape {tuple(logits.shape)}")
    checks.is_int("iters", iters, minimum=1)
    checks.is_real("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    checks.is_real("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    checks.one_of("eps_in", eps_in, EPS_IN)
