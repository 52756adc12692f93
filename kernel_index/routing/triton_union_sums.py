"""Sums over the queries that selected each token, from what each list of a union holds for its tokens.

A kernel writes a row of float32 for each entry of the lists, as many lists at a time as fit the memory.  Each entry has
its place there before: the rows of a token lie together, in the order of their lists.  So the sums read rows one after
the other, without a search, and have the same bits every time.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors
from kernel_index.routing.token_unions import BLOCK, GRAIN, Rounds, TokenUnions
from kernel_index.routing.triton_token_unions import bits_below

ROUND_BYTES = 1 << 30
"""Of what kernels keep for the entries of the lists of one round."""


@jit
def _bits(before_ptr, present_ptr, o_list, high, o_run, RUNS, o_bit):
    """Entries before each run [LISTS, ROWS], its bits as an integer, and each of them [LISTS, ROWS, GRAIN]."""
    m_list, at = (o_list < high)[:, None], o_list.to(tl.int64)[:, None]
    before = tl.load(before_ptr + at * (RUNS + 1) + o_run[None, :], mask=m_list & (o_run <= RUNS)[None, :], other=0)
    present = tl.load(present_ptr + at * RUNS + o_run[None, :], mask=m_list & (o_run < RUNS)[None, :], other=0)
    return before, present, (present[:, :, None] >> o_bit[None, None, :]) & 1


@jit
def _place_kernel(
    begin_ptr, before_ptr, present_ptr, lists_ptr, slots_ptr, starts_ptr, PART, TILES, SELECTIONS, RUNS,
    LISTS: tl.constexpr, ROWS: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """Places of ROWS runs of GRAIN tokens in one round, for the lists of one selection; LISTS of them at a time."""
    parts = tl.cdiv(RUNS + 1, ROWS)  # one more run: where the rows of the last token end
    here = tl.program_id(0) // parts
    number, selection = here // SELECTIONS, here % SELECTIONS
    low = tl.maximum(tl.load(lists_ptr + number), selection * TILES)
    high = tl.minimum(tl.load(lists_ptr + number + 1), selection * TILES + TILES)
    if low >= high:
        return
    o_run, o_bit = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS), tl.arange(0, GRAIN)
    o_token = o_run[:, None] * GRAIN + o_bit[None, :]  # [ROWS, GRAIN]
    rows, count = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS, GRAIN), tl.int32)
    for first in range(low, high, LISTS):
        o_list = first + tl.arange(0, LISTS)
        before, _, bits = _bits(before_ptr, present_ptr, o_list, high, o_run, RUNS, o_bit)
        rows += tl.sum(before, 0)
        count += tl.sum(bits, 0)
    base = (tl.load(begin_ptr + low) - number.to(tl.int64) * PART).to(tl.int32)
    slot = base + rows[:, None] + tl.cumsum(count, 1) - count  # [ROWS, GRAIN]
    p_starts = starts_ptr + here.to(tl.int64) * (RUNS * GRAIN + 1)
    tl.store(p_starts + o_token, slot, mask=o_token <= RUNS * GRAIN)
    for first in range(low, high, LISTS):
        o_list = first + tl.arange(0, LISTS)
        before, present, bits = _bits(before_ptr, present_ptr, o_list, high, o_run, RUNS, o_bit)
        begin = tl.load(begin_ptr + o_list, mask=o_list < high, other=0)
        o_all = tl.broadcast_to(o_bit[None, None, :], (LISTS, ROWS, GRAIN))
        below = bits_below(tl.broadcast_to(present[:, :, None], (LISTS, ROWS, GRAIN)), o_all)
        o_entry = begin[:, None, None] + (before[:, :, None] + below).to(tl.int64)
        tl.store(slots_ptr + o_entry, slot[None, :, :] + tl.cumsum(bits, 0) - bits, mask=bits != 0)
        slot += tl.sum(bits, 0)


def place(unions: TokenUnions, lists: Tensor, part: int, places: tuple[Tensor, Tensor]) -> None:
    """Fill ``slots`` and ``starts`` of rounds."""
    u, (_, starts) = unions, places
    rounds, selections, _ = starts.shape
    runs, rows = u.present.shape[1], 8
    with on_device(u.present):
        _place_kernel[(ceil_div(runs + 1, rows) * rounds * selections,)](
            u.begin, u.before, u.present, lists, *places, part, u.tiles, selections, runs,
            LISTS=8, ROWS=rows, GRAIN=GRAIN, num_warps=4,
        )  # fmt: skip


def rounds_of(unions: TokenUnions, bytes_of_entry: int) -> Rounds:
    """Rounds of at most ``ROUND_BYTES``, and those of one list; a round's entries are ``part + most``."""
    total, device = unions.tokens.shape[0], unions.begin.device
    part = min(total, max(1, ROUND_BYTES // (bytes_of_entry * BLOCK)) * BLOCK)
    at = torch.arange(0, total, BLOCK, device=device)
    owner = torch.searchsorted(unions.begin, at, right=True) - 1  # an empty list begins where the next one does
    inside = at < (unions.begin + unions.sizes)[owner]
    number = torch.arange(-(-total // part) + 1, device=device)
    lists = torch.searchsorted(unions.begin, number * part).to(torch.int32)
    numbers = number[:-1, None].expand(-1, 2).contiguous()
    slots = torch.empty(total, dtype=torch.int32, device=device)
    size = (len(numbers), len(unions.begin) // unions.tiles, unions.present.shape[1] * GRAIN + 1)
    starts = torch.empty(size, dtype=torch.int32, device=device)
    place(unions, lists, part, (slots, starts))
    return Rounds(part, torch.where(inside, owner, -1).to(torch.int32), lists, numbers, slots, starts)


@jit
def _sum_kernel(
    rows_ptr, starts_ptr, lists_ptr, round_ptr, sums_ptr, S, K, TILES, SELECTIONS, WIDTH,
    L: tl.constexpr, BLOCK_L: tl.constexpr, UNROLL: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Add the rows [L] of each token: of all heads if SHARED, else of one.

    Few programs take all tokens, one after the other: most rounds that the host launches are without a list.
    """
    number = tl.load(round_ptr)
    low, high = tl.load(lists_ptr + number), tl.load(lists_ptr + number + 1)
    if low >= high:
        return
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    m_l = o_l < L
    stop = ((high - 1) // TILES + 1) * S
    for i in range(low // TILES * S + tl.program_id(0), stop, tl.num_programs(0)):
        selection, token = (i // S).to(tl.int64), i % S
        p_starts = starts_ptr + (number * SELECTIONS + selection) * WIDTH + token
        row, end = tl.load(p_starts), tl.load(p_starts + 1)
        if row < end:
            at = selection * S + token if SHARED else (selection // K * S + token) * K + selection % K
            acc = tl.load(sums_ptr + at * L + o_l, mask=m_l, other=0.0)
            p_row = rows_ptr + row.to(tl.int64) * L + o_l
            for _ in tl.range(row, end, loop_unroll_factor=UNROLL):
                acc += tl.load(p_row, mask=m_l, other=0.0)
                p_row += L
            tl.store(sums_ptr + at * L + o_l, acc, mask=m_l)


class Sums(NamedTuple):
    """Values of a program, rows at once, warps, programs for each multiprocessor."""

    values: int
    unroll: int
    num_warps: int
    programs: int


SUMS = Sums(1024, 1, 2, 16)
"""A program waits for a token's first row, then for its rows, while 15 others of its multiprocessor wait for theirs."""


def add_rows(
    sums: Tensor, rows: Tensor, unions: TokenUnions, rounds: Rounds, number: Tensor, shared: bool
) -> None:  # fmt: skip
    """Add to ``sums`` float32 [B, S, K, W] from ``rows`` [entries, K or 1, W] of one round."""
    (_, S, K, W), kept = sums.shape, rows.shape[1]
    _, selections, width = rounds.starts.shape
    block = min(SUMS.values, next_power_of_2(kept * W))
    with on_device(sums):
        _sum_kernel[(min(processors(sums) * SUMS.programs, selections * S), ceil_div(kept * W, block))](
            rows, rounds.starts, rounds.lists, number, sums, S, K, unions.tiles, selections, width,
            L=kept * W, BLOCK_L=block, UNROLL=SUMS.unroll, SHARED=shared, num_warps=SUMS.num_warps,
        )  # fmt: skip
