"""Feed-forward layers."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.nn.linear import Linear
from kernel_index.nn.residual import Branch

Activation = Literal["relu2", "swiglu"]


class SquaredReLUMLP(nn.Module):
    """``down(relu(up(x))²)``, without biases.

    Args:
        dim: channels C.
        hidden: width of the hidden layer.
        recompute: whether backward computes the squared activation again from the pre-activation, which is kept
            anyway.  It saves tokens × hidden elements for one more elementwise pass; the second product is not
            repeated.  ``ki.explain(mlp, x)`` shows the bytes that are saved.
    """

    def __init__(self, dim: int, hidden: int, *, recompute: bool = True):
        super().__init__()
        _check_sizes(dim, hidden)
        self.up = Linear(dim, hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)
        self.recompute = recompute

    def forward(self, x_BTC: Tensor) -> Branch:
        h_BTF = self.up(x_BTC)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._second_half, h_BTF, use_reentrant=False, preserve_rng_state=False), None
        return self._second_half(h_BTF), None

    def _second_half(self, h_BTF: Tensor) -> Tensor:
        return self.down(ki.fused_relu_squared(h_BTF))


class SwiGLUMLP(nn.Module):
    """``down(silu(gate) · value)`` with ``gate, value = up(x)``, without biases.

    Args:
        dim: channels C.
        hidden: width of gate and of value.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        _check_sizes(dim, hidden)
        self.up = Linear(dim, 2 * hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)

    def forward(self, x_BTC: Tensor) -> Branch:
        return self.down(swiglu(self.up(x_BTC))), None


def _check_sizes(dim: int, hidden: int) -> None:
    checks.is_int("dim", dim, minimum=1)
    checks.is_int("hidden", hidden, minimum=1)


def swiglu(h_F: Tensor) -> Tensor:
    """``silu(gate) · value`` over the two halves of the last dimension."""
    gate, value = h_F.chunk(2, -1)
    return ki.fused_gated_activation(gate, value)


MLPS: dict[Activation, type[SquaredReLUMLP] | type[SwiGLUMLP]] = {"relu2": SquaredReLUMLP, "swiglu": SwiGLUMLP}
"""The dense layer of each activation."""
