"""A pre-norm transformer block whose residual updates are fused into the norms that follow them."""

from typing import Any

from torch import Tensor, nn

import kernel_index as ki
from kernel_index.nn.attention import Attention
from kernel_index.nn.mlp import SquaredReLUMLP
from kernel_index.nn.residual import Branch, ResidualRMSNorm


class TransformerBlock(nn.Module):
    """Mixer, then MLP.  A block receives the stream and the branch that the block before it has not yet added.

    Args:
        mixer: maps (normed [B, T, C], mask, rope tables) to a ``Branch``.
        mlp: maps normed [B, T, C] to a ``Branch``.
        dim: channels C.
        dropout: residual dropout of both branches.
    """

    def __init__(self, mixer: Attention, mlp: SquaredReLUMLP, dim: int, *, dropout: float = 0.0):
        super().__init__()
        self.mixer, self.mlp = mixer, mlp
        self.before_mixer = ResidualRMSNorm(dim, dropout=dropout)
        self.before_mlp = ResidualRMSNorm(dim, dropout=dropout)

    def forward(
        self,
        stream: Tensor,
        branch: Branch | None,
        mask: "ki.MaskContract | None",
        rope: tuple[Tensor, Tensor],
        cache: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Branch]:
        stream, normed = self.before_mixer(stream, branch)
        mixed = self.mixer(normed, mask, rope) if cache is None else self.mixer(normed, mask, rope, cache)
        stream, normed = self.before_mlp(stream, mixed)
        return stream, self.mlp(normed)
