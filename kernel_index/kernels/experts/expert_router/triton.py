"""Scores, selection and weights of a tile of tokens in one launch; backward two launches and one sum of partials.

Products are as exact as float32 whatever the dtype of x.  A float32 number is the sum of three of bfloat16: with x of
bfloat16 the products are those of its parts, which tensor cores multiply without rounding.  float16 fits into
tensorfloat32, of which a float32 weight is three parts, too.  Names are those of ``core/triton/attention.py``: ``o_n``
[TILE] are tokens, ``o_e`` [EXPERTS] experts, ``o_c`` [BLOCK] channels.
"""

import torch
import triton.language as tl
from torch import Tensor

from kernel_index.core.target import target_of
from kernel_index.core.triton.attention import narrow
from kernel_index.core.triton.jit import jit
from kernel_index.core.triton.launch import (
    SMALLEST_DOT,
    ceil_div,
    interpreting,
    next_power_of_2,
    on_device,
    processors,
)
from kernel_index.kernels.experts.expert_router.contract import SMALLEST_SUM

BLOCK = 64
"""Channels of a step."""

FEW_EXPERTS = 16
"""With no more the backward pass takes twice the channels at once."""

TILE_ELEMENTS, SCORE_ELEMENTS = 4096, 1024
"""Tokens × experts of a program at most, and of one that makes the gradient of the scores alone."""

MOST_AHEAD = 64
"""With more experts a tile is too low for two products from shared memory.  One reads the gradient of the logits from
registers then, and Triton would let the copy that is ahead overwrite what the other reads."""

WAVES = 2
"""Programs of the backward pass for each processor at most: with 64 experts one more for all took a third longer."""


