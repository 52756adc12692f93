"""Is attention to selected blocks faster than dense attention, with everything that the selection costs?

B = 1, H = 8 on K = 2 KV heads, D = 64, blocks of 64, 16 of them for each query: ``clustered_sparse_attention``, and
MoBA that selects by query head, with routing and planning, against PyTorch's scaled_dot_product_attention, causal, of
the same length. *Random*: queries are independent, so neighbours share nothing but by chance. *Shared*: queries
drift, so that a query shares 85 % of its selected blocks with the one before it.

Targets, as times of ours ÷ theirs: random at T = 16384 1/2.5 in float32 and 1/1.3 in bfloat16, shared 1/3 in both,
random at T = 65536 1/6 and 1/3; at T = 6144 (float32) and 12288 (bfloat16) not slower. Memory beyond inputs and
outputs grows like T.

Predicted, of the native kernels: 16 of 256 blocks are 34 GFLOP of dense attention's 275 forward, at half its rate,
since a product has 64 rows and the work between two products costs as much as they do; the router is a tenth. So
forward 4 times faster, wherever the dense kernel runs at the rate of its products; less in bfloat16 where those are
so fast (AMX) that exponentials and added rows are most of the time. With backward about the same. Sharing changes
nothing: the work grows with the selected blocks of each query, not with unions.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare, console

H, K, D = 8, 2, 64
CONFIG = ki.ClusteredSparseConfig(block_size=64, topk=16)
DRIFT = 0.975
"""Correlation of neighbouring queries at which they share 85 % of their selected blocks."""

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


def moba(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query head selects its own blocks: four times the selections to make, as many scores to compute."""
    return ki.moba_attention(q, k, v, block_size=CONFIG.block_size, topk=CONFIG.topk)


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

    return Contender(name, prepare, ours=attend is not dense)


def question(
    length: int,
    dtype: torch.dtype,
    shared: bool,
    backward: bool,
    target: float | None,
    rounds: int,
    memory: bool,
    attend: Callable[..., Tensor] = ours,
) -> Comparison:
    call = (length, dtype, shared, backward)
    contenders = [contender("kernel_index", attend, *call), contender(DENSE, dense, *call)]
    routing, passes = "shared 85 %" if shared else "random", "forward + backward" if backward else "forward"
    kind = "MoBA" if attend is moba else "clustered"
    title = f"{kind}, {routing} picks, {str(dtype).removeprefix('torch.')}, T={length}, {passes}"
    targets = {} if target is None else {DENSE: target}
    return compare(title, contenders, rounds=rounds, targets=targets, memory_targets={} if memory else None)


def shares(length: int, dtype: torch.dtype, shared: bool) -> list[Comparison]:
    """What routing takes of a forward pass; the rest is attention, which plans as it goes."""

    def prepared(part: Callable[..., object]) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            q, k, v = inputs(length, dtype, shared)
            return lambda: part(q, k, v)

        return prepare

    contenders = [
        Contender("all of it", prepared(ours), ours=True),
        Contender("routing", prepared(lambda q, k, v: ki.clustered_route(q, k, config=CONFIG))),
    ]
    found = compare(f"shares, {str(dtype).removeprefix('torch.')}, T={length}, forward", contenders, rounds=3)
    if found.rows:
        routing = 1 / found.ratio("routing")
        console.print(f"routing {routing:.0%}, attention {1 - routing:.0%}", highlight=False)
    return [found]


def main(rounds: int = 9) -> list[Comparison]:
    few = max(1, rounds // 3)
    results = []
    for dtype, random, long, even in ((torch.float32, 2.5, 6, 6144), (torch.bfloat16, 1.3, 3, 12288)):
        results.append(question(even, dtype, False, False, 1.0, few, memory=False))
        for backward in (False, True):
            results.append(question(16384, dtype, False, backward, 1 / random, few, memory=True))
            results.append(question(16384, dtype, True, backward, 1 / 3, few, memory=False))
            results.append(question(16384, dtype, False, backward, 1 / random, few, memory=False, attend=moba))
        results += shares(16384, dtype, False)
        results.append(question(65536, dtype, False, False, 1 / long, 1, memory=False))
    results.extend(question(t, torch.float32, False, True, None, 1, memory=True) for t in (4096, 8192, 32768))
    return results
