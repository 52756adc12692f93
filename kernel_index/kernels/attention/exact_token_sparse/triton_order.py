"""The selected tokens of each query: those that it may see, and in ascending order where it goes alone."""

import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import next_power_of_2, on_device, row_stride
from kernel_index.routing.token_unions import TILE, TokenUnions

NOTHING = tl.constexpr(0x7FFFFFFF)
"""In place of no token: above all."""


@jit
def _legal_kernel(
    indices_ptr, valid_ptr, start_ptr, end_ptr, tokens_ptr, counts_ptr, i_b, i_t, i_p, m_b, m_t, m_p, bound_b, P, N,
    BN: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One query's N entries: −1 for what is no token that it may see, and how many are one."""
    t, b = tl.program_id(0).to(tl.int64), (tl.program_id(1) // P).to(tl.int64)
    p = (tl.program_id(1) % P).to(tl.int64)
    start, end = tl.load(start_ptr + b * bound_b + t), tl.load(end_ptr + b * bound_b + t)
    o_list = (b * tl.num_programs(0) + t) * P + p
    count = tl.zeros((BN,), tl.int32)
    for first in range(0, N, BN):
        o_n = first + tl.arange(0, BN)  # [BN]
        b_token = tl.load(indices_ptr + b * i_b + t * i_t + p * i_p + o_n, mask=o_n < N, other=-1)
        m_token = (o_n < N) & (b_token >= start) & (b_token < end)
        if HAS_VALID:
            m_token = m_token & (tl.load(valid_ptr + b * m_b + t * m_t + p * m_p + o_n, mask=o_n < N, other=0) != 0)
        count += m_token.to(tl.int32)
        tl.store(tokens_ptr + o_list * N + o_n, tl.where(m_token, b_token, -1).to(tl.int32), mask=o_n < N)
    tl.store(counts_ptr + o_list, tl.sum(count, 0))


@jit
def _order_kernel(tokens_ptr, sizes_ptr, FIRST, T, TILES, P, N, LIMIT, BN: tl.constexpr, TILE: tl.constexpr):
    """One query's N ≤ BN tokens, sorted, −1 for what is repeated; not where the union of its tile has LIMIT or less."""
    local = tl.program_id(0)
    if tl.load(sizes_ptr + tl.program_id(1) * TILES + local // TILE) <= LIMIT:
        return
    t, b = (FIRST + local).to(tl.int64), (tl.program_id(1) // P).to(tl.int64)
    o_n = tl.arange(0, BN)  # [BN]
    p_tokens = tokens_ptr + ((b * T + t) * P + tl.program_id(1) % P) * N + o_n
    b_token = tl.load(p_tokens, mask=o_n < N, other=-1)
    b_token = tl.sort(tl.where(b_token < 0, NOTHING, b_token))
    tl.debug_barrier()
    tl.store(p_tokens, b_token, mask=o_n < N)
    tl.debug_barrier()
    before = tl.load(p_tokens - 1, mask=(o_n > 0) & (o_n < N), other=-1)
    tl.debug_barrier()
    tl.store(p_tokens, tl.where((b_token == before) | (b_token == NOTHING), -1, b_token), mask=o_n < N)


def keep_legal(
    indices: Tensor, valid: Tensor | None, start: Tensor, end: Tensor, outputs: tuple[Tensor, Tensor]
) -> None:
    """Fill tokens int32 [B, T, P, n], −1 for what a query may not see, and counts int32 [B, T, P] of the others."""
    batch, queries, shared, count = indices.shape
    if batch * queries * shared * count == 0:
        outputs[1].zero_()
        return
    seen = indices if valid is None else valid
    with on_device(indices):
        _legal_kernel[(queries, batch * shared)](
            indices, seen, start, end, *outputs, *indices.stride()[:3], *seen.stride()[:3], row_stride(start), shared,
            count, BN=min(1024, max(16, next_power_of_2(count))), HAS_VALID=valid is not None, num_warps=4,
        )  # fmt: skip


def sort_alone(tokens: Tensor, unions: TokenUnions, limit: int) -> None:
    """Sort, in place, the tokens of those queries of a chunk that go alone: as ``selection_order`` makes them."""
    batch, total, shared, count = tokens.shape
    if count:
        with on_device(tokens):
            _order_kernel[(unions.queries, batch * shared)](
                tokens, unions.sizes, unions.first, total, unions.tiles, shared, count, limit,
                BN=max(16, next_power_of_2(count)), TILE=TILE, num_warps=8 if count > 1024 else 4,
            )  # fmt: skip
