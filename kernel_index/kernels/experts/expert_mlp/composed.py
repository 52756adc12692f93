"""The public functions of the parts, one after the other, with a backend's name for all of them."""

from typing import Any

from torch import Tensor

from kernel_index.kernels.experts.expert_dispatch.api import expert_combine, expert_dispatch
from kernel_index.kernels.experts.expert_mlp.contract import Call
from kernel_index.kernels.experts.fused_gated_activation.api import fused_gated_activation
from kernel_index.kernels.experts.fused_relu_squared.api import fused_relu_squared
from kernel_index.kernels.experts.grouped_product.api import grouped_product


def hidden(x: Tensor, up: Tensor, slots: Tensor, offsets: Tensor, by: Any) -> Tensor:
    """The results of the first product, in the order of the experts."""
    return grouped_product(expert_dispatch(x, slots, backend=by), up, offsets, backend=by)


def output(call: Call, h_SF: Tensor, by: Any) -> Tensor:
    """What becomes of them."""
    return expert_combine(rows(call, h_SF, by), call.weights, call.slots, call.base, backend=by)


def rows(call: Call, h_SF: Tensor, by: Any) -> Tensor:
    if call.activation == "relu2":
        active = fused_relu_squared(h_SF, backend=by)
    else:
        active = fused_gated_activation(*h_SF.chunk(2, -1), backend=by)
    return grouped_product(active, call.down, call.offsets, backend=by)
