"""Argument checks and backend eligibility of ``fused_mla_projection``, and what each policy keeps for backward."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, rules
from kernel_index.core.autocast import autocast_dtype

Recompute = Literal["latent", "norm", "none"]

KEPT = {"latent": "1/rms", "norm": "1/rms, latent", "none": "1/rms, latent, normed"}
"""What each ``recompute`` policy keeps beside x and the weights; backward recomputes the rest."""

POLICIES = tuple(KEPT)

WIDEST = 16384
"""Channels of the widest latent of which the Triton kernels hold a row in registers."""


class Call(NamedTuple):
    """A checked call; ``dtype`` is that of both products and of the result."""

    x: Tensor
    w_down: Tensor
    w_up: Tensor
    norm_weight: Tensor | None
    eps: float
    recompute: Recompute
    dtype: torch.dtype


def check(x: Any, w_down: Any, w_up: Any, norm_weight: Any, eps: Any, recompute: Any) -> Call:
    checks.is_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [..., Din], got a tensor of rank 0")
    for name, value in (("w_down", w_down), ("w_up", w_up)):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 2, "a matrix [out, in] as of torch.nn.Linear")
        checks.on_device(name, value, x, "x")
        if not checks.is_autocast(x.device):
            checks.has_dtype(name, value, x.dtype, "like x outside of autocast")
    checks.has_shape("w_down", w_down, (w_down.shape[0], x.shape[-1]), "[L, Din] =")
    checks.has_shape("w_up", w_up, (w_up.shape[0], w_down.shape[0]), "[Dout, L] =")
    if norm_weight is not None:
        checks.is_floating("norm_weight", norm_weight)
        checks.has_shape("norm_weight", norm_weight, (w_down.shape[0],), "[L] =")
        checks.on_device("norm_weight", norm_weight, x, "x")
    checks.is_real("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    checks.one_of("recompute", recompute, POLICIES)
    return Call(x, w_down, w_up, norm_weight, eps, recompute, autocast_dtype(x) or x.dtype)


def statistics_dtype(dtype: torch.dtype, norm_weight: Tensor | None) -> torch.dtype:
    """What the norm is computed in: float32, or float64 where an argument is."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide if norm_weight is None else torch.promote_types(wide, norm_weight.dtype)


def _row_count(call: Call) -> int:
    return call.x.numel() // max(1, call.x.shape[-1])


def details(call: Call) -> tuple[tuple[str, Any], ...]:
    """What a call whose result needs a gradient keeps beside x and the weights; bytes where sizes are known."""
    policy = (("recompute", call.recompute), ("kept", KEPT[call.recompute]))
    if torch.compiler.is_compiling():
        return policy
    statistics = _row_count(call) * statistics_dtype(call.dtype, call.norm_weight).itemsize
    latent = _row_count(call) * call.w_down.shape[0] * call.dtype.itemsize
    sizes = {name: statistics + copies * latent for copies, name in enumerate(POLICIES)}
    return (*policy, ("kept_bytes", sizes[call.recompute]), ("kept_bytes_by_policy", sizes))


def reference_details(_: Call) -> tuple[tuple[str, Any], ...]:
    return (("recompute", "not applied"), ("kept", "whatever autograd keeps of the plain formula"))


def eager_why_not(call: Call) -> str | None:
    return rules.plain_why_not(*call)


def inductor_why_not(call: Call) -> str | None:
    return inductor.why_not(*call)


def inductor_not_worth(call: Call) -> str | None:
    return inductor.TOO_SMALL if _row_count(call) * call.w_down.shape[0] < inductor.MIN_ELEMENTS else None


def triton_why_not(call: Call) -> str | None:
    if call.w_down.shape[0] > WIDEST:
        return "needs a latent of at most 16384 channels"
    return rules.triton_why_not(*call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.x)
