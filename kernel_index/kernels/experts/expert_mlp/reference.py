"""The specification: each part's own, one after the other."""

from torch import Tensor

from kernel_index.kernels.experts.expert_dispatch.contract import Combine
from kernel_index.kernels.experts.expert_dispatch.reference import combine_reference, dispatch_reference
from kernel_index.kernels.experts.expert_mlp.contract import Call
from kernel_index.kernels.experts.fused_gated_activation import contract as gated
from kernel_index.kernels.experts.fused_gated_activation.reference import gated_activation_reference
from kernel_index.kernels.experts.fused_relu_squared.reference import relu_squared_reference
from kernel_index.kernels.experts.grouped_product.reference import grouped_product_reference


def expert_mlp_reference(call: Call) -> Tensor:
    h_SF = hidden_reference(call.x, call.up, call.slots, call.offsets)
    return output_reference(call, h_SF)


def hidden_reference(x: Tensor, up: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
    """The results of the first product, in the order of the experts."""
    return grouped_product_reference(dispatch_reference(x, slots), up, offsets)


def output_reference(call: Call, h_SF: Tensor) -> Tensor:
    active = relu_squared_reference(h_SF) if call.activation == "relu2" else _swiglu(h_SF)
    rows = grouped_product_reference(active, call.down, call.offsets)
    return combine_reference(Combine(rows, call.weights, call.slots, call.base))


def _swiglu(h_SF: Tensor) -> Tensor:
    gate, value = h_SF.chunk(2, -1)
    return gated_activation_reference(gated.check(gate, value, "silu"))
