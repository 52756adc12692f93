"""The block boundary: add a branch to the residual stream, then normalise the sum."""

import torch
from torch import Tensor, nn

import kernel_index as ki

Branch = tuple[Tensor, Tensor | None]
"""What a mixer or an MLP returns: its output, and a bias [C] that the boundary adds (or None)."""


class ResidualRMSNorm(nn.Module):
    """Adds the previous branch to the stream and returns ``(stream, RMSNorm(stream))``.

    A branch without bias and dropout takes one kernel, ``fused_residual_add_rms_norm``.  A branch with either takes
    ``fused_bias_dropout_add`` and then a norm.  The stream is kept in float32 whatever the branch's dtype.

    Args:
        dim: channels C.
        dropout: probability that an element of ``branch + bias`` is dropped while training.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, *, dropout: float = 0.0, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.dropout = dropout
        self.eps = eps

    def forward(self, stream: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        if branch is None:  # the first boundary: nothing has been added to the embeddings yet
            return stream, self._norm(stream)
        out, bias = branch
        if bias is None and (self.dropout == 0.0 or not self.training):
            return ki.fused_residual_add_rms_norm(stream, out, self.weight, eps=self.eps, fp32_residual=True)
        stream = ki.fused_bias_dropout_add(out, stream, bias=bias, p=self.dropout, training=self.training)
        return stream, self._norm(stream).to(out.dtype)

    def _norm(self, stream: Tensor) -> Tensor:
        return nn.functional.rms_norm(stream, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, dropout={self.dropout}, eps={self.eps}"
