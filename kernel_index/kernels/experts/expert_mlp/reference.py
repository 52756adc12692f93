"""The specification: the reference of each part, one after the other."""

from torch import Tensor

from kernel_index.kernels.experts.expert_mlp.composed import hidden, output
from kernel_index.kernels.experts.expert_mlp.contract import Call


def expert_mlp_reference(call: Call) -> Tensor:
    h_SF = hidden_reference(call.x, call.up, call.slots, call.offsets)
    return output_reference(call, h_SF)


def hidden_reference(x: Tensor, up: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
    return hidden(x, up, slots, offsets, "reference")


def output_reference(call: Call, h_SF: Tensor) -> Tensor:
    return output(call, h_SF, "reference")
