"""One launch forward; backward one launch and one small sum in a fixed order.

The four streams of a block of channels are in registers together, so every element is read once and written once:
``x`` and ``d`` are tuples of four [BLOCK], one for each stream.  The 24 coefficients are scalars.  Their gradients are
sums of products of two streams over tokens and channels; each program adds up its partial sums in registers and writes
24 numbers at its end.  Names are those of ``core/triton/attention.py``.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import ceil_div, next_power_of_2, on_device, processors

WAVES = 4
"""Programs of the backward pass for each processor."""

STAGES = 3
"""Tiles in flight in a program of the backward pass."""


def pick_config(width: int, sums: bool) -> dict:
    """8 channels of each stream for a thread; 4 where it also holds 25 running sums for each of them."""
    per_thread = 4 if sums else 8
    block = min(next_power_of_2(width), 128 * per_thread)
    return {"BLOCK": block, "num_warps": max(1, block // (32 * per_thread))}


@jit
def _load(p_x, m_d):
    return tl.load(p_x, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]


@jit
def _store(p_x, value, m_d):
    tl.store(p_x, value.to(p_x.dtype.element_ty), mask=m_d)


@jit
def _load_streams(p_x, width, m_d):
    return _load(p_x, m_d), _load(p_x + width, m_d), _load(p_x + 2 * width, m_d), _load(p_x + 3 * width, m_d)


@jit
def _load_four(p_h):
    """Coefficients are float32."""
    return tl.load(p_h), tl.load(p_h + 1), tl.load(p_h + 2), tl.load(p_h + 3)


@jit
def _dot(h, x):
    return h[0] * x[0] + h[1] * x[1] + h[2] * x[2] + h[3] * x[3]


@jit
def _add_products(sums, d, x):
    return sums[0] + d * x[0], sums[1] + d * x[1], sums[2] + d * x[2], sums[3] + d * x[3]


@jit
def _merge(x, f, p_post, p_res, p_out, m_d):
    """One merged stream [BLOCK]: stored rounded, returned in float32."""
    merged = _dot(_load_four(p_res), x) + tl.load(p_post) * f
    _store(p_out, merged, m_d)
    return merged


@jit
def _forward_kernel(
    hidden_ptr, branch_ptr, post_ptr, res_ptr, pre_ptr, merged_ptr, read_ptr, tokens, width, post_row, res_row, pre_row,
    MERGE: tl.constexpr, READ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``tokens`` counts those of one batch; a coefficient that the batches share has a row stride of 0."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    token = program // blocks
    batch = token // tokens
    o_d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_d = o_d < width
    x = _load_streams(hidden_ptr + 4 * token * width + o_d, width, m_d)
    if MERGE:
        f = _load(branch_ptr + token * width + o_d, m_d)  # [BLOCK]
        p_out = merged_ptr + 4 * token * width + o_d
        p_post = post_ptr + batch * post_row
        p_res = res_ptr + batch * res_row
        x = (
            _merge(x, f, p_post, p_res, p_out, m_d),
            _merge(x, f, p_post + 1, p_res + 4, p_out + width, m_d),
            _merge(x, f, p_post + 2, p_res + 8, p_out + 2 * width, m_d),
            _merge(x, f, p_post + 3, p_res + 12, p_out + 3 * width, m_d),
        )
    if READ:
        _store(read_ptr + token * width + o_d, _dot(_load_four(pre_ptr + batch * pre_row), x), m_d)


@jit
def _zero_four(BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float32)
    return zero, zero, zero, zero


@jit
def _four_sums(sums):
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0)


@jit
def _store_four(p_out, values):
    tl.store(p_out, values[0])
    tl.store(p_out + 1, values[1])
    tl.store(p_out + 2, values[2])
    tl.store(p_out + 3, values[3])


@jit
def _backward_kernel(
    d_merged_ptr, d_read_ptr, hidden_ptr, branch_ptr, post_ptr, res_ptr, pre_ptr, d_hidden_ptr, d_branch_ptr, parts_ptr,
    tokens, width, tiles_per_program, post_row, res_row, pre_row,
    MERGE: tl.constexpr, D_MERGED: tl.constexpr, D_READ: tl.constexpr, HIDDEN: tl.constexpr, BRANCH: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes a run of tiles of one batch; a tile is a block of channels of one token."""
    batch = tl.program_id(0).to(tl.int64)  # of which there may be as many as tokens
    program = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    first = program * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tl.full((), tokens, tl.int64) * blocks)  # 1 is a constexpr
    if D_READ:
        pre = _load_four(pre_ptr + batch * pre_row)
    if MERGE:
        post = _load_four(post_ptr + batch * post_row)
        res0 = _load_four(res_ptr + batch * res_row)
        res1 = _load_four(res_ptr + batch * res_row + 4)
        res2 = _load_four(res_ptr + batch * res_row + 8)
        res3 = _load_four(res_ptr + batch * res_row + 12)
    zero = tl.zeros((BLOCK,), tl.float32)
    df_sum = zero  # d_read · branch_out [BLOCK]
    dx_sums = _zero_four(BLOCK)  # d_read · stream n
    post_sums = _zero_four(BLOCK)
    sums0 = _zero_four(BLOCK)  # gradient of merged stream 0 · stream n
    sums1 = _zero_four(BLOCK)
    sums2 = _zero_four(BLOCK)
    sums3 = _zero_four(BLOCK)
    for tile in tl.range(first, last, num_stages=STAGES):
        token = batch * tokens + tile // blocks
        o_d = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        m_d = o_d < width
        d = _zero_four(BLOCK)  # the whole gradient of the merged streams
        if D_MERGED:
            d = _load_streams(d_merged_ptr + 4 * token * width + o_d, width, m_d)
        if D_READ:
            dy = _load(d_read_ptr + token * width + o_d, m_d)  # [BLOCK]
            d = _add_products(d, dy, pre)
        if HIDDEN:
            p_out = d_hidden_ptr + 4 * token * width + o_d
            dx = d
            if MERGE:  # the transpose of h_res
                dx = _add_products(_zero_four(BLOCK), d[0], res0)
                dx = _add_products(dx, d[1], res1)
                dx = _add_products(dx, d[2], res2)
                dx = _add_products(dx, d[3], res3)
            _store(p_out, dx[0], m_d)
            _store(p_out + width, dx[1], m_d)
            _store(p_out + 2 * width, dx[2], m_d)
            _store(p_out + 3 * width, dx[3], m_d)
        if BRANCH:
            _store(d_branch_ptr + token * width + o_d, _dot(post, d), m_d)
        if SUMS:
            x = _load_streams(hidden_ptr + 4 * token * width + o_d, width, m_d)
            if D_READ:
                dx_sums = _add_products(dx_sums, dy, x)
            if MERGE:
                f = _load(branch_ptr + token * width + o_d, m_d)  # [BLOCK]
                post_sums = _add_products(post_sums, f, d)
                sums0 = _add_products(sums0, d[0], x)
                sums1 = _add_products(sums1, d[1], x)
                sums2 = _add_products(sums2, d[2], x)
                sums3 = _add_products(sums3, d[3], x)
                if D_READ:
                    df_sum += dy * f
    if SUMS:
        p_part = parts_ptr + (batch * tl.num_programs(1) + program) * 24
        _store_four(p_part, _four_sums(post_sums))
        _store_four(p_part + 4, _four_sums(sums0))
        _store_four(p_part + 8, _four_sums(sums1))
        _store_four(p_part + 12, _four_sums(sums2))
        _store_four(p_part + 16, _four_sums(sums3))
        read = _four_sums(dx_sums)
        if MERGE and D_READ:  # d h_pre[n] = Σ d_read · merged stream n, and that stream is linear in the five
            fs = tl.sum(df_sum, 0)
            read = (
                _dot(res0, read) + post[0] * fs,
                _dot(res1, read) + post[1] * fs,
                _dot(res2, read) + post[2] * fs,
                _dot(res3, read) + post[3] * fs,
            )
        _store_four(p_part + 20, read)


