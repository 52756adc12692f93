"""The low-rank projection of multi-head latent attention: down, RMS norm, up."""

from typing import Literal

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.kernels.mla.fused_mla_projection import contract
from kernel_index.kernels.mla.fused_mla_projection.reference import mla_projection_reference
from kernel_index.kernels.mla.fused_mla_projection.torch_op import (
    mla_projection_eager,
    mla_projection_inductor,
    mla_projection_triton,
)

MLAProjectionBackend = Literal["auto", "triton", "inductor", "eager", "reference"]

BACKENDS = (
    Backend(
        "triton", contract.triton_why_not, mla_projection_triton, contract.triton_not_worth, details=contract.details
    ),
    Backend(
        "inductor",
        contract.inductor_why_not,
        mla_projection_inductor,
        contract.inductor_not_worth,
        details=contract.details,
    ),
    Backend("eager", contract.eager_why_not, mla_projection_eager, details=contract.details),
    Backend("reference", always, mla_projection_reference, details=contract.reference_details),
)


def fused_mla_projection(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    recompute: contract.Recompute = "latent",
    backend: MLAProjectionBackend = "auto",
) -> Tensor:
    """Project down to a latent, normalise it, project up; the latent need not be kept for backward.

    ``latent = x · w_downᵀ``, ``normed = latent · rsqrt(mean(latent²) + eps) · norm_weight``,
    ``out = normed · w_upᵀ``.

    The products run in x's dtype, or in autocast's; statistics and the norm are float32 (float64 for float64
    arguments).  ``recompute`` names the first tensor that backward recomputes, and so what is kept beside x and the
    weights, which the caller holds: with N rows,

    - ``"latent"``: 4·N bytes, 1/rms of each row.  Backward has one product more: 2·N·Din·L FLOPs beside
      4·N·L·(Din + Dout).
    - ``"norm"``: the latent as well, N·L elements.
    - ``"none"``: the normed latent as well, 2·N·L elements.

    The receipt and ``ki.explain`` state the policy and these bytes.  Weight gradients are summed in float32 and rounded
    once, to the weight's own dtype; a frozen argument costs none of its products.

    Args:
        x: [..., Din], any floating dtype.
        w_down: [L, Din], as ``torch.nn.Linear`` keeps it, of x's dtype outside of autocast.
        w_up: [Dout, L], likewise.
        norm_weight: [L] or None for ones; any floating dtype.
        eps: added to the mean square.
        recompute: ``"latent"``, ``"norm"`` or ``"none"``.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.  ``"reference"`` is
            plain autograd and keeps more than any policy.

    Returns:
        [..., Dout], contiguous, of x's dtype or autocast's.  Differentiable twice.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the weights' dtype is not x's outside of autocast.
        ValueError: the shapes or devices do not fit, eps is negative, or the policy is unknown.
        Ineligible: the named backend cannot run this call.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; recomputing it, "DeepSeek-V3 Technical Report", 2024.

    >>> import torch, kernel_index as ki
    >>> x, w_down, w_up = torch.tensor([[3.0, 4.0, 0.0]]), torch.eye(2, 3), torch.ones(1, 2)
    >>> ki.fused_mla_projection(x, w_down, w_up)
    tensor([[1.9799]])
    >>> ki.explain("fused_mla_projection", x, w_down, w_up, recompute="norm").details["kept_bytes"]
    12
    """
    call = contract.check(x, w_down, w_up, norm_weight, eps, recompute)
    return choose("fused_mla_projection", BACKENDS, backend, call).run(call)
