"""Mean keys of blocks that begin anywhere, by additions in order: the router's blocks under invariant numerics."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import dot_block, on_device


@jit
def _means_kernel(
    k_ptr, first_ptr, means_ptr, k_b, k_t, k_h, BLOCKS, S, K, block_size, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The mean of one block of one KV head; nothing is written where ``first`` is −1 or the block is not whole."""
    b, n = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    h, o_d = tl.program_id(1), tl.arange(0, BLOCK_D)
    first = tl.load(first_ptr + b * BLOCKS + n)
    if (first >= 0) & (first + block_size <= S):
        p_k = k_ptr + b * k_b + tl.cast(first, tl.int64) * k_t + h * k_h + o_d
        total = tl.zeros((BLOCK_D,), tl.float32)
        for _ in range(0, block_size):
            total += tl.load(p_k, mask=o_d < D, other=0.0).to(tl.float32)
            p_k += k_t
        tl.store(means_ptr + ((b * BLOCKS + n) * K + h) * D + o_d, total / block_size, mask=o_d < D)


def means(k: Tensor, first: Tensor, block_size: int, out: Tensor) -> Tensor:
    """``out`` float32 [B, blocks, K, D] of k [B, S, K, D] with dense columns; ``first`` int32 [B, blocks]."""
    (_, S, K, D), blocks = k.shape, first.shape[1]
    if first.numel():
        with on_device(k):
            _means_kernel[(first.numel(), K)](
                k, first, out, *k.stride()[:3], blocks, S, K, block_size, D=D, BLOCK_D=dot_block(D), num_warps=1
            )
    return out
