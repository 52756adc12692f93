"""Sums over the queries that selected each token, from what each list of a union holds for its tokens.

A kernel writes a row of float32 for each entry of the lists, as many lists at a time as fit the memory; this one adds
the rows of each token, list by list, so that the sums have the same bits every time.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import load_rows, store_rows
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, on_device
from kernel_index.routing.token_unions import GRAIN, Rounds, TokenUnions
from kernel_index.routing.triton_token_unions import bits_below


@jit
def _sum_kernel(
    rows_ptr, begin_ptr, before_ptr, present_ptr, lists_ptr, round_ptr, sums_ptr, PART, S, K, TILES, RUNS,
    W: tl.constexpr, BLOCK_W: tl.constexpr, GRAIN: tl.constexpr, KEPT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Add the rows [W] of GRAIN tokens for one head; lists ``lists[round] ≤ list < lists[round + 1]`` are in memory."""
    run = tl.program_id(0)
    b, head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    selection = b if SHARED else b * K + head
    part = tl.load(round_ptr)
    low = tl.maximum(tl.load(lists_ptr + part), selection * TILES)
    high = tl.minimum(tl.load(lists_ptr + part + 1), selection * TILES + TILES)
    if low >= high:
        return
    o_bit = tl.arange(0, GRAIN)  # [GRAIN]
    o_s = run * GRAIN + o_bit
    o_sum = ((b * S + o_s) * K + head) * W
    acc = load_rows(sums_ptr, o_sum, o_s < S, W, BLOCK_W)  # [GRAIN, BLOCK_W]
    for i in range(low, high):
        at = tl.cast(i, tl.int64)
        b_present = tl.load(present_ptr + at * RUNS + run)
        entry = tl.load(begin_ptr + i) - part * PART + tl.load(before_ptr + at * (RUNS + 1) + run)
        b_present = tl.zeros_like(o_bit) + b_present
        o_row = ((entry + bits_below(b_present, o_bit)) * KEPT + head % KEPT) * W  # [GRAIN]
        acc += load_rows(rows_ptr, o_row, ((b_present >> o_bit) & 1) != 0, W, BLOCK_W)
    store_rows(sums_ptr, o_sum, o_s < S, acc, W, BLOCK_W, False)


def add_rows(
    sums: Tensor, rows: Tensor, unions: TokenUnions, rounds: Rounds, number: Tensor, shared: bool
) -> None:  # fmt: skip
    """Add to ``sums`` float32 [B, S, K, W] from ``rows`` [entries, K or 1, W] of one round."""
    (B, S, K, W), u = sums.shape, unions
    with on_device(sums):
        _sum_kernel[(ceil_div(S, GRAIN), B * K)](
            rows, u.begin, u.before, u.present, rounds.lists, number, sums, rounds.part, S, K, u.tiles,
            u.present.shape[1], W=W, BLOCK_W=dot_block(W), GRAIN=GRAIN, KEPT=rows.shape[1], SHARED=shared, num_warps=4,
        )  # fmt: skip
