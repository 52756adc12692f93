"""The gradient of the indexer's scores at the selected tokens: of q and of the weights by query, of k by union.

Gradients of scores are stored by slots of a query's selection, and read by entries of the union of its tile: a kernel
moves them first.  Row r of a tile is query ``r // BJ`` with head ``r % BJ``.  Names are those of
``core/triton/attention.py``; BM rows, BN tokens.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import dot, has_nan, load_rows, narrow, store_rows, weighted_sum
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, dot_block, interpreting, next_power_of_2, on_device
from kernel_index.routing.token_unions import BLOCK, GRAIN, TILE, Rounds, TokenUnions, chunks_of_queries, unions_of
from kernel_index.routing.triton_token_unions import bits_below
from kernel_index.routing.triton_union_sums import add_rows, rounds_of


@jit
def _queries_kernel(
    g_ptr, q_ptr, k_ptr, w_ptr, indices_ptr, dq_ptr, dw_ptr, q_b, q_t, q_j, k_b, k_s, w_b, w_t, w_j, T, S, J, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ and dW of the heads of one query."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_j = tl.arange(0, BJ)  # [BJ]
    m_j = o_j < J
    b_q = load_rows(q_ptr + b * q_b + t * q_t, o_j.to(tl.int64) * q_j, m_j, D, BLOCK_D)  # [BJ, BLOCK_D]
    b_w = tl.load(w_ptr + b * w_b + t * w_t + o_j * w_j, mask=m_j, other=0.0).to(tl.float32)  # [BJ]
    dq = tl.zeros((BJ, BLOCK_D), tl.float32)
    dw = tl.zeros((BJ,), tl.float32)
    row = (b * T + t) * N
    for first in range(0, N, BN):
        o_n = first + tl.arange(0, BN)  # [BN]
        b_token = tl.load(indices_ptr + row + o_n, mask=o_n < N, other=-1).to(tl.int64)  # [BN]
        m_k = (b_token >= 0) & (b_token < S)
        b_g = tl.load(g_ptr + row + o_n, mask=m_k, other=0.0).to(tl.float32)  # [BN]
        b_k = load_rows(k_ptr + b * k_b, tl.where(m_k, b_token, 0) * k_s, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        z = dot(b_q, tl.trans(b_k), UPCAST)  # [BJ, BN]
        dw += tl.sum(tl.where(m_k[None, :], b_g[None, :] * tl.where(z > 0.0, z, 0.0), 0.0), 1)
        dz = tl.where(m_k[None, :] & (z > 0.0), b_g[None, :] * b_w[:, None], 0.0)
        dq += dot(narrow(dz, b_k.dtype, UPCAST), b_k, UPCAST)
    o_row = (b * T + t) * J + o_j
    store_rows(dq_ptr, o_row * D, m_j, dq, D, BLOCK_D, UPCAST)
    tl.store(dw_ptr + o_row, narrow(dw, dw_ptr.dtype.element_ty, UPCAST), mask=m_j)


@jit
def _move_kernel(
    g_ptr, indices_ptr, begin_ptr, before_ptr, present_ptr, round_ptr, moved_ptr, FIRST, T, S, N, TILES, RUNS, PART,
    BN: tl.constexpr, TILE: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """``moved[entry, query]`` [PART + most, TILE] of one query, if the list of its tile is one of this round."""
    local, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_list = b * TILES + local // TILE
    number, begin = tl.load(round_ptr), tl.load(begin_ptr + o_list)
    if begin // PART != number:
        return
    p_before, p_present = before_ptr + o_list * (RUNS + 1), present_ptr + o_list * RUNS
    row = (b * T + FIRST + local) * N
    p_moved = moved_ptr + (begin - number * PART) * TILE + local % TILE
    for first in range(0, N, BN):
        o_n = first + tl.arange(0, BN)  # [BN]
        b_token = tl.load(indices_ptr + row + o_n, mask=o_n < N, other=-1).to(tl.int32)  # [BN]
        m_k = (b_token >= 0) & (b_token < S)
        b_g = tl.load(g_ptr + row + o_n, mask=m_k, other=0.0).to(tl.float32)  # [BN]
        b_token = tl.where(m_k, b_token, 0)
        before, b_present = tl.load(p_before + b_token // GRAIN), tl.load(p_present + b_token // GRAIN)  # [BN]
        entry = before + bits_below(b_present, b_token % GRAIN)
        tl.store(p_moved + entry.to(tl.int64) * TILE, b_g, mask=m_k)


@jit
def _keys_walk(
    b_k, b_word, p_q, p_w, p_moved, q_t, q_j, w_t, w_j, first, STOP, J, m_k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, UPCAST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dK of the tokens over the rows of the queries from ``first`` on."""
    SUB: tl.constexpr = BM // BJ
    o_m = tl.arange(0, BM)  # [BM]
    o_l, o_j = o_m // BJ, o_m % BJ
    o_n = tl.arange(0, BN)  # [BN]
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    for at in range(0, TILE, SUB):
        t = (first + at + o_l).to(tl.int64)
        m_m = (t < STOP) & (o_j < J)
        b_q = load_rows(p_q, t * q_t + o_j * q_j, m_m, D, BLOCK_D)  # [BM, BLOCK_D]
        b_w = tl.load(p_w + t * w_t + o_j * w_j, mask=m_m, other=0.0).to(tl.float32)  # [BM]
        m_seen = m_m[None, :] & (((b_word[:, None] >> (at + o_l).to(tl.int64)[None, :]) & 1) != 0)  # [BN, BM]
        p_g = p_moved + (o_n[:, None] * TILE + (at + o_l)[None, :])
        b_g = tl.load(p_g, mask=m_seen & m_k[:, None], other=0.0)  # [BN, BM]
        z = dot(b_k, tl.trans(b_q), UPCAST)  # [BN, BM]
        dz = tl.where(m_seen & (z > 0.0), b_g * b_w[None, :], 0.0)
        dk += weighted_sum(dz, b_q, m_seen, CAREFUL, UPCAST)
    return dk


