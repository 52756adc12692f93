"""Named calls of MoBA.  The suite of ``moba_decode`` fills a cache of its own, and returns what it then holds too."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.kernels.attention.dense_attention.cases import UNITS
from kernel_index.kernels.sparse.moba_block_sparse.api import (
    BACKENDS,
    DECODE_BACKENDS,
    moba_attention,
    moba_attention_with_lse,
    moba_decode,
)
from kernel_index.kvcache.cache import ContiguousKVCache, KVCache
from kernel_index.kvcache.paged import PagedKVCache
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.cases import on_each_path, packed, tree_fields
from kernel_index.masks.doc_window_mask.mask import MaskContract


def qkv(m: Maker, b: int, t: int, s: int, h: int, k: int, d: int, dv: int | None = None) -> dict[str, Any]:
    """Scores grow with the square root of the maker's scale: beyond a few tens softmax only selects the largest."""
    return {
        "q": m.normal(b, t, h, d),
        "k": m.normal(b, s, k, d, scale=m.scale**-0.5),
        "v": m.normal(b, s, k, dv or d),
    }


def call(m: Maker, t: int, s: int | None = None, **more: Any) -> dict[str, Any]:
    return {**qkv(m, 2, t, t if s is None else s, 4, 2, 8), "block_size": 4, "topk": 3, **more}


