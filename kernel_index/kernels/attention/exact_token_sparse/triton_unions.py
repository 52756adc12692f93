"""Exact-token attention by tiles: neighbouring queries go together over the union of their tokens.

A program fetches each token of the union of 64 queries once, for all heads of some of them; a row uses those tokens
whose word has the bit of its query.  Where neighbours select mostly the same tokens few rows are fetched.  Row r of a
tile is query ``r // BG`` with head ``r % BG`` of a group.  Names and units are those of ``core/triton/attention.py``.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import (
    dot,
    has_nan,
    load_rows,
    lse_of_grad,
    online_softmax,
    score_grad,
    scores,
    softmax_output,
    store_rows,
    weighted_sum,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import AttentionLaunch, on_device, strides
from kernel_index.routing.token_unions import TILE, TokenUnions


@jit
def rows_of_word(b_word, shift, o_l, SUB: tl.constexpr):
    """Which of the tokens [BN] the queries ``shift + o_l`` [BM] of a tile selected, bool [BM, BN].

    Up to 32 queries are tested in 32 bits, which costs half.
    """
    b_word = b_word >> shift
    if SUB <= 32:
        return ((b_word.to(tl.int32)[None, :] >> o_l[:, None]) & 1) != 0
    return ((b_word[None, :] >> o_l.to(tl.int64)[:, None]) & 1) != 0


@jit
def load_entries(p_tokens, p_words, first, size, BN: tl.constexpr):
    """Tokens in 64 bits and words [BN] of a list from entry ``first`` on; no bit behind its end."""
    o_n = first + tl.arange(0, BN)
    b_token = tl.load(p_tokens + o_n, mask=o_n < size, other=0).to(tl.int64)
    return b_token, tl.load(p_words + o_n, mask=o_n < size, other=0), o_n < size


@jit
def _forward_walk(
    b_q, p_k, p_v, k_t, v_t, p_tokens, p_words, size, shift, o_l, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SUB: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The softmax state over the first ``size`` entries, and how many a row selected at least [BM]."""
    STAGES: tl.constexpr = 1 if CAREFUL else None
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    for first in tl.range(0, size, BN, num_stages=STAGES):
        o_k, b_word, m_k = load_entries(p_tokens, p_words, first, size, BN)  # [BN]
        b_k = load_rows(p_k, o_k * k_t, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        m_seen = rows_of_word(b_word, shift, o_l, SUB)  # [BM, BN]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
        p, alpha, row_max, row_sum = online_softmax(tl.where(m_seen, z * outer, float("-inf")), row_max, row_sum)
        b_v = load_rows(p_v, o_k * v_t, m_k, DV, BLOCK_DV)  # [BN, BLOCK_DV]
        acc = acc * alpha[:, None] + weighted_sum(p, b_v, m_seen, CAREFUL, UPCAST)
    return acc, row_max, row_sum


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, tokens_ptr, words_ptr, begin_ptr, sizes_ptr, counts_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, FIRST, STOP, TILES, LIMIT, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """SUB queries of a tile with the heads of one KV head; nothing where the union has more than LIMIT tokens."""
    SUB: tl.constexpr = BM // BG
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * SUB  # the long unions of a causal mask begin first
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    o_list = (b if SHARED else b * K + kv_head) * TILES + at // TILE
    size = tl.load(sizes_ptr + o_list)
    if size > LIMIT:
        return
    o_m = tl.arange(0, BM)  # [BM]
    o_l, o_g = o_m // BG, o_m % BG
    t = (FIRST + at + o_l).to(tl.int64)
    m_m = (t < STOP) & (o_g < G)
    o_h = (kv_head * G + o_g).to(tl.int64)
    b_q = load_rows(q_ptr + b * q_b, t * q_t + o_h * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    begin, shift = tl.load(begin_ptr + o_list), (at % TILE).to(tl.int64)
    acc, row_max, row_sum = _forward_walk(
        b_q, p_k, p_v, k_t, v_t, tokens_ptr + begin, words_ptr + begin, size, shift, o_l, inner, outer,
        D, DV, BLOCK_D, BLOCK_DV, BM, BN, SUB, CAPPED, UPCAST, False,
    )  # fmt: skip
    if has_nan(acc):
        acc, row_max, row_sum = _forward_walk(
            b_q, p_k, p_v, k_t, v_t, tokens_ptr + begin, words_ptr + begin, size, shift, o_l, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BM, BN, SUB, CAPPED, UPCAST, True,
        )  # fmt: skip
    o_count = (b * T + t) if SHARED else (b * T + t) * K + kv_head
    m_empty = tl.load(counts_ptr + o_count, mask=m_m, other=0) == 0  # not row_sum = 0, which keys of infinity make, too
    out, lse = softmax_output(acc, row_max, row_sum, m_empty)
    o_row = (b * T + t) * K * G + o_h
    store_rows(out_ptr, o_row * DV, m_m, out, DV, BLOCK_DV, UPCAST)
    tl.store(lse_ptr + o_row, lse, mask=m_m)


@jit
def _queries_walk(
    b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, p_tokens, p_words, size, shift, o_l, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SUB: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    STAGES: tl.constexpr = 1 if CAREFUL else None
    dq = tl.zeros((BM, BLOCK_D), tl.float32)
    for first in tl.range(0, size, BN, num_stages=STAGES):
        o_k, b_word, m_k = load_entries(p_tokens, p_words, first, size, BN)  # [BN]
        b_k = load_rows(p_k, o_k * k_t, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        m_seen = rows_of_word(b_word, shift, o_l, SUB)  # [BM, BN]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BM, BN]
        p = tl.where(m_seen, tl.exp2(z * outer - lse[:, None]), 0.0)
        b_v = load_rows(p_v, o_k * v_t, m_k, DV, BLOCK_DV)  # [BN, BLOCK_DV]
        dz = score_grad(z, p, dot(b_do, tl.trans(b_v), UPCAST), delta[:, None], CAPPED)  # [BM, BN]
        dq += weighted_sum(dz, b_k, m_seen, CAREFUL, UPCAST)
    return dq


@jit
def _queries_kernel(
    d_out_ptr, d_lse_ptr, q_ptr, k_ptr, v_ptr, tokens_ptr, words_ptr, begin_ptr, sizes_ptr, out_ptr, lse_ptr, dq_ptr,
    delta_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, FIRST, STOP, TILES, LIMIT,
    scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr,
    HAS_D_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of the rows of a program of the forward pass, and their ``delta`` for the keys' kernel."""
    SUB: tl.constexpr = BM // BG
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * SUB
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    o_list = (b if SHARED else b * K + kv_head) * TILES + at // TILE
    size = tl.load(sizes_ptr + o_list)
    if size > LIMIT:
        return
    o_m = tl.arange(0, BM)  # [BM]
    o_l, o_g = o_m // BG, o_m % BG
    t = (FIRST + at + o_l).to(tl.int64)
    m_m = (t < STOP) & (o_g < G)
    o_h = (kv_head * G + o_g).to(tl.int64)
    o_row = (b * T + t) * K * G + o_h
    b_do = load_rows(d_out_ptr + b * do_b, t * do_t + o_h * do_h, m_m, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    b_out = load_rows(out_ptr, o_row * DV, m_m, DV, BLOCK_DV)  # [BM, BLOCK_DV]
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)  # [BM]
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + (b * K * G + o_h) * T + t, mask=m_m, other=0.0)
    tl.store(delta_ptr + o_row, delta, mask=m_m)
    b_lse = tl.load(lse_ptr + o_row, mask=m_m, other=float("inf"))  # [BM]
    lse = lse_of_grad(b_lse, b_lse != float("-inf"))
    b_q = load_rows(q_ptr + b * q_b, t * q_t + o_h * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
    p_k, p_v = k_ptr + b * k_b + kv_head * k_h, v_ptr + b * v_b + kv_head * v_h
    begin, shift = tl.load(begin_ptr + o_list), (at % TILE).to(tl.int64)
    dq = _queries_walk(
        b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, tokens_ptr + begin, words_ptr + begin, size, shift, o_l, inner,
        outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, SUB, CAPPED, UPCAST, False,
    )  # fmt: skip
    if has_nan(dq):
        dq = _queries_walk(
            b_q, b_do, lse, delta, p_k, p_v, k_t, v_t, tokens_ptr + begin, words_ptr + begin, size, shift, o_l, inner,
            outer, D, DV, BLOCK_D, BLOCK_DV, BM, BN, SUB, CAPPED, UPCAST, True,
        )  # fmt: skip
    store_rows(dq_ptr, o_row * D, m_m, dq * scale, D, BLOCK_D, UPCAST)


def _of_tile(launch: AttentionLaunch, group: int) -> dict[str, int]:
    rows = max(launch.config.tile, group)
    return {"BG": group, "BM": min(rows, TILE * group), "BN": launch.config.step, "TILE": TILE}


def forward(
    q: Tensor, k: Tensor, v: Tensor, unions: TokenUnions, counts: Tensor, limit: int, launch: AttentionLaunch,
    group: int, outputs: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill the rows of the chunk's tiles whose unions have at most ``limit`` tokens; ``group``: the heads, padded."""
    (B, T, H, _), K = q.shape, k.shape[2]
    u, sizes = unions, _of_tile(launch, group)
    with on_device(q):
        _forward_kernel[(u.tiles * TILE * group // sizes["BM"], B * K)](
            q, k, v, u.tokens, u.words, u.begin, u.sizes, counts, *outputs, *strides(q, k, v), T, K, H // K, u.first,
            u.first + u.queries, u.tiles, limit, launch.inner, launch.outer, **sizes, **launch.constants,
        )  # fmt: skip


def backward_queries(
    upstream: tuple[Tensor, Tensor | None], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    unions: TokenUnions, limit: int, launch: AttentionLaunch, group: int, outputs: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    (B, T, H, _), K = q.shape, k.shape[2]
    u, sizes = unions, _of_tile(launch, group)
    d_out, d_lse = upstream
    with on_device(q):
        _queries_kernel[(u.tiles * TILE * group // sizes["BM"], B * K)](
            d_out, d_lse, q, k, v, u.tokens, u.words, u.begin, u.sizes, out, lse, *outputs, *strides(d_out, q, k, v), T,
            K, H // K, u.first, u.first + u.queries, u.tiles, limit, launch.scale, launch.inner, launch.outer, **sizes,
            HAS_D_LSE=d_lse is not None, **launch.constants,
        )  # fmt: skip
