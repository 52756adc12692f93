"""Decoding over selected blocks: programs take splits of a query's tokens, which are then merged in a fixed order.

The query heads that share a selection are the rows of a program's tile, and only its blocks are read, through the page
table where there is one.  Lengths are read on the device, so a captured graph serves every later seen.
Names and units are those of ``core/triton/attention.py``.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    OUTGROWN,
    cache_slots,
    finite_max,
    load_rows,
    narrow,
    online_softmax,
    scores,
    softmax_output,
    store_rows,
    weighted_sum,
    with_sink,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import (
    LOG2E,
    ceil_div,
    dot_block,
    interpreting,
    next_power_of_2,
    processors,
    score_factors,
)
from kernel_index.kvcache.selected import Visible

_LOG2E = tl.constexpr(LOG2E)


@jit
def _aligned_tiles(
    p_selected, p_table, i, end, b, position,
    BLOCK: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """The first tokens of tiles ``i`` [N], each in one block and one page, and their slots in the whole cache.

    Where nothing is selected, the first token is after ``position``.
    """
    block = tl.load(p_selected + i // (BLOCK // BN), mask=i < end, other=-1)  # [N]
    m_block = (block >= 0) & (block <= position // BLOCK)
    first = tl.where(m_block, block, 0).to(tl.int32) * BLOCK + i % (BLOCK // BN) * BN
    m_block = m_block & (first <= position)
    if PAGED:
        page = tl.load(p_table + first // PAGE, mask=m_block, other=0).to(tl.int32)
        slot = page * PAGE + first % PAGE
    else:
        slot = b.to(tl.int32) * PAGE + first
    return tl.where(m_block, first, position + 1), tl.where(m_block, slot, 0)


@jit
def _any_tile(
    p_selected, p_table, i, b, position, SELECTED,
    BLOCK: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """The tokens of tile ``i`` of the selected ones [BN], their slots in the whole cache, and which of them exist."""
    o_n = i * BN + tl.arange(0, BN)  # [BN]
    block = tl.load(p_selected + o_n // BLOCK, mask=o_n // BLOCK < SELECTED, other=-1)  # [BN]
    m_block = (block >= 0) & (block <= position // BLOCK)
    o_k = tl.where(m_block, block, 0).to(tl.int32) * BLOCK + o_n % BLOCK
    m_k = m_block & (o_k <= position)
    b_page, o_slot = cache_slots(p_table, b, 0, 1, o_k, m_k, PAGE, PAGED)  # [BN]
    return o_k, b_page * PAGE + o_slot, m_k


@jit
def _selected_kernel(
    q_ptr, k_ptr, v_ptr, selected_ptr, length_ptr, table_ptr, sink_ptr, state_ptr,
    q_b, q_t, q_h, table_b, AT, QUERIES, NEW, LEFT, SELECTED, PER_SPLIT, inner, outer,
    GROUPS: tl.constexpr, KV: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    ALIGNED: tl.constexpr, SHARED: tl.constexpr, HAS_LEFT: tl.constexpr, DIRECT: tl.constexpr,
    CAPPED: tl.constexpr, SINK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The softmax state of one query's J heads of one group over PER_SPLIT tiles of its SELECTED blocks.

    ALIGNED: a tile is in one block and one page; the slots of N tiles are looked up at once, so that the loop over
    them loads keys and values alone and many are under way.  SHARED: the groups of a query have one selection.
    DIRECT: one split holds all, and ``state_ptr`` is the output.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # a pair is a query and a group
    query, group = pair // GROUPS, pair % GROUPS
    b, t, kv_head = query // QUERIES, query % QUERIES, group // (GROUPS // KV)
    o_m = tl.arange(0, BM)  # [BM]
    b_q = load_rows(q_ptr + b * q_b + t * q_t, (group * J + o_m) * q_h, o_m < J, D, BLOCK_D)  # [BM, BLOCK_D]
    position = tl.load(length_ptr + b).to(tl.int32) + NEW - QUERIES + t.to(tl.int32)
    p_table = table_ptr + b * table_b
    p_selected = selected_ptr
    if selected_ptr.dtype.element_ty == tl.float32:  # in the memory of the states, before them
        p_selected = selected_ptr.to(tl.pointer_type(tl.int32))
    p_selected += (query if SHARED else pair) * SELECTED
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    tiles = SELECTED * (BLOCK // BN) if ALIGNED else tl.cdiv(SELECTED * BLOCK, BN)
    end = tl.where(position >= 0, tl.minimum((split + 1) * PER_SPLIT, tiles), 0)
    for begin in range(split * PER_SPLIT, end, N):
        o_i = begin + tl.arange(0, N)  # [N]
        b_first, b_slot = o_i, o_i
        if ALIGNED:
            b_first, b_slot = _aligned_tiles(p_selected, p_table, o_i, end, b, position, BLOCK, BN, PAGE, PAGED)
        for i in range(begin, tl.minimum(begin + N, end)):
            if ALIGNED:
                o_n = tl.arange(0, BN)
                o_k = tl.sum(tl.where(o_i == i, b_first, 0), 0) + o_n  # [BN]
                slot = tl.sum(tl.where(o_i == i, b_slot, 0), 0).to(tl.int64)
                base, o_row, m_k = slot * (KV * D), o_n.to(tl.int64) * (KV * D), o_k <= position
            else:
                o_k, slot, m_k = _any_tile(p_selected, p_table, i, b, position, SELECTED, BLOCK, BN, PAGE, PAGED)
                base, o_row = kv_head * 0, slot * (KV * D)
            if HAS_LEFT:
                m_k = m_k & (o_k >= position - LEFT)
            base += kv_head * D
            b_k = load_rows(k_ptr + base, o_row, m_k, D, BLOCK_D)  # [BN, BLOCK_D], and no other slot is read
            z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
            logits = tl.where(m_k[None, :], z * outer, float("-inf"))
            p, alpha, row_max, row_sum = online_softmax(logits, row_max, row_sum)
            b_v = load_rows(v_ptr + base, o_row, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
            acc = acc * alpha[:, None] + weighted_sum(p, b_v, m_k, False, UPCAST)
    if tl.load(p_selected) == OUTGROWN:
        acc, row_sum = acc + float("nan"), row_sum + float("nan")
    if DIRECT:
        m_empty = row_sum == 0
        if SINK:
            b_sink = tl.load(sink_ptr + group * J + o_m, mask=o_m < J, other=0.0).to(tl.float32) * _LOG2E
            acc, row_max, row_sum = with_sink(acc, row_max, row_sum, b_sink)
        out, _ = softmax_output(acc, row_max, row_sum, m_empty)  # NaN stays
        store_rows(state_ptr, (pair * J + o_m) * D, o_m < J, out, D, BLOCK_D, UPCAST)
    else:
        rows = tl.num_programs(0).to(tl.int64) * J
        o_state = split * rows + pair * J + o_m
        p_max = state_ptr + AT + tl.num_programs(1) * rows * D
        tl.store(p_max + o_state, row_max, mask=o_m < J)
        tl.store(p_max + tl.num_programs(1) * rows + o_state, row_sum, mask=o_m < J)
        store_rows(state_ptr + AT, o_state * D, o_m < J, acc, D, BLOCK_D, False)


@jit
def _merge_kernel(
    state_ptr, sink_ptr, out_ptr, AT, SPLITS, HEADS, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
    SINK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One row of the output from the states of its SPLITS ≤ N splits."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    o_split = tl.arange(0, N)  # [N]
    m_split = o_split < SPLITS
    o_state = o_split * rows + row
    p_max = state_ptr + AT + SPLITS * rows * D
    b_max = tl.load(p_max + o_state, mask=m_split, other=float("-inf"))  # [N]
    b_sum = tl.load(p_max + SPLITS * rows + o_state, mask=m_split, other=0.0)  # [N]
    b_acc = load_rows(state_ptr + AT, o_state * D, m_split, D, BLOCK_D)  # [N, BLOCK_D]
    row_max = tl.max(b_max, 0)
    if SINK:
        sink = tl.load(sink_ptr + row % HEADS).to(tl.float32) * _LOG2E
        row_max = tl.maximum(row_max, sink)
    shift = finite_max(row_max)
    w = tl.exp2(b_max - shift)
    row_sum = tl.sum(b_sum * w, 0)
    if SINK:
        row_sum += tl.exp2(sink - shift)
    out = tl.sum(b_acc * w[:, None], 0) / tl.where(row_sum != 0, row_sum, 1.0)  # NaN stays
    o_d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + row * D + o_d, narrow(out, out_ptr.dtype.element_ty, UPCAST), mask=o_d < D)


class Plan(NamedTuple):
    """Rows and tokens of a tile, whether a tile is in one block and page, warps, stages; tiles of a split, splits."""

    block_rows: int
    block_keys: int
    aligned: bool
    num_warps: int
    num_stages: int
    per_split: int
    splits: int


TILES_AT_ONCE = 32
"""Whose slots are looked up together: as many as a warp has threads."""

MOST_SPLITS = 64
"""A program of the merge reads the states of all splits at once."""


def power_below(n: int) -> int:
    """The largest power of 2 that is at most ``n``."""
    return 1 << max(0, n.bit_length() - 1)


def plan(pairs: int, heads: int, selected: int, block_size: int, page: int, row_bytes: int, count: int) -> Plan:
    """About four programs for each of ``count`` processors, which run at once; a function of sizes alone.

    ``page`` is 0 without pages.  Of few rows a program waits for memory alone: one warp, with five tiles of 4 KiB of
    keys, and as many of values, under way.
    """
    few = heads <= 16
    largest = min(64, max(16, power_below(4096 // row_bytes))) if few else 64 if row_bytes <= 256 else 32
    common = math.gcd(block_size, page) if page else block_size
    block_keys = min(largest, common & -common)  # the largest that divides both
    aligned = block_keys >= 16
    if not aligned:
        block_keys = min(largest, dot_block(selected * block_size))
    tiles = ceil_div(selected * block_size, block_keys)
    splits = max(1, min(ceil_div(tiles, 2), round(4 * count / max(1, pairs)), MOST_SPLITS))
    per_split = ceil_div(tiles, splits)
    stages = min(6, max(2, 49152 // (2 * block_keys * row_bytes))) if few else 2
    return Plan(
        dot_block(heads), block_keys, aligned, 1 if few else 4, stages, per_split, max(1, ceil_div(tiles, per_split))
    )


class Launch(NamedTuple):
    """The constants of both kernels; ``states``: float32 elements that the splits need, 0 for a single one."""

    plan: Plan
    states: int
    kernel: dict[str, Any]
    merge: dict[str, Any]


@functools.lru_cache(1024)
def launch_of(
    shape: torch.Size,
    kv_heads: int,
    page: int,
    columns: int,
    groups: int,
    count: int,
    block_size: int,
    width: int,
    many: int,
) -> Launch:
    """For queries of ``shape`` with elements of ``width`` bytes; ``columns`` of the table, 0 without one."""
    batch, queries, heads, size = shape
    block_size = min(
        block_size, next_power_of_2(page * max(1, columns))
    )  # of a block that holds a row, any size serves
    each, paged = heads // groups, columns > 0
    p = plan(batch * queries * groups, each, count, block_size, page if paged else 0, size * width, many)
    common = {"D": size, "BLOCK_D": dot_block(size), "UPCAST": interpreting()}
    kernel = common | {
        "GROUPS": groups, "KV": kv_heads, "J": each, "BM": p.block_rows, "BN": p.block_keys, "N": TILES_AT_ONCE,
        "BLOCK": block_size, "PAGE": page, "PAGED": paged, "ALIGNED": p.aligned, "DIRECT": p.splits == 1,
        "num_warps": p.num_warps, "num_stages": p.num_stages,
    }  # fmt: skip
    states = 0 if p.splits == 1 else p.splits * batch * queries * heads * (size + 2)
    return Launch(p, states, kernel, common | {"N": next_power_of_2(p.splits), "num_warps": 4})


def launch_for(q: Tensor, k_cache: Tensor, seen: Visible, groups: int, count: int, block_size: int) -> Launch:
    page, kv_heads = k_cache.shape[1:3]
    return launch_of(q.shape, kv_heads, page, seen.columns, groups, count, block_size, q.element_size(), processors(q))


def decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    selected: Tensor,
    seen: Visible,
    launch: Launch,
    count: int,
    scale: float,
    softcap: float,
    memory: tuple[Tensor, int] | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Fill ``out`` [B, Lq, H, D]; each of the G groups of a query has ``count`` selected blocks, −1 for none.

    ``selected``: int32 or int64 [B, Lq, G or 1, count]; or float32 memory that begins with them as int32, [B, Lq, G].
    ``memory``: float32, and the element from which on ``launch.states`` of them are free; None allocates it.
    """
    batch, queries, heads, _ = q.shape
    lengths, table, splits, groups = seen.lengths, seen.table, launch.plan.splits, launch.kernel["GROUPS"]
    if memory is None:
        memory = (q.new_empty(launch.states, dtype=torch.float32), 0)
    states, at = (out, 0) if splits == 1 else memory
    inner, outer = score_factors(scale, softcap)
    given_sink = lengths if sink is None else sink
    _selected_kernel[(batch * queries * groups, splits)](
        q, k_cache, v_cache, selected, lengths, lengths if table is None else table, given_sink, states,
        *q.stride()[:3], 0 if table is None else table.stride(0), at, queries, seen.new, seen.left, count,
        launch.plan.per_split, inner, outer,
        SHARED=selected.ndim == 4 and selected.shape[2] < groups, HAS_LEFT=seen.left >= 0, CAPPED=softcap > 0,
        SINK=sink is not None,
        **launch.kernel,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(batch * queries * heads,)](
            states, given_sink, out, at, splits, heads, SINK=sink is not None, **launch.merge
        )
    return out
