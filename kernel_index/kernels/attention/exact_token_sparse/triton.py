"""Exact-token attention with the gather inside: a program fetches the selected keys and values of one query itself.

A program takes one query with all query heads of a KV head, over the query's selected tokens: for tiles of queries that
share few tokens; ``triton_unions.py`` has the others.  Names and units are those of ``core/triton/attention.py``; BG
rows are the heads of a group.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    dot,
    load_rows,
    lse_of_grad,
    narrow,
    online_softmax,
    score_grad,
    scores,
    softmax_output,
    store_rows,
    weighted_sum,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import AttentionLaunch, dot_block, on_device, strides
from kernel_index.routing.token_unions import TILE, TokenUnions


@jit
def _selection(
    selected_ptr, counts_ptr, sizes_ptr, b, kv_head, t, T, K, SELECTED, FIRST, TILES, TILE: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Where a query's selected tokens begin, how many there are, and how many the union of its tile has."""
    o_list = b * T + t if SHARED else (b * T + t) * K + kv_head
    o_tile = (b if SHARED else b * K + kv_head) * TILES + (t - FIRST) // TILE
    return selected_ptr + o_list * SELECTED, tl.load(counts_ptr + o_list), tl.load(sizes_ptr + o_tile)


@jit
def _load_selected(p_selected, first, count, BN: tl.constexpr):
    """Positions of BN selected tokens in 64 bits, 0 where there is none, and which there are."""
    o_slot = first + tl.arange(0, BN)  # [BN]
    b_token = tl.load(p_selected + o_slot, mask=o_slot < count, other=-1)  # [BN]
    m_k = b_token >= 0
    return tl.where(m_k, b_token, 0).to(tl.int64), m_k


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, selected_ptr, counts_ptr, sizes_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, SELECTED, FIRST, TILES, LIMIT, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The heads of one group at one query; nothing where the union of its tile has at most LIMIT tokens."""
    t = (FIRST + tl.program_id(0)).to(tl.int64)
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    p_selected, count, size = _selection(
        selected_ptr, counts_ptr, sizes_ptr, b, kv_head, t, T, K, SELECTED, FIRST, TILES, TILE, SHARED
    )
    if size <= LIMIT:
        return
    o_g = tl.arange(0, BG)  # [BG]
    m_g = o_g < G
    o_h = (kv_head * G + o_g).to(tl.int64)  # [BG]
    b_q = load_rows(q_ptr + b * q_b + t * q_t, o_h * q_h, m_g, D, BLOCK_D)  # [BG, BLOCK_D]
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    acc = tl.zeros((BG, BLOCK_DV), tl.float32)
    row_max = tl.full((BG,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BG,), tl.float32)
    for first in range(0, count, BN):
        o_k, m_k = _load_selected(p_selected, first, count, BN)  # [BN]
        b_k = load_rows(p_k, o_k * k_t, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BG, BN]
        logits = tl.where(m_k[None, :], z * outer, float("-inf"))
        p, alpha, row_max, row_sum = online_softmax(logits, row_max, row_sum)
        b_v = load_rows(p_v, o_k * v_t, m_k, DV, BLOCK_DV)  # [BN, BLOCK_DV]
        acc = acc * alpha[:, None] + weighted_sum(p, b_v, m_k, False, UPCAST)
    m_empty = tl.zeros((BG,), tl.int32) + count == 0  # not row_sum = 0, which keys of infinity make, too
    out, lse = softmax_output(acc, row_max, row_sum, m_empty)
    o_row = (b * T + t) * K * G + o_h
    store_rows(out_ptr, o_row * DV, m_g, out, DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + o_row, lse, mask=m_g)


@jit
def _queries_kernel(
    d_out_ptr, d_lse_ptr, q_ptr, k_ptr, v_ptr, selected_ptr, counts_ptr, sizes_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, SELECTED, FIRST, TILES, LIMIT,
    scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, HAS_D_LSE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of the heads of one group at one query, and their ``delta`` for the keys' kernel."""
    t = (FIRST + tl.program_id(0)).to(tl.int64)
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    p_selected, count, size = _selection(
        selected_ptr, counts_ptr, sizes_ptr, b, kv_head, t, T, K, SELECTED, FIRST, TILES, TILE, SHARED
    )
    if size <= LIMIT:
        return
    o_g = tl.arange(0, BG)  # [BG]
    m_g = o_g < G
    o_h = (kv_head * G + o_g).to(tl.int64)  # [BG]
    o_row = (b * T + t) * K * G + o_h
    b_do = load_rows(d_out_ptr + b * do_b + t * do_t, o_h * do_h, m_g, DV, BLOCK_DV)  # [BG, BLOCK_DV]
    b_out = load_rows(out_ptr, o_row * DV, m_g, DV, BLOCK_DV)  # [BG, BLOCK_DV]
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)  # [BG]
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + (b * K * G + o_h) * T + t, mask=m_g, other=0.0)
    tl.store(delta_ptr + o_row, delta, mask=m_g)
    b_lse = tl.load(lse_ptr + o_row, mask=m_g, other=float("inf"))  # [BG]
    lse = lse_of_grad(b_lse, b_lse != float("-inf"))
    b_q = load_rows(q_ptr + b * q_b + t * q_t, o_h * q_h, m_g, D, BLOCK_D)  # [BG, BLOCK_D]
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    dq = tl.zeros((BG, BLOCK_D), tl.float32)
    for first in range(0, count, BN):
        o_k, m_k = _load_selected(p_selected, first, count, BN)  # [BN]
        b_k = load_rows(p_k, o_k * k_t, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BG, BN]
        p = tl.where(m_k[None, :], tl.exp2(z * outer - lse[:, None]), 0.0)
        b_v = load_rows(p_v, o_k * v_t, m_k, DV, BLOCK_DV)  # [BN, BLOCK_DV]
        dz = score_grad(z, p, dot(b_do, tl.trans(b_v), UPCAST), delta[:, None], CAPPED)  # [BG, BN]
        dq += dot(narrow(dz, b_k.dtype, UPCAST), b_k, UPCAST)
    store_rows(dq_ptr, o_row * D, m_g, dq * scale, D, BLOCK_D, UPCAST)


def forward(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, counts: Tensor, unions: TokenUnions, limit: int,
    launch: AttentionLaunch, outputs: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill the rows of the chunk's tiles whose unions have more than ``limit`` tokens."""
    (B, T, H, _), K, u = q.shape, k.shape[2], unions
    with on_device(q):
        _forward_kernel[(u.queries, B * K)](
            q, k, v, selected, counts, u.sizes, *outputs, *strides(q, k, v), T, K, H // K, selected.shape[3],
            u.first, u.tiles, limit, launch.inner, launch.outer, BG=dot_block(H // K), BN=launch.config.step,
            TILE=TILE, **launch.constants,
        )  # fmt: skip


def backward_queries(
    upstream: tuple[Tensor, Tensor | None], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, selected: Tensor,
    counts: Tensor, unions: TokenUnions, limit: int, launch: AttentionLaunch, outputs: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    (B, T, H, _), K, u = q.shape, k.shape[2], unions
    d_out, d_lse = upstream
    with on_device(q):
        _queries_kernel[(u.queries, B * K)](
            d_out, d_lse, q, k, v, selected, counts, u.sizes, out, lse, *outputs, *strides(d_out, q, k, v), T, K,
            H // K, selected.shape[3], u.first, u.tiles, limit, launch.scale, launch.inner, launch.outer,
            BG=dot_block(H // K), BN=launch.config.step, TILE=TILE, HAS_D_LSE=d_lse is not None, **launch.constants,
        )  # fmt: skip
