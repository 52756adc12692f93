"""Plans on a GPU: which blocks a tile of queries shares, and the lists of queries of each block, in few launches."""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dense, next_power_of_2, on_device
from kernel_index.kernels.sparse.block_sparse_attention import lists, plan
from kernel_index.kernels.sparse.block_sparse_attention.lists import ListPlan, chunk_of, shift_of
from kernel_index.kernels.sparse.block_sparse_attention.plan import allocate_plan

NOTHING = tl.constexpr(0x7FFFFFFF)
"""In place of a block that is not selected: above all."""


@jit
def _entries(selected_ptr, valid_ptr, o_entry, m_e, BLOCKS, HAS_VALID: tl.constexpr):
    """Blocks of entries, NOTHING for those that select none."""
    b_block = tl.load(selected_ptr + o_entry, mask=m_e, other=-1)
    m_e = (b_block >= 0) & (b_block < BLOCKS)
    if HAS_VALID:
        m_e = m_e & (tl.load(valid_ptr + o_entry, mask=m_e, other=0) != 0)
    return tl.where(m_e, b_block.to(tl.int32), NOTHING)


@jit
def _unions_kernel(
    selected_ptr, valid_ptr, pairs_ptr, blocks_ptr, members_ptr, sizes_ptr, T, G, N, TILES, BLOCKS, WASTE,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """A program sorts the entries of one tile, QUERIES × BLOCK_N of them.  What neighbours hold goes through memory."""
    tile, group = tl.program_id(0), tl.program_id(1)
    b, g = (group // G).to(tl.int64), group % G
    o_e = tl.arange(0, QUERIES * BLOCK_N)  # [E]
    o_q, o_n = o_e // BLOCK_N, o_e % BLOCK_N  # [E]
    first = tile * QUERIES
    m_e = (first + o_q < T) & (o_n < N)
    o_entry = ((b * T + first + o_q) * G + g) * N + o_n
    b_block = _entries(selected_ptr, valid_ptr, o_entry, m_e, BLOCKS, HAS_VALID)  # [E]
    b_pair = tl.sort(tl.where(b_block == NOTHING, NOTHING, b_block * QUERIES + o_q))  # [E]: by block, then by query
    union = (group.to(tl.int64) * TILES + tile) * (QUERIES * N)
    m_slot = o_e < QUERIES * N  # what is invalid stands at the end
    tl.store(pairs_ptr + union + o_e, b_pair, mask=m_slot)
    tl.debug_barrier()
    b_before = tl.load(pairs_ptr + union + o_e - 1, mask=m_slot & (o_e > 0), other=-QUERIES)  # [E]
    m_selected = b_pair != NOTHING
    m_once = m_selected & (b_pair != b_before)  # not a block that the query selects again
    m_new = m_selected & (b_pair // QUERIES != b_before // QUERIES)
    slot = tl.cumsum(m_new.to(tl.int32), 0) - 1  # [E]
    # The members of a block are the sum of its entries' bits: a difference of prefix sums, which may wrap round.
    bit = tl.where(m_once, tl.full((QUERIES * BLOCK_N,), 1, tl.int64) << (b_pair % QUERIES), 0)  # [E]
    before = tl.cumsum(bit, 0) - bit
    tl.store(blocks_ptr + union + slot, b_pair // QUERIES, mask=m_new)
    tl.store(members_ptr + union + slot, before, mask=m_new)
    tl.debug_barrier()
    size, entries = tl.sum(m_new.to(tl.int32), 0), tl.sum(m_once.to(tl.int32), 0)
    m_first = o_e < size
    low = tl.load(members_ptr + union + o_e, mask=m_first, other=0)  # [E]
    high = tl.load(members_ptr + union + o_e + 1, mask=o_e + 1 < size, other=0)
    high = tl.where(o_e + 1 == size, tl.sum(bit, 0), high)
    tl.debug_barrier()
    tl.store(members_ptr + union + o_e, high - low, mask=m_first)
    tl.store(sizes_ptr + group * TILES + tile, tl.where(size * QUERIES <= WASTE * entries, size, -1))


def unions_plan(
    selected: Tensor, selected_valid: Tensor | None, num_blocks: int, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``Plan`` without ``pairs``; the size is −1 where lists take the tile: see ``plan.WASTE``."""
    batch, queries, groups, count = selected.shape
    found = allocate_plan(selected, tile)
    selected, selected_valid = dense((selected, selected_valid))
    tiles = found.sizes.shape[2]
    if tiles * batch * groups:
        entries = tile * next_power_of_2(count)
        with on_device(selected):
            _unions_kernel[(tiles, batch * groups)](
                selected, selected_valid, found.pairs, found.blocks, found.members, found.sizes, queries, groups, count,
                tiles, num_blocks, plan.WASTE, QUERIES=tile, BLOCK_N=next_power_of_2(count),
                HAS_VALID=selected_valid is not None, num_warps=1 if entries <= 128 else 4,
            )  # fmt: skip
    return found.blocks, found.members, found.sizes


@jit
def _numbers(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of the entries of a program.  Divisions of 64 bits take several times as long as those of 32."""
    first = tl.program_id(0)
    first = first.to(tl.int64) if WIDE else first
    return first * BLOCK + tl.arange(0, BLOCK)


@jit
def _bucket_kernel(
    selected_ptr, valid_ptr, sizes_ptr, bucket_ptr, FIRST, ENTRIES, T, G, N, BLOCKS, CHUNK, CHUNKS, SEGMENTS, TILES,
    TILE: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The list of each entry, counted from FIRST: a segment has BLOCKS + 1, the last one of what is not selected.

    TILE: entries of tiles that go by unions are in segments of their own, behind all others.
    """
    o_e = _numbers(BLOCK, WIDE)  # [BLOCK]
    m_e = o_e < ENTRIES
    b_block = tl.minimum(_entries(selected_ptr, valid_ptr, o_e, m_e, BLOCKS, HAS_VALID), BLOCKS)
    o_query = o_e // N
    b, t, g = o_query // G // T, o_query // G % T, o_query % G
    segment = ((b * G + g) * CHUNKS + t // CHUNK).to(tl.int32)
    if TILE > 0:
        b_size = tl.load(sizes_ptr + (b * G + g) * TILES + t // TILE, mask=m_e, other=0)  # [BLOCK]
        segment += tl.where(b_size >= 0, SEGMENTS, 0)
    bucket = FIRST + b_block + segment * (BLOCKS + 1)
    tl.store(bucket_ptr + o_e, bucket.to(bucket_ptr.dtype.element_ty), mask=m_e)


@jit
def _order_kernel(
    bucket_ptr, index_ptr, order_ptr, ENTRIES, T, G, N, SHIFT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Entries from the indices that the sort gives; −1 for one of the same block and query as the one before it."""
    o_e = _numbers(BLOCK, WIDE)  # [BLOCK]
    m_e = o_e < ENTRIES
    m_before = m_e & (o_e > 0)
    b_index = tl.load(index_ptr + o_e, mask=m_e, other=0).to(o_e.dtype)
    b_query = b_index // N
    m_same = tl.load(bucket_ptr + o_e, mask=m_e, other=0) == tl.load(bucket_ptr + o_e - 1, mask=m_before, other=-1)
    m_again = m_same & (b_query == tl.load(index_ptr + o_e - 1, mask=m_before, other=0).to(o_e.dtype) // N)
    entry = ((b_query // G % T).to(order_ptr.dtype.element_ty) << SHIFT) + (b_index - b_query * N)
    tl.store(order_ptr + o_e, tl.where(m_again, -1, entry), mask=m_e)


@jit
def _parts_kernel(begins_ptr, items_ptr, parts_ptr, BLOCKS, M, PART, BLOCK: tl.constexpr):
    """The parts of a segment's lists, PART entries each at most."""
    segment = tl.program_id(0).to(tl.int64)
    begins_ptr += segment * (BLOCKS + 1)
    parts_ptr += segment * (BLOCKS + 1)
    before = tl.load(begins_ptr) * 0
    for first in range(0, BLOCKS, BLOCK):
        o_b = first + tl.arange(0, BLOCK)  # [BLOCK]
        m_b = o_b < BLOCKS
        begin = tl.load(begins_ptr + o_b, mask=m_b, other=0)
        stop = tl.load(begins_ptr + o_b + 1, mask=m_b, other=0)
        count = (stop - begin + PART - 1) // PART
        ends = before + tl.cumsum(count, 0)
        tl.store(parts_ptr + o_b, (ends - count).to(tl.int32), mask=m_b)
        before += tl.sum(count, 0)
        for part in range(0, tl.max(count, 0)):
            m_part = part < count
            p_item = items_ptr + (segment * M + ends - count + part) * 4
            tl.store(p_item, o_b.to(tl.int64), mask=m_part)
            tl.store(p_item + 1, begin, mask=m_part)
            tl.store(p_item + 2, begin + part * PART, mask=m_part)
            tl.store(p_item + 3, tl.minimum(begin + (part + 1) * PART, stop), mask=m_part)
    tl.store(parts_ptr + BLOCKS, before.to(tl.int32))


def inverted(
    selected: Tensor,
    selected_valid: Tensor | None,
    num_blocks: int,
    entry_bytes: int,
    of_tiles: tuple[Tensor, int] | None,
) -> tuple[Tensor, Tensor]:
    """The ``order`` of a ``ListPlan``, and where each list of each segment begins in it, int64.

    ``of_tiles``: sizes of unions and the queries of a tile, where there are twice as many segments.
    """
    (_, queries, groups, count), entries = selected.shape, selected.numel()
    found = lists.allocate_inverted(selected, num_blocks, entry_bytes, of_tiles is not None)
    order, begins = found
    selected, selected_valid = dense((selected, selected_valid))
    chunk, grid = chunk_of(queries, count, entry_bytes), (ceil_div(entries, STEP),)
    ways, wide = 1 if of_tiles is None else 2, entries + STEP >= 2**31
    number = begins.numel() - 1
    # A sort of 16 bits takes half the time of one of 32.
    first, dtype = (-(2**15), torch.int16) if number < 2**16 else (0, torch.int32)
    bucket = order.new_empty(entries, dtype=dtype)
    sizes, tile = of_tiles or (None, 0)
    with on_device(selected):
        if entries:
            _bucket_kernel[grid](
                selected, selected_valid, sizes, bucket, first, entries, queries, groups, count, num_blocks, chunk,
                ceil_div(queries, chunk), number // (num_blocks + 1) // ways, 0 if sizes is None else sizes.shape[2],
                TILE=tile, HAS_VALID=selected_valid is not None, BLOCK=STEP, WIDE=wide,
            )  # fmt: skip
        bucket, index = bucket.sort(stable=True)
        torch.searchsorted(bucket, torch.arange(first, first + number + 1, device=bucket.device).to(dtype), out=begins)
        if entries:
            _order_kernel[grid](
                bucket, index, order, entries, queries, groups, count, SHIFT=shift_of(count), BLOCK=STEP, WIDE=wide
            )
    return found


def with_parts(found: tuple[Tensor, Tensor], which: tuple[int, int], num_blocks: int, most: int, part: int) -> ListPlan:
    """The plan of the segments ``which``, first and how many: ``most`` entries in one, ``part`` in a part of a list."""
    (order, begins), (first, segments) = found, which
    plan = lists.allocate_parts(order, segments, num_blocks, most, part)
    plan.items.zero_()  # those that remain are empty
    if segments:
        with on_device(order):
            _parts_kernel[(segments,)](
                begins[first * (num_blocks + 1) :], plan.items, plan.parts, num_blocks, plan.items.shape[1], part,
                BLOCK=1024, num_warps=4,
            )  # fmt: skip
    return plan


def list_plan(
    selected: Tensor, selected_valid: Tensor | None, num_blocks: int, entry_bytes: int, part: int
) -> ListPlan:
    """``part``: entries of a part at most."""
    found = inverted(selected, selected_valid, num_blocks, entry_bytes, None)
    cut = lists.shape_of(selected, entry_bytes)
    return with_parts(found, (0, cut.segments), num_blocks, cut.entries, part)


STEP = 1024
"""Entries of a program that looks at each by itself."""
