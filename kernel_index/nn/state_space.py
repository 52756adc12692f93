"""The Mamba-2 mixer: a gated linear recurrence, computed in chunks, that restarts with every document."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import stable
from kernel_index.core.numerics import is_invariant, needs_ordinary_numerics
from kernel_index.nn.document_scan import Operands, continued, lengths_of, paths_of, plan_of, scan_documents, silu
from kernel_index.nn.linear import Linear
from kernel_index.nn.mixer import Mixer
from kernel_index.nn.residual import Branch
from kernel_index.nn.tree_scan import convolve_tree, scan_tree


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
    """

    conv: Tensor
    scan: Tensor
    counts: Tensor | None = None
    open: tuple[Tensor, ...] = ()


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
            return self._by_documents(x_BTC, mask, cache)
        gate, inputs, step = self.proj(x_BTC).split(self.sizes, -1)
        segments = segments_of(mask, x_BTC.shape[1]) if cache is None else None
        counts = None if cache is None else cache.counts
        tree = mask if cache is None and mask is not None and mask.is_tree else None
        if tree is None:
            before = None if cache is None else cache.conv
            mixed = ki.causal_conv1d(inputs, self.conv.T, activation="silu", segments=segments, state=before)
        else:
            mixed = nn.functional.silu(convolve_tree(inputs, self.conv, tree, segments)).to(inputs.dtype)
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        x, b, c = mixed.split([inner, shared, shared], -1)
        x_BTHP = x.unflatten(-1, (self.heads, self.head_dim))
        b_BTGN, c_BTGN = (t.unflatten(-1, (self.groups, self.state)) for t in (b, c))
        if counts is not None:  # padding after a shorter prompt does not change the state: softplus(−∞) is 0
            is_token = torch.arange(x.shape[1], device=x.device) < counts[:, None]
            step = step.masked_fill(~is_token[..., None], -torch.inf)
        if tree is None:
            state = None if cache is None else cache.scan
            y_BTHP, last = self._scan(x_BTHP, step, b_BTGN, c_BTGN, segments, state)
            if cache is not None:
                self._remember(cache, inputs, last)
        else:
            y_BTHP = scan_tree(self._scan, (x_BTHP, step, b_BTGN, c_BTGN), tree, segments)
        normed = ki.gated_rms_norm(y_BTHP.flatten(2), gate, self.norm)
        return self.out(normed.to(x_BTC.dtype)), None

    def _scan(
        self, x_BTHP: Tensor, step_BTH: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, segments: Tensor | None,
        state: Tensor | None,
    ) -> ki.Scanned:  # fmt: skip
        options: dict[str, Any] = {"segments": segments, "state": state, "chunk": self.chunk}
        layer: dict[str, Any] = {"d": self.skip, "dt_bias": self.step_bias, "dt_softplus": True}
        return ki.ssd_scan(x_BTHP, step_BTH, -self.log_decay.exp(), b_BTGN, c_BTGN, **layer, **options)

    def _convolve(self, joined: Tensor, segments: Tensor | None) -> Tensor:
        """``Σ_j w[j]·input[t − (width − 1) + j]`` over the inputs of t's own segment; a product for each j."""
        T = joined.shape[1] - self.width + 1
        out = self.conv[-1] * joined[:, self.width - 1 :]
        for j in range(self.width - 1):
            back = self.width - 1 - j
            earlier = self.conv[j] * joined[:, j : j + T]
            if segments is not None:
                own = segments == nn.functional.pad(segments, (back, 0), value=-1)[:, :T]
                earlier = torch.where(own[..., None], earlier, 0.0)
            out = out + earlier
        return out

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
            cache.conv, cache.scan = latest.detach().to(cache.conv.dtype, copy=True), state.detach().clone()

    def new_state(self, rows: int) -> MixerState:
        """The state before any token."""
        like = self.proj.weight
        conv = like.new_zeros(rows, self.width - 1, self.sizes[1])
        scan = like.new_zeros(rows, self.heads, self.head_dim, self.state, dtype=torch.float32)
        if not is_invariant():
            return MixerState(conv, scan)
        kept = ((self.heads, self.head_dim), (self.heads,), (self.groups, self.state))
        tokens = (scan.new_zeros(rows, self.chunk, *shape) for shape in kept)
        return MixerState(conv, scan, open=(*tokens, torch.zeros(rows, dtype=torch.int64, device=scan.device)))

    def _by_documents(self, x_BTC: Tensor, mask: "ki.MaskContract | None", cache: MixerState | None) -> Branch:
        """The same layer by functions and products whose rows do not depend on each other."""
        gate, inputs, step = self.proj(x_BTC).split(self.sizes, -1)
        if cache is None and mask is not None and mask.is_tree:
            y = self._along_paths(inputs, step, mask)
        else:
            segments = segments_of(mask, x_BTC.shape[1]) if cache is None else None
            y = self._mixed(inputs, step, segments, cache)
        y = y.flatten(2) * silu(gate.float())
        normed = ki.fused_residual_add_rms_norm(y, torch.zeros_like(y), self.norm, eps=1e-6).normed
        return self.out(normed.to(x_BTC.dtype)), None

    def _along_paths(self, inputs: Tensor, step: Tensor, mask: "ki.MaskContract") -> Tensor:
        """Each path of a tree as a document, of which its last run is kept."""
        if mask.document_rows(inputs.shape[1]) is not None:
            needs_ordinary_numerics("nn.Mamba2", "documents inside a prefix tree have no invariant form")
        rows, tokens = inputs.shape[:2]
        paths = paths_of(mask.tree_levels(rows, tokens))
        inputs, step = (t.flatten(0, 1).index_select(0, paths.index)[None] for t in (inputs, step))
        number = torch.arange(len(paths.lengths), device=inputs.device)
        segments = number.repeat_interleave(torch.tensor(paths.lengths, device=inputs.device))[None]
        y = self._mixed(inputs, step, segments, None)[0]
        gaps = y.new_zeros(rows * tokens, *y.shape[1:])
        return gaps.index_copy(0, paths.index[paths.own], y[paths.own]).unflatten(0, (rows, tokens))

    def _mixed(self, inputs: Tensor, step: Tensor, segments: Tensor | None, cache: MixerState | None) -> Tensor:
        """The convolution, the scan and the skip, float32 [B, T, H, P]."""
        previous = inputs.new_zeros(len(inputs), self.width - 1, inputs.shape[-1]) if cache is None else cache.conv
        joined = torch.cat([previous.to(inputs.dtype), inputs], 1)
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        x, b, c = silu(self._convolve(joined, segments)).split([inner, shared, shared], -1)
        x_BTHP = x.unflatten(-1, (self.heads, self.head_dim)).float()
        b_BTGN, c_BTGN = (t.unflatten(-1, (self.groups, self.state)).float() for t in (b, c))
        dt_BTH = stable.with_gradient("softplus", step.float() + self.step_bias)
        log_a_BTH = -dt_BTH * stable.with_gradient("exp", self.log_decay.float())
        operands = Operands(x_BTHP * dt_BTH[..., None], log_a_BTH, b_BTGN, c_BTGN)
        if cache is None:
            plan = plan_of(lengths_of(segments, *inputs.shape[:2]), self.chunk, inputs.device)
            scanned = scan_documents(operands.flat(), plan)[0].view(x_BTHP.shape)
        else:
            scanned, state, left = continued(operands, cache.scan, cache.open, cache.counts, self.chunk)
            self._remember(cache, inputs, state)
            cache.open = left
        return scanned + self.skip[:, None] * x_BTHP
