"""One launch for both tensors: a program rotates all heads of q and of k at one token, with one read of its angles.

Backward is the same launch with −sin.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.launch import next_power_of_2, on_device

TILE = 512
"""Channel pairs that a program rotates at once: it loops over the heads beyond that."""


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, token, heads, cos, sin, o_pair, m_pair, head_size, half, rest,
    STEP: tl.constexpr, NEXT: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token: rotate 2·half channels of each, copy the rest.  A pair is (STEP·i, STEP·i + NEXT)."""
    base = token * heads * head_size
    distance = half if NEXT == 0 else NEXT
    for first in range(0, heads, HEADS):
        o_h = first + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
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


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, q_heads, k_heads, head_size, half, sign,
    BATCHED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """``tokens`` counts those of one batch row: tables that the batch shares are read at token mod tokens."""
    token = tl.program_id(0).to(tl.int64)
    o_pair = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
    m_pair = o_pair < half
    o_angle = (token if BATCHED else token % tokens) * half + o_pair
    cos = tl.load(cos_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32)  # [1, PAIRS]
    sin = tl.load(sin_ptr + o_angle, mask=m_pair, other=0.0).to(tl.float32) * sign  # [1, PAIRS]
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    NEXT: tl.constexpr = 1 if INTERLEAVED else 0
    rest = head_size - 2 * half
    if HAS_Q:
        _rotate_heads(q_ptr, q_out_ptr, token, q_heads, cos, sin, o_pair, m_pair, head_size, half, rest,
                      STEP, NEXT, Q_HEADS, REST)  # fmt: skip
    if HAS_K:
        _rotate_heads(k_ptr, k_out_ptr, token, k_heads, cos, sin, o_pair, m_pair, head_size, half, rest,
                      STEP, NEXT, K_HEADS, REST)  # fmt: skip


def pick_config(q_heads: int, k_heads: int, half: int) -> dict:
    """Four pairs for each thread."""
    pairs = next_power_of_2(half)
    most = max(1, TILE // pairs)
    q_block, k_block = (min(next_power_of_2(n), most) for n in (q_heads, k_heads))
    warps = min(4, max(1, max(q_block, k_block) * pairs // 128))
    return {"Q_HEADS": q_block, "K_HEADS": k_block, "PAIRS": pairs, "num_warps": warps}


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
    with on_device(like):
        _rope_kernel[(batch * tokens,)](
            q, k, cos, sin, *outputs, tokens, q_heads, k_heads, head_size, half, -1.0 if inverse else 1.0,
            BATCHED=cos.shape[0] > 1, INTERLEAVED=interleaved, HAS_Q=q is not None,
            HAS_K=k is not None and k.numel() > 0, REST=next_power_of_2(rest) if rest else 0,
            **pick_config(q_heads, k_heads, half),
        )  # fmt: skip
    return outputs
