"""The specification: a product for each tap, of the inputs so many tokens before."""

import torch
from torch import Tensor, nn

from kernel_index.core.dtypes import compute_dtype
from kernel_index.kernels.state_space.causal_conv1d.contract import Call


def causal_conv1d_reference(call: Call) -> Tensor:
    wide = compute_dtype(*call)
    taps, T = call.weight.shape[1], call.x.shape[1]
    weight_WC = call.weight.to(wide).T
    state = call.x.new_zeros(len(call.x), taps - 1, call.x.shape[2]) if call.state is None else call.state
    joined = torch.cat([state.to(wide), call.x.to(wide)], 1)
    if T == 1:
        y = (weight_WC * joined).sum(1, keepdim=True)
    else:
        y = weight_WC[-1] * joined[:, taps - 1 :]
        for j in range(taps - 1):
            earlier = weight_WC[j] * joined[:, j : j + T]
            if call.segments is not None:
                earlier = torch.where(_own(call.segments, taps - 1 - j)[..., None], earlier, 0.0)
            y = y + earlier
    y = y if call.bias is None else y + call.bias
    y = y if call.activation is None else nn.functional.silu(y)
    return y.to(call.x.dtype).contiguous()


def _own(segments: Tensor, back: int) -> Tensor:
    """Whether the token ``back`` tokens before is of the same segment; those before the first are of its segment."""
    back = min(back, segments.shape[1])
    before = segments[:, :1].expand(-1, back)
    return segments == torch.cat([before, segments[:, : segments.shape[1] - back]], 1)
