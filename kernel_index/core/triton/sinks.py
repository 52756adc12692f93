"""A sink beside attention that was computed without one: one more logit of each row, without a value, in one pass."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.attention import load_rows, softmax_output, store_rows, with_sink
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, interpreting, next_power_of_2, on_device

ROWS = 32
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _sink_kernel(
    out_ptr, lse_ptr, sink_ptr, new_out_ptr, new_lse_ptr, TOKENS, H, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``out`` is the state of a softmax whose largest logit is the log-sum-exp, by base 2, and whose sum is 1."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_m = o_row < tl.cast(TOKENS, tl.int64) * H
    b_out = load_rows(out_ptr, o_row * DV, m_m, DV, BLOCK_DV).to(tl.float32)  # [ROWS, BLOCK_DV]
    b_lse = tl.load(lse_ptr + o_row, mask=m_m, other=0.0)  # [ROWS]
    sink = tl.load(sink_ptr + o_row % H, mask=m_m, other=0.0).to(tl.float32) * LOG2E
    out, lse = softmax_output(*with_sink(b_out, b_lse, tl.full((ROWS,), 1.0, tl.float32), sink), b_lse == float("-inf"))
    store_rows(new_out_ptr, o_row * DV, m_m, out, DV, BLOCK_DV, UPCAST)
    tl.store(new_lse_ptr + o_row, lse, mask=m_m)


def add_sink(out: Tensor, log2_sum: Tensor, sink: Tensor, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Fill the new ``out`` [B, T, H, Dv] and log-sum-exp by base 2 [B, T, H]."""
    B, T, H, DV = out.shape
    if log2_sum.numel():
        with on_device(out):
            _sink_kernel[(ceil_div(B * T * H, ROWS),)](
                out, log2_sum, sink, *outputs, B * T, H, DV=DV, BLOCK_DV=next_power_of_2(DV), ROWS=ROWS,
                UPCAST=interpreting(),
            )  # fmt: skip
    return outputs
