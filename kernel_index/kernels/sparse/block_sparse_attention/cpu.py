"""Block-sparse attention on the CPU: by key block, so that every product has one block on one side and is dense.

Picks are cut into tiles of one block each (``tiles.py``), some tiles at a time are gathered and multiplied, and what
they give is added to their queries' rows; no scores outlive a step.  A first pass over each query's opening tiles, a
small part of all, gives a shift that keeps the exponentials of the second in range.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import inductor
from kernel_index.core.inductor import Region
from kernel_index.kernels.sparse.block_sparse_attention.contract import scale_of, sizes_of
from kernel_index.kernels.sparse.block_sparse_attention.tiles import Tiles, tiles_of
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps

SCORE_BYTES = 1 << 22
"""Bytes of a step's scores: much larger ones leave the caches, smaller ones wait for Python."""

FEW_STEPS = 4
"""Up to this many steps run the plain formulas: too few for a compiled region to pay."""

TOO_LARGE = 2.0**60
"""A sum of shifted exponentials above this makes the second pass start again with exact shifts."""


class Scoring(NamedTuple):
    scale: float
    softcap: float


def _capped(z: Tensor, scale: float, softcap: float) -> Tensor:
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def _allowed(z: Tensor, low: Tensor, high: Tensor) -> Tensor:
    key = torch.arange(z.shape[-1], dtype=torch.int32, device=z.device)
    return (key >= low[:, None, None]) & (key < high[:, None, None])


def _log_sums(z: Tensor, kept: Tensor, low: Tensor | None, high: Tensor | None, scale: float, softcap: float) -> Tensor:
    z = _capped(z, scale, softcap)
    if low is not None and high is not None:
        z = torch.where(_allowed(z, low, high), z, -torch.inf)
    return torch.where(kept[:, None], z.logsumexp(-1), -torch.inf)


