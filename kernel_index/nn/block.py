"""Pre-norm blocks whose residual updates are fused into the norms that follow them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.nn.mixer import Mixer
from kernel_index.nn.residual import Branch, ResidualRMSNorm


class HybridBlock(nn.Module):
    """A mixer, a feed-forward layer, or both.  A block receives the stream and the branch not yet added to it.

    Args:
        dim: channels C.
        mixer: a ``Mixer``, or None.
        mlp: maps normed [B, T, C] to a ``Branch``; or None.
        dropout: probability of the residual dropout of every branch.
        fp32_residual: keep the stream in float32 for branches of any dtype.

    ``recompute = True`` keeps only the inputs of the block and computes the rest again in backward, with the same
    dropout masks.  What the feed-forward layer would compute again by itself it then keeps: only one block at a time
    holds it.
    """

    mixer: Mixer | None

    def __init__(
        self,
        dim: int,
        *,
        mixer: Mixer | None = None,
        mlp: nn.Module | None = None,
        dropout: float = 0.0,
        fp32_residual: bool = True,
    ):
        super().__init__()
        if mixer is None and mlp is None:
            raise ValueError("mixer must be given where mlp is not, got None")
        self.mixer, self.mlp, self.dropout = mixer, mlp, dropout
        self._recompute, self._switched_off = False, list[nn.Module]()
        self._compiled: Callable[..., tuple[Tensor, Branch]] | None = None
        boundary = {"dropout": dropout, "fp32_residual": fp32_residual}
        self.before_mixer = None if mixer is None else ResidualRMSNorm(dim, **boundary)
        self.before_mlp = None if mlp is None else ResidualRMSNorm(dim, **boundary)

    @property
    def recompute(self) -> bool:
        return self._recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if value and not self._recompute and self.mlp is not None:
            self._switched_off = [layer for layer in self.mlp.modules() if _recomputes(layer)]
        for layer in self._switched_off:
            setattr(layer, "recompute", not value)  # noqa: B010
        if not value:
            self._switched_off = []
        self._recompute = value

    def forward(
        self,
        stream: Tensor,
        branch: Branch | None,
        mask: "ki.MaskContract | None" = None,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Branch]:
        if cache is not None or not torch.is_grad_enabled():
            return self._forward(stream, branch, mask, rope, cache)
        return (self._compiled or self._train_forward)(stream, branch, mask, rope)

    def compile_training(self, compiler: str = "inductor") -> None:
        """From now on passes with a gradient and without a cache run through ``torch.compile``, as one graph."""
        self._compiled = torch.compile(self._train_forward, fullgraph=True, backend=compiler)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None}  # of this process

    def _train_forward(
        self,
        stream: Tensor,
        branch: Branch | None,
        mask: "ki.MaskContract | None",
        rope: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Branch]:
        if self.recompute:
            keep_seeds = self.dropout > 0  # else nothing is drawn, and a CUDA graph cannot read the generator's state
            return checkpoint(
                self._forward, stream, branch, mask, rope, None, use_reentrant=False, preserve_rng_state=keep_seeds
            )
        return self._forward(stream, branch, mask, rope, None)

    def _forward(
        self,
        stream: Tensor,
        branch: Branch | None,
        mask: "ki.MaskContract | None",
        rope: tuple[Tensor, Tensor] | None,
        cache: Any,
    ) -> tuple[Tensor, Branch]:
        if self.before_mixer is not None and self.mixer is not None:
            stream, normed = self.before_mixer(stream, branch)
            branch = self.mixer(normed, mask, rope) if cache is None else self.mixer(normed, mask, rope, cache)
        if self.before_mlp is not None and self.mlp is not None:
            stream, normed = self.before_mlp(stream, branch)
            branch = self.mlp(normed)
        assert branch is not None
        out, bias = branch
        # The next block adds the bias, when a sharded block has already freed its gathered parameters: hence a copy.
        return stream, (out, None if bias is None else bias.clone())


def _recomputes(layer: nn.Module) -> bool:
    return getattr(layer, "recompute", False) is True


class TransformerBlock(HybridBlock):
    """Mixer, then MLP: a ``HybridBlock`` with both."""

    def __init__(self, mixer: Mixer, mlp: nn.Module, dim: int, *, dropout: float = 0.0, fp32_residual: bool = True):
        super().__init__(dim, mixer=mixer, mlp=mlp, dropout=dropout, fp32_residual=fp32_residual)


class BlockBranch(nn.Module):
    """A block as one branch, for ``HyperConnections``: the update that it would add to the stream [B, T, C]."""

    def __init__(self, block: HybridBlock):
        super().__init__()
        self.block = block

    def forward(self, x_BTC: Tensor, *args: Any, **kwargs: Any) -> Branch:
        stream, (out, bias) = self.block(x_BTC, None, *args, **kwargs)
        dropout = self.block.dropout if self.training else 0.0
        if stream is x_BTC and dropout == 0.0:
            return out, bias
        return ki.fused_bias_dropout_add(out, stream - x_BTC, bias=bias, p=dropout, training=self.training), None
