"""The specification: gate where there is one, then normalise."""

from torch import Tensor, nn

from kernel_index.core.dtypes import compute_dtype
from kernel_index.kernels.state_space.gated_rms_norm.contract import Call


def gated_rms_norm_reference(call: Call) -> Tensor:
    wide = compute_dtype(call.x, call.weight, *([] if call.gate is None else [call.gate]))
    gated, weight = call.x.to(wide), call.weight.to(wide)
    if call.gate is not None:
        gated = gated * nn.functional.silu(call.gate.to(wide))
    if call.groups == 1:
        normed = nn.functional.rms_norm(gated, weight.shape, weight, call.eps)
    else:
        grouped = gated.unflatten(-1, (call.groups, -1))
        normed = nn.functional.rms_norm(grouped, grouped.shape[-1:], None, call.eps).flatten(-2) * weight
    return normed.to(call.dtype).contiguous()
