"""The block boundary: add a branch to the residual stream, then normalise the sum."""

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.numerics import is_invariant

Branch = tuple[Tensor, Tensor | None]
"""The result of a mixer or an MLP: its output, and a bias [C] that the boundary adds (or None)."""


def invariant_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in x's dtype, for ``numerics("invariant")``: on a CPU by the boundary's kernel, with nothing to add."""
    if x.is_cuda:
        return ki.gated_rms_norm(x, None, weight, eps=eps, dtype=x.dtype)
    return ki.fused_residual_add_rms_norm(x, torch.zeros_like(x), weight, eps=eps).normed


class ResidualRMSNorm(nn.Module):
    """Adds the previous branch to the stream and returns ``(stream, RMSNorm(stream))``.

    A branch without bias and dropout runs one kernel, ``fused_residual_add_rms_norm``.  A branch with either runs
    ``fused_bias_dropout_add`` and then ``gated_rms_norm`` without a gate.

    Args:
        dim: channels C.
        dropout: probability that an element of ``branch + bias`` is dropped while training.
        eps: added to the mean square.
        fp32_residual: keep the stream in float32 for a branch of any dtype; False keeps the stream's own dtype.
    """

    def __init__(self, dim: int, *, dropout: float = 0.0, eps: float = 1e-6, fp32_residual: bool = True):
        super().__init__()
        checks.is_int("dim", dim, minimum=1)
        checks.is_probability("dropout", dropout)
        checks.is_real("eps", eps)
        if eps < 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        self.weight = nn.Parameter(torch.ones(dim))
        self.dropout, self.eps, self.fp32_residual = dropout, eps, fp32_residual

    def forward(self, stream: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        if branch is None:  # the first boundary: nothing has been added to the embeddings yet
            # In the dtype that the layers multiply in, so that each of them need not convert it.
            cast = checks.is_autocast(stream.device)
            return stream, self._norm(stream, torch.get_autocast_dtype(stream.device.type) if cast else stream.dtype)
        out, bias = branch
        if bias is None and (self.dropout == 0.0 or not self.training):
            options = {"eps": self.eps, "fp32_residual": self.fp32_residual}
            return ki.fused_residual_add_rms_norm(stream, out, self.weight, **options)
        wide = stream.to(torch.promote_types(stream.dtype, torch.float32)) if self.fp32_residual else stream
        stream = ki.fused_bias_dropout_add(out, wide, bias=bias, p=self.dropout, training=self.training)
        return stream, self._norm(stream, out.dtype)

    def _norm(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        if is_invariant() and not stream.is_cuda:
            return invariant_norm(stream, self.weight, self.eps).to(dtype)
        return ki.gated_rms_norm(stream, None, self.weight, eps=self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, dropout={self.dropout}, eps={self.eps}"
