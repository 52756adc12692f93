"""The selected tokens of a query in the order of their scores, in Gluon: a bitonic sort in registers.

A thread has 32 of a row's keys, so five bits of a place are a matter of registers.  To compare keys whose places differ
in other bits, keys go to other threads, through shared memory: 15 times for 2048 keys, which are 66 steps.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernel_index.core.triton.hopper import QuickHopperKernel
from kernel_index.core.triton.launch import next_power_of_2

NONE, LOW = gl.constexpr(-(2**31)), gl.constexpr(0x7FFFFFFF)

FEWEST, MOST = 1024, 4096
"""Keys of a row: 32 of a thread, a warp and four."""


@gluon.jit
def _step(x, k, J: gl.constexpr):
    """Keys whose places differ in bit J: the larger one first, or last where bit k of the place is set."""
    N: gl.constexpr = x.shape[0]
    LAYOUT: gl.constexpr = x.type.layout
    a, b = gl.split(gl.permute(gl.reshape(x, [N >> (J + 1), 2, 1 << J]), [0, 2, 1]))
    o_block = gl.arange(0, N >> (J + 1), layout=gl.SliceLayout(1, a.type.layout))
    is_turned = ((o_block >> (k - (J + 1))) & 1) != 0
    swap = (a < b) ^ is_turned[:, None]
    x = gl.permute(gl.join(gl.where(swap, b, a), gl.where(swap, a, b)), [0, 2, 1])
    return gl.convert_layout(gl.reshape(x, [N]), LAYOUT)


@gluon.jit
def _step_of(x, k, J: gl.constexpr):
    """Stage k has this step if bit J is below bit k."""
    if k > J:
        x = _step(x, k, J)
    return x


@gluon.jit
def _between_warps(x, k, BITS: gl.constexpr):
    """The steps of the bits of a place that are of warps."""
    N: gl.constexpr = x.shape[0]
    LAYOUT: gl.constexpr = x.type.layout
    FARTHEST: gl.constexpr = gl.DistributedLinearLayout(
        [[1 << (BITS - 5)], [1 << (BITS - 4)], [1 << (BITS - 3)], [1 << (BITS - 2)], [1 << (BITS - 1)]],
        [[1], [2], [4], [8], [16]], [[32], [64]][: BITS - 10], [], [N],
    )  # fmt: skip
    if k > 10:
        y = gl.convert_layout(x, FARTHEST)
        if BITS > 11:
            y = _step_of(y, k, 11)
        x = gl.convert_layout(_step(y, k, 10), LAYOUT)
    return x


@QuickHopperKernel
def _order_kernel(
    best_ptr, tokens_ptr, indices_ptr, scores_ptr, FIRST, QUERIES, T, TOPK, N: gl.constexpr, BITS: gl.constexpr
):  # fmt: skip
    """Index and score of each token of one query, the largest score first, of equal ones the first token; −1 and −∞."""
    WARP_BASES: gl.constexpr = [[1024], [2048]]
    NEAR: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2], [4], [8], [16]], [[32], [64], [128], [256], [512]], WARP_BASES[: BITS - 10], [], [N]
    )
    FAR: gl.constexpr = gl.DistributedLinearLayout(
        [[32], [64], [128], [256], [512]], [[1], [2], [4], [8], [16]], WARP_BASES[: BITS - 10], [], [N]
    )
    b, local = gl.program_id(1).to(gl.int64), gl.program_id(0)
    given, row = (b * QUERIES + local) * TOPK, (b * T + FIRST + local) * TOPK
    o_n = gl.arange(0, N, layout=NEAR)
    o_n = (o_n & -1024) + (o_n & 31) * 32 + ((o_n >> 5) & 31)  # any order will do
    rank = gl.load(best_ptr + given + o_n, mask=o_n < TOPK, other=NONE)
    token = gl.load(tokens_ptr + given + o_n, mask=o_n < TOPK, other=-1)
    x = (rank.to(gl.int64) << 32) | (token ^ -1).to(gl.uint32, bitcast=True).to(gl.int64)
    for k in gl.static_range(1, 6):
        for j in gl.static_range(k):
            x = _step(x, k, k - 1 - j)
    for k in range(6, BITS + 1):
        if BITS > 10:
            x = _between_warps(x, k, BITS)
        y = gl.convert_layout(x, FAR)
        for j in gl.static_range(5):
            y = _step_of(y, k, 9 - j)
        x = gl.convert_layout(y, NEAR)
        for j in gl.static_range(5):
            x = _step(x, k, 4 - j)
    x = gl.convert_layout(x, FAR)
    o_n = gl.arange(0, N, layout=FAR)
    rank, token = (x >> 32).to(gl.int32), x.to(gl.int32) ^ -1
    score = (rank ^ ((rank >> 31) & LOW)).to(gl.float32, bitcast=True)
    gl.store(indices_ptr + row + o_n, token.to(gl.int64), mask=o_n < TOPK)
    gl.store(scores_ptr + row + o_n, gl.where(rank > NONE, score, float("-inf")), mask=o_n < TOPK)


def takes(topk: int) -> bool:
    return FEWEST // 2 < topk <= MOST


def order(picked: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], first: int) -> None:
    """Fill the rows of ``outputs``, indices int64 and scores float32 [B, T, topk], best first."""
    (ranks, tokens), T = picked, outputs[0].shape[1]
    B, queries, topk = ranks.shape
    size = next_power_of_2(topk)
    _order_kernel[(queries, B)](
        ranks, tokens, *outputs, first, queries, T, topk, N=size, BITS=size.bit_length() - 1,
        num_warps=size // 1024, maxnreg=128,
    )  # fmt: skip
