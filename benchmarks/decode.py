"""Does a decoding step through our caches cost what one bare attention call costs?

Batch 16, 4096 cached tokens, 8 query heads, 2 KV heads of size 64; the step writes one new token for each row.

Predicted: a step reads 2 · 16 · 4096 · 2 · 64 elements, 67 MB in float32, and does nothing else of that size.  The bare
call reads the keys of a group once for each of its 4 query heads, from cache at best, and we read them once: contiguous
0.5 to 1.0 of it.  Pages in random order are copied row by row, 4 MB at a time that stay in cache: 1.0 to 1.8.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

ROWS, CACHED, HEADS, KV_HEADS, WIDTH, PAGE = 16, 4096, 8, 2, 64, 64
TARGET = {"contiguous": 1.1, "paged": 2.0}


def new_tokens(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(ROWS, 1, heads, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))


def caches(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2)]


def bare(dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        q, _, _ = new_tokens(dtype)
        k, v = caches(dtype, ROWS, CACHED)
        call = [x.transpose(1, 2) for x in (q, k, v)]
        return lambda: scaled_dot_product_attention(*call, enable_gqa=True)

    return prepare


def contiguous(dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        q, k, v = new_tokens(dtype)
        cache = caches(dtype, ROWS, CACHED)
        return lambda: ki.fa4_kvcache_decode(q, *cache, cache_seqlens=CACHED - 1, k=k, v=v)

    return prepare


def paged(dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        q, k, v = new_tokens(dtype)
        slots = CACHED // PAGE
        cache = caches(dtype, ROWS * slots, PAGE)
        table = torch.randperm(ROWS * slots).view(ROWS, slots).to(torch.int32)
        lengths = torch.full((ROWS,), CACHED - 1, dtype=torch.int32)
        return lambda: ki.fa4_kvcache_decode(q, *cache, cache_seqlens=lengths, k=k, v=v, block_table=table)

    return prepare


def main(rounds: int = 9) -> list[Comparison]:
    results = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for kind, ours in (("contiguous", contiguous(dtype)), ("paged", paged(dtype))):
                name = str(dtype).removeprefix("torch.")
                title = f"decode step, {kind} cache, {ROWS} rows × {CACHED} tokens, {name}"
                contenders = [Contender("kernel_index", ours, ours=True), Contender("one bare SDPA call", bare(dtype))]
                results.append(compare(title, contenders, rounds=rounds, targets={"one bare SDPA call": TARGET[kind]}))
    return results
