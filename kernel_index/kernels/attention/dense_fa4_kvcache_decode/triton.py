"""Decoding in two launches: write the new tokens and attend to splits of the keys, then merge the splits in order.

The queries of a KV head (its G heads, and every new token) share one tile, so that keys are read once for all of them.
How many splits a row gets is decided on the device, from the lengths that it finds there: rows of different lengths
keep all processors busy alike, and a captured graph serves every later step.
Names and units are those of ``core/triton/attention.py``; a row of a tile is one query with one head of the group.
"""

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    cache_slots,
    finite_max,
    has_nan,
    load_rows,
    narrow,
    scores,
    softmax_output,
    store_rows,
    weighted_sum,
    with_sink,
    within,
)
from kernel_index.core.triton.jit import Prepared, jit, place_of
from kernel_index.core.triton.launch import (
    LOG2E,
    ceil_div,
    dot_block,
    interpreting,
    next_power_of_2,
    on_device,
    processors,
    score_factors,
)
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.triton_splits import (
    batch_row,
    ideal_split,
    splits_before,
    splits_of,
)

_LOG2E = tl.constexpr(LOG2E)
UNLIMITED = 2**31 - 1
LARGEST_TILE = 64
"""Rows."""
SMALLEST_SPLIT = 32
"""Keys: a shorter split costs more in the merge than it saves."""


