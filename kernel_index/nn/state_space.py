"""The Mamba-2 mixer: a gated linear recurrence, computed in chunks, that restarts with every document."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core.numerics import is_invariant
from kernel_index.nn.document_scan import mixed_by_documents, no_tokens
from kernel_index.nn.linear import Linear
from kernel_index.nn.mixer import Mixer
from kernel_index.nn.residual import Branch
from kernel_index.nn.scan import Scanned, chunked_scan, scan_step
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
            return mixed_by_documents(self, x_BTC, mask, cache)
        gate, inputs, step = self.proj(x_BTC).split(self.sizes, -1)
        segments = segments_of(mask, x_BTC.shape[1]) if cache is None else None
        counts = None if cache is None else cache.counts
        previous = inputs.new_zeros(len(inputs), self.width - 1, inputs.shape[-1]) if cache is None else cache.conv
        joined = torch.cat([previous.to(inputs.dtype), inputs], 1)
        tree = mask if cache is None and mask is not None and mask.is_tree else None
        if tree is None:
            mixed = nn.functional.silu(self._convolve(joined, segments))
        else:
            mixed = nn.functional.silu(convolve_tree(inputs, self.conv, tree, segments))
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        x, b, c = mixed.split([inner, shared, shared], -1)
        x_BTHP = x.unflatten(-1, (self.heads, self.head_dim)).float()
        b_BTGN, c_BTGN = (t.unflatten(-1, (self.groups, self.state)) for t in (b, c))
        dt_BTH = nn.functional.softplus(step.float() + self.step_bias)
        if counts is not None:  # padding after a shorter prompt does not change the state
            dt_BTH = dt_BTH * (torch.arange(x.shape[1], device=x.device) < counts[:, None])[..., None]
        log_a_BTH = -dt_BTH * self.log_decay.exp()
        operands = x_BTHP * dt_BTH[..., None], log_a_BTH, b_BTGN, c_BTGN
        if cache is not None and x.shape[1] == 1:
            x_BHP, log_a_BH, b_BGN, c_BGN = (t[:, 0] for t in operands)
            scanned = scan_step(x_BHP, log_a_BH, b_BGN, c_BGN, cache.scan)
        elif tree is not None:
            scanned = Scanned(scan_tree(operands, tree, segments=segments, chunk=self.chunk), x.new_empty(0))
        else:
            state = None if cache is None else cache.scan
            scanned = chunked_scan(*operands, segments=segments, state=state, chunk=self.chunk)
        if cache is not None:
            self._remember(cache, joined, scanned.state)
        y = (scanned.y.view(x_BTHP.shape) + self.skip[:, None] * x_BTHP).flatten(2) * nn.functional.silu(gate.float())
        normed = nn.functional.rms_norm(y, self.norm.shape, self.norm, 1e-6)
        return self.out(normed.to(x_BTC.dtype)), None

    def _convolve(self, joined: Tensor, segments: Tensor | None) -> Tensor:
        """``Σ_j w[j]·input[t − (width − 1) + j]`` over the inputs of t's own segment; a product for each j."""
        T = joined.shape[1] - self.width + 1
        if T == 1:
            return (self.conv * joined).sum(1, keepdim=True)
        out = self.conv[-1] * joined[:, self.width - 1 :]
        for j in range(self.width - 1):
            back = self.width - 1 - j
            earlier = self.conv[j] * joined[:, j : j + T]
            if segments is not None:
                own = segments == nn.functional.pad(segments, (back, 0), value=-1)[:, :T]
                earlier = torch.where(own[..., None], earlier, 0.0)
            out = out + earlier
        return out

    def _remember(self, cache: MixerState, joined: Tensor, state: Tensor) -> None:
        keep = self.width - 1
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
        return MixerState(conv, scan, open=no_tokens(self, scan) if is_invariant() else ())
