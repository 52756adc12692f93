"""The unions of neighbouring queries in one launch: a program sorts the entries of a tile and where they came from.

E entries are TILE queries × N selected blocks.  Nothing is added up, so nothing depends on an order of execution.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device


@jit
def _unions_kernel(
    selected_ptr, valid_ptr, sorted_ptr, union_ptr, sizes_ptr, own_ptr, is_ptr, T, G, N, TILES, BLOCKS, WIDTH,
    TILE: tl.constexpr, E: tl.constexpr, HAS_VALID: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of one group.  What neighbours in the sorted order hold goes through memory."""
    tile, group = tl.program_id(0), tl.program_id(1)
    b, g = (group // G).to(tl.int64), group % G
    o_e = tl.arange(0, E)  # [E]
    first = tile * TILE
    m_e = (o_e < TILE * N) & (first + o_e // N < T)
    o_entry = ((b * T + first + o_e // N) * G + g) * N + o_e % N  # [E]
    b_block = tl.load(selected_ptr + o_entry, mask=m_e, other=0).to(tl.int64)  # [E]
    m_selected = m_e & (b_block >= 0) & (b_block < BLOCKS)
    if HAS_VALID:
        m_selected &= tl.load(valid_ptr + o_entry, mask=m_e, other=0) != 0
    tl.store(is_ptr + o_entry, m_selected, mask=m_e)
    tl.store(own_ptr + o_entry, -1, mask=m_e & ~m_selected)

    nothing = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    b_key = tl.where(m_selected, b_block * E + o_e, nothing)
    b_key = tl.sort(b_key if WIDE else b_key.to(tl.int32))  # [E]: by block, then by entry
    p_key = sorted_ptr + (group.to(tl.int64) * TILES + tile) * E + o_e
    tl.store(p_key, b_key)
    tl.debug_barrier()
    b_before = tl.load(p_key - 1, mask=o_e > 0, other=-E)  # [E]
    m_some = b_key != nothing
    m_new = m_some & (b_key // E != b_before // E)
    rank = tl.cumsum(m_new.to(tl.int32), 0) - 1  # [E]
    size = tl.sum(m_new.to(tl.int32), 0)
    union = (b * TILES + tile) * G + g
    tl.store(union_ptr + union * WIDTH + rank, (b_key // E).to(tl.int32), mask=m_new)
    tl.store(union_ptr + union * WIDTH + o_e, -1, mask=(o_e >= size) & (o_e < WIDTH))
    tl.store(sizes_ptr + union, size)
    origin = (b_key % E).to(tl.int32)  # [E]
    o_own = ((b * T + first + origin // N) * G + g) * N + origin % N
    tl.store(own_ptr + o_own, rank, mask=m_some)


def fill(
    selected: Tensor, valid: Tensor | None, tile: int, num_blocks: int,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """The fields of ``UnionMaps``, from dense tensors with at least one entry."""
    (batch, queries, groups, count), (tiles, width) = selected.shape, outputs[0].shape[1::2]
    entries = max(16, next_power_of_2(tile * count))
    wide = num_blocks * entries >= 2**31
    sorted_entries = outputs[0].new_empty(batch * groups * tiles * entries, dtype=torch.int64 if wide else torch.int32)
    with on_device(selected):
        _unions_kernel[(tiles, batch * groups)](
            selected, valid, sorted_entries, *outputs, queries, groups, count, tiles, num_blocks, width,
            TILE=tile, E=entries, HAS_VALID=valid is not None, WIDE=wide, num_warps=1 if entries <= 128 else 4,
        )  # fmt: skip
