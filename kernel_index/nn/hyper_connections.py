"""Several residual streams instead of one: static hyper-connections around any block."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks, stable
from kernel_index.core.numerics import is_invariant


class HyperConnections(nn.Module):
    """One block between residual streams: weights of what it reads, of what it writes, and of how the streams mix.

    ``hidden ← h_res · hidden + h_post · block(h_pre · hidden)``, with ``h_res = sinkhorn(h_res_logits)``, a doubly
    stochastic matrix: the mean of the streams passes from layer to layer unchanged.

    At initialization the block reads one stream (number ``index`` modulo the streams), writes to all of them, and the
    streams do not mix.  Streams that begin as copies therefore stay copies, and the model equals the model with a
    single stream: in exact arithmetic for every ``separation``, bit for bit from about 20 on, where the float32 matrix
    is the identity.  Its gradient is then almost zero, too; the default leaves 1/3000 off the diagonal.

    Args:
        block: maps [B, T, C] and the further arguments of forward to [B, T, C], or to ([B, T, C], bias [C] or None).
        index: position among the layers.
        streams: 4 for the fused backends.
        separation: initial difference of the logits of h_res on and off the diagonal.
        iters: Sinkhorn iterations.
    """

    def __init__(self, block: nn.Module, index: int = 0, *, streams: int = 4, separation: float = 8.0, iters: int = 20):
        super().__init__()
        checks.is_int("index", index)
        checks.is_int("streams", streams, minimum=1)
        checks.is_real("separation", separation)
        checks.is_int("iters", iters, minimum=0)
        self.block, self.iters = block, iters
        self.h_pre = nn.Parameter(torch.eye(streams)[index % streams])
        self.h_post = nn.Parameter(torch.ones(streams))
        self.h_res_logits = nn.Parameter(separation * torch.eye(streams))

    @property
    def streams(self) -> int:
        return self.h_pre.numel()

    def h_res(self) -> Tensor:
        return ki.sinkhorn(self.h_res_logits, self.iters, eps=0.0)

    def run_block(self, x_BTC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output with its bias."""
        out = self.block(x_BTC, *args, **kwargs)
        if isinstance(out, Tensor):
            return out
        out, bias = out
        return out if bias is None else out + bias

    def forward(self, hidden_BTNC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x_BTC = ki.mhc_branch_input(hidden_BTNC, self.h_pre)
        return ki.mhc_merge(hidden_BTNC, self.run_block(x_BTC, *args, **kwargs), self.h_post, self.h_res())


class HyperConnectedBlocks(nn.Module):
    """Blocks in a row over shared streams, each merge fused with the next block's input: [B, T, C] to [B, T, C].

    The streams begin as copies of the input, and their mean is the output.  The mixing matrices of all layers are
    computed together, so that Sinkhorn's 40 small steps run once, not once per layer.

    Args:
        blocks: the blocks, first to last, each as ``HyperConnections`` takes it.
        iters: Sinkhorn iterations.
        options: the other options of ``HyperConnections``.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, iters: int = 20, **options: Any):
        super().__init__()
        self.iters = iters
        options["iters"] = iters
        self.layers = nn.ModuleList(HyperConnections(b, i, **options) for i, b in enumerate(blocks))

    def forward(self, x_BTC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Every block gets the same further arguments."""
        return self.run(x_BTC, [(args, kwargs)] * len(self.layers))

    def mixing(self) -> Tensor:
        """``h_res`` of every layer, [layers, streams, streams]."""
        return ki.sinkhorn(torch.stack([layer.h_res_logits for layer in self._layers()]), self.iters, eps=0.0)

    def run(
        self,
        x_BTC: Tensor,
        arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        mixing: Tensor | None = None,
    ) -> Tensor:
        """``forward`` with further arguments ``(args, kwargs)`` of its own for every block.

        ``mixing`` is the result of ``mixing()``, for many runs with the same weights; by default it is computed here.
        """
        layers = self._layers()
        if not layers:
            return x_BTC
        hidden = x_BTC.unsqueeze(-2).repeat_interleave(layers[0].streams, -2)
        branch_input = ki.mhc_branch_input(hidden, layers[0].h_pre)
        *inner, last_mixing = (self.mixing() if mixing is None else mixing).unbind()
        between = zip(itertools.pairwise(layers), inner, arguments, strict=False)
        for (layer, following), h_res, (args, kwargs) in between:
            out = layer.run_block(branch_input, *args, **kwargs)
            hidden, branch_input = ki.mhc_merge_and_branch_input(hidden, out, layer.h_post, h_res, following.h_pre)
        last, (args, kwargs) = layers[-1], arguments[-1]
        out = last.run_block(branch_input, *args, **kwargs)
        if is_invariant():
            hidden = ki.mhc_merge(hidden, out, last.h_post, last_mixing)
            return stable.sum_of(hidden, -2) / hidden.shape[-2]
        mean = last.h_pre.new_full((last.streams,), 1 / last.streams)
        return ki.mhc_merge_and_branch_input(hidden, out, last.h_post, last_mixing, mean).branch_input

    def _layers(self) -> list[HyperConnections]:
        return [layer for layer in self.layers if isinstance(layer, HyperConnections)]
