"""Who may call ``fused_mla_projection``, who may answer, and what each policy keeps for backward."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, rules

KEPT = {"latent": "1/rms", "norm": "1/rms, latent", "none": "1/rms, latent, normed"}
"""What each ``recompute`` policy keeps beside x and the weights; the rest is computed again in backward."""

POLICIES = tuple(KEPT)

WIDEST = 16384
"""Channels of the widest latent whose rows the Triton kernels hold in registers."""


def check(x: Any, w_down: Any, w_up: Any, norm_weight: Any, eps: Any, recompute: Any) -> None:
    checks.is_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [..., Din], got a tensor of rank 0")
    for name, value in (("w_down", w_down), ("w_up", w_up)):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 2, "a matrix [out, in] as of torch.nn.Linear")
        checks.on_device(name, value, x, "x")
        if not autocasts(x):
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


def product_dtype(x: Tensor) -> torch.dtype:
    """What both products run in, and the result's dtype: x's, or autocast's, which leaves float64 alone."""
    autocast = autocasts(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return checks.is_autocast(x.device)


def statistics_dtype(dtype: torch.dtype, norm_weight: Tensor | None) -> torch.dtype:
    """What the norm is computed in: float32, or float64 where an argument is."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide if norm_weight is None else torch.promote_types(wide, norm_weight.dtype)


def details(
    x: Tensor, w_down: Tensor, w_up: Tensor, norm_weight: Tensor | None, eps: float, recompute: str, dtype: torch.dtype
) -> tuple[tuple[str, Any], ...]:
    """What a call whose result needs a gradient keeps beside x and the weights; bytes where sizes are known."""
    policy = (("recompute", recompute), ("kept", KEPT[recompute]))
    if torch.compiler.is_compiling():
        return policy
    rows = x.numel() // max(1, x.shape[-1])
    statistics = rows * statistics_dtype(dtype, norm_weight).itemsize
    latent = rows * w_down.shape[0] * dtype.itemsize
    sizes = {name: statistics + copies * latent for copies, name in enumerate(POLICIES)}
    return (*policy, ("kept_bytes", sizes[recompute]), ("kept_bytes_by_policy", sizes))


def reference_details(*_: Any) -> tuple[tuple[str, Any], ...]:
    return (("recompute", "not applied"), ("kept", "whatever autograd keeps of the plain formula"))


def eager_why_not(*call: Any) -> str | None:
    if rules.inside_functorch():
        return "inside a torch.func transform"
    if any(isinstance(t, Tensor) and type(t) not in rules.PLAIN for t in call):
        return "needs plain tensors, not a tensor subclass"
    return None


def inductor_why_not(*call: Any) -> str | None:
    return inductor.why_not(*call)


def inductor_not_worth(x: Tensor, w_down: Tensor, *_: Any) -> str | None:
    elements = x.numel() // max(1, x.shape[-1]) * w_down.shape[0]
    return "too small for a compiled region to pay" if elements < inductor.MIN_ELEMENTS else None


def triton_why_not(x: Tensor, w_down: Tensor, *call: Any) -> str | None:
    if w_down.shape[0] > WIDEST:
        return "needs a latent of at most 16384 channels"
    return rules.triton_why_not(x, w_down, *call)


triton_not_worth = rules.triton_not_worth