@jit
def _keys_kernel(
    q_ptr, k_ptr, w_ptr, moved_ptr, tokens_ptr, words_ptr, begin_ptr, sizes_ptr, owners_ptr, slots_ptr, round_ptr,
    rows_ptr, q_b, q_t, q_j, k_b, k_s, w_b, w_t, w_j, J, FIRST, STOP, TILES, TOTAL, PART,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BN entries of a list that begins among the PART entries of this round."""
    number = tl.load(round_ptr)
    entry = number * PART + tl.program_id(0) * BN
    if entry >= TOTAL:
        return
    owner = tl.load(owners_ptr + entry // BLOCK)
    if owner < 0:
        return
    begin, size = tl.load(begin_ptr + owner), tl.load(sizes_ptr + owner)
    if (begin // PART != number) | (entry - begin >= size):
        return
    b = (owner // TILES).to(tl.int64)
    o_n = tl.arange(0, BN)  # [BN]
    m_k = o_n < size - (entry - begin)
    o_k = tl.load(tokens_ptr + entry + o_n, mask=m_k, other=0).to(tl.int64)  # [BN]
    b_word = tl.load(words_ptr + entry + o_n, mask=m_k, other=0)  # [BN]
    b_k = load_rows(k_ptr + b * k_b, o_k * k_s, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
    at = (entry - number * PART).to(tl.int64)
    p_q, p_w, p_moved, first = q_ptr + b * q_b, w_ptr + b * w_b, moved_ptr + at * TILE, FIRST + owner % TILES * TILE
    dk = _keys_walk(
        b_k, b_word, p_q, p_w, p_moved, q_t, q_j, w_t, w_j, first, STOP, J, m_k,
        D, BLOCK_D, BJ, BM, BN, TILE, UPCAST, False,
    )  # fmt: skip
    if has_nan(dk):
        dk = _keys_walk(
            b_k, b_word, p_q, p_w, p_moved, q_t, q_j, w_t, w_j, first, STOP, J, m_k,
            D, BLOCK_D, BJ, BM, BN, TILE, UPCAST, True,
        )  # fmt: skip
    b_slot = tl.load(slots_ptr + entry + o_n, mask=m_k, other=0).to(tl.int64)  # [BN]
    store_rows(rows_ptr, b_slot * D, m_k, dk, D, BLOCK_D, UPCAST)


def backward(
    g: Tensor, q: Tensor, k: Tensor, w: Tensor, indices: Tensor, outputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill dQ, dK and dW from g [B, T, n] and indices [B, T, n], which have no token twice; both dense."""
    (B, T, J, D), S, N = q.shape, k.shape[1], indices.shape[2]
    d_q, d_k, d_w = outputs
    strides = (*q.stride()[:3], *k.stride()[:2], *w.stride())
    common = {"D": D, "BLOCK_D": dot_block(D), "UPCAST": interpreting()}
    if B * T and S and N:
        with on_device(q):
            _queries_kernel[(T, B)](
                g, q, k, w, indices, d_q, d_w, *strides, T, S, J, N, BJ=dot_block(J),
                BN=16 if interpreting() else 64, num_warps=4, num_stages=2, **common,
            )  # fmt: skip
    else:
        d_q.zero_()
        d_w.zero_()
    sums = torch.zeros(B, S, 1, D, dtype=torch.float32, device=q.device)
    for first, queries in chunks_of_queries(B, 1, T, S) if B * S * N else ():
        u = unions_of(indices[:, :, None], S, first, queries)
        rounds = rounds_of(u, (D + TILE) * 4)
        entries = rounds.part + u.most
        rows = torch.empty(entries, 1, D, dtype=torch.float32, device=q.device)
        moved = torch.empty(entries, TILE, dtype=torch.float32, device=q.device)
        for number in rounds.numbers:
            _move(g, indices, u, rounds, number, moved, (T, S))
            _launch_keys((q, k, w, moved), u, rounds, number, rows, (strides, common))
            add_rows(sums, rows, u, rounds, number, True)
    d_k.copy_(sums[:, :, 0])
    return outputs


def _move(
    g: Tensor, indices: Tensor, u: TokenUnions, rounds: Rounds, number: Tensor, moved: Tensor, sizes: tuple[int, int]
) -> None:
    with on_device(g):
        _move_kernel[(u.queries, g.shape[0])](
            g, indices, u.begin, u.before, u.present, number, moved, u.first, *sizes, g.shape[2], u.tiles,
            u.present.shape[1], rounds.part, BN=64 if interpreting() else 512, TILE=TILE, GRAIN=GRAIN, num_warps=4,
        )  # fmt: skip


def _launch_keys(
    tensors: tuple[Tensor, ...], u: TokenUnions, rounds: Rounds, number: Tensor, rows: Tensor,
    more: tuple[tuple[int, ...], dict[str, int]],
) -> None:  # fmt: skip
    q, heads = tensors[0], next_power_of_2(tensors[0].shape[2])
    strides, common = more
    step = 16 if interpreting() else 64
    with on_device(q):
        _keys_kernel[(ceil_div(rows.shape[0], 64), 1)](
            *tensors, u.tokens, u.words, u.begin, u.sizes, rounds.owners, rounds.slots, number, rows, *strides,
            q.shape[2], u.first, u.first + u.queries, u.tiles, u.tokens.shape[0], rounds.part, BJ=heads,
            BM=max(step, heads), BN=64, TILE=TILE, BLOCK=BLOCK, num_warps=4, num_stages=2, **common,
        )  # fmt: skip
