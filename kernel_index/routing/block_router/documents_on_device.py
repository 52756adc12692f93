"""The router of a GPU under ``numerics("invariant")``: blocks count from the start of each document.

The blocks of a row's documents are numbered one document after the other, and each query's legal ones are a range of
those numbers.  So the kernel of ordinary mode routes: a score is one product of a query and a mean, whatever other
queries and blocks its tile holds, and ties go to the smaller number.  Nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.device_products import PRODUCT, multiply_rows
from kernel_index.core.numerics import Recipe, is_invariant
from kernel_index.core.triton import launch
from kernel_index.masks.doc_window_mask.intervals import Sizes, segments
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.block_router.contract import RouterCall
from kernel_index.routing.block_router.documents import route_rows
from kernel_index.routing.block_router.torch_op import route_triton, triton_top_blocks
from kernel_index.routing.legal_blocks import LegalBlocks, TopBlocks

ROUTING = Recipe(
    "routing on a GPU 1: blocks from the document's start, their means by additions in order, float32 scores as sums "
    f"of products of TF32 parts, one accumulator; groups of blocks by {PRODUCT.text}, stable sorts"
)


class _Numbered(NamedTuple):
    """``first`` int32 [rows, blocks]: a block's first key, −1 for no block.  The rest is of queries, int32 [rows, T]:
    the number of the first block of their document, and the range of legal blocks.
    """

    first: Tensor
    base: Tensor
    legal: LegalBlocks


def _numbered(mask: MaskContract, sizes: Sizes, block_size: int) -> _Numbered:
    def build() -> _Numbered:
        ids = mask.document_rows(sizes.keys)
        place = torch.arange(sizes.keys, device=sizes.device)
        within = place.expand(1, -1) if ids is None else place - segments(ids)[0]
        begins = (within % block_size == 0).expand(sizes.rows, -1)
        number = begins.to(torch.int64).cumsum(-1) - 1  # of each key's block
        first = torch.full_like(number, -1)
        first = first.scatter_reduce(1, number, torch.where(begins, place, -1), "amax")
        start, end = mask.row_intervals(sizes)
        origin = mask.row_origins(sizes).to(torch.int64)
        position = mask.positions_of_queries(sizes)
        base, some = number.gather(1, origin.expand(sizes.rows, -1)), start < end
        low = torch.where(some, base + (start - origin) // block_size, 0)
        current = torch.where(some, base + (position - origin) // block_size, -1)
        legal = LegalBlocks(*(x.to(torch.int32).contiguous() for x in (low, current)))
        return _Numbered(first.to(torch.int32).contiguous(), base.to(torch.int32), legal)

    return mask.remember("numbered_blocks", (sizes, block_size), build)


def _launch_means(k: Tensor, first: Tensor, block_size: int) -> Tensor:
    from kernel_index.routing.block_router import triton_means

    return triton_means.means(launch.dense_heads(k), first, block_size, _allocate_means(k, first, block_size).zero_())


def _allocate_means(k: Tensor, first: Tensor, block_size: int) -> Tensor:
    return k.new_empty((*first.shape, *k.shape[2:]), dtype=torch.float32)


_means_op = ops.register(
    "block_means_in_order(Tensor k, Tensor first, int block_size) -> Tensor", _launch_means, _allocate_means
)


def route(call: RouterCall) -> TopBlocks:
    return route_on_device(call) if is_invariant() else route_triton(call)


def route_on_device(call: RouterCall, hierarchy: tuple[int, int] | None = None) -> TopBlocks:
    """The blocks of each query, counted from its document's start.  By groups of blocks it goes document by document,
    whose bounds it reads on the host.
    """
    if hierarchy is not None:
        return route_rows(call, multiply_rows, hierarchy)
    with torch.no_grad():
        batch, keys = call.k.shape[:2]
        if keys == 0 or call.q.numel() == 0:
            none = torch.full((*call.q.shape[:2], call.groups, call.selected), -1, device=call.q.device)
            return TopBlocks(none.to(torch.int32), none >= 0)
        first, base, legal = _numbered(call.mask, call.sizes, call.block_size)
        means = _means_op(call.k.detach(), first.expand(batch, -1).contiguous(), call.block_size)
        found = triton_top_blocks(call.q, means, legal, call.selected, call.groups)
        return TopBlocks(torch.where(found.valid, found.indices - base[:, :, None, None], -1), found.valid)
