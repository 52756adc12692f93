"""A bit for each selected block: what the kernels of ``documents.py`` read of a selection."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device


@jit
def _bits_kernel(selected_ptr, bits_ptr, count, words, N: tl.constexpr):
    """One selection.  Bits are joined by an atomic OR, whose result has no order."""
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, N)
    b_block = tl.load(selected_ptr + row * count + o_n, mask=o_n < count, other=-1)  # [N]
    m_block = (b_block >= 0) & (b_block < words * 32)
    b_block = tl.where(m_block, b_block, 0)
    tl.atomic_or(bits_ptr + row * words + b_block // 32, 1 << (b_block % 32), mask=m_block)


def set_bits(selected: Tensor, bits: Tensor) -> Tensor:
    """``bits`` int32 [..., words], zeros, gets those of ``selected`` int32 [..., n]; −1 is none."""
    count = selected.shape[-1]
    if selected.numel():
        with on_device(bits):
            _bits_kernel[(selected.numel() // count,)](
                selected, bits, count, bits.shape[-1], N=next_power_of_2(count), num_warps=1
            )
    return bits