def _row_strides(*coefficients: Tensor | None) -> list[int]:
    return [0 if c is None or c.shape[0] == 1 else c.stride(0) for c in coefficients]


def forward(
    outputs: tuple[Tensor, Tensor],
    hidden: Tensor,
    branch_out: Tensor | None,
    h_post: Tensor | None,
    h_res: Tensor | None,
    h_pre: Tensor | None,
) -> None:
    """Contiguous ``[batches, N, 4, C]`` in, ``outputs`` = (merged, read) filled where they are asked for."""
    if hidden.numel() == 0:
        return
    batches, tokens, _, width = hidden.shape
    config = pick_config(width, sums=False)
    with on_device(hidden):
        _forward_kernel[(batches * tokens * ceil_div(width, config["BLOCK"]),)](
            hidden, branch_out, h_post, h_res, h_pre, *outputs, tokens, width, *_row_strides(h_post, h_res, h_pre),
            MERGE=h_post is not None, READ=h_pre is not None, **config,
        )  # fmt: skip


def backward(
    outputs: list[Tensor | None],
    d_merged: Tensor | None,
    d_read: Tensor | None,
    hidden: Tensor | None,
    branch_out: Tensor | None,
    h_post: Tensor | None,
    h_res: Tensor | None,
    h_pre: Tensor | None,
) -> None:
    """``outputs`` = (d_hidden, d_branch_out, sums ``[batches, 24]``), None where not wanted."""
    d_hidden, d_branch, sums = outputs
    like = d_read if d_merged is None else d_merged
    assert like is not None, "a backward without upstream gradients is not launched"
    if like.numel() == 0:
        if sums is not None:
            sums.zero_()
        return
    batches, tokens, width = like.shape[0], like.shape[1], like.shape[-1]
    config = pick_config(width, sums=sums is not None)
    tiles = tokens * ceil_div(width, config["BLOCK"])
    programs = min(tiles, ceil_div(WAVES * processors(like), batches))
    parts = None if sums is None else like.new_empty((batches, programs, sums.shape[1]), dtype=torch.float32)
    with on_device(like):
        _backward_kernel[(batches, programs)](
            d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre, d_hidden, d_branch, parts,
            tokens, width, ceil_div(tiles, programs), *_row_strides(h_post, h_res, h_pre),
            MERGE=h_post is not None, D_MERGED=d_merged is not None, D_READ=d_read is not None,
            HIDDEN=d_hidden is not None, BRANCH=d_branch is not None, SUMS=sums is not None, STAGES=STAGES, **config,
        )  # fmt: skip
    if sums is not None and parts is not None:
        torch.sum(parts, 1, out=sums)
