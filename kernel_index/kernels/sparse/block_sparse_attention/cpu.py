"""Block-sparse attention on the CPU: by key block, so that every product has one block on one side and is dense.

The selection is inverted into tiles of one block each (``inverse_tiles.py``).  A step gathers and multiplies some tiles
and adds the results to their queries' rows; no scores outlive a step.  A first pass over each query's opening tiles, a
small part of all, gives a shift that keeps the exponentials of the second pass in range.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import inductor
from kernel_index.core.attention_function import (
    Backward,
    Forward,
    Gradients,
    Passes,
    add_sink,
    attend,
    delta_of,
    gradient_of_sink,
)
from kernel_index.core.excluded import Sight, guarded, guarded_backward, sight_of_blocks
from kernel_index.core.inductor import Region
from kernel_index.kernels.sparse.block_sparse_attention.contract import BlockSparseCall
from kernel_index.kernels.sparse.block_sparse_attention.inverse_tiles import InverseTiles, inverse_tiles
from kernel_index.masks.attention_arguments import scale_of

SCORE_BYTES = 1 << 22
"""Bytes of a step's scores: much larger ones leave the caches, smaller ones wait for Python."""

FEW_STEPS = 4
"""Up to this many steps run the plain formulas: too few for a compiled region to pay."""

TOO_LARGE = 2.0**60
"""A row whose sum of shifted exponentials is above this is computed again with its exact shift."""


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
    d_z = p * (dp - delta[..., None]) * scale
    if softcap:
        d_z = d_z * (1 - (capped / softcap).square())
    if low is not None and high is not None:
        allowed = _allowed(z, low, high)
        p, d_z = (torch.where(allowed, x, 0.0) for x in (p, d_z))
    return p.to(z.dtype), d_z.to(z.dtype)


_log_sums_region = Region(_log_sums, z=(0,), kept=(0,), low=(0,), high=(0,))
_weights_region = Region(_weights, z=(0,), shift=(0,), low=(0,), high=(0,))
_score_gradients_region = Region(_score_gradients, z=(0,), dp=(0,), lse=(0,), delta=(0,), low=(0,), high=(0,))


class _Step(NamedTuple):
    """Some tiles of one kind: the slice of their entries among all, and their rows and blocks."""

    at: slice
    rows: Tensor
    block: Tensor
    low: Tensor | None
    high: Tensor | None