def _weights(
    z: Tensor, shift: Tensor, low: Tensor | None, high: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    p = torch.exp(_capped(z, scale, softcap) - shift[..., None])
    if low is not None and high is not None:
        p = torch.where(_allowed(z, low, high), p, 0.0)
    return p.to(z.dtype), p.sum(-1)


def _score_gradients(
    z: Tensor,
    dp: Tensor,
    lse: Tensor,
    delta: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    capped = _capped(z, scale, softcap)
    p = torch.exp(capped - lse[..., None])
    if low is not None and high is not None:
        p = torch.where(_allowed(z, low, high), p, 0.0)
    d_z = p * (dp - delta[..., None]) * scale
    if softcap:
        d_z = d_z * (1 - (capped / softcap).square())
    return p.to(z.dtype), d_z.to(z.dtype)


_log_sums_region = Region(_log_sums, z=(0,), kept=(0,), low=(0,), high=(0,))
_weights_region = Region(_weights, z=(0,), shift=(0,), low=(0,), high=(0,))
_score_gradients_region = Region(_score_gradients, z=(0,), dp=(0,), lse=(0,), delta=(0,), low=(0,), high=(0,))


class _Step(NamedTuple):
    """Some tiles of one kind: where their picks are among all, and their rows and blocks."""

    at: slice
    rows: Tensor
    block: Tensor
    low: Tensor | None
    high: Tensor | None


class _Call:
    """The tensors of one call by rows and blocks, and the steps over its tiles."""

    def __init__(self, q: Tensor, k: Tensor, tiles: Tiles, groups: int, block_size: int, scoring: Scoring):
        self.tiles, self.groups, self.block_size, self.scoring = tiles, groups, block_size, scoring
        self.heads = q.shape[2] // groups
        self.dtype = q.dtype if q.dtype == torch.bfloat16 else torch.promote_types(q.dtype, torch.float32)
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k = self.by_rows(q), self.by_blocks(k)
        tile_bytes = tiles.rows.shape[1] * self.heads * block_size * self.dtype.itemsize
        per_step = max(1, SCORE_BYTES // tile_bytes)
        self.compiled = tiles.rows.shape[0] > FEW_STEPS * per_step and inductor.why_not(q) is None
        self.starts = [
            *range(0, tiles.opening, per_step),
            *range(tiles.opening, tiles.rows.shape[0], per_step),
            tiles.rows.shape[0],
        ]

    def by_rows(self, x: Tensor) -> Tensor:
        """[B, T, H, D] as [B·T·G, H/G, D]."""
        return x.to(self.dtype).reshape(-1, self.heads, x.shape[-1])

    def by_blocks(self, x: Tensor) -> Tensor:
        """[B, S, K, D] as [B·K·blocks, block_size, D], zeros behind the last key."""
        missing = -x.shape[1] % self.block_size
        x = torch.nn.functional.pad(x.to(self.dtype).transpose(1, 2), (0, 0, 0, missing))
        return x.reshape(-1, self.block_size, x.shape[-1])

    def steps(self, stop: int):
        """The steps over the first ``stop`` tiles, or all."""
        rows, _, block, opening, low, high = self.tiles
        for begin, end in zip(self.starts, self.starts[1:], strict=False):
            if begin >= stop:
                return
            at = slice(begin, end)
            limits = (low[at].flatten(), high[at].flatten()) if begin < opening else (None, None)
            picks = slice(begin * rows.shape[1], end * rows.shape[1])
            yield _Step(picks, rows[at].flatten(), block[at], *limits)

    def gather(self, rows_of: Tensor, step: _Step) -> Tensor:
        """The step's rows, [tiles, P·heads, D]."""
        return rows_of.index_select(0, step.rows).view(step.block.shape[0], -1, rows_of.shape[-1])

    def of_picks(self, values: Tensor, otherwise: float) -> Tensor:
        """Each pick's row of values [B·T·G, heads], and something else where there is no pick."""
        rows, kept = self.tiles.rows.flatten(), self.tiles.kept.flatten()
        return torch.where(kept[:, None], values.index_select(0, rows), otherwise)

    def scores(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Products of rows and the keys of their blocks, [picks, heads, block_size]."""
        return torch.bmm(rows, blocks.transpose(1, 2)).view(-1, self.heads, self.block_size)

    def run(self, region: Region, *args: Any) -> Any:
        return (region if self.compiled else region.function)(*args, *self.scoring)


def _shifts(call: _Call, stop: int) -> Tensor:
    """For each row the largest log-sum-exp among the blocks of the first tiles, [B·T·G, heads]."""
    shift = call.q.new_full(call.q.shape[:2], -torch.inf, dtype=call.wide)
    kept = call.tiles.kept.flatten()
    for step in call.steps(stop):
        z = call.scores(call.gather(call.q, step), call.k.index_select(0, step.block))
        parts = call.run(_log_sums_region, z, kept[step.at], step.low, step.high)
        shift.scatter_reduce_(0, step.rows[:, None].expand_as(parts), parts, "amax")
    return shift


def _sums(call: _Call, v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exponentials and of weighted values, each exponential shifted."""
    weighted = v.new_zeros(*call.q.shape[:2], v.shape[-1], dtype=call.wide)
    own = call.of_picks(shift, torch.inf)
    parts = torch.empty_like(own)
    for step in call.steps(call.tiles.rows.shape[0]):
        z = call.scores(call.gather(call.q, step), call.k.index_select(0, step.block))
        p, parts[step.at] = call.run(_weights_region, z, own[step.at], step.low, step.high)
        values = torch.bmm(p.view(step.block.shape[0], -1, call.block_size), v.index_select(0, step.block))
        weighted.index_add_(0, step.rows, values.view(-1, call.heads, v.shape[-1]).to(call.wide))
    return weighted, torch.zeros_like(shift).index_add_(0, call.tiles.rows.flatten(), parts)


def _forward(call: _Call, v: Tensor) -> tuple[Tensor, Tensor]:
    shift = _shifts(call, call.tiles.opening)
    weighted, total = _sums(call, v, shift)
    if not bool((total < TOO_LARGE).all()):  # a query's other blocks score far above its last one
        shift = _shifts(call, call.tiles.rows.shape[0])
        weighted, total = _sums(call, v, shift)
    nothing = shift.isneginf()
    out = weighted.div_(total.masked_fill(nothing, 1.0)[..., None])
    return out, (shift + total.log()).masked_fill_(nothing, -torch.inf)


def _backward(call: _Call, d_out: Tensor, v: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_zeros(x.shape, dtype=call.wide) for x in (call.q, call.k, v))
    lse, delta = call.of_picks(lse, torch.inf), call.of_picks(delta, 0.0)
    for step in call.steps(call.tiles.rows.shape[0]):
        keys = call.k.index_select(0, step.block)
        queries, upstream = call.gather(call.q, step), call.gather(d_out, step)
        z, dp = call.scores(queries, keys), call.scores(upstream, v.index_select(0, step.block))
        p, d_z = call.run(_score_gradients_region, z, dp, lse[step.at], delta[step.at], step.low, step.high)
        p, d_z = (x.view(step.block.shape[0], -1, call.block_size) for x in (p, d_z))
        d_q.index_add_(0, step.rows, torch.bmm(d_z, keys).view(-1, *call.q.shape[1:]).to(call.wide))
        d_k.index_add_(0, step.block, torch.bmm(d_z.transpose(1, 2), queries).to(call.wide))
        d_v.index_add_(0, step.block, torch.bmm(p.transpose(1, 2), upstream).to(call.wide))
    return d_q, d_k, d_v


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, groups: int, block_size: int, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        call = _Call(q, k, tiles, groups, block_size, scoring)
        out, lse = _forward(call, call.by_blocks(v))
        out = out.view(*q.shape[:3], v.shape[3]).to(q.dtype)
        lse_BHT = lse.view(q.shape[0], q.shape[1], q.shape[2]).transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, out, lse_BHT)
        ctx.statics = tiles, groups, block_size, scoring
        return out, lse_BHT

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the cpu backend of block_sparse_attention cannot differentiate twice: use backend='reference'"
            )
        q, k, v, out, lse = ctx.saved_tensors
        call = _Call(q, k, *ctx.statics)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        delta = (d_out.to(call.wide) * out).sum(-1)
        delta = delta if d_lse is None else delta - d_lse.transpose(1, 2)
        rows = call.q.shape[:2]
        lse_rows = lse.transpose(1, 2).reshape(rows)
        d_q, d_k, d_v = _backward(call, call.by_rows(d_out), call.by_blocks(v), lse_rows, delta.reshape(rows))
        d_k, d_v = (_by_keys(g, x).to(x.dtype) for g, x in ((d_k, k), (d_v, v)))
        return d_q.view(q.shape).to(q.dtype), d_k, d_v, None, None, None, None


def _by_keys(blocks: Tensor, like: Tensor) -> Tensor:
    """[B·K·blocks, block_size, D] as [B, S, K, D]."""
    batch, keys, heads, width = like.shape
    if blocks.numel() == 0:
        return blocks.new_zeros(like.shape)
    return blocks.view(batch, heads, -1, width)[:, :, :keys].transpose(1, 2).contiguous()


def block_sparse_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    selected_valid: Tensor | None,
    block_size: int,
    mask: MaskContract,
    scale: float | None,
    softcap: float,
    query_tile_size: int,
    maps: UnionMaps | None,
) -> tuple[Tensor, Tensor]:
    sizes = sizes_of(q, k, mask)
    bounds = mask.row_intervals(sizes)
    tiles = tiles_of(selected, selected_valid, bounds, sizes, (k.shape[2], q.shape[2]), block_size)
    scoring = Scoring(scale_of(q, scale), softcap)
    return _BlockSparse.apply(q, k, v, tiles, selected.shape[2], block_size, scoring)
