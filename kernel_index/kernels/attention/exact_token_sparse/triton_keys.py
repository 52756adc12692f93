"""dK and dV of the tokens of a union, for the heads of 64 queries at once; another kernel adds those of all unions.

Products are transposed, [BN, BM], with BN tokens and BM rows: so dK and dV need no transposed operand.  Names and units
are those of ``core/triton/attention.py`` and ``triton_unions.py``.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import dot, has_nan, load_rows, score_grad, scores, store_rows, weighted_sum
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import AttentionLaunch, ceil_div, on_device, processors, strides
from kernel_index.routing.token_unions import BLOCK, TILE, Rounds, TokenUnions
from kernel_index.routing.triton_union_sums import add_rows, rounds_of


@jit
def _keys_walk(
    b_k, b_v, b_word, p_q, p_do, p_lse, p_delta, q_t, q_h, do_t, do_h, first, STOP, kv_head, G, H, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Over the rows of the queries from ``first`` on; pointers are to the batch row."""
    SUB: tl.constexpr = BM // BG
    STAGES: tl.constexpr = 1 if CAREFUL else None
    o_m = tl.arange(0, BM)  # [BM]
    o_l, o_g = o_m // BG, o_m % BG
    o_h = (kv_head * G + o_g).to(tl.int64)
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    for at in tl.range(0, TILE, SUB, num_stages=STAGES):
        t = (first + at + o_l).to(tl.int64)
        m_m = (t < STOP) & (o_g < G)
        b_q = load_rows(p_q, t * q_t + o_h * q_h, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
        b_lse = tl.load(p_lse + t * H + o_h, mask=m_m, other=float("inf"))  # [BM]: no gradient where there is no row
        b_delta = tl.load(p_delta + t * H + o_h, mask=m_m, other=0.0)  # [BM]
        b_bits = b_word >> at
        if SUB <= 32:
            m_seen = ((b_bits.to(tl.int32)[:, None] >> o_l[None, :]) & 1) != 0  # [BN, BM]
        else:
            m_seen = ((b_bits[:, None] >> o_l.to(tl.int64)[None, :]) & 1) != 0
        z = scores(b_k, b_q, inner, CAPPED, UPCAST)  # [BN, BM]
        p = tl.where(m_seen, tl.exp2(z * outer - b_lse[None, :]), 0.0)
        b_do = load_rows(p_do, t * do_t + o_h * do_h, m_m, DV, BLOCK_DV)  # [BM, BLOCK_DV]
        dv += weighted_sum(p, b_do, m_seen, CAREFUL, UPCAST)
        dz = score_grad(z, p, dot(b_v, tl.trans(b_do), UPCAST), b_delta[None, :], CAPPED)  # [BN, BM]
        dk += weighted_sum(dz, b_q, m_seen, CAREFUL, UPCAST)
    return dk, dv


@jit
def _keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, tokens_ptr, words_ptr, begin_ptr, sizes_ptr, owners_ptr,
    lists_ptr, slots_ptr, round_ptr, rows_ptr, do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, K, G, FIRST, STOP, TILES, PART, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The entries of the lists that begin among the PART entries of this round, BN at a time.

    Few programs take all of them, one after the other: most rounds that the host launches are without a list.
    """
    number = tl.load(round_ptr)
    low, high = tl.load(lists_ptr + number), tl.load(lists_ptr + number + 1)
    if low >= high:
        return
    end = tl.load(begin_ptr + high - 1) + tl.load(sizes_ptr + high - 1) - number * PART
    tiles = tl.cdiv(end, BN).to(tl.int32)
    for i in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):  # it would spill
        entry = number * PART + i * BN
        owner = tl.load(owners_ptr + entry // BLOCK)
        begin, size = tl.load(begin_ptr + owner), tl.load(sizes_ptr + owner)
        if (begin // PART == number) & (entry - begin < size):
            _keys_tile(
                d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, tokens_ptr, words_ptr, slots_ptr, rows_ptr,
                do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, FIRST, STOP, TILES,
                scale, inner, outer, owner, entry, size - (entry - begin),
                D, DV, BLOCK_D, BLOCK_DV, BG, BM, BN, TILE, SHARED, CAPPED, UPCAST,
            )  # fmt: skip


@jit
def _keys_tile(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, tokens_ptr, words_ptr, slots_ptr, rows_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, FIRST, STOP, TILES,
    scale, inner, outer, owner, entry, left,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """BN entries of a list, of which ``left`` are left, each to its row."""
    selection = owner // TILES
    b = (selection if SHARED else selection // K).to(tl.int64)
    kv_head = tl.program_id(1) if SHARED else selection % K
    o_n = tl.arange(0, BN)  # [BN]
    m_k = o_n < left
    o_k = tl.load(tokens_ptr + entry + o_n, mask=m_k, other=0).to(tl.int64)  # [BN]
    b_word = tl.load(words_ptr + entry + o_n, mask=m_k, other=0)  # [BN]
    b_k = load_rows(k_ptr + b * k_b + kv_head * k_h, o_k * k_t, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
    b_v = load_rows(v_ptr + b * v_b + kv_head * v_h, o_k * v_t, m_k, DV, BLOCK_DV)  # [BN, BLOCK_DV]
    p_q, p_do, H = q_ptr + b * q_b, d_out_ptr + b * do_b, K * G
    p_lse, p_delta, first = lse_ptr + b * T * H, delta_ptr + b * T * H, FIRST + owner % TILES * TILE
    dk, dv = _keys_walk(
        b_k, b_v, b_word, p_q, p_do, p_lse, p_delta, q_t, q_h, do_t, do_h, first, STOP, kv_head, G, H, inner, outer,
        D, DV, BLOCK_D, BLOCK_DV, BG, BM, BN, TILE, CAPPED, UPCAST, False,
    )  # fmt: skip
    if has_nan(dk) | has_nan(dv):
        dk, dv = _keys_walk(
            b_k, b_v, b_word, p_q, p_do, p_lse, p_delta, q_t, q_h, do_t, do_h, first, STOP, kv_head, G, H, inner,
            outer, D, DV, BLOCK_D, BLOCK_DV, BG, BM, BN, TILE, CAPPED, UPCAST, True,
        )  # fmt: skip
    b_slot = tl.load(slots_ptr + entry + o_n, mask=m_k, other=0).to(tl.int64)  # [BN]
    o_row = (b_slot * tl.num_programs(1) + tl.program_id(1)) * (D + DV)
    store_rows(rows_ptr, o_row, m_k, dk * scale, D, BLOCK_D, UPCAST)
    store_rows(rows_ptr + D, o_row, m_k, dv, DV, BLOCK_DV, UPCAST)


def sums_of(k: Tensor, v: Tensor) -> Tensor:
    """For dK and dV side by side: zeros, float32 [B, S, K, D + Dv]."""
    return torch.zeros(*k.shape[:3], k.shape[3] + v.shape[3], dtype=torch.float32, device=k.device)


def add_keys(
    sums: Tensor, of_rows: tuple[Tensor, ...], u: TokenUnions, shared: bool, launch: AttentionLaunch, group: int
) -> None:
    """Add dK and dV of a chunk.  ``of_rows``: d_out, q, k, v, the log-sum-exp and ``delta``; ``shared``: P = 1."""
    kept, values = sums.shape[2] if shared else 1, sums.shape[3]
    rounds = rounds_of(u, kept * values * 4)
    rows = torch.empty(rounds.part + u.most, kept, values, dtype=torch.float32, device=sums.device)
    for number in rounds.numbers:
        _launch_keys(of_rows, u, rounds, number, rows, launch, group)
        add_rows(sums, rows, u, rounds, number, shared)


def _launch_keys(
    tensors: tuple[Tensor, ...], u: TokenUnions, rounds: Rounds, number: Tensor, rows: Tensor,
    launch: AttentionLaunch, group: int,
) -> None:  # fmt: skip
    d_out, q, k, v, lse, delta = tensors
    (_, T, H, _), K = q.shape, k.shape[2]
    with on_device(q):
        _keys_kernel[(min(processors(q), ceil_div(rows.shape[0], launch.config.tile)), rows.shape[1])](
            d_out, q, k, v, lse, delta, u.tokens, u.words, u.begin, u.sizes, rounds.owners, rounds.lists,
            rounds.slots, number, rows, *strides(d_out, q, k, v), T, K, H // K, u.first, u.first + u.queries, u.tiles,
            rounds.part, launch.scale, launch.inner, launch.outer, BG=group,
            BM=max(launch.config.step, group), BN=launch.config.tile, TILE=TILE, BLOCK=BLOCK, **launch.constants,
        )  # fmt: skip
