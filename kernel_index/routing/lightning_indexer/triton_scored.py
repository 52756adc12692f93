"""The indexer's scores on Hopper, in Gluon, of which only those are stored that reach a bound.

A program has 32 queries and walks over a part of the keys that they may see.  The rows of its product lie so that the
four heads of a query are in one thread, and the keys so that 16 neighbours are: a thread has 16 scores of one query for
64 keys.  Four threads that share a query count what they found and store it in order, in the list of the query and the
part.  The same kernel scores the sample from which the bound comes, and stores all of that.
"""

import math

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernel_index.core.triton.hopper import DTYPES, HopperKernel, barriers, product_nt, within
from kernel_index.core.triton.jit import ENABLE_FP_FUSION
from kernel_index.core.triton.launch import ceil_div, on_device, processors
from kernel_index.core.triton.products import is_hopper
from kernel_index.routing.lightning_indexer import triton_sample

MOST_HEADS, QUERIES, WIDTH = 4, 32, 64
"""Of the product of a program, whose 128 rows have WIDTH columns."""

PARTS = 4
"""Of the keys that the queries of a program may see, one after the other, each with lists of its own."""

KEYS = 64
"""Of a step."""

STAGES = 8
"""Slots of the ring of keys."""

CONSUMERS, FOUR = gl.constexpr(4), gl.constexpr(((4, 4, 4, 1), (112, 112, 112, 24)))
"""Roles behind the first consumer: their warps and registers."""

SLACK = gl.constexpr(16)
"""Behind each list: a thread stores what it has of 16 keys where one more has a place."""

PIECE = gl.constexpr(8)
"""Neighbouring keys of a sample."""

NAN = gl.constexpr(tl.PropagateNan.ALL)
NONE, LOW = gl.constexpr(-(2**31)), gl.constexpr(0x7FFFFFFF)


