"""One launch for both tensors: a program rotates all heads of q and of k at one token, with one read of its angles.

Backward is the same launch with −sin.  With a norm of each head it is a launch of its own, in which a program takes a
run of tokens and sums its part of the weights' gradients, and one small reduction of these parts in a fixed order.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors
from kernel_index.core.triton.sums import sum_parts

TILE, FEW_TILE = 512, 256
"""Channel pairs that a program rotates at once: it loops over the heads beyond that.  FEW_TILE with few tokens."""

PROGRAMS = 80
"""For each processor, that few tokens are divided into by their heads: of 2048 tokens on an H200 five for each, which
share 32 heads of q and 8 of k evenly; four would not."""


@jit
def _rotate_heads(
    x_ptr, y_ptr, token, first, step, heads, cos, sin, o_pair, m_pair, head_size, half, rest,
    STEP: tl.constexpr, NEXT: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads from ``first`` on in steps of ``step``: rotate 2·half channels of each, copy the rest.

    A pair is (STEP·i, STEP·i + NEXT).
    """
    base = token * heads * head_size
    distance = half if NEXT == 0 else NEXT
    for at in range(first, heads, step):
        o_h = at + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
        o_x = base + o_h * head_size + STEP * o_pair  # [HEADS, PAIRS]
        m_x = (o_h < heads) & m_pair
        x1 = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)  # [HEADS, PAIRS]
        x2 = tl.load(x_ptr + o_x + distance, mask=m_x, other=0.0).to(tl.float32)  # [HEADS, PAIRS]
        tl.store(y_ptr + o_x, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=m_x)
        tl.store(y_ptr + o_x + distance, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=m_x)
        if REST:
            o_d = tl.arange(0, REST)[None, :]  # [1, REST]
            o_x = base + o_h * head_size + 2 * half + o_d  # [HEADS, REST]
            m_x = (o_h < heads) & (o_d < rest)
            tl.store(y_ptr + o_x, tl.load(x_ptr + o_x, mask=m_x, other=0.0), mask=m_x)


@jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, q_heads, k_heads, head_size, half, sign, of_q,
    BATCHED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One token; of the programs of the grid's second dimension the first ``of_q`` share q's heads, the rest k's.

    With one program for both, it does q and then k.  ``tokens`` counts those of one batch row: tables that the batch
    shares are read at token mod tokens.
    """
    token = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    o_pair = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
    m_pair = o_pair < half
    o_angle = (token if BATCHED else (tl.program_id(0) % tokens).to(tl.int64)) * half + o_pair
    cos = tl.load(cos_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32)  # [1, PAIRS]
    sin = tl.load(sin_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32) * sign  # [1, PAIRS]
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    NEXT: tl.constexpr = 1 if INTERLEAVED else 0
    rest = head_size - 2 * half
    if HAS_Q:
        first = tl.where(part < of_q, part * Q_HEADS, q_heads)
        _rotate_heads(q_ptr, q_out_ptr, token, first, of_q * Q_HEADS, q_heads, cos, sin, o_pair, m_pair,
                      head_size, half, rest, STEP, NEXT, Q_HEADS, REST)  # fmt: skip
    if HAS_K:
        of_k = tl.maximum(1, parts - of_q)
        first = tl.where(parts == 1, 0, tl.where(part < of_q, k_heads, (part - of_q) * K_HEADS))
        _rotate_heads(k_ptr, k_out_ptr, token, first, of_k * K_HEADS, k_heads, cos, sin, o_pair, m_pair,
                      head_size, half, rest, STEP, NEXT, K_HEADS, REST)  # fmt: skip


def pick_config(q_heads: int, k_heads: int, half: int, tile: int = TILE) -> dict:
    """Four pairs for each thread."""
    pairs = next_power_of_2(half)
    most = max(1, tile // pairs)
    q_block, k_block = (min(next_power_of_2(n), most) for n in (q_heads, k_heads))
    warps = min(4, max(1, max(q_block, k_block) * pairs // 128))
    return {"Q_HEADS": q_block, "K_HEADS": k_block, "PAIRS": pairs, "num_warps": warps}


def sharing(q_heads: int, k_heads: int, config: dict, most: int) -> tuple[int, int]:
    """How many programs share the heads of q and of k at one token, of ``most``; (1, 0): one program does both."""
    if not k_heads or not q_heads or most < 2:
        blocks = ceil_div(q_heads, config["Q_HEADS"]) if q_heads else ceil_div(k_heads, config["K_HEADS"])
        count = max(1, min(blocks, most))
        return (count, 0) if q_heads else (0, count)
    blocks = ceil_div(q_heads, config["Q_HEADS"]), ceil_div(k_heads, config["K_HEADS"])
    of_k = max(1, min(blocks[1], most * blocks[1] // sum(blocks)))
    return max(1, min(blocks[0], most - of_k)), of_k


def rotate(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, outputs: tuple
) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous q, k ``[B, T, heads, D]``, either None; ``outputs`` of their shapes are filled."""
    like = q if q is not None else k
    if like is None or like.numel() == 0:
        if q is None or k is None or k.numel() == 0:
            return outputs
        like, q = k, None
    batch, tokens, _, head_size = like.shape
    q_heads, k_heads = (0 if t is None else t.shape[2] for t in (q, k))
    half = cos.shape[-1]
    rest = head_size - 2 * half
    most = PROGRAMS * processors(like) // (batch * tokens)
    config = pick_config(q_heads, k_heads, half, FEW_TILE if most > 1 else TILE)
    of_q, of_k = sharing(q_heads, k_heads, config, most)
    with on_device(like):
        _rope_kernel[(batch * tokens, max(1, of_q + of_k))](
            q, k, cos, sin, *outputs, tokens, q_heads, k_heads, head_size, half, -1.0 if inverse else 1.0, of_q,
            BATCHED=cos.shape[0] > 1, INTERLEAVED=interleaved, HAS_Q=q is not None,
            HAS_K=k is not None and k.numel() > 0, REST=next_power_of_2(rest) if rest else 0,
            **config,
        )  # fmt: skip
    return outputs


