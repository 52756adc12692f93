"""Named calls of ``fa4_kvcache_decode``.  The suite's function works on copies and returns the caches as well."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import SOFTMAX_UNITS, Case, Maker, Suite
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.api import BACKENDS, fa4_kvcache_decode


def on_copies(*, k_cache: Tensor, v_cache: Tensor, **call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both caches after the call, so that what was written is compared too."""
    own_k, own_v = (x.detach().clone(memory_format=torch.contiguous_format) for x in (k_cache, v_cache))
    return fa4_kvcache_decode(k_cache=own_k, v_cache=own_v, **call), own_k, own_v


def contiguous(
    m: Maker, lengths: list[int], capacity: int, queries: int, new: int, h: int, k: int, d: int
) -> dict[str, Any]:
    """Scores grow with the square root of the maker's scale: beyond a few tens softmax only selects the largest."""
    b, small = len(lengths), m.scale**-0.5
    return {
        "q": m.normal(b, queries, h, d),
        "k_cache": m.normal(b, capacity, k, d, scale=small),
        "v_cache": m.normal(b, capacity, k, d),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=m.device),
        "k": m.normal(b, new, k, d, scale=small) if new else None,
        "v": m.normal(b, new, k, d) if new else None,
    }


def paged(
    m: Maker, lengths: list[int], page: int, slots: int, queries: int, new: int, h: int, k: int, d: int
) -> dict[str, Any]:
    """Pages in a shuffled order, spare ones between them, and -1 after each row's last page."""
    call = contiguous(m, lengths, slots * page, queries, new, h, k, d)
    rows, pages = len(lengths), len(lengths) * slots + 3
    order = torch.randperm(pages, generator=m.generator)[: rows * slots].view(rows, slots)
    for name in ("k_cache", "v_cache"):
        pool = m.normal(pages, page, k, d)
        pool[order.to(m.device)] = call[name].view(rows, slots, page, k, d)
        call[name] = pool
    used = (torch.tensor(lengths) + new + page - 1) // page
    table = torch.where(torch.arange(slots) < used[:, None], order, -1)
    return {**call, "block_table": table.to(device=m.device, dtype=torch.int32)}


CASES = (
    Case("step", "one token for each row, ragged lengths, one row empty", lambda m: contiguous(
        m, [7, 0, 12], 16, 1, 1, 4, 2, 8)),
    Case("even", "all rows of one length: one kernel call", lambda m: contiguous(m, [9, 9], 16, 1, 1, 6, 2, 8)),
    Case("full", "the last slot of the cache", lambda m: contiguous(m, [15, 3], 16, 1, 1, 2, 2, 8)),
    Case("several", "five new tokens at once, ragged", lambda m: contiguous(m, [7, 0, 11], 16, 5, 5, 4, 1, 8)),
    Case("paged", "shuffled pages, ragged lengths across page ends", lambda m: paged(
        m, [7, 0, 12, 3], 4, 4, 1, 1, 4, 2, 8)),
    Case("paged_several", "new tokens that cross a page", lambda m: paged(m, [6, 0, 11], 4, 4, 3, 3, 4, 2, 8)),
    Case("window", "a window narrower than the prefix, paged", lambda m: {
        **paged(m, [7, 0, 13], 4, 5, 3, 3, 4, 2, 8), "window_size": (4, 0)}),
    Case("window_even", "a window in a contiguous cache", lambda m: {
        **contiguous(m, [9, 9], 16, 2, 2, 4, 2, 8), "window_size": (3, -1)}),
    Case("softcap", "scores bounded, paged", lambda m: {**paged(m, [7, 2], 4, 4, 2, 2, 4, 2, 8), "softcap": 2.0}),
    Case("scale", "a scale of its own", lambda m: {**contiguous(m, [7, 2], 16, 1, 1, 4, 2, 8), "scale": 0.25}),
    Case("sink", "a sink for each head, paged; a row of nothing cached", lambda m: {
        **paged(m, [7, 0, 9], 4, 4, 1, 1, 4, 2, 8), "sink": m.normal(4)}),
    Case("sink_window", "a sink, a window, a softcap and a scale; the first queries see nothing", lambda m: {
        **contiguous(m, [0, 5, 14], 16, 4, 2, 4, 2, 8), "sink": m.normal(4), "window_size": (3, 0), "softcap": 2.0,
        "scale": 0.5}),
    Case("not_causal", "every new token sees every other", lambda m: {
        **contiguous(m, [7, 2], 16, 3, 3, 4, 2, 8), "causal": False}),
    Case("both_sides", "not causal, a window to both sides", lambda m: {
        **contiguous(m, [7, 2], 16, 4, 4, 4, 2, 8), "causal": False, "window_size": (2, 1)}),
    Case("read_only", "nothing new: only what is cached", lambda m: contiguous(m, [7, 0, 16], 16, 1, 0, 4, 2, 8)),
    Case("more_queries", "more queries than keys: the first see nothing", lambda m: contiguous(
        m, [0, 5], 16, 4, 2, 4, 2, 8)),
    Case("prefill", "an empty cache filled by a prompt", lambda m: contiguous(m, [0], 16, 13, 13, 4, 2, 8)),
    Case("no_rows", "an empty batch", lambda m: contiguous(m, [], 8, 1, 1, 4, 2, 8)),
    Case("no_queries", "new tokens without a query", lambda m: contiguous(m, [3, 1], 8, 0, 2, 4, 2, 8)),
)  # fmt: skip


