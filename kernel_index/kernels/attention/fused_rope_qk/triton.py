"""One launch for both tensors: a program rotates all heads of q and of k at one token, with one read of its angles.

Backward is the same launch with −sin.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.launch import next_power_of_2, on_device

TILE = 512
"""Channel pairs that a program has in hand: heads beyond it are looped over."""


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, token, heads, cos, sin, pair, in_pair, head_size, half, rest,
    STEP: tl.constexpr, NEXT: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token: rotate 2·half channels of each, copy the rest.  A pair is (STEP·i, STEP·i + NEXT)."""
    base = token * heads * head_size
    distance = half if NEXT == 0 else NEXT
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        at = base + head * head_size + STEP * pair
        mask = (head < heads) & in_pair
        x1 = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at + distance, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + at + distance, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)
        if REST:
            channel = tl.arange(0, REST)[None, :]
            at = base + head * head_size + 2 * half + channel
            mask = (head < heads) & (channel < rest)
            tl.store(y_ptr + at, tl.load(x_ptr + at, mask=mask, other=0.0), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, q_heads, k_heads, head_size, half, sign,
    BATCHED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """``tokens`` counts those of one batch row: tables that the batch shares are read at token mod tokens."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    in_pair = pair < half
    angle = (token if BATCHED else token % tokens) * half + pair
    cos = tl.load(cos_ptr + angle, mask=in_pair, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=in_pair, other=0.0).to(tl.float32) * sign
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    NEXT: tl.constexpr = 1 if INTERLEAVED else 0
    rest = head_size - 2 * half
    if HAS_Q:
        _rotate_heads(q_ptr, q_out_ptr, token, q_heads, cos, sin, pair, in_pair, head_size, half, rest,
                      STEP, NEXT, Q_HEADS, REST)  # fmt: skip
    if HAS_K:
        _rotate_heads(k_ptr, k_out_ptr, token, k_heads, cos, sin, pair, in_pair, head_size, half, rest,
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
