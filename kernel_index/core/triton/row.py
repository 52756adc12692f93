"""Device functions for blocks of one row, [BLOCK], in float32.  Names are those of ``core/triton/attention.py``."""

import triton.language as tl

from kernel_index.core.triton.jit import jit


@jit
def load_row(p_row, o_d, m_d):
    return tl.load(p_row + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]


@jit
def store_row(p_row, o_d, value, m_d):
    tl.store(p_row + o_d, value.to(p_row.dtype.element_ty), mask=m_d)
