"""What does attention to selected tokens cost beside attention to all of them?

H = 8, K = 2, D = 64, 256 tokens for each query, against one causal call of PyTorch's scaled_dot_product_attention at
the same length; the selection is given.  And the indexer with 4 heads of 64 against all scores at once and
``torch.topk``.  No target: whether it pays depends on how much neighbouring queries share, and this is the question.

Predicted for T = 16384: 64 queries that share 85 % of their tokens have about 2500 distinct keys, of 8192 that a query
sees on average, so 0.3 of the products in smaller tiles and with a mask: 0.4 to 0.6 of the time in float32, about
1 in bfloat16, whose dense kernel gains more from large tiles.  Where nothing is shared they select nearly all: 1.5 to
3.  The indexer sorts in place of storing T·S scores: about the time of the other, a twentieth of its memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

T, H, K, D, PICKS = 16384, 8, 2, 64, 256
INDEXED, INDEX_HEADS = 8192, 4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def selected_tokens(shared: float) -> Tensor:
    """Indices before each query, drawn evenly; this share of them the same for 64 neighbours."""
    row = torch.arange(T)
    own = (torch.rand(T, PICKS) * (row[:, None] + 1)).long()
    common = (torch.rand(T // 64, PICKS) * (row[::64, None] + 1)).long().repeat_interleave(64, 0)
    return torch.where(torch.rand(T, PICKS) < shared, common, own)[None]


def contender(name: str, attend: Callable[[], Attend], dtype: torch.dtype, backward: bool) -> Contender:
    def prepare() -> Callable[[], object]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, T, heads, D).to(dtype).requires_grad_(backward) for heads in (H, K, K))
        upstream = torch.randn(1, T, H, D).to(dtype)
        call = attend()
        if backward:
            return lambda: torch.autograd.grad(call(q, k, v), (q, k, v), upstream)
        return lambda: call(q, k, v)

    return Contender(name, prepare, ours=name == "kernel_index")


def ours(shared: float) -> Attend:
    selected = selected_tokens(shared)
    return lambda q, k, v: ki.exact_token_attention(q, k, v, selected)


def dense() -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


def indexers(rounds: int) -> Comparison:
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        shapes = ((1, INDEXED, INDEX_HEADS, D), (1, INDEXED, D), (1, INDEXED, INDEX_HEADS))
        q, k, w = (torch.randn(shape) for shape in shapes)
        return q, k, w

    def streamed() -> Callable[[], object]:
        call = inputs()
        return lambda: ki.lightning_indexer(*call, topk=PICKS)

    def stored() -> Callable[[], object]:
        q, k, w = inputs()
        future = torch.ones(INDEXED, INDEXED, dtype=torch.bool).triu(1)

        def call() -> object:
            scores = sum((q[0, :, j] @ k[0].T).relu_().mul_(w[0, :, j, None]) for j in range(INDEX_HEADS))
            return torch.topk(scores.masked_fill_(future, -torch.inf), PICKS)

        return call

    contenders = [Contender("kernel_index", streamed, ours=True), Contender("all scores, topk", stored)]
    return compare(f"indexer, T={INDEXED}, {PICKS} picks", contenders, rounds=rounds, memory_targets={})


def main(rounds: int = 3) -> list[Comparison]:
    results = [indexers(max(1, rounds // 2))]
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            for shared in (0.85, 0.0):
                passes = "forward + backward" if backward else "forward"
                title = f"{shared:.0%} shared, {str(dtype).removeprefix('torch.')}, T={T}, {PICKS} picks, {passes}"
                contenders = [
                    contender("kernel_index", lambda share=shared: ours(share), dtype, backward),
                    contender("SDPA, is_causal", dense, dtype, backward),
                ]
                results.append(compare(title, contenders, rounds=max(1, rounds // 3)))
    return results