def documents(m: Maker, t: int) -> Tensor:
    """Three documents that end inside blocks, and padding."""
    ids = torch.tensor([0] * (t // 3) + [5] * (t // 3 + 1) + [2] * t)[: t - 2]
    return torch.nn.functional.pad(ids, (0, 2), value=-1).expand(2, -1).contiguous().to(m.device)


PREFIX = attention_validity(valid_token_counts=[22, 9])

CASES = (
    Case("heads", "a selection for each query head; the last block is short", lambda m: call(m, 22)),
    Case("groups", "the heads of a KV head share a selection", lambda m: call(m, 22, route_per="kv_group")),
    Case("documents", "documents that end inside blocks, padding, a window", lambda m: call(
        m, 22, mask=MaskContract(window=(9, 0), doc_ids=documents(m, 22)))),
    Case("prefix", "valid prefixes, one that ends inside a block; a softcap and a scale", lambda m: call(
        m, 22, mask=MaskContract(validity=PREFIX.to(m.device)), softcap=2.0, scale=0.7)),
    Case("current", "topk = 1: the current block alone", lambda m: call(m, 13, topk=1)),
    Case("everything", "more wanted than there are blocks: dense attention", lambda m: call(m, 13, topk=9)),
    Case("chunk", "the last queries of a longer row, values of another size", lambda m: {
        **call(m, 7, 18), **qkv(m, 2, 7, 18, 6, 3, 8, 5)}),
    Case("more_queries", "T > S: the first queries have no key", lambda m: call(
        m, 12, 9, mask=MaskContract())),
    Case("tree", "shared prompts: blocks count along each path; a window, documents, gaps", lambda m: call(
        m, 14, mask=MaskContract(window=(9, 0), doc_ids=packed(14), **tree_fields(14)).to(m.device))),
    Case("sink", "a float32 sink for each head, documents, padding", lambda m: call(
        m, 22, mask=MaskContract(doc_ids=documents(m, 22)), sink=m.normal(4, dtype=torch.float32))),
    Case("no_queries", "no query", lambda m: call(m, 0, 5)),
)  # fmt: skip


def selected_by_hand(
    q_JD: Tensor, k_SD: Tensor, seen: list[int], position: int, block_size: int, topk: int, doc: list[int] | None
) -> set[int]:
    """Python's own sort over the scores of past blocks that hold a key the query sees; ties by the smaller index."""
    wide = torch.promote_types(q_JD.dtype, torch.float32)
    scores = []
    for j in sorted({s // block_size for s in seen if s // block_size < position // block_size}):
        keys = range(j * block_size, min((j + 1) * block_size, len(k_SD)))
        inside = [s for s in keys if doc is None or doc[s] == doc[position]]
        scores.append((-float(q_JD.detach().to(wide).mean(0) @ k_SD.detach().to(wide)[inside].mean(0)), j))
    return {position // block_size} | {j for _, j in sorted(scores)[: topk - 1]}


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int,
    mask: MaskContract | None = None,
    route_per: str = "query_head",
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    options = {"route_per": route_per, "scale": scale, "softcap": softcap, "sink": sink}
    if mask is not None and mask.is_tree:
        return on_each_path(oracle, q, k, v, mask, block_size=block_size, topk=topk, **options)
    return oracle_with_lse(q, k, v, block_size, topk, mask, **options)[0]


def oracle_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int,
    mask: MaskContract | None = None,
    route_per: str = "query_head",
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Query by query and head by head: who is seen, which blocks score best, one softmax over what both leave."""
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    mask, group = mask or MaskContract(), heads // kv_heads
    allowed = mask.dense(batch, queries, keys, device=q.device)[:, 0]
    docs = None if mask.doc_ids is None else mask.doc_ids.tolist()
    offset = mask.sizes(batch, queries, keys, q.device).one_offset
    rows, lses = [], []
    for b in range(batch):
        for t in range(queries):
            seen = allowed[b, t].nonzero().flatten().tolist()
            for h in range(heads):
                at = (
                    slice(h, h + 1)
                    if route_per == "query_head"
                    else slice(h // group * group, h // group * group + group)
                )
                k_SD, v_SD = k[b, :, h // group], v[b, :, h // group]
                if not seen:
                    rows.append(q[b, t, h].sum() * 0.0 + v_SD.sum(0) * 0.0)
                    lses.append(q[b, t, h].sum() * 0.0 - torch.inf)
                    continue
                doc = None if docs is None else docs[b]
                blocks = selected_by_hand(q[b, t, at], k_SD, seen, t + offset, block_size, topk, doc)
                kept = [s for s in seen if s // block_size in blocks]
                z = k_SD[kept] @ q[b, t, h] * (width**-0.5 if scale is None else scale)
                z = softcap * (z / softcap).tanh() if softcap else z
                logits = z if sink is None else torch.cat([z, sink[h : h + 1].to(z.dtype)])
                rows.append(logits.softmax(0)[: len(kept)] @ v_SD[kept])
                lses.append(logits.logsumexp(0))
    nothing = (q.sum() + k.sum() + v.sum()) * 0.0  # so that an empty call has a gradient too
    if not rows:
        return nothing.expand(*q.shape[:3], v.shape[3]), nothing.expand(batch, heads, queries)
    lse_BTH = torch.stack(lses).view(q.shape[:3]).to(torch.promote_types(q.dtype, torch.float32))
    return torch.stack(rows).view(*q.shape[:3], -1), lse_BTH.transpose(1, 2)


def filled(k: Tensor, v: Tensor, lengths: list[int], new: int, page: int) -> KVCache:
    """A cache of one layer that holds the first tokens of every row, with a step of ``new`` tokens open."""
    batch, tokens, heads, width = k.shape
    if page:
        paged = PagedKVCache(
            1, batch * (-(-(tokens + new) // page) + 1), page, heads, width, dtype=k.dtype, device=k.device
        )
        rows = [paged.allocate() for _ in lengths]
        paged.begin(rows, tokens)
        paged.append(0, k.detach(), v.detach())
        paged.advance(lengths)
        paged.begin(rows, new)
        return paged
    cache = ContiguousKVCache(1, batch, tokens + new, heads, width, dtype=k.dtype, device=k.device)
    cache.begin(tokens)
    cache.append(0, k.detach(), v.detach())
    cache.advance(lengths)
    cache.begin(new)
    return cache


def decode_on_copies(
    *, past_k: Tensor, past_v: Tensor, lengths: tuple[int, ...], page: int, k: Tensor, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the caches after the step."""
    cache = filled(past_k, past_v, list(lengths), k.shape[1], page)
    out = moba_decode(cache=cache, k=k, **more)
    return out, cache.k, cache.v


def decode_call(m: Maker, lengths: tuple[int, ...], new: int, *, page: int = 0, **more: Any) -> dict[str, Any]:
    past = qkv(m, len(lengths), 1, max(lengths), 4, 2, 8)
    own = qkv(m, len(lengths), new, new, 4, 2, 8)
    return {**own, "past_k": past["k"], "past_v": past["v"], "lengths": lengths, "page": page, "block_size": 4,
            "topk": 3, **more}  # fmt: skip


DECODE_CASES = (
    Case("step", "one token for each row, ragged lengths", lambda m: decode_call(m, (14, 1), 1)),
    Case("paged", "pages that are no multiple of a block, two tokens", lambda m: decode_call(
        m, (14, 5), 2, page=6, topk=2, route_per="kv_group")),
    Case("window", "a window that cuts a block, small pages, a softcap", lambda m: decode_call(
        m, (19,), 1, page=2, window_size=(9, 0), softcap=2.0, scale=0.7, route_per="kv_group")),
    Case("sink", "a sink for each head; the first query of a row sees nothing cached", lambda m: decode_call(
        m, (14, 0), 2, sink=m.normal(4))),
)  # fmt: skip


def decode_oracle(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    lengths: tuple[int, ...],
    page: int,
    window_size: tuple[int, int] = (-1, -1),
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row alone: everything that it has seen, as one call over the whole of it."""
    outs = []
    for b, n in enumerate(lengths):
        keys, values = (torch.cat([p[b : b + 1, :n], x[b : b + 1]], 1) for p, x in ((past_k, k), (past_v, v)))
        outs.append(oracle(q=q[b : b + 1], k=keys, v=values, mask=MaskContract(window=window_size), **more))
    cache = filled(past_k, past_v, list(lengths), k.shape[1], page)
    cache.append(0, k.detach(), v.detach())
    return torch.cat(outs), cache.k, cache.v


def sized(m: Maker, n: int) -> dict[str, Any]:
    return {**qkv(m, 2, n, n, 2, 1, 8), "block_size": 4, "topk": 2}


def real_decode(m: Maker) -> dict[str, Any]:
    """Four rows of 32768 tokens in pages of 64, 32 query heads on 8, blocks of 64 tokens of which 16 are selected."""
    rows, sizes = 4, (8, 128)
    past = {name: m.normal(rows, 32767, *sizes) for name in ("past_k", "past_v")}
    new = {"q": m.normal(rows, 1, 32, 128), "k": m.normal(rows, 1, *sizes), "v": m.normal(rows, 1, *sizes)}
    return {**new, **past, "lengths": (32767,) * rows, "page": 64, "block_size": 64, "topk": 16}


# At 300 scores pass 50, and a backward that recomputes probabilities from the log-sum-exp has lost that many units.
SCALES = (1e-3, 1.0, 16.0)

SUITES = (
    Suite(
        op="moba_attention", function=moba_attention,
        backends=tuple(b for b in BACKENDS if b.name != "triton"), cases=CASES,
        differentiable=("q", "k", "v", "sink"), oracle=oracle, sized=sized,  # the core's suite interprets that kernel
        scales=SCALES, rounding=("native", "cpu"), units=UNITS,  # the core's backward is that of dense attention
    ),
    Suite(
        op="moba_attention_with_lse", function=moba_attention_with_lse,
        backends=tuple(b for b in BACKENDS if b.name != "triton"),
        cases=tuple(c for c in CASES if c.name in ("heads", "sink", "more_queries")),
        differentiable=("q", "k", "v", "sink"), oracle=oracle_with_lse, sized=sized,
        scales=SCALES, rounding=("native", "cpu"), units=UNITS,
    ),
    Suite(
        op="moba_decode", function=decode_on_copies, backends=DECODE_BACKENDS, cases=DECODE_CASES,
        differentiable=("q", "k", "v", "sink"), oracle=decode_oracle,
        sized=lambda m, n: decode_call(m, (n, n - 2), 2),
        scales=SCALES, rounding=("triton", "native", "cpu"), without_gradient=("native", "cpu", "triton"),
        real=real_decode,
    ),
)  # fmt: skip
