"""Does decoding over selected blocks take a tenth of what dense decoding takes?

65536 cached tokens in a contiguous cache, 8 query heads, 2 KV heads of size 64, blocks of 64 tokens of which 16 are
selected, one new token for each row, routing included.  Against ``ki.fa4_kvcache_decode`` over the same cache, which
reads each key once for the 4 query heads of its group.  Target: 1/10 of its time.

A model has a cache for every layer, which no processor's caches hold: a call goes over 4 layers of one row, or over one
layer of 4 rows, 268 MB of keys and values in float32 either way.

Predicted: dense decoding reads 2 · 65536 · 2 · 64 elements of a row, 67 MB in float32.  Routing reads 1024 means of
each KV head, 0.5 MB, and selects for each query head; 8 heads then read 16 · 64 keys and values, 4 MB.  That is 1/14 of
the bytes in one call of a native kernel, between some 20 small operations (0.1 ms) that write and count: 1/12.
With one selection for the heads of a KV head (``kv_group``) it is 1/45 of the bytes: 1/20 to 1/30.
"""

from collections.abc import Callable

import torch

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

CACHED, HEADS, KV_HEADS, WIDTH, BLOCK, PICKED = 65536, 8, 2, 64, 64, 16
AT_ONCE = 4  # rows times layers
TARGET = 0.1


def cache_of(layers: int, rows: int, dtype: torch.dtype) -> ki.ContiguousKVCache:
    """A cache with room for one token more; the same step can be opened again and again, as it is never advanced."""
    cache = ki.ContiguousKVCache(layers, rows, CACHED + 1, KV_HEADS, WIDTH, dtype=dtype)
    cache.begin(CACHED)
    for layer in range(layers):
        cache.append(layer, *(torch.randn(rows, CACHED, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2)))
    cache.advance()
    return cache


def step(rows: int, dtype: torch.dtype, decode: Callable[..., object]) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        torch.manual_seed(0)
        cache = cache_of(AT_ONCE // rows, rows, dtype)
        q, k, v = (torch.randn(rows, 1, heads, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))

        def call() -> object:
            cache.begin(1)
            return [decode(q, cache.layer(layer), k, v) for layer in range(cache.layers)]

        return call

    return prepare


def routed(per: str) -> Callable[..., object]:
    return lambda q, layer, k, v: ki.moba_decode(
        q, layer, k=k, v=v, block_size=BLOCK, topk=PICKED, route_per=per, backend="native"
    )


def dense(q: torch.Tensor, layer: ki.CacheLayer, k: torch.Tensor, v: torch.Tensor) -> object:
    return ki.fa4_kvcache_decode(q, k=k, v=v, **layer)


def main(rounds: int = 9) -> list[Comparison]:
    results = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, AT_ONCE):
                for per in ("query_head", "kv_group"):
                    name = str(dtype).removeprefix("torch.")
                    contenders = [
                        Contender("kernel_index", step(rows, dtype, routed(per)), ours=True),
                        Contender("dense decode", step(rows, dtype, dense)),
                    ]
                    title = (
                        f"decode step, {AT_ONCE // rows} layers × {rows} rows × {CACHED} tokens, picks by {per}, {name}"
                    )
                    results.append(compare(title, contenders, rounds=rounds, targets={"dense decode": TARGET}))
    return results
