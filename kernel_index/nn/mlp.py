"""Feed-forward layers."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.nn.residual import Branch


class SquaredReLUMLP(nn.Module):
    """``down(relu(up(x))²)``, without biases.

    Args:
        dim: channels C.
        hidden: width of the hidden layer.
        recompute: whether the squared activation is formed again in backward, from the pre-activation that is kept
            anyway, so that it is never stored: tokens × hidden elements less for one more elementwise pass.  The
            second product is not repeated.  ``ki.explain(mlp, x)`` says how many bytes that is.
    """

    def __init__(self, dim: int, hidden: int, *, recompute: bool = True):
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.recompute = recompute

    def forward(self, x_BTC: Tensor) -> Branch:
        h_BTF = self.up(x_BTC)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._second_half, h_BTF, use_reentrant=False, preserve_rng_state=False), None
        return self._second_half(h_BTF), None

    def _second_half(self, h_BTF: Tensor) -> Tensor:
        return self.down(ki.fused_relu_squared(h_BTF))
