"""The second launch of a decoding kernel: what programs made of their share of the keys, joined in a fixed order."""

import triton
import triton.language as tl

from kernel_index.core.triton.attention import narrow


@triton.jit
def join_kernel(
    acc_ptr, max_ptr, sum_ptr, out_ptr, ROWS, QUERIES, KV, SPLITS, PART,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows [pairs, ROWS] of ``out`` [pairs / KV, QUERIES, KV, G, D] from SPLITS parts, PART rows apart."""
    pair = tl.program_id(0)
    b, h = (pair // KV).to(tl.int64), (pair % KV).to(tl.int64)
    row, column = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    inside = (row < ROWS)[:, None] & (column < D)[None, :]
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    place = pair.to(tl.int64) * ROWS + row
    for _ in range(SPLITS):
        part_m = tl.load(max_ptr + place, mask=row < ROWS, other=float("-inf"))
        new_m = tl.maximum(m, part_m)
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        old, new = tl.exp2(m - safe_m), tl.exp2(part_m - safe_m)
        part = tl.load(acc_ptr + place[:, None] * D + column[None, :], mask=inside, other=0.0)
        acc = acc * old[:, None] + part * new[:, None]
        sums = sums * old + tl.load(sum_ptr + place, mask=row < ROWS, other=0.0) * new
        m = new_m
        place += PART
    out = tl.where((sums > 0)[:, None], acc / tl.where(sums > 0, sums, 1.0)[:, None], 0.0)
    at = ((b * QUERIES + row // G) * KV + h) * G + row % G
    tl.store(out_ptr + at[:, None] * D + column[None, :], narrow(out, out_ptr.dtype.element_ty, UPCAST), mask=inside)
