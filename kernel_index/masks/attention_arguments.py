"""Checks and defaults of the arguments that every attention function takes.

``q`` [B, T, H, D], ``k`` [B, S, K, D], ``v`` [B, S, K, Dv], a ``MaskContract``, ``scale``, ``softcap``, ``sink`` [H].
"""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.core.target import target_of
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract

EVERYTHING_BEFORE = MaskContract()
"""The default mask: causal, aligned with the last key."""


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any, softcap: Any, sink: Any = None) -> None:
    """Raise ``TypeError`` or ``ValueError`` if an argument has the wrong type, shape, dtype or device."""
    for name, value, legend in (("q", q, "[B, T, H, D]"), ("k", k, "[B, S, K, D]"), ("v", v, "[B, S, K, Dv]")):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, legend)
        checks.has_dtype(name, value, q.dtype, "like q")
        checks.on_device(name, value, q, "q")
    batch, _, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    checks.has_shape("k", k, (batch, keys, kv_heads, width), "[B, S, K, D] with q's B and D,")
    checks.has_shape("v", v, (batch, keys, kv_heads, v.shape[3]), "[B, S, K, Dv] with k's B, S and K,")
    if width < 1:
        raise ValueError(f"q must be of head size at least 1, got shape {tuple(q.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must be of a multiple of k's {kv_heads} heads, got {heads}")
    if not isinstance(mask, MaskContract):
        raise TypeError(f"mask must be a MaskContract, got {type(mask).__name__}")
    sizes_of(q, k, mask)
    _check_layout(q, k, mask)
    check_scoring(scale, softcap)
    check_sink(sink, q)


def check_sink(sink: Any, q: Tensor) -> None:
    """Raise unless sink is None or floating [H] on the device of q [B, T, H, D]."""
    if sink is not None:
        checks.is_floating("sink", sink)
        checks.has_shape("sink", sink, (q.shape[2],), "one logit for each query head, [H]")
        checks.on_device("sink", sink, q, "q")


def _check_layout(q: Tensor, k: Tensor, mask: MaskContract) -> None:
    """Refuse T > S under the default mask, where the first T − S queries would see nothing.

    It is what tensors in the layout of PyTorch's ``scaled_dot_product_attention`` look like, which would give zeros.
    """
    queries, keys = q.shape[1], k.shape[1]
    if mask is EVERYTHING_BEFORE and queries > keys > 0:
        raise ValueError(
            f"k must have at least q's {queries} tokens under the default mask, got {keys}: "
            "the layout is [B, T, H, D], not SDPA's [B, H, T, D]; give a mask where T > S is meant"
        )


def check_scoring(scale: Any, softcap: Any) -> None:
    """Raise unless scale is a finite number or None, and softcap a finite number of at least 0."""
    if scale is not None:
        checks.is_real("scale", scale)
    checks.is_real("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0 (0 is off), got {softcap}")


def sizes_of(q: Tensor, k: Tensor, mask: MaskContract) -> Sizes:
    """The mask's sizes for q and k; raises ``ValueError`` if its tensors have other sizes."""
    return mask.sizes(q.shape[0], q.shape[1], k.shape[1], q.device)


def scale_of(q: Tensor, scale: float | None) -> float:
    """``scale``, or 1/√D where it is None."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def host_plan_why_not(q: Tensor) -> str | None:
    """Eligibility of the CPU backends that read the mask's intervals on the host to plan their tiles."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: the mask's intervals are read on the host"
    if target_of(q.device).kind != "cpu":
        return rules.NEEDS_CPU
    if rules.inside_functorch():
        return rules.INSIDE_FUNCTORCH
    if rules.inside_dispatch_mode():
        return "inside a dispatch mode: the mask's intervals are read on the host"
    return None
