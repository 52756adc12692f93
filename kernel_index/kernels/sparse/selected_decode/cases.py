"""Named calls of ``selected_decode``.  The suite fills a cache of its own, and returns what it then holds too."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import SOFTMAX_UNITS, Case, Maker, Suite
from kernel_index.kernels.sparse.moba_block_sparse.cases import filled
from kernel_index.kernels.sparse.selected_decode.api import BACKENDS, selected_decode


def decode_on_copies(
    *, past_k: Tensor, past_v: Tensor, lengths: tuple[int, ...], page: int, k: Tensor, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the caches after the step."""
    cache = filled(past_k, past_v, list(lengths), k.shape[1], page)
    out = selected_decode(cache=cache, k=k, **more)
    return out, cache.k, cache.v


def call(
    m: Maker,
    lengths: tuple[int, ...],
    new: int,
    n: int,
    *,
    page: int = 0,
    block_size: int = 1,
    per_head: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Random selections with repeats, −1 for none, and blocks of the future.

    Scores grow with the square root of the maker's scale: beyond a few tens softmax only selects the largest.
    """
    batch, heads, kv_heads, width, small = len(lengths), 4, 2, 8, m.scale**-0.5
    blocks = -(-(max(lengths) + new) // block_size)
    shape = (batch, new, kv_heads, n) if per_head else (batch, new, n)
    return {
        "q": m.normal(batch, new, heads, width),
        "k": m.normal(batch, new, kv_heads, width, scale=small),
        "v": m.normal(batch, new, kv_heads, width),
        "indices": m.integers(-1, blocks, *shape),
        "past_k": m.normal(batch, max(lengths), kv_heads, width, scale=small),
        "past_v": m.normal(batch, max(lengths), kv_heads, width),
        "lengths": lengths,
        "page": page,
        "block_size": block_size,
        **more,
    }  # fmt: skip


def selecting_nothing(m: Maker) -> dict[str, Any]:
    kwargs = call(m, (9, 4), 2, 6, page=4)
    kwargs["indices"][0, 1] = -1
    return kwargs


CASES = (
    Case("tokens", "single tokens for all heads, ragged lengths, repeats", lambda m: call(m, (14, 3), 1, 9)),
    Case("tokens_paged", "two new tokens, pages, a window", lambda m: call(
        m, (14, 5), 2, 9, page=6, window_size=(7, 0))),
    Case("tokens_per_head", "each KV head selects for itself", lambda m: call(m, (14, 5), 2, 9, page=4, per_head=True)),
    Case("blocks", "blocks that are no multiple of a page, for each KV head", lambda m: call(
        m, (18, 5), 2, 3, page=6, block_size=4, per_head=True)),
    Case("blocks_window", "a window that cuts a block, a softcap, a scale", lambda m: call(
        m, (19,), 1, 4, page=2, block_size=4, window_size=(9, 0), softcap=2.0, scale=0.7, per_head=True)),
    Case("nothing", "a query for which nothing is selected gives 0", selecting_nothing),
    Case("prompt", "an empty cache filled by a prompt of many queries", lambda m: call(m, (0, 0), 70, 5, page=16)),
)  # fmt: skip


def oracle(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    lengths: tuple[int, ...],
    page: int,
    block_size: int = 1,
    window_size: tuple[int | None, int | None] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query by query and head by head in Python: the set of tokens that it selects and may see, one softmax."""
    (queries, heads, width), kv_heads = q.shape[1:], k.shape[2]
    left = window_size[0] if window_size[0] is not None and window_size[0] >= 0 else 10**9
    outs = []
    for b, n in enumerate(lengths):
        keys, values = (torch.cat([past[b, :n], new[b]]) for past, new in ((past_k, k), (past_v, v)))
        for t in range(queries):
            p = len(keys) - queries + t
            for h in range(heads):
                g = h // (heads // kv_heads)
                selected = indices[b, t, g] if indices.ndim == 4 else indices[b, t]
                blocks = {j for j in selected.tolist() if j >= 0}
                seen = [s for s in range(max(0, p - left), p + 1) if s // block_size in blocks]
                if not seen:
                    outs.append(q[b, t, h] * 0.0)
                    continue
                z = keys[seen, g] @ q[b, t, h] * (width**-0.5 if scale is None else scale)
                z = softcap * (z / softcap).tanh() if softcap else z
                outs.append(z.softmax(0) @ values[seen, g])
    cache = filled(past_k, past_v, list(lengths), k.shape[1], page)
    cache.append(0, k.detach(), v.detach())
    unused = (k.sum() + v.sum()) * 0.0  # so that each has a gradient even where no new token is selected
    return torch.stack(outs).view(q.shape) + unused, cache.k, cache.v


def real(m: Maker) -> dict[str, Any]:
    """Four rows of 32768 tokens in pages of 64, 32 query heads on 8, 2048 tokens selected for each query."""
    rows, sizes = 4, (8, 128)
    past = {name: m.normal(rows, 32767, *sizes) for name in ("past_k", "past_v")}
    new = {"q": m.normal(rows, 1, 32, 128), "k": m.normal(rows, 1, *sizes), "v": m.normal(rows, 1, *sizes)}
    return {**new, **past, "indices": m.integers(0, 32768, rows, 1, 2048), "lengths": (32767,) * rows, "page": 64}


# At 300 scores pass 50, and softmax only selects the largest key.
SCALES = (1e-3, 1.0, 16.0)

SUITES = (
    Suite(
        op="selected_decode", function=decode_on_copies, backends=BACKENDS, cases=CASES,
        differentiable=("q", "k", "v"), oracle=oracle, sized=lambda m, n: call(m, (n, n - 2), 2, 5),
        scales=SCALES, rounding=("triton", "native", "sdpa"), units={"reference": SOFTMAX_UNITS},
        without_gradient=("triton", "native", "sdpa"),
        real=real,
    ),
)  # fmt: skip
