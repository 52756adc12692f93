"""Forward: a tile of queries, with the heads that share their picks, goes over the union of their blocks.

A program reads each block of its union once, for all its rows; a row counts it if its query picked it and the token
mask allows the keys.  The blocks that the mask allows to all of the tile's queries come first and need no token mask.
Exponentials and the log-sum-exp are base 2; ``outer`` carries log2(e).
"""

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    dot,
    load_rows,
    load_tile,
    narrow,
    store_rows,
    tanh,
    union_visits,
)
from kernel_index.core.triton.launch import on_device
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Launch, row_stride, strides
from kernel_index.kernels.sparse.block_sparse_attention.plan import Plan


@triton.jit
def _step(
    acc, m, total, q, k_base, v_base, k_stride, v_stride, at, stop, member, partial, start, end, S, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
    RAGGED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    key = at + tl.arange(0, BN)
    k = load_tile(k_base, at, k_stride, S, BN, D, BLOCK_D)
    z = dot(q, tl.trans(k), UPCAST)
    if CAPPED:
        z = tanh(z * inner)
    z = z * outer + tl.where(member, 0.0, float("-inf"))[:, None]
    if partial:
        z = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), z, float("-inf"))
    if RAGGED:
        z = tl.where((key < stop)[None, :], z, float("-inf"))
    new_m = tl.maximum(m, tl.max(z, 1))
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(z - safe_m[:, None])
    shrink = tl.exp2(m - safe_m)
    v = load_tile(v_base, at, v_stride, S, BN, DV, BLOCK_DV)
    acc = acc * shrink[:, None] + dot(narrow(p, v.dtype, UPCAST), v, UPCAST)
    return acc, new_m, total * shrink + tl.sum(p, 1)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, blocks_ptr, members_ptr, sizes_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, interval_b, T, S, K, TILES, PLACES, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (BLOCK + BN - 1) // BN
    RAGGED: tl.constexpr = BLOCK % BN != 0
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the long unions of a causal mask begin first
    chunk, group = tl.program_id(1) % CHUNKS, tl.program_id(1) // CHUNKS
    G = K * GROUPS
    H = G * GROUP
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)
    first = tile * QUERIES
    row = tl.arange(0, BM)
    query, of_group = first + row // HEADS, chunk * HEADS + row % HEADS
    exists = (query < T) & (of_group < GROUP)
    head = g * GROUP + of_group

    start_ptr += b * interval_b
    end_ptr += b * interval_b
    start = tl.load(start_ptr + query, mask=exists, other=0)
    end = tl.load(end_ptr + query, mask=exists, other=0)
    union = (b * G + g) * TILES + tile
    blocks_ptr += union * PLACES
    members_ptr += union * PLACES
    size = tl.load(sizes_ptr + union)
    begin, whole, cease, stop = union_visits(blocks_ptr, start_ptr, end_ptr, size, first, T, QUERIES, BLOCK)

    q = load_rows(q_ptr + b * q_b, query.to(tl.int64) * q_t + head * q_h, exists, D, BLOCK_D)
    of_keys = g // GROUPS
    k_base, v_base = k_ptr + b * k_b + of_keys * k_h, v_ptr + b * v_b + of_keys * v_h
    bit = (row // HEADS).to(tl.int64)
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for i in range(0, (stop - begin) * STEPS):
        place = begin + i // STEPS
        at = tl.load(blocks_ptr + place) * BLOCK
        member = ((tl.load(members_ptr + place) >> bit) & 1) != 0
        partial = (place < whole) | (place >= cease)
        acc, m, total = _step(
            acc, m, total, q, k_base, v_base, k_t, v_t, at + i % STEPS * BN, at + BLOCK, member, partial,
            start, end, S, inner, outer, D, DV, BLOCK_D, BLOCK_DV, BN, RAGGED, CAPPED, UPCAST,
        )  # fmt: skip
    empty = m == float("-inf")
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), m + tl.log2(total))
    token = b * T + query
    store_rows(out_ptr, (token * H + head) * DV, exists, acc / total[:, None], DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + token * H + head, lse, mask=exists)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    bounds: tuple[Tensor, Tensor],
    how: Launch,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill ``out`` [B, T, H, Dv] and the log-sum-exp, base 2, [B, T, H]."""
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    G, tiles, places = plan.blocks.shape[1:]
    if B * T * H:
        with on_device(q):
            _forward_kernel[(tiles, B * G * how.chunks)](
                q, k, v, plan.blocks, plan.members, plan.sizes, *bounds, *outputs, *strides(q, k, v),
                row_stride(bounds[0]), T, S, K, tiles, places, how.inner, how.outer, **how.constants,
            )  # fmt: skip
    return outputs
