"""The selected tokens of each query in ascending order, without repeats, in one launch."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device, row_stride


@jit
def _order_kernel(
    indices_ptr, valid_ptr, start_ptr, end_ptr, tokens_ptr, counts_ptr, i_b, i_t, i_p, m_b, m_t, m_p, bound_b, P, N, S,
    BN: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One query's N ≤ BN entries: sorted, −1 for what is repeated, and how many come before those that are no token."""
    t, b = tl.program_id(0).to(tl.int64), (tl.program_id(1) // P).to(tl.int64)
    p = (tl.program_id(1) % P).to(tl.int64)
    start, end = tl.load(start_ptr + b * bound_b + t), tl.load(end_ptr + b * bound_b + t)
    o_n = tl.arange(0, BN)  # [BN]
    b_token = tl.load(indices_ptr + b * i_b + t * i_t + p * i_p + o_n, mask=o_n < N, other=-1)
    m_token = (b_token >= start) & (b_token < end)
    if HAS_VALID:
        m_token = m_token & (tl.load(valid_ptr + b * m_b + t * m_t + p * m_p + o_n, mask=o_n < N, other=0) != 0)
    b_token = tl.sort(tl.where(m_token, b_token, S).to(tl.int32))
    o_list = (b * tl.num_programs(0) + t) * P + p
    p_tokens = tokens_ptr + o_list * N + o_n
    tl.store(p_tokens, b_token, mask=o_n < N)
    tl.store(counts_ptr + o_list, tl.sum((b_token < S).to(tl.int32), 0))
    tl.debug_barrier()
    before = tl.load(p_tokens - 1, mask=(o_n > 0) & (o_n < N), other=-1)
    tl.debug_barrier()
    tl.store(p_tokens, tl.where((b_token == before) | (b_token == S), -1, b_token), mask=o_n < N)


def sort_selected(
    indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor, keys: int, outputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fill tokens int32 [B, T, P, n] and counts int32 [B, T, P], as ``selection_order`` makes them."""
    batch, queries, shared, count = indices.shape
    if batch * queries * shared * count == 0:
        outputs[1].zero_()
        return outputs
    seen = indices if valid is None else valid
    with on_device(indices):
        _order_kernel[(queries, batch * shared)](
            indices, seen, start, end, *outputs, *indices.stride()[:3], *seen.stride()[:3], row_stride(start), shared,
            count, keys, BN=max(16, next_power_of_2(count)), HAS_VALID=valid is not None,
            num_warps=8 if count > 1024 else 4,
        )  # fmt: skip
    return outputs