@jit
def _write_new(
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, table_ptr, b, kv_head, table_b, cached, low, high,
    new_b, new_t, new_h, s_page, s_slot, s_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Write the new tokens at positions ``low ≤ s < high``, of which the first new one is at ``cached``."""
    o_k = tl.maximum(low, cached) + tl.arange(0, N)  # [N]
    m_k = o_k < high
    b_page, o_slot = cache_slots(table_ptr, b, table_b, 1, o_k, m_k, PAGE, PAGED)
    o_new = b * new_b + (o_k - cached).to(tl.int64) * new_t + kv_head * new_h
    o_d = tl.arange(0, BLOCK_D)
    m_tile = m_k[:, None] & (o_d < D)[None, :]
    o_cache = (b_page * s_page + o_slot * s_slot + kv_head * s_h)[:, None] + o_d[None, :]
    tl.store(k_ptr + o_cache, load_rows(new_k_ptr, o_new, m_k, D, BLOCK_D), mask=m_tile)
    tl.store(v_ptr + o_cache, load_rows(new_v_ptr, o_new, m_k, D, BLOCK_D), mask=m_tile)


@jit
def _walk(
    b_q, k_ptr, v_ptr, table_ptr, b, kv_head, table_b, low, high, first_seen, start, end,
    s_page, s_slot, s_h, inner, outer,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    PAGED: tl.constexpr, HAS_LEFT: tl.constexpr, ALIKE: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """The softmax state of a tile of rows over the keys ``low ≤ s < high``; ``low`` is a multiple of BN."""
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    sums = tl.zeros((BM, BN), tl.float32)  # added up over the keys once, at the end
    o_n = tl.arange(0, BN)  # [BN]
    o_row = kv_head * s_h if PAGED else b * s_page + kv_head * s_h
    for first in range(low, high, BN):
        o_k = first + o_n  # [BN]
        m_k = o_k < high  # no other slot is read, neither keys nor the table
        if HAS_LEFT:
            m_k = m_k & (o_k >= first_seen)
        if PAGED and PAGE % BN != 0:
            page, o_slot = cache_slots(table_ptr, b, table_b, 1, o_k, m_k, PAGE, PAGED)  # [BN]
            first_slot, o_key = o_row, page * s_page + o_slot * s_slot
        else:  # the tile is in one page: what differs between its rows is the same in every tile
            first_slot, o_key = o_row + tl.cast(first, tl.int64) * s_slot, o_n * s_slot
            if PAGED:
                page = tl.load(table_ptr + b * table_b + first // PAGE).to(tl.int64)
                first_slot = o_row + page * s_page + (first % PAGE) * s_slot
        b_k = load_rows(k_ptr + first_slot, o_key, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
        m_seen = m_k[None, :] if ALIKE else within(o_k[None, :], start[:, None], end[:, None])
        logits = tl.where(m_seen, z * outer, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        shift = finite_max(new_max)
        p, alpha = tl.exp2(logits - shift[:, None]), tl.exp2(row_max - shift)
        row_max, sums = new_max, sums * alpha[:, None] + p
        b_v = load_rows(v_ptr + first_slot, o_key, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        acc = acc * alpha[:, None] + weighted_sum(p, b_v, m_seen, CAREFUL, UPCAST)
    return acc, row_max, tl.sum(sums, 1)


@jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, new_k_ptr, new_v_ptr, length_ptr, table_ptr, sink_ptr, out_ptr, state_ptr,
    q_b, q_t, q_h, s_page, s_slot, s_h, new_b, new_t, new_h, table_b,
    BATCH, QUERIES, KV, NEW, LEFT, RIGHT, REACH, PROGRAMS, MOST, SLOTS, inner, outer,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    PAGED: tl.constexpr, WRITTEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, ALIKE: tl.constexpr,
    CAPPED: tl.constexpr, SINK: tl.constexpr, SMALLEST: tl.constexpr, BATCHES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A split of one batch row's keys for one KV head and a tile of rows: their output, or their softmax state.

    WRITTEN: most new tokens that it writes first, 0 where they are in the cache already.
    ALIKE: all rows see the same keys.
    """
    slot, kv_head, ROWS = tl.program_id(0) // KV, (tl.program_id(0) % KV).to(tl.int64), QUERIES * G
    ideal = ideal_split(length_ptr, BATCH, NEW, REACH, KV * tl.num_programs(1), PROGRAMS, SMALLEST, BATCHES)
    row, before = batch_row(length_ptr, slot, BATCH, NEW, REACH, ideal, MOST, BATCHES)
    if row >= BATCH:
        return
    b, split = row.to(tl.int64), slot - before
    length = tl.load(length_ptr + b).to(tl.int32) + NEW
    splits = splits_of(tl.minimum(length, REACH), ideal, MOST)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    m_m, query, head = o_m < ROWS, o_m // G, kv_head * G + o_m % G
    position = length - QUERIES + query  # [BM]
    start = tl.maximum(position - LEFT, 0) if HAS_LEFT else tl.zeros_like(position)
    end = tl.minimum(position + RIGHT + 1, length) if HAS_RIGHT else tl.zeros_like(position) + length
    b_q = load_rows(q_ptr + b * q_b, query.to(tl.int64) * q_t + head * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
    first_seen = tl.maximum(length - REACH, 0) if HAS_LEFT else 0  # by any query of the batch row
    first = first_seen // BN * BN
    size = tl.cdiv(tl.cdiv(length - first, splits), BN) * BN
    low = first + split * size
    high = tl.minimum(low + size, length)
    if WRITTEN > 0:  # noqa: SIM102 (a constant)
        if high > length - NEW:
            _write_new(
                new_k_ptr, new_v_ptr, k_ptr, v_ptr, table_ptr, b, kv_head, table_b, length - NEW, low, high,
                new_b, new_t, new_h, s_page, s_slot, s_h, D, BLOCK_D, WRITTEN, PAGE, PAGED,
            )  # fmt: skip
            tl.debug_barrier()  # what other threads of this program wrote is read below
    acc, row_max, row_sum = _walk(
        b_q, k_ptr, v_ptr, table_ptr, b, kv_head, table_b, low, high, first_seen, start, end,
        s_page, s_slot, s_h, inner, outer,
        D, BLOCK_D, BM, BN, PAGE, PAGED, HAS_LEFT, ALIKE, CAPPED, UPCAST, False,
    )  # fmt: skip
    if not ALIKE:  # noqa: SIM102 (a constant: where rows are alike, the second walk is not compiled)
        if has_nan(acc):
            acc, row_max, row_sum = _walk(
                b_q, k_ptr, v_ptr, table_ptr, b, kv_head, table_b, low, high, first_seen, start, end,
                s_page, s_slot, s_h, inner, outer,
                D, BLOCK_D, BM, BN, PAGE, PAGED, HAS_LEFT, ALIKE, CAPPED, UPCAST, True,
            )  # fmt: skip
    if splits == 1:
        m_empty = row_sum == 0  # NaN stays
        if SINK:
            sink = tl.load(sink_ptr + head, mask=m_m, other=0.0).to(tl.float32) * _LOG2E
            acc, row_max, row_sum = with_sink(acc, row_max, row_sum, sink)
        out, _ = softmax_output(acc, row_max, row_sum, m_empty)
        store_rows(out_ptr, ((b * QUERIES + query) * KV * G + head) * D, m_m, out, D, BLOCK_D, UPCAST)
    else:
        o_state = (slot.to(tl.int64) * KV + kv_head) * ROWS + o_m
        states = tl.cast(SLOTS, tl.int64) * KV * ROWS
        tl.store(state_ptr + o_state, row_max, mask=m_m)
        tl.store(state_ptr + states + o_state, row_sum, mask=m_m)
        store_rows(state_ptr + 2 * states, o_state * D, m_m, acc, D, BLOCK_D, False)


@jit
def _merge_kernel(
    length_ptr, sink_ptr, out_ptr, state_ptr,
    BATCH, QUERIES, KV, NEW, REACH, TILES, PROGRAMS, MOST, SLOTS,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SINK: tl.constexpr, N: tl.constexpr,
    SMALLEST: tl.constexpr, BATCHES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One row of the output from the states of its splits, N at a time; nothing where it has a single one."""
    b, kv_head = (tl.program_id(0) // KV).to(tl.int64), (tl.program_id(0) % KV).to(tl.int64)
    row, ROWS = tl.program_id(1), QUERIES * G
    ideal = ideal_split(length_ptr, BATCH, NEW, REACH, KV * TILES, PROGRAMS, SMALLEST, BATCHES)
    splits = splits_of(tl.minimum(tl.load(length_ptr + b).to(tl.int32) + NEW, REACH), ideal, MOST)
    if splits == 1:
        return
    before = splits_before(length_ptr, b, BATCH, NEW, REACH, ideal, MOST, BATCHES)
    head, states = kv_head * G + row % G, tl.cast(SLOTS, tl.int64) * KV * ROWS
    acc, row_sum = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((), tl.float32)
    row_max = tl.zeros((), tl.float32) + float("-inf")
    for first in range(0, splits, N):
        o_split = first + tl.arange(0, N)  # [N]
        m_split = o_split < splits
        o_state = ((before + o_split).to(tl.int64) * KV + kv_head) * ROWS + row
        b_max = tl.load(state_ptr + o_state, mask=m_split, other=float("-inf"))
        b_sum = tl.load(state_ptr + states + o_state, mask=m_split, other=0.0)
        b_acc = load_rows(state_ptr + 2 * states, o_state * D, m_split, D, BLOCK_D)  # [N, BLOCK_D]
        new_max = tl.maximum(row_max, tl.max(b_max, 0))
        shift = finite_max(new_max)
        alpha, w = tl.exp2(row_max - shift), tl.exp2(b_max - shift)
        acc = acc * alpha + tl.sum(b_acc * w[:, None], 0)
        row_sum = row_sum * alpha + tl.sum(b_sum * w, 0)
        row_max = new_max
    if SINK:
        sink = tl.load(sink_ptr + head).to(tl.float32) * _LOG2E
        shift = finite_max(tl.maximum(row_max, sink))
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.exp2(sink - shift)
        acc = acc * tl.exp2(row_max - shift)
    out = tl.where(row_sum != 0, acc / tl.where(row_sum != 0, row_sum, 1.0), 0.0)  # NaN stays
    o_d = tl.arange(0, BLOCK_D)
    o_out = ((b * QUERIES + row // G) * KV * G + head) * D
    value = narrow(out, out_ptr.dtype.element_ty, UPCAST)
    tl.store(out_ptr + o_out + o_d, value, mask=o_d < D)


class Config(NamedTuple):
    """Rows of a tile, keys of a step, warps, stages; programs that a multiprocessor runs at once."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    programs: int


def pick_config(rows: int, row_bytes: int, pairs: int, count: int) -> Config:
    """Of ``rows`` of all tiles, the bytes of a key, pairs of a batch row and a KV head, and ``count`` multiprocessors.

    Few rows wait for memory alone.  A warp for each tile of 4 KiB and four of them on a multiprocessor reach the copy
    bandwidth of an H200; where every multiprocessor has a batch row to itself, larger tiles do (docs/decisions/0020).
    """
    if rows <= 16 and pairs >= 2 * count:
        return Config(16, min(64, max(16, 16384 // row_bytes)), 2, 3, 2)
    if rows <= 16:
        block_keys = min(64, max(16, 4096 // row_bytes))
        stages = min(6, max(2, 49152 // (2 * block_keys * row_bytes)))
        return Config(16, block_keys, 1, stages, 4)
    block_keys = 64 if row_bytes <= 256 else 32
    return Config(32 if rows <= 32 else LARGEST_TILE, block_keys, 4, 3 if row_bytes <= 256 else 2, 2)


class Plan(NamedTuple):
    """What a launch takes from the sizes of a call alone: nothing here depends on a length."""

    config: Config
    tiles: int
    programs: int
    most: int  # splits of a batch row
    slots: int  # splits of all batch rows
    batches: int


def plan(batch: int, kv_heads: int, rows: int, row_bytes: int, count: int) -> Plan:
    config = pick_config(rows, row_bytes, batch * kv_heads, count)
    tiles = ceil_div(rows, config.block_rows)
    programs = config.programs * count
    most = programs // (kv_heads * tiles) + 1
    # Rows have their share of the programs, rounded up or down, and at least one split: together at most one more each.
    return Plan(config, tiles, programs, most, most + batch, min(1024, next_power_of_2(batch)))


def writes_itself(queries: int, group: int, new: int) -> bool:
    """Whether the first launch writes the new tokens: where it has one tile of rows that sees them all."""
    return 0 < new <= queries and queries * group <= LARGEST_TILE


class Launches(NamedTuple):
    """Both launches of a call, and how many float32 numbers the states of its splits are."""

    split: Prepared
    merge: Prepared | None
    states: int


class Sizes(NamedTuple):
    """All that the launches of a call depend on, beside its tensors."""

    q: tuple[int, ...]
    q_strides: tuple[int, ...]
    cache: tuple[int, ...]
    cache_strides: tuple[int, ...]
    table_stride: int | None
    new: int
    new_strides: tuple[int, ...] | None  # None where the new tokens are in the cache already
    left: int
    right: int
    scale: float
    softcap: float
    sink: bool
    dtypes: tuple[torch.dtype, ...]
    processors: int


@functools.lru_cache(4096)
def launches(sizes: Sizes) -> Launches:
    """A function of sizes alone, kept because it would cost a third of an eager step."""
    (batch, queries, heads, width), (page, kv_heads) = sizes.q, sizes.cache[1:3]
    group, paged = heads // kv_heads, sizes.table_stride is not None
    p = plan(batch, kv_heads, queries * group, dot_block(width) * sizes.dtypes[0].itemsize, sizes.processors)
    inner, outer = score_factors(sizes.scale, sizes.softcap)
    reach = queries + sizes.left if sizes.left >= 0 else UNLIMITED
    flags = {"G": group, "D": width, "BLOCK_D": dot_block(width), "SINK": sizes.sink, "SMALLEST": SMALLEST_SPLIT}
    flags |= {"BATCHES": p.batches, "UPCAST": interpreting()}
    split = Prepared(
        _split_kernel,
        (p.slots * kv_heads, p.tiles),
        (
            *sizes.q_strides[:3], *sizes.cache_strides[:3], *(sizes.new_strides or sizes.q_strides)[:3],
            sizes.table_stride or 0, batch, queries, kv_heads, sizes.new, sizes.left, sizes.right, reach, p.programs,
            p.most, p.slots, inner, outer,
        ),
        BM=p.config.block_rows, BN=p.config.block_keys, PAGE=page, PAGED=paged,
        WRITTEN=0 if sizes.new_strides is None else next_power_of_2(sizes.new), HAS_LEFT=sizes.left >= 0,
        HAS_RIGHT=sizes.right >= 0, ALIKE=queries == 1 or (sizes.left < 0 and sizes.right < 0),
        CAPPED=sizes.softcap > 0, num_warps=p.config.num_warps, num_stages=p.config.num_stages, **flags,
    )  # fmt: skip
    if p.most == 1:
        return Launches(split, None, 1)
    merge = Prepared(
        _merge_kernel,
        (batch * kv_heads, queries * group),
        (batch, queries, kv_heads, sizes.new, reach, p.tiles, p.programs, p.most, p.slots),
        N=min(64, next_power_of_2(p.most)), num_warps=4, **flags,
    )  # fmt: skip
    return Launches(split, merge, p.slots * kv_heads * queries * group * (width + 2))


def launches_of(
    q: Tensor,
    k_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    new_k: Tensor | None,
    sink: Tensor | None,
    added: int,
    window: tuple[int, int],
    scale: float,
    softcap: float,
) -> Launches:
    """The launches of a step whose tensors have these sizes; ``window``: −1 is unlimited.

    ``new_k``: the keys of the ``added`` tokens, which the first launch writes; None where they are written already.
    """
    given_table, given_sink = lengths if table is None else table, lengths if sink is None else sink
    return launches(
        Sizes(
            q.shape, q.stride(), k_cache.shape, k_cache.stride(), None if table is None else table.stride(0), added,
            None if new_k is None else new_k.stride(), *window, scale, softcap, sink is not None,
            (q.dtype, lengths.dtype, given_table.dtype, given_sink.dtype), processors(q),
        )
    )  # fmt: skip


def launch(
    made: Launches,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    new: tuple[Tensor, Tensor],
    sink: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Fill ``out`` [B, Lq, H, D]; ``new``: keys and values of the new tokens, of the same strides, or any tensors."""
    given_table, given_sink = lengths if table is None else table, lengths if sink is None else sink
    state = torch.empty(made.states, dtype=torch.float32, device=q.device)
    with on_device(q):
        place = place_of(q)
        made.split(place, q, k_cache, v_cache, *new, lengths, given_table, given_sink, out, state)
        if made.merge is not None:
            made.merge(place, lengths, given_sink, out, state)
    return out