# With a norm of each head.  A head is read as three parts: the two channels of every pair, and the rest.


@jit
def _load_head(ptr, base, o_pair, m_pair, o_rest, m_rest, half, distance, STEP: tl.constexpr):
    p_pair = ptr + base + STEP * o_pair  # [HEADS, PAIRS]
    x1 = tl.load(p_pair, mask=m_pair, other=0.0).to(tl.float32)
    x2 = tl.load(p_pair + distance, mask=m_pair, other=0.0).to(tl.float32)
    x3 = tl.load(ptr + base + 2 * half + o_rest, mask=m_rest, other=0.0).to(tl.float32)  # [HEADS, REST]
    return x1, x2, x3


@jit
def _store_head(ptr, base, y1, y2, y3, o_pair, m_pair, o_rest, m_rest, half, distance, STEP: tl.constexpr):
    p_pair = ptr + base + STEP * o_pair  # [HEADS, PAIRS]
    tl.store(p_pair, y1.to(ptr.dtype.element_ty), mask=m_pair)
    tl.store(p_pair + distance, y2.to(ptr.dtype.element_ty), mask=m_pair)
    tl.store(ptr + base + 2 * half + o_rest, y3.to(ptr.dtype.element_ty), mask=m_rest)


@jit
def _sum_head(x1, x2, x3):
    """Over the channels of each head, [HEADS, 1]."""
    return (tl.sum(x1 + x2, 1) + tl.sum(x3, 1))[:, None]


@jit
def _rstd(x1, x2, x3, m_h, head_size, eps):
    """1/rms of each head [HEADS, 1]; 0 for a head that does not exist, whatever eps."""
    squares = _sum_head(x1 * x1, x2 * x2, x3 * x3)
    return tl.where(m_h, tl.rsqrt(squares / head_size + eps), 0.0)


