"""Exact-token attention with the gather inside: a program fetches the selected keys and values of one query itself.

Forward and dQ take one query and all query heads of a KV head, over the query's selected tokens; dK and dV take one
key, over the queries that selected it, in their order.  Nothing is staged and nothing is summed by atomics.  Names and
units are those of ``core/triton/attention.py``; BG rows are the heads of a group, BR rows are (query, head) pairs.
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
    softcapped,
    softmax_output,
    store_rows,
    weighted_sum,
)
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import (
    INTERPRETED_CONFIG,
    AttentionLaunch,
    Config,
    attention_launch,
    dot_block,
    interpreting,
    on_device,
    strides,
)


@jit
def _selection(selected_ptr, counts_ptr, b, kv_head, t, T, K, SELECTED, SHARED: tl.constexpr):
    """Where a query's selected tokens begin, and how many there are."""
    o_list = b * T + t if SHARED else (b * T + t) * K + kv_head
    return selected_ptr + o_list * SELECTED, tl.load(counts_ptr + o_list)


@jit
def _load_selected(p_selected, first, count, BN: tl.constexpr):
    """Positions of BN selected tokens in 64 bits, 0 where there is none, and which there are."""
    o_slot = first + tl.arange(0, BN)  # [BN]
    b_token = tl.load(p_selected + o_slot, mask=o_slot < count, other=-1)  # [BN]
    m_k = b_token >= 0
    return tl.where(m_k, b_token, 0).to(tl.int64), m_k


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, selected_ptr, counts_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, SELECTED, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The heads of one group at one query."""
    t = tl.program_id(0).to(tl.int64)
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    p_selected, count = _selection(selected_ptr, counts_ptr, b, kv_head, t, T, K, SELECTED, SHARED)
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
    d_out_ptr, q_ptr, k_ptr, v_ptr, selected_ptr, counts_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, K, G, SELECTED, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of the heads of one group at one query, and their ``delta`` for the keys' kernel."""
    t = tl.program_id(0).to(tl.int64)
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    p_selected, count = _selection(selected_ptr, counts_ptr, b, kv_head, t, T, K, SELECTED, SHARED)
    o_g = tl.arange(0, BG)  # [BG]
    m_g = o_g < G
    o_h = (kv_head * G + o_g).to(tl.int64)  # [BG]
    o_row = (b * T + t) * K * G + o_h
    b_do = load_rows(d_out_ptr + b * do_b + t * do_t, o_h * do_h, m_g, DV, BLOCK_DV)  # [BG, BLOCK_DV]
    b_out = load_rows(out_ptr, o_row * DV, m_g, DV, BLOCK_DV)  # [BG, BLOCK_DV]
    delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)  # [BG]
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


