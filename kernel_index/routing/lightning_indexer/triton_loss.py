"""The indexer's loss and its gradient, query by query: a program fetches the selected keys of one query itself.

It goes over them twice for each KV head, first for the log-sum-exp of each query head, then for the weights, whose sum
over the heads it keeps in the memory of the gradient.  Names and units are those of ``core/triton/attention.py``.
"""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import LOG2E, finite_max, load_rows, scores
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import dot_block, interpreting, on_device, score_factors


@jit
def _selected(indices_ptr, valid_ptr, row, first, S, N, BN: tl.constexpr):
    """BN selected tokens in 64 bits, 0 where there is none, and which there are."""
    o_n = first + tl.arange(0, BN)  # [BN]
    b_token = tl.load(indices_ptr + row + o_n, mask=o_n < N, other=-1).to(tl.int64)
    m_k = (b_token >= 0) & (b_token < S) & (tl.load(valid_ptr + row + o_n, mask=o_n < N, other=0) != 0)
    return o_n, tl.where(m_k, b_token, 0), m_k


@jit
def _heads_log_sum(
    b_q, p_k, k_t, indices_ptr, valid_ptr, row, S, N, inner, outer,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of each head, base 2 [BG]; +∞ where nothing is selected."""
    row_max = tl.full((BG,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BG,), tl.float32)
    for first in range(0, N, BN):
        _, o_k, m_k = _selected(indices_ptr, valid_ptr, row, first, S, N, BN)
        b_k = load_rows(p_k, o_k * k_t, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BG, BN]
        logits = tl.where(m_k[None, :], z * outer, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        shift = finite_max(new_max)
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        row_max = new_max
    return tl.where(row_sum == 0.0, float("inf"), row_max + tl.log2(row_sum))


@jit
def _add_weights(
    b_q, lse, p_k, k_t, indices_ptr, valid_ptr, grads_ptr, row, S, N, G, share, is_first, inner, outer,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the weights of the G heads, times ``share``, to what earlier KV heads left at ``grads_ptr``."""
    m_g = tl.arange(0, BG) < G  # [BG]
    for first in range(0, N, BN):
        o_n, o_k, m_k = _selected(indices_ptr, valid_ptr, row, first, S, N, BN)
        b_k = load_rows(p_k, o_k * k_t, m_k, D, BLOCK_D)  # [BN, BLOCK_D]
        z = scores(b_q, b_k, inner, CAPPED, UPCAST)  # [BG, BN]
        p = tl.where(m_k[None, :] & m_g[:, None], tl.exp2(z * outer - lse[:, None]), 0.0)
        weight = tl.sum(p, 0) * share  # [BN]
        earlier = tl.load(grads_ptr + row + o_n, mask=(o_n < N) & (is_first == 0), other=0.0)
        tl.store(grads_ptr + row + o_n, earlier + weight, mask=o_n < N)


@jit
def _loss_kernel(
    scores_ptr, indices_ptr, valid_ptr, q_ptr, k_ptr, rows_ptr, grads_ptr, q_b, q_t, q_h, k_b, k_t, k_h, T, S, K, G, N,
    inner, outer,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The divergence of one query, and its gradient at the scores: softmax(scores) · Σ target − target."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = (b * T + t) * N
    o_g = tl.arange(0, BG)  # [BG]
    for kv_head in range(0, K):
        o_h = (kv_head * G + o_g).to(tl.int64)
        b_q = load_rows(q_ptr + b * q_b + t * q_t, o_h * q_h, o_g < G, D, BLOCK_D)  # [BG, BLOCK_D]
        p_k = k_ptr + b * k_b + kv_head * k_h
        lse = _heads_log_sum(
            b_q, p_k, k_t, indices_ptr, valid_ptr, row, S, N, inner, outer, D, BLOCK_D, BG, BN, CAPPED, UPCAST
        )
        is_first = (tl.cast(kv_head, tl.int32) == 0).to(tl.int32)
        _add_weights(
            b_q, lse, p_k, k_t, indices_ptr, valid_ptr, grads_ptr, row, S, N, G, 1.0 / (K * G), is_first, inner, outer,
            D, BLOCK_D, BG, BN, CAPPED, UPCAST,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of this program read it

    score_max = tl.full((WIDE,), float("-inf"), tl.float32)
    score_sum = tl.zeros((WIDE,), tl.float32)
    for first in range(0, N, WIDE):
        o_n, _, m_k = _selected(indices_ptr, valid_ptr, row, first, S, N, WIDE)
        b_score = tl.load(scores_ptr + row + o_n, mask=m_k, other=float("-inf"))
        new_max = tl.maximum(score_max, b_score, propagate_nan=tl.PropagateNan.ALL)
        shift = finite_max(new_max)
        score_sum = score_sum * tl.exp2((score_max - shift) * LOG2E) + tl.exp2((b_score - shift) * LOG2E)
        score_max = new_max
    whole_max = tl.max(score_max, 0)
    whole_sum = tl.sum(score_sum * tl.exp2((score_max - finite_max(whole_max)) * LOG2E), 0)
    log_sum = whole_max + tl.log(whole_sum)

    divergence = tl.zeros((WIDE,), tl.float32)
    mass = tl.zeros((WIDE,), tl.float32)
    for first in range(0, N, WIDE):
        o_n, _, m_k = _selected(indices_ptr, valid_ptr, row, first, S, N, WIDE)
        b_score = tl.load(scores_ptr + row + o_n, mask=m_k, other=0.0)
        target = tl.load(grads_ptr + row + o_n, mask=m_k, other=0.0)
        found = target * (tl.log(tl.maximum(target, 1e-37)) - (b_score - log_sum))
        divergence += tl.where(m_k & (target > 0.0), found, 0.0)
        mass += tl.where(m_k, target, 0.0)
    total = tl.sum(mass, 0)
    tl.store(rows_ptr + b * T + t, tl.sum(divergence, 0))
    for first in range(0, N, WIDE):
        o_n, _, m_k = _selected(indices_ptr, valid_ptr, row, first, S, N, WIDE)
        b_score = tl.load(scores_ptr + row + o_n, mask=m_k, other=0.0)
        target = tl.load(grads_ptr + row + o_n, mask=m_k, other=0.0)
        grad = tl.exp2((b_score - log_sum) * LOG2E) * total - target
        tl.store(grads_ptr + row + o_n, tl.where(m_k, grad, 0.0), mask=o_n < N)


def loss_rows(
    scores: Tensor, indices: Tensor, valid: Tensor, q: Tensor, k: Tensor, scoring: tuple[float, float],
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill the divergences [B, T] and their gradients [B, T, n], float32; the first three are dense."""
    (B, T, H, D), (S, K), N = q.shape, k.shape[1:3], indices.shape[2]
    if B * T:
        with on_device(q):
            _loss_kernel[(T, B)](
                scores, indices, valid, q, k, *outputs, *q.stride()[:3], *k.stride()[:3], T, S, K, H // K, N,
                *score_factors(*scoring), D=D, BLOCK_D=dot_block(D), BG=dot_block(H // K),
                BN=16 if interpreting() else 64 if D <= 128 else 32, WIDE=16 if interpreting() else 512,
                CAPPED=scoring[1] > 0, UPCAST=interpreting(), num_warps=4, num_stages=2,
            )  # fmt: skip
    return outputs
