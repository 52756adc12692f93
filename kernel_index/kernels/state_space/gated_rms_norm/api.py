"""The norm behind a state-space scan: of the scan's output times the activation of its gate."""

from typing import Literal

import torch
from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import ON_A_GPU
from kernel_index.kernels.state_space.gated_rms_norm import contract
from kernel_index.kernels.state_space.gated_rms_norm.reference import gated_rms_norm_reference
from kernel_index.kernels.state_space.gated_rms_norm.torch_op import gated_rms_norm_triton

GatedRMSNormBackend = Literal["auto", "triton", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, gated_rms_norm_triton, contract.triton_not_worth, invariant=ON_A_GPU),
    Backend("reference", always, gated_rms_norm_reference),
)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    backend: GatedRMSNormBackend = "auto",
) -> Tensor:
    """RMS normalisation of ``x · silu(gate)`` in one pass over memory.

    With ``z = x · gate · sigmoid(gate)``, or z = x without a gate, group by group over the last dimension:
    ``y = z · rsqrt(mean(z²) + eps) · weight``, computed in float32 at least and rounded once.  Backward makes z again;
    kept are the arguments and one float32 number for each group of a row.  The gradient of weight is added up in a
    fixed order.

    Args:
        x: ``[..., C]``, any floating dtype; C is at least 1.
        gate: x's shape, any floating dtype; None for none.  It may be a part of a projection: rows are read where they
            are.
        weight: ``[C]``, any floating dtype.
        eps: added to the mean square.
        groups: into how many equal groups the channels are divided; each is normalised by itself.
        dtype: of the result; None for x's.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        A new contiguous tensor of x's shape, differentiable twice.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, eps is negative, or groups do not divide the channels.
        Ineligible: the named backend cannot run this call.

    Source: Dao and Gu, "Transformers are SSMs", 2024; ``RMSNormGated`` of ``mamba_ssm``, with the gate before the norm.

    >>> import torch, kernel_index as ki
    >>> ki.gated_rms_norm(torch.tensor([[1.0, 3.0]]), torch.full((1, 2), 20.0), torch.ones(2))
    tensor([[0.4472, 1.3416]])
    """
    call = contract.check(x, gate, weight, eps, groups, dtype)
    return choose("gated_rms_norm", BACKENDS, backend, call).run(call)
