"""Feed-forward layers."""

from torch import Tensor, nn

import kernel_index as ki
from kernel_index.nn.residual import Branch


class SquaredReLUMLP(nn.Module):
    """``down(relu(up(x))²)``, without biases.

    Args:
        dim: channels C.
        hidden: width of the hidden layer.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTC: Tensor) -> Branch:
        return self.down(ki.fused_relu_squared(self.up(x_BTC))), None
