"""Split-K decoding: each program stores the softmax state of its split of the keys; a second launch merges the splits.

Splits are merged in a fixed order, so the result does not depend on which program ends first.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import load_rows, merge_states, store_rows
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting


class Splits(NamedTuple):
    """float32 states: ``acc`` [splits, pairs, rows, D], ``row_max`` and ``row_sum`` [splits, pairs, rows]."""

    acc: Tensor
    row_max: Tensor
    row_sum: Tensor


@jit
def store_split(
    acc_ptr, max_ptr, sum_ptr, acc, row_max, row_sum, split, pair, PAIRS, ROWS, o_m,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows ``o_m`` [BM] of the state of one split of one pair; ``split`` is of 64 bits."""
    m_m = o_m < ROWS
    o_state = (split * PAIRS + pair) * ROWS + o_m
    tl.store(max_ptr + o_state, row_max, mask=m_m)
    tl.store(sum_ptr + o_state, row_sum, mask=m_m)
    store_rows(acc_ptr, o_state * D, m_m, acc, D, BLOCK_D, False)


@jit
def _merge_splits_kernel(
    acc_ptr, max_ptr, sum_ptr, out_ptr, ROWS, QUERIES, KV, SPLITS, SPLIT_ROWS,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``out`` [pairs / KV, QUERIES, KV, G, D] from SPLITS states of [pairs, ROWS], SPLIT_ROWS rows apart."""
    pair = tl.program_id(0)
    b, kv_head = (pair // KV).to(tl.int64), (pair % KV).to(tl.int64)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < ROWS
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    o_state = pair.to(tl.int64) * ROWS + o_m
    for _ in range(SPLITS):
        b_max = tl.load(max_ptr + o_state, mask=m_m, other=float("-inf"))  # [BM]
        b_sum = tl.load(sum_ptr + o_state, mask=m_m, other=0.0)  # [BM]
        b_acc = load_rows(acc_ptr, o_state * D, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
        acc, row_max, row_sum = merge_states(acc, row_max, row_sum, b_acc, b_max, b_sum)
        o_state += SPLIT_ROWS
    m_some = row_sum != 0  # NaN stays
    out = tl.where(m_some[:, None], acc / tl.where(m_some, row_sum, 1.0)[:, None], 0.0)
    o_out = ((b * QUERIES + o_m // G) * KV + kv_head) * G + o_m % G
    store_rows(out_ptr, o_out * D, m_m, out, D, BLOCK_D, UPCAST)


def allocate_splits(splits: int, pairs: int, rows: int, like: Tensor) -> Splits:
    acc = torch.empty((splits, pairs, rows, like.shape[-1]), dtype=torch.float32, device=like.device)
    return Splits(acc, *torch.empty((2, splits, pairs, rows), dtype=torch.float32, device=like.device))


def merge_splits(splits: Splits, out: Tensor, queries: int, kv_heads: int, group: int, block_rows: int) -> Tensor:
    """Fill ``out`` [B, queries, kv_heads · group, D]; a pair is (b, KV head), a row is (query, head of the group)."""
    count, pairs, rows, width = splits.acc.shape
    _merge_splits_kernel[(pairs, ceil_div(rows, block_rows))](
        *splits, out, rows, queries, kv_heads, count, pairs * rows,
        G=group, D=width, BLOCK_D=dot_block(width), BM=block_rows, UPCAST=interpreting(), num_warps=4,
    )  # fmt: skip
    return out
