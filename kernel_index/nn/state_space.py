"""The Mamba-2 mixer: a gated linear recurrence, computed in chunks, that restarts with every document."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.numerics import Ineligible, is_invariant, needs_ordinary_numerics
from kernel_index.nn.document_scan import mixed_by_documents, no_tokens
from kernel_index.nn.linear import Linear
from kernel_index.nn.mixer import Mixer
from kernel_index.nn.residual import Branch
from kernel_index.nn.tree_scan import mix_tree


def segments_of(mask: "ki.MaskContract | None", tokens: int) -> Tensor | None:
    """The number of each token's document in its row, int64 [B or 1, T]; None where the mask has no documents."""
    ids = None if mask is None else mask.document_rows(tokens)
    if ids is None:
        return None
    return nn.functional.pad((ids[:, 1:] != ids[:, :-1]).long().cumsum(-1), (1, 0))


@dataclass
class MixerState:
    """The state of a ``Mamba2`` layer for its rows; every forward replaces it.

    ``conv``: [B, width − 1, channels], the latest inputs of the convolution.  ``scan``: [B, H, P, N], float32 at least.
    ``counts``: int64 [B], the real tokens of each row in the step; None for all.  ``open``, under
    ``numerics("invariant")``: x, log_a and b of the tokens since ``scan``, [B, chunk, …], and how many there are [B].
    ``ordinary``: it holds tokens of ordinary numerics, whose ``scan`` is the state at the last of them.
    """

    conv: Tensor
    scan: Tensor
    counts: Tensor | None = None
    open: tuple[Tensor, ...] = ()
    ordinary: bool = False


class Mamba2(Mixer):
    """Mamba-2: a short causal convolution, the gated recurrence, a gated norm.  Its state has a fixed size.

    Neither the convolution nor the scan reads across a change of the mask's document ids.  In a prefix tree both follow
    the paths: a branch begins with the state of the token that it continues.  Windows and valid counts of the mask have
    no effect, because padding follows the text.

    Args:
        dim: channels C of the stream.
        heads: H.
        head_dim: P.
        state: size N of the state per channel.
        groups: G; the heads of a group share b and c.
        width: tokens that the convolution sees.
        chunk: tokens of a chunk of the scan.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, *, state: int, groups: int = 1, width: int = 4, chunk: int = 64
    ):
        super().__init__()
        sizes = {"dim": dim, "heads": heads, "head_dim": head_dim, "state": state, "groups": groups, "width": width}
        for name, size in (*sizes.items(), ("chunk", chunk)):
            checks.is_int(name, size, minimum=1)
        if heads % groups:
            raise ValueError(f"heads must be a multiple of groups ({groups}), got {heads}")
        self.heads, self.head_dim, self.state, self.groups = heads, head_dim, state, groups
        self.width, self.chunk = width, chunk
        inner = heads * head_dim
        self.sizes = [inner, inner + 2 * groups * state, heads]
        self.proj = Linear(dim, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.empty(width, self.sizes[1]))
        self.log_decay = nn.Parameter(torch.empty(heads))
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = nn.Parameter(torch.ones(inner))
        self.out = Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Steps from 0.001 to 0.1 and decays from 1 to 16, spread evenly over the heads."""
        with torch.no_grad():
            at = torch.linspace(0, 1, self.heads)
            step = 0.001 * 100**at
            self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is the step
            self.log_decay.copy_(torch.log(1 + 15 * at.flip(0)))
            nn.init.normal_(self.conv, std=self.width**-0.5)

    def forward(
        self,
        x_BTC: Tensor,
        mask: "ki.MaskContract | None" = None,
        rope: object = None,
        cache: MixerState | None = None,
    ) -> Branch:
        if is_invariant():
            if cache is not None and cache.ordinary:
                needs_ordinary_numerics("nn.Mamba2", "the tokens of its state were not computed so: begin a new cache")
            return mixed_by_documents(self, x_BTC, mask, cache)
        if cache is not None and cache.open:
            raise Ineligible("nn.Mamba2: ordinary numerics cannot go on with a state of numerics('invariant')")
        gate, inputs, step = self.proj(x_BTC).split(self.sizes, -1)
        segments = segments_of(mask, x_BTC.shape[1]) if cache is None else None
        counts = None if cache is None else cache.counts
        tree = mask if cache is None and mask is not None and mask.is_tree else None
        if tree is not None:
            y_BTHP = mix_tree(self._convolve, self._scan, self.width, inputs, step, tree, segments)
        else:
            before, state = (None, None) if cache is None else (cache.conv, cache.scan)
            if counts is not None:  # padding after a shorter prompt does not change the state: softplus(−∞) is 0
                is_token = torch.arange(inputs.shape[1], device=inputs.device) < counts[:, None]
                step = step.masked_fill(~is_token[..., None], -torch.inf)
            y_BTHP, last = self._scan(self._convolve(inputs, segments, before), step, segments, state)
            if cache is not None:
                self._remember(cache, inputs, last)
        normed = ki.gated_rms_norm(y_BTHP.flatten(2), gate, self.norm)
        return self.out(normed.to(x_BTC.dtype)), None

    def _convolve(self, inputs_BTC: Tensor, segments: Tensor | None, before: Tensor | None) -> Tensor:
        return ki.causal_conv1d(inputs_BTC, self.conv.T, activation="silu", segments=segments, state=before)

    def _scan(self, mixed_BTC: Tensor, step_BTH: Tensor, segments: Tensor | None, state: Tensor | None) -> ki.Scanned:
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        x, b, c = mixed_BTC.split([inner, shared, shared], -1)
        x_BTHP = x.unflatten(-1, (self.heads, self.head_dim))
        b_BTGN, c_BTGN = (t.unflatten(-1, (self.groups, self.state)) for t in (b, c))
        options: dict[str, Any] = {"segments": segments, "state": state, "chunk": self.chunk}
        layer: dict[str, Any] = {"d": self.skip, "dt_bias": self.step_bias, "dt_softplus": True}
        return ki.ssd_scan(x_BTHP, step_BTH, -self.log_decay.exp(), b_BTGN, c_BTGN, **layer, **options)

    def _remember(self, cache: MixerState, inputs: Tensor, state: Tensor) -> None:
        joined, keep = torch.cat([cache.conv.to(inputs.dtype), inputs], 1), self.width - 1
        if cache.counts is None:
            latest = joined[:, -keep:] if keep else joined[:, :0]
        else:
            at = cache.counts[:, None] + torch.arange(keep, device=joined.device)
            latest = joined.gather(1, at[..., None].expand(-1, -1, joined.shape[-1]))
        # Replaced, not written to: a backward pass may have saved what this step read.  Detached, like cached keys; and
        # copied, so that the prompt's memory is freed and the state stays usable outside inference mode.
        with torch.inference_mode(False):
            cache.ordinary = True
            cache.conv, cache.scan = latest.detach().to(cache.conv.dtype, copy=True), state.detach().clone()

    def new_state(self, rows: int) -> MixerState:
        """The state before any token."""
        like = self.proj.weight
        conv = like.new_zeros(rows, self.width - 1, self.sizes[1])
        scan = like.new_zeros(rows, self.heads, self.head_dim, self.state, dtype=torch.float32)
        return MixerState(conv, scan, open=no_tokens(self, scan) if is_invariant() else ())