@jit
def _keys_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, queries_ptr, first_ptr, dk_ptr, dv_ptr,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, S, K, G, SELECTED, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BR: tl.constexpr,
    SHARED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key.  Products with a single key are sums over the head's columns, in float32."""
    s = tl.program_id(0).to(tl.int64)
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    selection = b if SHARED else b * K + kv_head
    begin = tl.load(first_ptr + selection * (S + 1) + s)
    stop = tl.load(first_ptr + selection * (S + 1) + s + 1)
    queries_ptr += selection * T * SELECTED + begin
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_d, m_dv = o_d < D, o_dv < DV
    b_k = tl.load(k_ptr + b * k_b + s * k_t + kv_head * k_h + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    b_v = tl.load(v_ptr + b * v_b + s * v_t + kv_head * v_h + o_dv, mask=m_dv, other=0.0).to(tl.float32)  # [BLOCK_DV]
    dk = tl.zeros((BLOCK_D,), tl.float32)
    dv = tl.zeros((BLOCK_DV,), tl.float32)
    rows = ((stop - begin) * G).to(tl.int32)
    for first in range(0, rows, BR):
        o_r = first + tl.arange(0, BR)  # [BR]
        m_r = o_r < rows
        b_t = tl.load(queries_ptr + o_r // G, mask=m_r, other=0).to(tl.int64)  # [BR]
        o_h = (kv_head * G + o_r % G).to(tl.int64)
        b_q = load_rows(q_ptr + b * q_b, b_t * q_t + o_h * q_h, m_r, D, BLOCK_D).to(tl.float32)  # [BR, BLOCK_D]
        b_do = load_rows(d_out_ptr + b * do_b, b_t * do_t + o_h * do_h, m_r, DV, BLOCK_DV).to(tl.float32)
        o_row = (b * T + b_t) * K * G + o_h
        b_lse = tl.load(lse_ptr + o_row, mask=m_r, other=float("inf"))  # [BR]
        b_delta = tl.load(delta_ptr + o_row, mask=m_r, other=0.0)  # [BR]
        z = softcapped(tl.sum(b_q * b_k[None, :], 1), inner, CAPPED)  # [BR]
        p = tl.exp2(z * outer - b_lse)
        dz = score_grad(z, p, tl.sum(b_do * b_v[None, :], 1), b_delta, CAPPED)  # [BR]
        dk += tl.sum(dz[:, None] * b_q, 0)
        dv += tl.sum(p[:, None] * b_do, 0)
    o_key = (b * S + s) * K + kv_head
    tl.store(dk_ptr + o_key * D + o_d, narrow(dk * scale, dk_ptr.dtype.element_ty, UPCAST), mask=m_d)
    tl.store(dv_ptr + o_key * DV + o_dv, narrow(dv, dv_ptr.dtype.element_ty, UPCAST), mask=m_dv)


def pick_config(width: int, element_bytes: int) -> Config:
    """``tile``: rows that the kernel of one key reads at once; ``step``: tokens that the kernels of one query do.

    Depends on the larger head size alone; not tuned on a device.  Compiled ahead of time for sm_90 and sm_100 it spills
    no register, but for dQ in float32 above a head size of 128.
    """
    if interpreting():
        return INTERPRETED_CONFIG
    if element_bytes == 4:
        return Config(32, 32, 4, 1) if width <= 64 else Config(16, 16, 8, 1)
    if width <= 64:
        return Config(64, 64, 4, 2)
    return Config(32, 32, 4, 2) if width <= 128 else Config(16, 16, 4, 1)


def _launch_of(q: Tensor, v: Tensor, scale: float, softcap: float, shared: bool) -> AttentionLaunch:
    config = pick_config(max(q.shape[3], v.shape[3]), q.element_size())
    return attention_launch(config, q, v, scale, softcap, SHARED=shared)


def forward(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, counts: Tensor, scale: float, softcap: float,
    outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), K = q.shape, k.shape[2]
    launch = _launch_of(q, v, scale, softcap, selected.shape[2] == 1)
    if B * T * H:
        with on_device(q):
            _forward_kernel[(T, B * K)](
                q, k, v, selected, counts, *outputs, *strides(q, k, v), T, K, H // K, selected.shape[3],
                launch.inner, launch.outer, BG=dot_block(H // K), BN=launch.config.step, **launch.constants,
            )  # fmt: skip
    return outputs


def backward_queries(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, selected: Tensor, counts: Tensor,
    scale: float, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), K = q.shape, k.shape[2]
    launch = _launch_of(q, v, scale, softcap, selected.shape[2] == 1)
    if B * T * H:
        with on_device(q):
            _queries_kernel[(T, B * K)](
                d_out, q, k, v, selected, counts, out, lse, *outputs, *strides(d_out, q, k, v), T, K, H // K,
                selected.shape[3], launch.scale, launch.inner, launch.outer, BG=dot_block(H // K),
                BN=launch.config.step, **launch.constants,
            )  # fmt: skip
    return outputs


def backward_keys(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, queries: Tensor, first: Tensor,
    scale: float, softcap: float, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    launch = _launch_of(q, v, scale, softcap, queries.shape[1] == 1)
    if B * S * K:
        with on_device(q):
            _keys_kernel[(S, B * K)](
                d_out, q, k, v, lse, delta, queries, first, *outputs, *strides(d_out, q, k, v), T, S, K, H // K,
                queries.shape[2] // max(1, T), launch.scale, launch.inner, launch.outer, BR=launch.config.tile,
                **launch.constants,
            )  # fmt: skip
    return outputs
