"""Plans on a GPU: which blocks a tile of queries shares, and the lists of queries of each block, in few launches."""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dense, next_power_of_2, on_device
from kernel_index.kernels.sparse.block_sparse_attention import plan
from kernel_index.kernels.sparse.block_sparse_attention.lists import (
    ListPlan,
    allocate_list_plan,
    chunk_of,
    shift_of,
)
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
def _shared_kernel(
    selected_ptr, valid_ptr, blocks_ptr, members_ptr, sizes_ptr, others_ptr, T, G, N, TILES, BLOCKS, SHARED,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """A program has the entries of one tile, QUERIES × BLOCK_N of them, and compares each with all."""
    tile, group = tl.program_id(0), tl.program_id(1)
    b, g = (group // G).to(tl.int64), group % G
    o_e = tl.arange(0, QUERIES * BLOCK_N)  # [E]
    o_q, o_n = o_e // BLOCK_N, o_e % BLOCK_N  # [E]
    first = tile * QUERIES
    m_e = (first + o_q < T) & (o_n < N)
    o_entry = ((b * T + first + o_q) * G + g) * N + o_n
    b_block = _entries(selected_ptr, valid_ptr, o_entry, m_e, BLOCKS, HAS_VALID)  # [E]

    members = tl.zeros((QUERIES * BLOCK_N,), tl.int64)
    count = tl.zeros((QUERIES * BLOCK_N,), tl.int32)
    m_first = b_block != NOTHING  # of the tile's entries with this block
    m_once = b_block != NOTHING  # not a block that the query selects again
    o_other = tl.arange(0, BLOCK_N)
    for q in range(0, QUERIES):
        o_others = ((b * T + first + q) * G + g) * N + o_other
        m_others = (o_other < N) & (first + q < T)
        b_others = _entries(selected_ptr, valid_ptr, o_others, m_others, BLOCKS, HAS_VALID)  # [BLOCK_N]
        m_equal = b_block[:, None] == b_others[None, :]  # [E, BLOCK_N]
        m_same = tl.max(m_equal.to(tl.int32), 1)  # [E]
        m_again = tl.max((m_equal & (o_other[None, :] < o_n[:, None])).to(tl.int32), 1)
        members += m_same.to(tl.int64) << q
        count += m_same
        m_once = m_once & ((o_q != q) | (m_again == 0))
        m_first = m_first & ((o_q <= q) | (m_same == 0))
    m_shared = (b_block != NOTHING) & (count >= SHARED)
    tl.store(others_ptr + o_entry, m_once & (count < SHARED), mask=m_e)

    # The slot of a block is how many smaller ones the tile shares.  What is compared lies where the slots will be.
    m_first = m_first & m_once & m_shared
    union = (group.to(tl.int64) * TILES + tile) * (QUERIES * N)
    tl.store(blocks_ptr + union + o_q * N + o_n, tl.where(m_first, b_block, NOTHING), mask=o_n < N)
    tl.debug_barrier()
    slot = tl.zeros((QUERIES * BLOCK_N,), tl.int32)
    for q in range(0, QUERIES):
        b_others = tl.load(blocks_ptr + union + q * N + o_other, mask=o_other < N, other=NOTHING)  # [BLOCK_N]
        slot += tl.sum((b_others[None, :] < b_block[:, None]).to(tl.int32), 1)
    tl.debug_barrier()
    tl.store(blocks_ptr + union + slot, b_block, mask=m_first)
    tl.store(members_ptr + union + slot, members, mask=m_first)
    tl.store(sizes_ptr + group * TILES + tile, tl.sum(m_first.to(tl.int32), 0))


def shared_plan(
    selected: Tensor, selected_valid: Tensor | None, num_blocks: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``Plan`` without ``pairs``, of blocks that ``SHARED`` queries of a tile selected, and which entries are others.

    The latter is bool, of ``selected``'s shape.
    """
    batch, queries, groups, count = selected.shape
    found, others = allocate_plan(selected, tile), torch.empty_like(selected, dtype=torch.bool)
    selected, selected_valid = dense((selected, selected_valid))
    tiles = found.sizes.shape[2]
    if tiles * batch * groups:
        with on_device(selected):
            _shared_kernel[(tiles, batch * groups)](
                selected, selected_valid, found.blocks, found.members, found.sizes, others, queries, groups, count,
                tiles, num_blocks, plan.SHARED,
                QUERIES=tile, BLOCK_N=next_power_of_2(count), HAS_VALID=selected_valid is not None, num_warps=4,
            )  # fmt: skip
    return found.blocks, found.members, found.sizes, others


@jit
def _numbers(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of the entries of a program.  Divisions of 64 bits take several times as long as those of 32."""
    first = tl.program_id(0)
    first = first.to(tl.int64) if WIDE else first
    return first * BLOCK + tl.arange(0, BLOCK)


@jit
def _bucket_kernel(
    selected_ptr, valid_ptr, bucket_ptr, ENTRIES, T, G, N, BLOCKS, CHUNK, CHUNKS,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The list of each entry: those of a segment are BLOCKS + 1, and the last one is of what is not selected."""
    o_e = _numbers(BLOCK, WIDE)  # [BLOCK]
    m_e = o_e < ENTRIES
    b_block = tl.minimum(_entries(selected_ptr, valid_ptr, o_e, m_e, BLOCKS, HAS_VALID), BLOCKS)
    o_query = o_e // N
    b, t, g = o_query // G // T, o_query // G % T, o_query % G
    segment = ((b * G + g) * CHUNKS + t // CHUNK).to(tl.int32)
    tl.store(bucket_ptr + o_e, b_block + segment * (BLOCKS + 1), mask=m_e)


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


def list_plan(
    selected: Tensor, selected_valid: Tensor | None, num_blocks: int, entry_bytes: int, part: int
) -> ListPlan:
    """``part``: entries of a part at most."""
    found = allocate_list_plan(selected, selected_valid, num_blocks, entry_bytes, part)
    found.items.zero_()  # those that remain are empty
    selected, selected_valid = dense((selected, selected_valid))
    (_, queries, groups, count), entries = selected.shape, selected.numel()
    chunk = chunk_of(queries, count, entry_bytes)
    lists, grid = found.items.shape[0] * (num_blocks + 1), (ceil_div(entries, STEP),)
    wide = entries + STEP >= 2**31
    bucket = torch.empty(entries, dtype=torch.int32, device=selected.device)
    with on_device(selected):
        if entries:
            _bucket_kernel[grid](
                selected, selected_valid, bucket, entries, queries, groups, count, num_blocks, chunk,
                ceil_div(queries, chunk), HAS_VALID=selected_valid is not None, BLOCK=STEP, WIDE=wide,
            )  # fmt: skip
        bucket, index = bucket.sort(stable=True)
        begins = torch.searchsorted(bucket, torch.arange(lists + 1, dtype=torch.int32, device=bucket.device))
        if entries:
            _order_kernel[grid](
                bucket, index, found.order, entries, queries, groups, count, SHIFT=shift_of(count), BLOCK=STEP,
                WIDE=wide,
            )  # fmt: skip
        if found.items.shape[0]:
            _parts_kernel[(found.items.shape[0],)](
                begins, found.items, found.parts, num_blocks, found.items.shape[1], part, BLOCK=1024, num_warps=4
            )
    return found


STEP = 1024
"""Entries of a program that looks at each by itself."""