@jit
def _tile(p_x, o_row, o_c, rows, width):
    """Float32 [rows, BLOCK]; zeros beyond the rows and channels."""
    mask = (o_row < rows)[:, None] & (o_c < width)[None, :]
    return tl.load(p_x + o_row.to(tl.int64)[:, None] * width + o_c[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _load(p_x, o_row, o_c, rows, width, UPCAST: tl.constexpr):
    """The same as it is, for a product; float32 in the interpreter."""
    mask = (o_row < rows)[:, None] & (o_c < width)[None, :]
    tile = tl.load(p_x + o_row.to(tl.int64)[:, None] * width + o_c[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@jit
def _parts(x, UPCAST: tl.constexpr):
    """Three numbers of bfloat16 whose sum is the float32 x; those after an infinite one are 0."""
    first = x.to(tl.bfloat16)
    rest = tl.where(tl.abs(first.to(tl.float32)) == float("inf"), 0.0, x - first.to(tl.float32))
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    if UPCAST:
        return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32)
    return first, second, third


@jit
def _sum_of(first, rest):
    """An infinite factor times a part that is 0 is no number: then the first part decides."""
    return first + tl.where(rest == rest, rest, 0.0)


@jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, experts_ptr, weights_ptr, parts_ptr, scores_ptr, tokens, width, count, smallest,
    TOPK: tl.constexpr, CHOICES: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_e = tl.arange(0, EXPERTS)
    m_e = o_e < count
    z = tl.zeros((TILE, EXPERTS), tl.float32)
    rest = tl.zeros((TILE, EXPERTS), tl.float32)
    for start in range(0, width, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        if PRECISION == "parts":
            b_x = _load(x_ptr, o_n, o_c, tokens, width, UPCAST)
            if weight_ptr.dtype.element_ty == tl.bfloat16:
                # Not as parts, of which two are 0: Triton 3.6 overwrites a tile that registers and a product read.
                z = tl.dot(b_x, tl.trans(_load(weight_ptr, o_e, o_c, count, width, UPCAST)), z)
            else:
                first, second, third = _parts(_tile(weight_ptr, o_e, o_c, count, width), UPCAST)
                rest = tl.dot(b_x, tl.trans(third), rest)
                rest = tl.dot(b_x, tl.trans(second), rest)
                z = tl.dot(b_x, tl.trans(first), z)
        else:
            b_x, b_w = _tile(x_ptr, o_n, o_c, tokens, width), _tile(weight_ptr, o_e, o_c, count, width)
            z += tl.dot(b_x, tl.trans(b_w), input_precision=PRECISION)
    z = _sum_of(z, rest)
    if SOFTMAX:
        z = tl.where(m_e[None, :], z, float("-inf"))
        e = tl.exp(z - tl.max(z, 1)[:, None])
        score = e / tl.sum(e, 1)[:, None]
    else:
        score = 1.0 / (1.0 + tl.exp(-z))
    m_ne = (o_n < tokens)[:, None] & m_e[None, :]
    p_scores = scores_ptr + o_n.to(tl.int64)[:, None] * count + o_e[None, :]
    tl.store(p_scores, score, mask=m_ne)
    key = score
    if BIAS:
        key += tl.load(bias_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    key = tl.where(key == key, key, float("inf"))  # as a sort: NaN comes first
    key = tl.where(m_e[None, :], key, float("-inf"))
    left = m_ne
    o_k = tl.arange(0, CHOICES)
    chosen = tl.zeros((TILE, CHOICES), tl.int32)
    weight = tl.zeros((TILE, CHOICES), tl.float32)
    for k in range(TOPK):
        best = tl.max(tl.where(left, key, float("-inf")), 1)
        # The smallest index among equals; one that is left, also where every key is −inf.
        at = tl.min(tl.where(left & (key == best[:, None]), o_e[None, :], EXPERTS), 1)
        is_best = o_e[None, :] == at[:, None]
        left = left & (is_best == 0)
        of_best = tl.sum(tl.where(is_best, score, 0.0), 1)
        chosen = tl.where((o_k == k)[None, :], at[:, None], chosen)
        weight = tl.where((o_k == k)[None, :], of_best[:, None], weight)
    if (TOPK > 1) | (count == 1):
        weight = weight / tl.maximum(tl.sum(weight, 1), smallest, propagate_nan=tl.PropagateNan.ALL)[:, None]
    o_nk = o_n.to(tl.int64)[:, None] * TOPK + o_k[None, :]
    m_nk = (o_n < tokens)[:, None] & (o_k < TOPK)[None, :]
    tl.store(experts_ptr + o_nk, chosen.to(tl.int64), mask=m_nk)
    tl.store(weights_ptr + o_nk, weight, mask=m_nk)
    taken = tl.sum((m_ne & (left == 0)).to(tl.int32), 0)  # [EXPERTS]
    tl.store(parts_ptr + tl.program_id(0) * count + o_e, taken, mask=m_e)


@jit
def _score_grad_kernel(
    d_weights_ptr, scores_ptr, experts_ptr, dz_ptr, tokens, count, smallest,
    TOPK: tl.constexpr, SOFTMAX: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile's logits, float32 [TILE, EXPERTS], or its three parts in tensors one after another."""
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_e = tl.arange(0, EXPERTS)
    m_n = o_n < tokens
    m_ne = m_n[:, None] & (o_e < count)[None, :]
    o_ne = o_n.to(tl.int64)[:, None] * count + o_e[None, :]
    score = tl.load(scores_ptr + o_ne, mask=m_ne, other=0.0)
    d = tl.zeros((TILE, EXPERTS), tl.float32)  # of the weights, in their experts' columns
    chosen = tl.zeros((TILE, EXPERTS), tl.int32)
    for k in range(TOPK):
        o_nk = o_n.to(tl.int64) * TOPK + k
        is_expert = o_e[None, :] == tl.load(experts_ptr + o_nk, mask=m_n, other=-1)[:, None]
        d = tl.where(is_expert, tl.load(d_weights_ptr + o_nk, mask=m_n, other=0.0).to(tl.float32)[:, None], d)
        chosen = tl.where(is_expert, 1, chosen)
    if (TOPK > 1) | (count == 1):
        own = tl.where(chosen == 1, score, 0.0)
        total = tl.sum(own, 1)
        divisor = tl.maximum(total, smallest, propagate_nan=tl.PropagateNan.ALL)[:, None]
        mean = tl.where(total >= smallest, tl.sum(d * own, 1), 0.0)[:, None] / divisor
        d = tl.where(chosen == 1, (d - mean) / divisor, 0.0)
    dz = score * (d - tl.sum(d * score, 1)[:, None]) if SOFTMAX else d * score * (1.0 - score)
    if PARTS:
        first, second, third = _parts(dz, False)
        size = tl.cast(tokens, tl.int64) * count
        tl.store(dz_ptr + o_ne, first, mask=m_ne)
        tl.store(dz_ptr + size + o_ne, second, mask=m_ne)
        tl.store(dz_ptr + 2 * size + o_ne, third, mask=m_ne)
    else:
        tl.store(dz_ptr + o_ne, dz, mask=m_ne)


@jit
def _backward_kernel(
    dz_ptr, x_ptr, weight_ptr, d_x_ptr, parts_ptr, tokens, width, count, tiles,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes each ``num_programs``-th tile of tokens and one block of channels."""
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_e = tl.arange(0, EXPERTS)
    b_w = _tile(weight_ptr, o_e, o_c, count, width)  # [EXPERTS, BLOCK]
    d_w = tl.zeros((EXPERTS, BLOCK), tl.float32)
    rest = tl.zeros((EXPERTS, BLOCK), tl.float32)
    w_first, w_second, _ = _parts(b_w, UPCAST)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        o_n = tile * TILE + tl.arange(0, TILE)
        if PRECISION == "parts":
            b_x = _load(x_ptr, o_n, o_c, tokens, width, UPCAST)
            size = tl.cast(tokens, tl.int64) * count
            first = _load(dz_ptr, o_n, o_e, tokens, count, UPCAST)  # [TILE, EXPERTS]
            second = _load(dz_ptr + size, o_n, o_e, tokens, count, UPCAST)
            third = _load(dz_ptr + 2 * size, o_n, o_e, tokens, count, UPCAST)
            rest = tl.dot(tl.trans(third), b_x, rest)
            rest = tl.dot(tl.trans(second), b_x, rest)
            d_w = tl.dot(tl.trans(first), b_x, d_w)
            # dx is rounded to bfloat16: what is left out is below 2⁻¹⁶ of a term.
            dx = _sum_of(tl.dot(first, w_first), tl.dot(second, w_first, tl.dot(first, w_second)))  # [TILE, BLOCK]
        else:
            dz = _tile(dz_ptr, o_n, o_e, tokens, count)  # [TILE, EXPERTS]
            b_x = _tile(x_ptr, o_n, o_c, tokens, width)
            d_w += tl.dot(tl.trans(dz), b_x, input_precision=PRECISION)
            dx = tl.dot(dz, b_w, input_precision=PRECISION)  # [TILE, BLOCK]
        mask = (o_n < tokens)[:, None] & (o_c < width)[None, :]
        p_out = d_x_ptr + o_n.to(tl.int64)[:, None] * width + o_c[None, :]
        tl.store(p_out, narrow(dx, d_x_ptr.dtype.element_ty, UPCAST), mask=mask)
    d_w = _sum_of(d_w, rest)
    p_part = parts_ptr + (tl.program_id(0).to(tl.int64) * count + o_e[:, None]) * width + o_c[None, :]
    tl.store(p_part, d_w, mask=(o_e < count)[:, None] & (o_c < width)[None, :])


def _geometry(x: Tensor, count: int) -> dict:
    """``ieee`` where x has more digits than tensorfloat32, and on AMD, whose compiler has no other exact way."""
    experts = max(SMALLEST_DOT, next_power_of_2(count))
    is_hip = target_of(x.device).kind == "hip"
    exact = "ieee" if x.dtype == torch.float32 or is_hip else "tf32x3"
    precision = "parts" if x.dtype == torch.bfloat16 else exact
    most = 64 if precision == "parts" else 32
    return {
        "PRECISION": precision,
        "UPCAST": interpreting(),
        "TILE": max(SMALLEST_DOT, min(most, TILE_ELEMENTS // experts)),
        "EXPERTS": experts,
        "BLOCK": BLOCK,
        "num_warps": 4,
    }


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, softmax: bool, outputs: tuple[Tensor, ...]) -> None:
    """Contiguous x [N, C], weight [E, C] and bias [E] in; ``outputs``: experts, weights, load, scores."""
    experts, weights, load, scores = outputs
    (tokens, width), count = x.shape, weight.shape[0]
    if not tokens:
        load.zero_()
        return
    geometry, topk = _geometry(x, count), experts.shape[1]
    tiles = ceil_div(tokens, geometry["TILE"])
    parts = x.new_empty((tiles, count), dtype=torch.int32)
    with on_device(x):
        _forward_kernel[(tiles,)](
            x, weight, bias, experts, weights, parts, scores, tokens, width, count, SMALLEST_SUM,
            TOPK=topk, CHOICES=max(2, next_power_of_2(topk)), BIAS=bias is not None, SOFTMAX=softmax, **geometry,
        )  # fmt: skip
    torch.sum(parts, 0, out=load)


def backward(
    d_weights: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    experts: Tensor,
    softmax: bool,
    d_x: Tensor,
    d_weight: Tensor,
) -> None:
    """Contiguous tensors in; the gradients of x and weight filled."""
    (tokens, width), count = x.shape, weight.shape[0]
    if not tokens:
        d_weight.zero_()
        return
    geometry = _geometry(x, count)
    in_parts = geometry["PRECISION"] == "parts"
    if in_parts and count <= FEW_EXPERTS:
        geometry["BLOCK"] = 2 * BLOCK
    tiles, blocks = ceil_div(tokens, geometry["TILE"]), ceil_div(width, geometry["BLOCK"])
    programs = min(tiles, max(1, WAVES * processors(x) // blocks))
    dz = x.new_empty((3, *scores.shape)) if in_parts else torch.empty_like(scores)
    parts = x.new_empty((programs, count, width), dtype=torch.float32)
    held = max(1, SCORE_ELEMENTS // geometry["EXPERTS"])
    with on_device(x):
        _score_grad_kernel[(ceil_div(tokens, held),)](
            d_weights, scores, experts, dz, tokens, count, SMALLEST_SUM,
            TOPK=experts.shape[1], SOFTMAX=softmax, PARTS=in_parts, TILE=held, EXPERTS=geometry["EXPERTS"],
        )  # fmt: skip
        _backward_kernel[(programs, blocks)](
            dz, x, weight, d_x, parts, tokens, width, count, tiles,
            STAGES=3 if geometry["EXPERTS"] <= MOST_AHEAD else 1, **geometry,
        )  # fmt: skip
    if d_weight.dtype == parts.dtype:
        torch.sum(parts, 0, out=d_weight)
    else:
        d_weight.copy_(parts.sum(0))
