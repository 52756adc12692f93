"""What do the C++ selections bring: blocks in two steps, and the indexer's choice of tokens, against PyTorch's calls?

One thread and two, float32.  The other side is the same function without a C++ compiler in sight, which is the chain of
small calls that it was.

Predicted: one query is all overhead, some hundred calls against one: 1/8.  Many queries do the same products and
compare while scores are in cache: 1/3.
"""

from collections.abc import Callable
from unittest import mock

import torch

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare
from kernel_index.core import native

OPS = ("lightning_indexer",)  # the other is no dispatched function
BLOCKS = ((1, 256), (9, 4096), (4096, 256), (1024, 16384))
TOKENS = ((1, 2049, 2, 32, 48), (1, 65536, 4, 64, 2048), (2048, 2048, 2, 32, 48), (1024, 16384, 4, 64, 2048))

Prepare = Callable[[], Callable[[], object]]


def blocks(queries: int, count: int) -> Prepare:
    def prepare() -> Callable[[], object]:
        q, keys = torch.randn(1, queries, 4, 64), torch.randn(1, count, 2, 64)
        options = {"block_size": 64, "kv_len": 64 * count, "mask": ki.MaskContract()}
        return lambda: ki.hierarchical_block_select(q, keys, **options)

    return prepare


def tokens(queries: int, keys: int, heads: int, width: int, kept: int) -> Prepare:
    def prepare() -> Callable[[], object]:
        q, k, w = torch.randn(1, queries, heads, width), torch.randn(1, keys, width), torch.randn(1, queries, heads)
        mask = ki.MaskContract()
        return lambda: ki.lightning_indexer(q, k, w, topk=kept, mask=mask)

    return prepare


def without_native(prepare: Prepare) -> Prepare:
    def prepared() -> Callable[[], object]:
        call = prepare()

        def plain() -> None:
            with mock.patch.object(native, "has_libraries", return_value=False):
                call()

        return plain

    return prepared


def main(rounds: int = 15) -> list[Comparison]:
    found, before = [], torch.get_num_threads()
    calls = [(f"blocks, {t} × {n}", blocks(t, n)) for t, n in BLOCKS]
    calls += [(f"tokens, {t} × {s}, {j} × {d}, {n} kept", tokens(t, s, j, d, n)) for t, s, j, d, n in TOKENS]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for title, prepare in calls:
                pair = [Contender("C++", prepare, ours=True), Contender("PyTorch's calls", without_native(prepare))]
                few = rounds if title.split()[1] in ("1", "9") else max(1, rounds // 3)
                found.append(compare(f"{title}, threads {threads}", pair, rounds=few))
    finally:
        torch.set_num_threads(before)
    return found


if __name__ == "__main__":
    main()
