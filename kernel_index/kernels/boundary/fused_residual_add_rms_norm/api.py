"""Add a block's output to the residual stream and normalise the stream for the next block."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core import native
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import ELEMENTWISE, ON_A_GPU
from kernel_index.kernels.boundary.fused_residual_add_rms_norm import contract
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.reference import residual_add_rms_norm_reference
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.torch_op import (
    residual_add_rms_norm_inductor,
    residual_add_rms_norm_native,
    residual_add_rms_norm_triton,
)

ResidualAddRMSNormBackend = Literal["auto", "triton", "native", "inductor", "reference"]

BACKENDS = (
    Backend(
        "triton", contract.triton_why_not, residual_add_rms_norm_triton, contract.triton_not_worth, invariant=ON_A_GPU
    ),
    Backend(
        "native",
        contract.native_why_not,
        residual_add_rms_norm_native,
        native.once_built(native.ROWS, not_worth=contract.native_not_worth),
        invariant=ELEMENTWISE,
    ),
    Backend("inductor", contract.inductor_why_not, residual_add_rms_norm_inductor, contract.inductor_not_worth),
    Backend("reference", always, residual_add_rms_norm_reference),
)


class ResidualAndNormed(NamedTuple):
    """The stream after a block, and the next block's input.

    >>> import torch, kernel_index as ki
    >>> pair = ki.fused_residual_add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2))
    >>> pair.new_residual
    tensor([[2., 2.]])
    """

    new_residual: Tensor
    normed: Tensor


def fused_residual_add_rms_norm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    scale: float | Tensor = 1.0,
    eps: float = 1e-8,
    fp32_residual: bool = False,
    weight_offset: float = 0.0,
    backend: ResidualAddRMSNormBackend = "auto",
) -> ResidualAndNormed:
    """Residual addition and RMS normalisation in one pass over memory.

    ``new_residual = residual + scale·delta``, then, row by row over the last dimension,
    ``normed = new_residual · rsqrt(mean(new_residual²) + eps) · (weight_offset + weight)``.

    Everything is computed in float32 (float64 if an argument is) and rounded once for each output.  What is normalised
    is new_residual *as stored*: backward then differentiates exactly what forward computed from the one tensor that
    is kept, and the result equals that of a separate addition followed by a separate norm.  Kept for backward:
    new_residual and one float32 number per row, and delta only if scale needs a gradient.  An output that is not
    used costs nothing in backward.

    Args:
        residual: the stream, ``[..., C]``, any floating dtype.
        delta: the block's output, exactly of residual's shape, any floating dtype.
        weight: the norm's weight ``[C]``.
        scale: what delta is multiplied by: a number, or a tensor of 1 or C elements, which then has a gradient.
        eps: added to the mean square.
        fp32_residual: store new_residual in float32 whatever residual's dtype, so that small terms are not lost.
        weight_offset: added to weight; 1.0 for weights that are stored around zero.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``(new_residual, normed)``: new_residual has residual's dtype, or float32 with fp32_residual; normed has
        delta's dtype.  Both are new, contiguous, and differentiable twice.

    Raises:
        TypeError: an argument has the wrong type or is not a floating-point tensor.
        ValueError: the shapes or devices differ, a number is not finite, or eps is negative.
        Ineligible: the named backend cannot run this call.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    >>> import torch, kernel_index as ki
    >>> stream, out = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    >>> ki.fused_residual_add_rms_norm(stream, out, torch.ones(2))
    ResidualAndNormed(new_residual=tensor([[3., 4.]]), normed=tensor([[0.8485, 1.1314]]))
    """
    call = contract.check(residual, delta, weight, scale, eps, fp32_residual, weight_offset)
    return ResidualAndNormed(*choose("fused_residual_add_rms_norm", BACKENDS, backend, call).run(call))
