"""Is attention to picked blocks faster than dense attention, with everything that picking costs?

B = 1, H = 8 on K = 2 key heads, D = 64, blocks of 64, 16 of them for each query: ``clustered_sparse_attention``, with
routing and planning, against PyTorch's scaled_dot_product_attention, causal, of the same length.  *Random*: queries
are independent, so neighbours share nothing but by chance.  *Shared*: queries drift, so that a query shares 85 % of its
picks with the one before it.

Targets, as times of ours ÷ theirs: random at T = 16384 1/2.5 in float32 and 1/1.3 in bfloat16, shared 1/3 in both,
random at T = 65536 1/6 and 1/3; at T = 6144 (float32) and 12288 (bfloat16) not slower.  Memory beyond inputs and
outputs grows like T.

Predicted: 16 of 256 blocks are 34 GFLOP of dense attention's 275 forward.  Matrix products of one block run at two
thirds (float32) to all (bfloat16) of dense attention's rate; gathering rows and adding them back costs as much again in
bfloat16.  So forward 3 to 4 times faster in float32, 1.5 to 2 in bfloat16; with backward, where PyTorch's bfloat16
kernel is slow, about 4 and 3.  Sharing changes neither: the work goes by pick, not by union.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare, console
from kernel_index.sparse.block_sparse_attention.tiles import tiles_of

H, K, D = 8, 2, 64
CONFIG = ki.ClusteredSparseConfig(block_size=64, topk=16)
DRIFT = 0.975
"""Correlation of neighbouring queries at which they share 85 % of their picks."""

DENSE = "SDPA, is_causal"


def inputs(length: int, dtype: torch.dtype, shared: bool) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, D) for heads in (H, K, K))
    if shared:
        for t in range(1, length):
            q[:, t] = DRIFT * q[:, t - 1] + (1 - DRIFT**2) ** 0.5 * q[:, t]
    return [x.to(dtype) for x in (q, k, v)]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ki.clustered_sparse_attention(q, k, v, config=CONFIG)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


def contender(
    name: str, attend: Callable[..., Tensor], length: int, dtype: torch.dtype, shared: bool, backward: bool
) -> Contender:
    def prepare() -> Callable[[], object]:
        tensors = [x.requires_grad_(backward) for x in inputs(length, dtype, shared)]
        upstream = torch.randn(1, length, H, D).to(dtype)
        if not backward:
            return lambda: attend(*tensors)
        return lambda: torch.autograd.grad(attend(*tensors), tensors, upstream)

    return Contender(name, prepare, ours=attend is ours)


def question(
    length: int, dtype: torch.dtype, shared: bool, backward: bool, target: float | None, rounds: int, memory: bool
) -> Comparison:
    call = (length, dtype, shared, backward)
    contenders = [contender("kernel_index", ours, *call), contender(DENSE, dense, *call)]
    routing, passes = "shared 85 %" if shared else "random", "forward + backward" if backward else "forward"
    title = f"{routing} picks, {str(dtype).removeprefix('torch.')}, T={length}, {passes}"
    targets = {} if target is None else {DENSE: target}
    return compare(title, contenders, rounds=rounds, targets=targets, memory_targets={} if memory else None)


def shares(length: int, dtype: torch.dtype, shared: bool) -> list[Comparison]:
    """What routing and planning take of a forward pass; the rest is attention."""

    def prepared(part: Callable[..., object]) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            q, k, v = inputs(length, dtype, shared)
            mask = ki.MaskContract()
            sizes = mask.sizes(1, length, length, q.device)
            picks = ki.clustered_route(q, k, config=CONFIG)
            bounds = mask.row_intervals(sizes)
            return lambda: part(q, k, v, picks, bounds, sizes)

        return prepare

    def route(q: Tensor, k: Tensor, *_: object) -> object:
        return ki.clustered_route(q, k, config=CONFIG)

    def plan(q: Tensor, k: Tensor, v: Tensor, picks, bounds, sizes) -> object:
        return tiles_of(picks.indices, picks.valid, bounds, sizes, (K, H), CONFIG.block_size)

    contenders = [
        Contender("all of it", prepared(lambda q, k, v, *_: ours(q, k, v)), ours=True),
        Contender("routing", prepared(route)),
        Contender("planning", prepared(plan)),
    ]
    found = compare(f"shares, {str(dtype).removeprefix('torch.')}, T={length}, forward", contenders, rounds=3)
    if found.rows:
        parts = {name: 1 / found.ratio(name) for name in ("routing", "planning")}
        text = ", ".join(f"{name} {part:.0%}" for name, part in parts.items())
        console.print(f"{text}, attention {1 - sum(parts.values()):.0%}", highlight=False)
    return [found]


def main(rounds: int = 9) -> list[Comparison]:
    few = max(1, rounds // 3)
    results = []
    for dtype, random, long, even in ((torch.float32, 2.5, 6, 6144), (torch.bfloat16, 1.3, 3, 12288)):
        results.append(question(even, dtype, False, False, 1.0, few, memory=False))
        for backward in (False, True):
            results.append(question(16384, dtype, False, backward, 1 / random, few, memory=True))
            results.append(question(16384, dtype, True, backward, 1 / 3, few, memory=False))
        results += shares(16384, dtype, False)
        results.append(question(65536, dtype, False, False, 1 / long, 1, memory=False))
    results.extend(question(t, torch.float32, False, True, None, 1, memory=True) for t in (4096, 8192, 32768))
    return results