def oracle(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token in Python: the slot of each key, the queries that may see it, one softmax for each query."""
    batch, queries, heads, width = q.shape
    page, group = k_cache.shape[1], heads // k_cache.shape[2]
    caches, out = (k_cache.clone(), v_cache.clone()), []
    left, right = (None if side is None or side < 0 else side for side in window_size)
    right = 0 if causal else right
    for b in range(batch):
        cached = int(cache_seqlens[b])
        rows: list[list[Tensor]] = [[], []]
        for at in range(cached + (0 if k is None else k.shape[1])):
            slot = (b, at) if block_table is None else (int(block_table[b, at // page]), at % page)
            for row, cache, new in zip(rows, caches, (k, v), strict=True):
                if new is not None and at >= cached:
                    cache[slot] = new[b, at - cached].detach()
                row.append(cache[slot] if new is None or at < cached else new[b, at - cached])
        total = len(rows[0])
        for t in range(queries):
            p = total - queries + t
            seen = [s for s in range(total) if (left is None or s >= p - left) and (right is None or s <= p + right)]
            if not seen:
                out.append(q[b, t] * 0.0)
                continue
            keys, values = (torch.stack([row[s] for s in seen]).repeat_interleave(group, 1) for row in rows)
            z_HS = torch.einsum("hd,shd->hs", q[b, t], keys) * (width**-0.5 if scale is None else scale)
            z_HS = softcap * (z_HS / softcap).tanh() if softcap else z_HS
            if sink is not None:
                z_HS = torch.cat([z_HS, sink[:, None].to(z_HS.dtype)], 1)
            out.append(torch.einsum("hs,shd->hd", z_HS.softmax(-1)[:, : len(seen)], values))
    nothing = q.sum() * 0.0  # so that an empty call has a gradient too
    stacked = torch.stack(out).view(q.shape) if out else nothing.expand(q.shape)
    return stacked, caches[0], caches[1]


def sized(m: Maker, n: int) -> dict[str, Any]:
    return contiguous(m, [n - 2, n - 3], n, 2, 2, 4, 2, 8)


def real(m: Maker) -> dict[str, Any]:
    return paged(m, [4095 - 128 * i for i in range(16)], 64, 64, 1, 1, 8, 2, 64)


# At 300 scores pass 50, and softmax only selects the largest key.
SCALES = (1e-3, 1.0, 16.0)

SUITES = (
    Suite(
        op="fa4_kvcache_decode", function=on_copies, backends=BACKENDS, cases=CASES,
        differentiable=("q", "k", "v", "sink"), oracle=oracle, sized=sized,
        scales=SCALES, rounding=("native", "sdpa", "triton"), units={"reference": SOFTMAX_UNITS}, real=real,
        without_gradient=("fa4", "native", "sdpa", "triton"),
    ),
)  # fmt: skip