@jit
def _norm_rotate_heads(
    x_ptr, y_ptr, w_ptr, token, heads, cos, sin, o_pair, m_pair, o_rest, m_rest, head_size, half, distance, eps, offset,
    STEP: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """All heads of one token; NORM says whether they are normalized first."""
    for first in range(0, heads, HEADS):
        o_h = first + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
        m_h = o_h < heads
        base = (token * heads + o_h) * head_size
        x1, x2, x3 = _load_head(x_ptr, base, o_pair, m_h & m_pair, o_rest, m_h & m_rest, half, distance, STEP)
        if NORM:
            w1, w2, w3 = _load_head(w_ptr, 0, o_pair, m_pair, o_rest, m_rest, half, distance, STEP)
            rstd = _rstd(x1, x2, x3, m_h, head_size, eps)
            x1, x2, x3 = x1 * rstd * (w1 + offset), x2 * rstd * (w2 + offset), x3 * rstd * (w3 + offset)
        _store_head(y_ptr, base, x1 * cos - x2 * sin, x2 * cos + x1 * sin, x3,
                    o_pair, m_h & m_pair, o_rest, m_h & m_rest, half, distance, STEP)  # fmt: skip


@jit
def _norm_rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
    tokens, q_heads, k_heads, head_size, half, distance, eps, offset,
    BATCHED: tl.constexpr, STEP: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o_pair, o_rest = tl.arange(0, PAIRS)[None, :], tl.arange(0, REST)[None, :]  # [1, PAIRS], [1, REST]
    m_pair, m_rest = o_pair < half, o_rest < head_size - 2 * half
    o_angle = (token if BATCHED else token % tokens) * half + o_pair
    cos = tl.load(cos_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32)  # [1, PAIRS]
    sin = tl.load(sin_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32)  # [1, PAIRS]
    _norm_rotate_heads(q_ptr, q_out_ptr, q_weight_ptr, token, q_heads, cos, sin, o_pair, m_pair, o_rest, m_rest,
                       head_size, half, distance, eps, offset, STEP, Q_HEADS, NORM_Q)  # fmt: skip
    _norm_rotate_heads(k_ptr, k_out_ptr, k_weight_ptr, token, k_heads, cos, sin, o_pair, m_pair, o_rest, m_rest,
                       head_size, half, distance, eps, offset, STEP, K_HEADS, NORM_K)  # fmt: skip


@jit
def _heads_backward(
    g_ptr, x_ptr, dx_ptr, w_ptr, d_w1, d_w2, d_w3, token, heads, cos, sin, o_pair, m_pair, o_rest, m_rest,
    head_size, half, distance, eps, offset, STEP: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of all heads of one token is stored, that of the weight is added to d_w1, d_w2 and d_w3."""
    for first in range(0, heads, HEADS):
        o_h = first + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
        m_h = o_h < heads
        base = (token * heads + o_h) * head_size
        g1, g2, g3 = _load_head(g_ptr, base, o_pair, m_h & m_pair, o_rest, m_h & m_rest, half, distance, STEP)
        g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        if NORM:
            x1, x2, x3 = _load_head(x_ptr, base, o_pair, m_h & m_pair, o_rest, m_h & m_rest, half, distance, STEP)
            w1, w2, w3 = _load_head(w_ptr, 0, o_pair, m_pair, o_rest, m_rest, half, distance, STEP)
            rstd = _rstd(x1, x2, x3, m_h, head_size, eps)
            x1, x2, x3 = x1 * rstd, x2 * rstd, x3 * rstd
            d_w1 += tl.sum(g1 * x1, 0)[None, :]
            d_w2 += tl.sum(g2 * x2, 0)[None, :]
            d_w3 += tl.sum(g3 * x3, 0)[None, :]
            g1, g2, g3 = g1 * (w1 + offset), g2 * (w2 + offset), g3 * (w3 + offset)
            mean = _sum_head(g1 * x1, g2 * x2, g3 * x3) / head_size
            g1, g2, g3 = rstd * (g1 - x1 * mean), rstd * (g2 - x2 * mean), rstd * (g3 - x3 * mean)
        _store_head(dx_ptr, base, g1, g2, g3, o_pair, m_h & m_pair, o_rest, m_h & m_rest, half, distance, STEP)
    return d_w1, d_w2, d_w3


@jit
def _norm_rope_backward_kernel(
    gq_ptr, gk_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr,
    q_parts_ptr, k_parts_ptr, all_tokens, per_program, tokens, q_heads, k_heads, head_size, half, distance, eps, offset,
    BATCHED: tl.constexpr, STEP: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr, NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    o_pair, o_rest = tl.arange(0, PAIRS)[None, :], tl.arange(0, REST)[None, :]  # [1, PAIRS], [1, REST]
    m_pair, m_rest = o_pair < half, o_rest < head_size - 2 * half
    q1, q2, q3 = tl.zeros((1, PAIRS), tl.float32), tl.zeros((1, PAIRS), tl.float32), tl.zeros((1, REST), tl.float32)
    k1, k2, k3 = q1, q2, q3
    first = program * per_program
    for step in range(0, tl.minimum(per_program, all_tokens - first)):
        token = first + step  # 64 bits
        o_angle = (token if BATCHED else token % tokens) * half + o_pair
        cos = tl.load(cos_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32)  # [1, PAIRS]
        sin = tl.load(sin_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32)  # [1, PAIRS]
        if HAS_Q:
            q1, q2, q3 = _heads_backward(
                gq_ptr, q_ptr, dq_ptr, q_weight_ptr, q1, q2, q3, token, q_heads, cos, sin, o_pair, m_pair, o_rest,
                m_rest, head_size, half, distance, eps, offset, STEP, Q_HEADS, NORM_Q,
            )  # fmt: skip
        if HAS_K:
            k1, k2, k3 = _heads_backward(
                gk_ptr, k_ptr, dk_ptr, k_weight_ptr, k1, k2, k3, token, k_heads, cos, sin, o_pair, m_pair, o_rest,
                m_rest, head_size, half, distance, eps, offset, STEP, K_HEADS, NORM_K,
            )  # fmt: skip
    if HAS_Q and NORM_Q:
        _store_head(q_parts_ptr, program * head_size, q1, q2, q3, o_pair, m_pair, o_rest, m_rest, half, distance, STEP)
    if HAS_K and NORM_K:
        _store_head(k_parts_ptr, program * head_size, k1, k2, k3, o_pair, m_pair, o_rest, m_rest, half, distance, STEP)


def _shape(q_heads: int, k_heads: int, head_size: int, cos: Tensor, interleaved: bool) -> dict:
    """The arguments by name that both kernels take."""
    half = cos.shape[-1]
    sizes = {"q_heads": q_heads, "k_heads": k_heads, "head_size": head_size, "half": half}
    steps = {"distance": 1 if interleaved else half, "STEP": 2 if interleaved else 1}
    blocks = {"BATCHED": cos.shape[0] > 1, "REST": next_power_of_2(max(1, head_size - 2 * half))}
    return sizes | steps | blocks | pick_config(q_heads, k_heads, half)


def norm_rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, offset: float, interleaved: bool, outputs: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contiguous tensors in; ``outputs`` of q's and k's shapes are filled."""
    batch, tokens, q_heads, head_size = q.shape
    if batch * tokens:
        with on_device(q):
            _norm_rope_kernel[(batch * tokens,)](
                q, k, cos, sin, q_weight, k_weight, *outputs, tokens, eps=eps, offset=offset,
                NORM_Q=q_weight is not None, NORM_K=k_weight is not None,
                **_shape(q_heads, k.shape[2], head_size, cos, interleaved),
            )  # fmt: skip
    return outputs


NORM_PROGRAMS = 3
"""Programs of the backward pass for each processor: a program has few heads in flight."""


def norm_backward(
    gq: Tensor | None, gk: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, interleaved: bool, outputs: tuple,
) -> None:  # fmt: skip
    """``outputs`` = gradients of q, k and their weights are filled, but for those that have none."""
    like = gq if gq is not None else gk
    assert like is not None
    batch, tokens, _, head_size = like.shape
    weights = [d if g is not None and w is not None else None
               for d, g, w in zip(outputs[2:], (gq, gk), (q_weight, k_weight), strict=True)]  # fmt: skip
    if batch * tokens == 0:
        for d_weight in weights:
            if d_weight is not None:
                d_weight.zero_()
        return
    count = min(batch * tokens, NORM_PROGRAMS * processors(like), 512)
    parts = [None if d is None else like.new_empty((count, head_size), dtype=torch.float32) for d in weights]
    q_heads, k_heads = (1 if g is None else g.shape[2] for g in (gq, gk))
    with on_device(like):
        _norm_rope_backward_kernel[(count,)](
            gq, gk, q, k, cos, sin, q_weight, k_weight, *outputs[:2], *parts,
            batch * tokens, ceil_div(batch * tokens, count), tokens, eps=eps, offset=offset,
            HAS_Q=gq is not None, HAS_K=gk is not None, NORM_Q=q_weight is not None, NORM_K=k_weight is not None,
            **_shape(q_heads, k_heads, head_size, cos, interleaved),
        )  # fmt: skip
    for d_weight, part in zip(weights, parts, strict=True):
        if d_weight is not None and part is not None:
            sum_parts(part, d_weight)
