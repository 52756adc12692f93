"""Plans the list-driven kernels: each key block visits the list of queries that selected it and writes partial results.

The plan is one stable sort of the selection, of static size, and needs no wait for the device.  No product is formed of
a query and a block that it did not select.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.target import Target, target_of, triton_version
from kernel_index.core.triton.launch import (
    INTERPRETED_CONFIG,
    AttentionLaunch,
    Config,
    attention_launch,
    ceil_div,
    dot_block,
    interpreting,
    next_power_of_2,
)
from kernel_index.kernels.sparse.block_sparse_attention import plan
from kernel_index.kernels.sparse.block_sparse_attention.contract import BlockSparseCall
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Cut

STEP = 64
"""Keys of a block at most: larger blocks are split into these, each with its own partial result."""

PART_ROWS = {"forward": 2048, "backward": 8192}
"""Rows of a list that one program visits, a row being a head of an entry: a block that many queries selected is split
among programs.  On an H200 the forward pass of 8 heads took 6.3 ms with 8192 rows and 5.3 with 2048; each part of the
backward pass writes sums of dK and dV."""

PARTIAL_BYTES = 1 << 30
"""Bytes of partial results that exist at once, unless those of ``FEWEST`` queries are more."""

FEWEST = 1024
"""Queries of a segment at least: fewer would leave too little of a list for each block."""

WASTE = 8
"""Lists are used from this ratio on: products of a tile's union over products of its selected blocks, at most."""


WIDEST = 256
"""Bytes of a head at most: the sums of dK and dV of a wider one do not fit into registers."""


def head_bytes_of(q: Tensor, v: Tensor) -> int:
    return max(q.shape[3], v.shape[3]) * q.element_size()


def takes_lists(cut: Cut, head_bytes: int, block_size: int) -> bool:
    fits = cut.group <= STEP and head_bytes <= WIDEST
    return fits and (block_size <= STEP or block_size % STEP == 0)


