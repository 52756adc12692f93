"""The router under ``numerics("invariant")``: blocks count from the start of each document, scores row by row.

So a query selects what it selects in any batch, packing or cache.  The op reads the mask's bounds on the host, where a
trace does not see it; it is made of products, sums and sorts whose bits do not depend on other queries.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops, stable
from kernel_index.core.numerics import Recipe
from kernel_index.core.products import PRODUCT, product
from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.legal_blocks import TopBlocks, ascending
from kernel_index.routing.membership import membership
from kernel_index.routing.stable_topk import best_by_sorting

ROUTING = Recipe(
    f"routing 1: blocks from the document's start, their means by additions in order, scores by {PRODUCT.text}, "
    "stable sorts"
)


class _Options(NamedTuple):
    """``ratio`` 0 scores every legal block; else groups of so many blocks, of which the ``topc`` best are opened."""

    block_size: int
    topk: int
    groups: int
    ratio: int
    topc: int


class _Document(NamedTuple):
    queries: slice
    keys: slice


Product = Callable[[Tensor, Tensor, None, torch.dtype], Tensor]


def _launch(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    return _route(product.launch, q, k, *rest)


def _route(
    multiply: Product, q: Tensor, k: Tensor, start: Tensor, end: Tensor, origin: Tensor, position: Tensor, *options: int
) -> Tensor:
    found, chosen = _allocate(q, k, start, end, origin, position, *options).fill_(-1), _Options(*options)
    wide = q.float()
    queries = stable.sum_of(wide.unflatten(2, (chosen.groups, -1)), 3) / (q.shape[2] // chosen.groups)
    for b in range(q.shape[0]):
        row = [x[b % len(x)] for x in (start, end, origin, position)]
        for d in _documents(*row[:3]):
            first = (row[0][d.queries] - d.keys.start) // chosen.block_size
            current = (row[3][d.queries] - d.keys.start) // chosen.block_size
            legal = first, torch.where(row[0][d.queries] < row[1][d.queries], current, -1)
            scores = _scores(multiply, queries[b, d.queries], k[b, d.keys].float(), chosen.block_size)
            found[b, d.queries] = _best(scores, *legal, chosen)
    return found


def _allocate(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    topk, groups = rest[5:7]
    return q.new_empty(*q.shape[:2], groups, topk, dtype=torch.int32)


def _documents(start: Tensor, end: Tensor, origin: Tensor) -> Iterator[_Document]:
    """Consecutive queries of one document that sees a key, and its keys up to the last that one of them sees."""
    if not len(origin):
        return
    new = torch.cat((origin.new_ones(1, dtype=torch.bool), origin[1:] != origin[:-1]))
    starts = new.nonzero().flatten().tolist()
    for begin, stop in zip(starts, [*starts[1:], len(origin)], strict=True):
        last = int(torch.where(start < end, end, 0)[begin:stop].max())
        if last > 0:
            yield _Document(slice(begin, stop), slice(int(origin[begin]), last))


def _scores(multiply: Product, q_TGD: Tensor, k_SKD: Tensor, block_size: int) -> Tensor:
    """Of each block of a document, float32 [T, G, blocks]; a last block that is not whole is never scored."""
    whole, blocks = len(k_SKD) // block_size, -(-len(k_SKD) // block_size)
    means_NKD = stable.sum_of(k_SKD[: whole * block_size].unflatten(0, (whole, block_size)), 1) / block_size
    kv_heads, groups = k_SKD.shape[1], q_TGD.shape[1]
    scores = q_TGD.new_full((len(q_TGD), groups, blocks), -torch.inf)
    for g in range(groups):
        scores[:, g, :whole] = multiply(q_TGD[:, g], means_NKD[:, g * kv_heads // groups], None, torch.float32)
    return scores


def _best(scores_TGN: Tensor, first: Tensor, current: Tensor, options: _Options) -> Tensor:
    block = torch.arange(scores_TGN.shape[2], device=scores_TGN.device)
    low, high = first[:, None, None], current[:, None, None]
    candidates = (block >= low) & (block < high)
    if options.ratio:
        candidates = candidates & _in_best_groups(scores_TGN, candidates, options)
    best = best_by_sorting(scores_TGN, candidates + 2 * (block == high), options.topk)
    return ascending(best, options.topk).indices


def _in_best_groups(scores: Tensor, legal: Tensor, options: _Options) -> Tensor:
    """Which blocks are children of the groups whose legal children score best on average."""
    blocks, ratio = scores.shape[2], options.ratio
    groups = -(-blocks // ratio)
    padding = (0, groups * ratio - blocks)
    children = torch.nn.functional.pad(torch.where(legal, scores, 0.0), padding).unflatten(2, (groups, ratio))
    counted = torch.nn.functional.pad(legal, padding).unflatten(2, (groups, ratio)).sum(3)
    means = stable.sum_of(children, 3) / counted.clamp(min=1)
    opened = membership(best_by_sorting(means, counted > 0, options.topc)[None], None, groups)[0]
    return opened.index_select(2, torch.arange(blocks, device=opened.device) // ratio)


_op = ops.NativeOp(
    "block_router_rows(Tensor q, Tensor k, Tensor start, Tensor end, Tensor origin, Tensor position, "
    "SymInt block_size, SymInt topk, SymInt groups, SymInt ratio, SymInt topc) -> Tensor",
    _launch,
    _allocate,
)


def route_documents(call: RouterCall, hierarchy: tuple[int, int] = (0, 0)) -> TopBlocks:
    """The blocks of each query, counted from its document's start."""
    return _routed(_op, call, hierarchy)


def route_rows(call: RouterCall, multiply: Product, hierarchy: tuple[int, int]) -> TopBlocks:
    """The same with another product, which a trace does not see."""
    return _routed(lambda *args: _route(multiply, *args), call, hierarchy)


def _routed(route: Callable[..., Tensor], call: RouterCall, hierarchy: tuple[int, int]) -> TopBlocks:
    with torch.no_grad():
        sizes, mask = call.sizes, call.mask
        position = mask.positions_of_queries(sizes).expand(sizes.rows, -1)
        sight = (*mask.row_intervals(sizes), mask.row_origins(sizes), position)
        options = (call.block_size, call.selected, call.groups, *hierarchy)
        indices = route(call.q.detach(), call.k.detach(), *sight, *options)
        return TopBlocks(indices, indices >= 0)