NEIGHBOURS = gl.constexpr(KEYS // 4)
"""Scores of one query that a thread has in a step."""


def _appending(count: int) -> str:
    """A thread's ``count`` scores of one query: store what reaches the bound, behind what the threads before it store.

    A list begins at ``base``; ``stored`` are in it already.  ``seen``: a bit for each key that the query may see.
    ``eight``: bytes of an entry, in a register, as of a constant ptxas makes four instructions for one.
    """
    score, (bound, seen, stored, many, base, token, eight) = count, (count * i for i in range(2, 9))
    lines = [
        "{",
        ".reg .pred p;",
        ".reg .b32 found, ones, place, other, word;",
        ".reg .b64 at;",
        "mov.b32 found, 0;",
    ]
    for i in range(count):
        lines += [f"setp.geu.f32 p, ${score + i}, ${bound};", f"@p or.b32 found, found, {1 << i};"]
    lines += [
        f"and.b32 found, found, ${seen};",
        "popc.b32 ones, found;",
        "mov.b32 place, ones;",
        "shfl.sync.up.b32 other|p, place, 1, 0x1c00, 0xffffffff;",
        "@p add.s32 place, place, other;",
        "shfl.sync.up.b32 other|p, place, 2, 0x1c00, 0xffffffff;",
        "@p add.s32 place, place, other;",
        "shfl.sync.idx.b32 $0, place, 3, 0x1c1f, 0xffffffff;",
        "sub.s32 place, place, ones;",
        f"add.s32 place, place, ${stored};",
        f"setp.ge.s32 p, place, ${many};",
        "@p mov.b32 found, 0;",
    ]
    for i in range(count):
        lines += [
            f"and.b32 word, found, {1 << i};",
            "setp.ne.s32 p, word, 0;",
            f"add.s32 word, ${token}, {i};",
            f"mad.wide.u32 at, place, ${eight}, ${base};",
            f"@p st.global.v2.b32 [at], {{word, ${score + i}}};",
            "@p add.s32 place, place, 1;",
        ]
    lines += [f"mov.b32 ${i}, 0;" for i in range(1, count)]
    return "\n".join([*lines, "}"])


APPENDING = gl.constexpr(_appending(KEYS // 4))
APPENDED = gl.constexpr(
    ",".join(kind for kind in ("=&r", "f", "f", "r", "r", "r", "l", "r", "r") for _ in range(KEYS // 4))
)


@gluon.jit
def _first(x, LAYOUT: gl.constexpr):
    """Of the 16 numbers of each thread the first."""
    x, _ = gl.split(gl.reshape(x, [32, 4, 8, 2]))
    x, _ = gl.split(gl.reshape(x, [32, 4, 4, 2]))
    x, _ = gl.split(gl.reshape(x, [32, 4, 2, 2]))
    x, _ = gl.split(x)
    return gl.convert_layout(x, LAYOUT)


@gluon.jit
def _by_threads(h, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """[4, 8, BN] of the product as [query, thread, key of the thread]."""
    h = gl.permute(gl.reshape(h, [32, BN // 8, 4, 2]), [0, 2, 1, 3])
    return gl.convert_layout(gl.reshape(h, [32, 4, BN // 4]), LAYOUT)


@gluon.jit
def _weighed(z, w_0, w_1, w_2, w_3, HEADS: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores [query, thread, key] of the product [128, BN]."""
    z = gl.maximum(z, 0.0, propagate_nan=NAN)
    z = gl.permute(gl.reshape(z, [2, 4, 2, 8, BN]), [1, 3, 4, 0, 2])  # [warp, query, BN, head // 2, head % 2]
    even, odd = gl.split(z)
    h_0, h_2 = gl.split(even)
    h_1, h_3 = gl.split(odd)
    score = _by_threads(h_0, BN, LAYOUT) * w_0[:, None, None]
    if HEADS > 1:  # of a head that is not there, 0 times infinity must not count
        score += _by_threads(h_1, BN, LAYOUT) * w_1[:, None, None]
    if HEADS > 2:
        score += _by_threads(h_2, BN, LAYOUT) * w_2[:, None, None]
    if HEADS > 3:
        score += _by_threads(h_3, BN, LAYOUT) * w_3[:, None, None]
    return score


@gluon.jit
def _rank_of(score):
    """See ``triton_topk.py``."""
    bits = (score + 0.0).to(gl.int32, bitcast=True)
    return gl.where(score != score, LOW, bits ^ ((bits >> 31) & LOW))


@gluon.jit
def _produce(given, SAMPLED: gl.constexpr):
    k_desc, k_ring, full, empty, first, stop, low, period = given
    STAGES: gl.constexpr = full.shape[0]
    BOX: gl.constexpr = k_desc.block_type.shape[0]
    BOXES: gl.constexpr = k_ring.shape[0] // STAGES
    for index in range(first, stop, BOX * BOXES):
        at = (index - first) // (BOX * BOXES)
        slot = at % STAGES
        mbarrier.wait(empty.index(slot), ((at // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), BOXES * k_desc.block_type.nbytes)
        for j in gl.static_range(BOXES):
            if SAMPLED:
                row = low + (index // BOX + j) * period * BOX
            else:
                row = low + index
            tma.async_copy_global_to_shared(k_desc, [row, 0], full.index(slot), k_ring.index(slot * BOXES + j))


@gluon.jit
def _consume(given, CONSUMER: gl.constexpr, HEADS: gl.constexpr, BN: gl.constexpr, SAMPLED: gl.constexpr):
    (
        q_ptr, w_ptr, start_ptr, end_ptr, bounds_ptr, found_ptr, counts_ptr, buffers, q_t, q_j, w_t, w_j, T0, FIRST,
        STOP, MANY, EIGHT, part, PARTS, first, stop, low, period,
    ) = given  # fmt: skip
    q_ring, k_ring, full, empty = buffers
    STAGES: gl.constexpr = full.shape[0]
    D: gl.constexpr = q_ring.shape[2]
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(  # [queries, threads of a query, keys of a thread]
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[8, 0, 0], [16, 0, 0]], [], [32, 4, BN // 4],
    )  # fmt: skip
    THREAD: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    QUERY: gl.constexpr = gl.SliceLayout(1, THREAD)
    t = T0 + CONSUMER * 32
    o_row = gl.arange(0, 128, layout=gl.SliceLayout(1, WIDE))  # head // 2, warp, head % 2, query of the warp
    o_q, o_j = t + o_row // 16 % 4 * 8 + o_row % 8, o_row // 64 * 2 + o_row // 8 % 2
    p_q = (
        q_ptr + (o_q.to(gl.int64) * q_t + o_j * q_j)[:, None] + gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))[None, :]
    )
    q_tile = q_ring.index(CONSUMER)
    q_tile.store(gl.load(p_q, mask=((o_q < STOP) & (o_j < HEADS))[:, None], other=0.0))
    fence_async_shared()
    o_t = t + gl.arange(0, 32, layout=QUERY)
    m_t = o_t < STOP
    start = gl.load(start_ptr + o_t, mask=m_t, other=LOW)
    end = gl.load(end_ptr + o_t, mask=m_t, other=0)
    row = (o_t - FIRST).to(gl.int64)
    p_w = w_ptr + o_t.to(gl.int64) * w_t
    w_0 = gl.load(p_w, mask=m_t, other=0.0).to(gl.float32)
    w_1 = gl.load(p_w + w_j, mask=m_t & (HEADS > 1), other=0.0).to(gl.float32)
    w_2 = gl.load(p_w + 2 * w_j, mask=m_t & (HEADS > 2), other=0.0).to(gl.float32)
    w_3 = gl.load(p_w + 3 * w_j, mask=m_t & (HEADS > 3), other=0.0).to(gl.float32)
    o_thread = gl.arange(0, 4, layout=gl.SliceLayout(0, THREAD))[None, :]
    o_i = gl.arange(0, BN // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    if SAMPLED:
        p_found = found_ptr + row * MANY
    else:
        p_found = found_ptr + (row * PARTS + part) * (MANY + SLACK)
        rank = gl.load(bounds_ptr + row, mask=m_t, other=LOW)
        bound = (rank ^ ((rank >> 31) & LOW)).to(gl.float32, bitcast=True)
    count = gl.full([32, 4], 0, gl.int32, layout=THREAD)
    zero = gl.full([128, BN], 0.0, gl.float32, layout=PRODUCT)
    for index in range(first, stop, BN):
        at = (index - first) // BN
        slot = at % STAGES
        mbarrier.wait(full.index(slot), (at // STAGES) & 1)
        z = warpgroup_mma_wait(0, [product_nt(q_tile, k_ring.index(slot), zero)])
        mbarrier.arrive(empty.index(slot), count=1)
        score = _weighed(z, w_0, w_1, w_2, w_3, HEADS, BN, LAYOUT)
        if SAMPLED:
            o_r = low // 8 + (index // 8 + o_i // 2) * period  # eight keys each, of 64 every eighth pair
            o_n = o_r // 8 * 64 + o_thread[:, :, None] * 16 + o_r % 8 * 2 + o_i % 2
            m_seen = within(o_n, start[:, None, None], end[:, None, None])
            p_sample = p_found[:, None, None] + index + o_thread[:, :, None] * (BN // 4) + o_i
            gl.store(p_sample, gl.where(m_seen, _rank_of(score), NONE), mask=m_t[:, None, None])
        else:
            o_first = low + index + o_thread * (BN // 4)  # [1, 4]
            below = 1 << gl.minimum(gl.maximum(start[:, None] - o_first, 0), NEIGHBOURS)
            seen = (1 << gl.minimum(gl.maximum(end[:, None] - o_first, 0), NEIGHBOURS)) - below
            added = gl.inline_asm_elementwise(
                APPENDING, APPENDED,
                [score, bound[:, None, None], gl.maximum(seen, 0)[:, :, None], count[:, :, None], MANY,
                 p_found.to(gl.int64)[:, None, None], o_first[:, :, None], EIGHT],
                dtype=gl.int32, is_pure=False, pack=16,
            )  # fmt: skip
            count += _first(added, THREAD)
    if not SAMPLED:
        p_count = counts_ptr + row * PARTS + part
        gl.store(p_count[:, None] + o_thread * 0, count, mask=m_t[:, None] & (o_thread == 0))


@HopperKernel
def _scored_kernel(
    q_ptr, k_desc, w_ptr, start_ptr, end_ptr, bounds_ptr, found_ptr, counts_ptr, q_t, q_j, w_t, w_j, FIRST, STOP, S,
    TOPK, MANY, EIGHT,
    PARTS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    SAMPLED: gl.constexpr,
):  # fmt: skip
    """Store score · 2³² + token of the first MANY keys of each part that reach the bound, and count all of them.

    ``SAMPLED``: the ranks int32 [T', MANY] of MANY keys instead, NONE for those that a query may not see.
    """
    ALL: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    T0 = FIRST + gl.program_id(0) * 128
    o_t = T0 + gl.arange(0, 128, layout=ALL)
    start = gl.load(start_ptr + o_t, mask=o_t < STOP, other=LOW)
    end = gl.load(end_ptr + o_t, mask=o_t < STOP, other=0)
    low = gl.maximum(gl.min(start, 0), 0) // BN * BN
    high = gl.minimum(gl.max(end, 0), S)
    part = gl.program_id(1)
    longest = gl.max(gl.where(o_t < STOP, end - start, 0), 0)
    if SAMPLED:
        size = MANY // PARTS
        period = gl.cdiv(gl.cdiv(high - low, 8), MANY // 8)
        whole = gl.where(longest > MANY, size, 0)  # others need no sample
    else:
        size = gl.cdiv(gl.cdiv(high - low, PARTS), BN) * BN
        period = 0
        whole = gl.where(longest > TOPK, gl.minimum(size, high - low - size * part), 0)
    first = size * part
    stop = first + whole
    DTYPE: gl.constexpr = k_desc.dtype
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], DTYPE)
    BOXES: gl.constexpr = BN // k_desc.block_type.shape[0]
    q_ring = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 128, D], SHARED_Q)
    k_boxes = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, BN // BOXES, D], k_desc.layout)
    k_ring = k_boxes._reinterpret(DTYPE, [STAGES, BN, D], gl.NVMMASharedLayout.get_default_for([BN, D], DTYPE))
    full, empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    fence_async_shared()
    consumed = (
        q_ptr, w_ptr, start_ptr, end_ptr, bounds_ptr, found_ptr, counts_ptr, (q_ring, k_ring, full, empty), q_t, q_j,
        w_t, w_j, T0, FIRST, STOP, MANY, EIGHT, part, PARTS, first, stop, low, period,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (consumed, 0, HEADS, BN, SAMPLED)),
            (_consume, (consumed, 1, HEADS, BN, SAMPLED)),
            (_consume, (consumed, 2, HEADS, BN, SAMPLED)),
            (_consume, (consumed, 3, HEADS, BN, SAMPLED)),
            (_produce, ((k_desc, k_boxes, full, empty, first, stop, low, period), SAMPLED)),
        ],
        FOUR[0],
        FOUR[1],
    )


SURE = 7
"""Deviations, squared, of the number of keys that a sample says reach its bound, from the fewest that are wanted: then
hardly one row of 200 is left.  Of a tile with such a row all scores are computed again."""


def takes(q: Tensor, k: Tensor, topk: int, many: int) -> bool:
    """Whether these kernels are for such a call: heads that fill their product, programs for half of the GPU, and rows
    of which a sample of ``many`` keys says enough."""
    fits = q.element_size() == 2 and q.shape[2] <= MOST_HEADS and q.shape[3] == WIDTH and q.stride(3) == 1
    if not (is_hopper(q) and fits and many and k.shape[1]):
        return False
    reach = math.isqrt(topk * many) * many / k.shape[1]  # of the sample
    return 2 * q.shape[1] >= queries_at_once(q) and reach * (1 - math.sqrt(topk / many)) ** 2 >= SURE


def bytes_of(many: int) -> int:
    """Of a query: its sample and its lists."""
    return 4 * many + 8 * PARTS * (many + SLACK.value)


def queries_at_once(q: Tensor) -> int:
    """Whose programs fill the GPU: a second wave of a few would take as long as the first."""
    return 4 * QUERIES * ceil_div(processors(q), PARTS)


def turned(k: Tensor) -> Tensor:
    """Keys [S, D] such that of 64 each pair stands where the product has the columns of the thread that it is for."""
    tiles = ceil_div(k.shape[0], KEYS)
    k = torch.nn.functional.pad(k, (0, 0, 0, tiles * KEYS - k.shape[0]))
    return k.view(tiles, 4, KEYS // 8, 2, k.shape[1]).transpose(1, 2).reshape(tiles * KEYS, k.shape[1])


def _described(k: Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, k.shape[1]], DTYPES[k.dtype])
    return TensorDescriptor(k, list(k.shape), list(k.stride()), [rows, k.shape[1]], layout)


def score(
    call: tuple[Tensor, Tensor, Tensor], bounds: tuple[Tensor, Tensor], first: int, topk: int, least: Tensor,
    target: Tensor, counts: Tensor | None,
) -> None:  # fmt: skip
    """Fill ``target``: without ``counts`` samples int32 [T', many], else lists int64 [T', PARTS, many + SLACK].

    ``call``: q [T, J, D], what ``turned`` makes of the keys, w [T, J].  ``least`` int32 [T']: the ranks to reach.
    """
    (q, k, w), queries, sampled = call, len(target), counts is None
    many = target.shape[-1] if sampled else target.shape[-1] - SLACK.value
    _scored_kernel[(ceil_div(queries, 4 * QUERIES), PARTS)](
        q, _described(k, 8 if sampled else KEYS), w, *bounds, least, target, counts, *q.stride()[:2], *w.stride(),
        first, first + queries, k.shape[0], topk, many, 8,
        PARTS=PARTS, HEADS=q.shape[1], D=WIDTH, BN=KEYS, STAGES=STAGES, SAMPLED=sampled, num_warps=4,
        enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip


def select(
    call: tuple[Tensor, Tensor, Tensor], bounds: tuple[Tensor, Tensor], picked: tuple[Tensor, Tensor], first: int,
    done: Tensor, many: int,
) -> None:  # fmt: skip
    """Fill the rows of ``picked`` [1, T', topk] that this way finds, and 1 in ``done`` for each."""
    (_, queries, topk), device = picked[0].shape, call[0].device
    sample = torch.empty(queries, many, dtype=torch.int32, device=device)
    found = torch.empty(queries, PARTS, many + SLACK.value, dtype=torch.int64, device=device)
    counts = torch.empty(queries, PARTS, dtype=torch.int32, device=device)
    least = torch.empty(queries, dtype=torch.int32, device=device)
    with on_device(call[0]):
        score(call, bounds, first, topk, least, sample, None)
        triton_sample.bound(sample, bounds, first, topk, least)
        score(call, bounds, first, topk, least, found, counts)
        triton_sample.pick(found, counts, least, picked, done)
