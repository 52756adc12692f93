"""A linear layer that follows ``ki.numerics``."""

from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core.numerics import is_invariant


class Linear(nn.Linear):
    """``torch.nn.Linear``; under ``ki.numerics("invariant")`` its product is ``ki.linear``."""

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear has
        return ki.linear(input, self.weight, self.bias) if is_invariant() else super().forward(input)