class _Products:
    """The tensors of one call by rows and by blocks, and the steps over its tiles."""

    def __init__(self, q: Tensor, k: Tensor, tiles: InverseTiles, groups: int, block_size: int, scoring: Scoring):
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
        """[B, S, K, D] as [B·K·blocks, block_size, D], zeros after the last key."""
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
            entries = slice(begin * rows.shape[1], end * rows.shape[1])
            yield _Step(entries, rows[at].flatten(), block[at], *limits)

    def gather(self, rows_of: Tensor, step: _Step) -> Tensor:
        """The step's rows, [tiles, P·heads, D]."""
        return rows_of.index_select(0, step.rows).view(step.block.shape[0], -1, rows_of.shape[-1])

    def of_selected(self, values: Tensor, otherwise: float) -> Tensor:
        """Each entry's row of values [B·T·G, heads], and ``otherwise`` where a tile has no entry."""
        rows, kept = self.tiles.rows.flatten(), self.tiles.kept.flatten()
        return torch.where(kept[:, None], values.index_select(0, rows), otherwise)

    def scores(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Products of rows and the keys of their blocks, [entries, heads, block_size]."""
        return torch.bmm(rows, blocks.transpose(1, 2)).view(-1, self.heads, self.block_size)

    def run(self, region: Region, *args: Any) -> Any:
        return (region if self.compiled else region.function)(*args, *self.scoring)


def _shifts(products: _Products, stop: int) -> Tensor:
    """For each row the largest log-sum-exp among the blocks of the first tiles, [B·T·G, heads]."""
    shift = products.q.new_full(products.q.shape[:2], -torch.inf, dtype=products.wide)
    kept = products.tiles.kept.flatten()
    for step in products.steps(stop):
        z = products.scores(products.gather(products.q, step), products.k.index_select(0, step.block))
        parts = products.run(_log_sums_region, z, kept[step.at], step.low, step.high)
        shift.scatter_reduce_(0, step.rows[:, None].expand_as(parts), parts, "amax")
    return shift


def _sums(products: _Products, v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exponentials and of weighted values, each exponential shifted."""
    weighted = v.new_zeros(*products.q.shape[:2], v.shape[-1], dtype=products.wide)
    shifts = products.of_selected(shift, torch.inf)
    parts = torch.empty_like(shifts)
    for step in products.steps(products.tiles.rows.shape[0]):
        z = products.scores(products.gather(products.q, step), products.k.index_select(0, step.block))
        p, parts[step.at] = products.run(_weights_region, z, shifts[step.at], step.low, step.high)
        values = torch.bmm(p.view(step.block.shape[0], -1, products.block_size), v.index_select(0, step.block))
        weighted.index_add_(0, step.rows, values.view(-1, products.heads, v.shape[-1]).to(products.wide))
    return weighted, torch.zeros_like(shift).index_add_(0, products.tiles.rows.flatten(), parts)


def _attend(products: _Products, v: Tensor) -> tuple[Tensor, Tensor]:
    shift = _shifts(products, products.tiles.opening)
    weighted, total = _sums(products, v, shift)
    again = ~(total < TOO_LARGE)
    if bool(again.any()):  # a query's other blocks score far above its last one; the other rows keep their bits
        exact = torch.where(again, _shifts(products, products.tiles.rows.shape[0]), shift)
        found = _sums(products, v, exact)
        shift, total = exact, torch.where(again, found[1], total)
        weighted = torch.where(again[..., None], found[0], weighted)
    nothing = shift.isneginf()
    out = weighted.div_(total.masked_fill(nothing, 1.0)[..., None])
    return out, (shift + total.log()).masked_fill_(nothing, -torch.inf)


def _gradients(
    products: _Products, d_out: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_zeros(x.shape, dtype=products.wide) for x in (products.q, products.k, v))
    lse, delta = products.of_selected(lse, torch.inf), products.of_selected(delta, 0.0)
    for step in products.steps(products.tiles.rows.shape[0]):
        keys = products.k.index_select(0, step.block)
        queries, upstream = products.gather(products.q, step), products.gather(d_out, step)
        z, dp = products.scores(queries, keys), products.scores(upstream, v.index_select(0, step.block))
        p, d_z = products.run(_score_gradients_region, z, dp, lse[step.at], delta[step.at], step.low, step.high)
        p, d_z = (x.view(step.block.shape[0], -1, products.block_size) for x in (p, d_z))
        d_q.index_add_(0, step.rows, torch.bmm(d_z, keys).view(-1, *products.q.shape[1:]).to(products.wide))
        d_k.index_add_(0, step.block, torch.bmm(d_z.transpose(1, 2), queries).to(products.wide))
        d_v.index_add_(0, step.block, torch.bmm(p.transpose(1, 2), upstream).to(products.wide))
    return d_q, d_k, d_v


class _Plan(NamedTuple):
    tiles: InverseTiles
    groups: int
    block_size: int
    scoring: Scoring
    sight: Callable[[], Sight]

    def products(self, q: Tensor, k: Tensor) -> _Products:
        return _Products(q, k, self.tiles, self.groups, self.block_size, self.scoring)


def _forward(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Forward:
    products = plan.products(q, k)
    out, lse = _attend(products, products.by_blocks(v))
    out = out.view(*q.shape[:3], v.shape[3]).to(q.dtype)
    lse_BHT = lse.view(q.shape[0], q.shape[1], q.shape[2]).transpose(1, 2).contiguous()
    if sink is not None:
        lse_BHT, _ = add_sink(out, lse_BHT, sink)
    return Forward(out, lse_BHT, (lse_BHT,))


def _backward(plan: _Plan, given: Backward) -> Gradients:
    return guarded_backward(functools.partial(_run_backward, plan), plan.sight, given)


def _run_backward(plan: _Plan, given: Backward) -> Gradients:
    q, k, v = given.q, given.k, given.v
    products = plan.products(q, k)
    rows = products.q.shape[:2]
    by_head = given.saved[0], delta_of(given)
    lse, delta = (x.transpose(1, 2).reshape(rows) for x in by_head)
    d_q, d_k, d_v = _gradients(products, products.by_rows(given.d_out), products.by_blocks(v), lse, delta)
    d_k, d_v = (_by_keys(g, x).to(x.dtype) for g, x in ((d_k, k), (d_v, v)))
    return Gradients(d_q.view(q.shape).to(q.dtype), d_k, d_v, gradient_of_sink(given, *by_head))


PASSES = Passes("the cpu backend of block_sparse_attention", _forward, _backward)


def _by_keys(blocks: Tensor, like: Tensor) -> Tensor:
    """[B·K·blocks, block_size, D] as [B, S, K, D]."""
    batch, keys, heads, width = like.shape
    if blocks.numel() == 0:
        return blocks.new_zeros(like.shape)
    return blocks.view(batch, heads, -1, width)[:, :, :keys].transpose(1, 2).contiguous()


@guarded
def block_sparse_cpu(call: BlockSparseCall) -> tuple[Tensor, Tensor]:
    q, k, sizes = call.q, call.k, call.sizes
    heads = (k.shape[2], q.shape[2])
    bounds = call.mask.row_intervals(sizes)
    tiles = inverse_tiles(call.selected, call.selected_valid, bounds, sizes, heads, call.block_size)
    scoring = Scoring(scale_of(q, call.scale), call.softcap)
    sight = functools.partial(sight_of_blocks, call.selected, call.selected_valid, call.block_size, *bounds)
    plan = _Plan(tiles, call.selected.shape[2], call.block_size, scoring, sight)
    return attend(PASSES, plan, q, k, call.v, call.sink)
