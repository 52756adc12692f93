"""The base class of the mixers."""

from torch import nn

import kernel_index as ki


class Mixer(nn.Module):
    """Maps (normed [B, T, C], mask, rope tables, and a cache if there is one) to a ``Branch``.

    ``window`` is the number of previous tokens that a query sees besides itself, None for all; ``rope_dim`` the number
    of rotated channels, None for a mixer without positions; ``out`` the last projection of the branch.
    """

    window: int | None = None
    rope_dim: int | None = None
    out: nn.Linear

    def contract(self, mask: "ki.MaskContract") -> "ki.MaskContract":
        """The batch's mask narrowed to this layer's window.  Layers with equal windows should share the result."""
        return mask if self.window is None else mask.with_window(self.window, 0)