def use_lists(cut: Cut, head_bytes: int, block_size: int, blocks: int, count: int) -> bool:
    """Depends on sizes alone: heads select alone, and a union can waste ``WASTE`` times the products."""
    if cut.group > 1 or not takes_lists(cut, head_bytes, block_size):
        return False
    return min(cut.queries, blocks // max(1, count)) >= WASTE


def use_both(cut: Cut, call: BlockSparseCall, block_size: int) -> bool:
    """For heads that share a selection: tiles whose queries select much alike by unions, the others by lists.

    On Hopper alone, where both ways were timed, and where a union may waste more than the tiles that go by unions.
    """
    q, v, target = call.q, call.v, target_of(call.q.device)
    if cut.group < 2 or not takes_lists(cut, head_bytes_of(q, v), block_size):
        return False
    if BOTH_EVERYWHERE:
        return True
    if target.kind != "cuda" or target.arch != 90 or q.element_size() != 2 or cut.group & (cut.group - 1):
        return False
    return min(cut.queries, call.blocks // max(1, call.selected.shape[3])) > plan.WASTE


BOTH_EVERYWHERE = False
"""For tests."""


def hopper_unions(cut: Cut, q: Tensor, v: Tensor, block_size: int) -> bool:
    """Whether tiles that go by unions are taken two at a time, by the kernels of ``triton_hopper_unions.py``."""
    target = target_of(q.device)
    if target.kind != "cuda" or target.arch != 90 or q.element_size() != 2 or triton_version() < (3, 6):
        return False
    fits = cut.heads == cut.group and cut.rows == STEP and block_size in (16, 32, 64)
    return fits and all(x.shape[3] in (64, 128) for x in (q, v))


def tile_of(cut: Cut, q: Tensor, v: Tensor, block_size: int) -> int:
    """Queries that have one union."""
    return cut.queries * (2 if hopper_unions(cut, q, v, block_size) else 1)


def split(selected: Tensor, selected_valid: Tensor | None, block_size: int) -> tuple[Tensor, Tensor | None, int]:
    """The same selection in blocks of at most ``STEP`` keys."""
    ways = max(1, block_size // STEP)
    if ways == 1:
        return selected, selected_valid, block_size
    nth = torch.arange(ways, dtype=selected.dtype, device=selected.device)
    is_selected = selected >= 0 if selected_valid is None else selected_valid & (selected >= 0)
    finer = torch.where(is_selected[..., None], selected[..., None] * ways + nth, -1)
    return finer.flatten(-2), None, block_size // ways


class Segments(NamedTuple):
    """How the queries of a call are cut: ``chunk`` queries of one group of one batch row are a segment, whose partial
    results exist at once.  ``count`` blocks are selected for a query, by ``group`` heads together."""

    batch: int
    groups: int
    group: int
    queries: int
    count: int
    chunk: int

    @property
    def chunks(self) -> int:
        return ceil_div(self.queries, max(1, self.chunk))

    @property
    def segments(self) -> int:
        return self.batch * self.groups * self.chunks

    @property
    def entries(self) -> int:
        """Of a segment."""
        return self.chunk * self.count

    def per_kv_head(self, kv_heads: int) -> int:
        return self.groups // kv_heads * self.chunks


def segments_of(q: Tensor, v: Tensor, entries: int, group: int) -> Segments:
    """``entries`` of all queries; ``group`` heads share a selection."""
    batch, queries, heads, _ = q.shape
    count = entries // max(1, batch * queries * (heads // group))
    chunk = chunk_of(queries, count, row_bytes(q, v, group))
    return Segments(batch, heads // group, group, queries, count, chunk)


def row_bytes(q: Tensor, v: Tensor, group: int) -> int:
    """Of a partial result of one entry."""
    return group * head_bytes_of(q, v)


def chunk_of(queries: int, count: int, bytes_of_entry: int) -> int:
    """Queries of a segment: all, or the power of two whose partial results take ``PARTIAL_BYTES``."""
    most = max(FEWEST, PARTIAL_BYTES // max(1, count * bytes_of_entry))
    return queries if queries <= most else 1 << (most.bit_length() - 1)


class ListPlan(NamedTuple):
    """The queries of each key block as lists, and the parts of lists that programs visit.

    ``order`` [B · T · G · n], int32 if that suffices: an entry ``t · 2^shift + j`` for ``selected[b, t, g, j]``, sorted
    by (b, g, chunk of t, block), ascending within a list; −1 for a block that the query selects again.  ``items`` int64
    [segments, M, 4]: for each part its block, the begin of its list, its own begin and its end; the others are empty.
    ``parts`` int32 [segments, blocks + 1]: block j has the parts ``parts[j] ≤ i < parts[j + 1]``.
    """

    order: Tensor
    items: Tensor
    parts: Tensor


def shape_of(selected: Tensor, entry_bytes: int) -> Segments:
    """How a selection is cut whose entries have partials of ``entry_bytes``; the heads of a group count as one."""
    batch, queries, groups, count = selected.shape
    return Segments(batch, groups, 1, queries, count, chunk_of(queries, count, entry_bytes))


def allocate_inverted(selected: Tensor, num_blocks: int, entry_bytes: int, twice: bool) -> tuple[Tensor, Tensor]:
    lists = shape_of(selected, entry_bytes).segments * (2 if twice else 1) * (num_blocks + 1)
    order = selected.new_empty(selected.numel(), dtype=_index_dtype(selected))
    return order, order.new_empty(lists + 1, dtype=torch.int64)


def allocate_parts(order: Tensor, segments: int, num_blocks: int, most: int, part: int) -> ListPlan:
    """``most``: entries of a segment."""
    items = order.new_empty((segments, num_blocks + most // part, 4), dtype=torch.int64)
    return ListPlan(order, items, order.new_empty((segments, num_blocks + 1), dtype=torch.int32))


def allocate_list_plan(
    selected: Tensor, selected_valid: Tensor | None, num_blocks: int, entry_bytes: int, part: int
) -> ListPlan:
    cut = shape_of(selected, entry_bytes)
    order, _ = allocate_inverted(selected, num_blocks, entry_bytes, False)
    return allocate_parts(order, cut.segments, num_blocks, cut.entries, part)


def part_of(kernel: str, group: int) -> int:
    """Entries of a part."""
    return max(1, PART_ROWS[kernel] // group)


def shift_of(count: int) -> int:
    return max(0, int(count) - 1).bit_length()


def _index_dtype(selected: Tensor) -> torch.dtype:
    return torch.int32 if selected.shape[1] << shift_of(selected.shape[3]) < 2**31 else torch.int64


def pick_config(kernel: str, width: int, element_bytes: int, target: Target) -> Config:
    """The geometry for ``forward`` or ``backward``; a tile is a block of keys, a step are entries of its list.

    On an H100 the fastest of those tried, at 128 columns.
    """
    if interpreting():
        return INTERPRETED_CONFIG
    forward = kernel == "forward"
    if element_bytes == 4:
        return Config(STEP, 32 if forward else 16, 8, 2)
    if target.kind == "hip":
        return Config(STEP, 32, 4, 1)
    if forward:
        return Config(STEP, 128 if target.arch == 90 else 64, 4, 2)
    # Rows wait for their list: of five stages, two are ahead with rows.  On an H200: 13.8 ms, 14.1 with two stages.
    return Config(STEP, 32, 8 if target.arch == 120 and width > 64 else 4, 5 if target.arch == 90 else 2)


def launch_of(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, block_size: int, group: int, scale: float | None, softcap: float
) -> AttentionLaunch:
    config = pick_config(kernel, max(q.shape[3], v.shape[3]), q.element_size(), target_of(q.device))
    config = config._replace(tile=dot_block(block_size))
    return attention_launch(
        config,
        q,
        v,
        scale,
        softcap,
        BM=max(config.step, next_power_of_2(group)),
        BN=config.tile,
        BLOCK=block_size,
        GROUP=group,
        HEADS=next_power_of_2(group),
    )


def for_hopper(of: ListPlan, launch: AttentionLaunch, *operands: Tensor) -> bool:
    """Whether the kernel of ``triton_hopper_lists.py`` takes the call: made for sm_90, and for what its copies reach.

    ``operands``: q and others of its dtype.
    """
    target, c = target_of(operands[0].device), launch.constants
    if target.kind != "cuda" or target.arch != 90 or operands[0].element_size() != 2 or triton_version() < (3, 6):
        return False
    from kernel_index.core.triton.hopper import has_tiles

    fits = c["GROUP"] == c["HEADS"] <= STEP and c["BLOCK"] in (16, 32, 64)
    fits = fits and of.order.dtype == torch.int32 and of.order.numel() < 2**31
    return fits and all(x.element_size() == 2 and x.shape[3] in (64, 128) and has_tiles(x) for x in operands)


def segments_at_once(bytes_of_segment: int, cut: Segments, kv_heads: int) -> int:
    """How many segments one launch treats: those of whole KV heads, or a divisor of those of one."""
    of_head, most = cut.per_kv_head(kv_heads), max(1, PARTIAL_BYTES // max(1, bytes_of_segment))
    if most < of_head:
        return max(n for n in range(1, most + 1) if of_head % n == 0)
    return min(cut.segments // of_head, most // of_head) * of_head


def parts_of(total: int, at_once: int) -> list[tuple[int, int]]:
    """(first, how many) of each launch."""
    return [(first, min(at_once, total - first)) for first in range(0, total, at_once)]
