"""Do packed documents and local windows cost what they contain?

B = 1, T = 16384, H = 8, D = 64, against one call of PyTorch's scaled_dot_product_attention with the dense mask, which
is made beforehand and not timed, and forward against FlexAttention with its block mask, made beforehand too.  Targets:
1/8 of the time and 0.1× the memory for 16 documents, 1/8 of the time for a window of 512, 1.05× for plain causal
attention; 1/200 of ``create_block_mask``'s time for a block plan.

Rows of everyday length follow: causal ones against the same call, masked ones against our own ``cpu`` backend, which is
PyTorch's kernel called for each rectangle of scores.

Predicted: documents need 1/32 of the dense scores and the kernel is the same one, so 1/20 to 1/30; a window of 512 by
256 queries at a time needs 1/21 of them, so about 1/16; plain causal is the same call, 1.00; a plan of 64 blocks from
8192 ids is a dozen small operations, against 67 million evaluations of a predicate: 1/1000 or less.  Memory counts
the results too: out, dq, dk and dv alone are 0.11 of what PyTorch takes, so 0.1 is met by the forward pass only.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

T, H, D = 16384, 8, 64
PLANNED, DOCUMENTS = 8192, 8

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def documents(length: int, count: int) -> Tensor:
    return (torch.arange(length) // (length // count))[None]


def ours(mask: ki.MaskContract) -> Attend:
    return lambda q, k, v: ki.attention(q, k, v, mask)


def dense(mask: ki.MaskContract) -> Attend:
    allowed = mask.dense(1, T, T, allow_large=True)
    return lambda q, k, v: scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed)


def flex(mask: ki.MaskContract) -> Attend:
    """FlexAttention, compiled, with the block mask made beforehand; on a CPU it has no backward."""
    blocks, attend = mask.flex_block_mask(128, 1, T, T, device="cpu"), torch.compile(flex_attention)
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks)


def causal() -> Attend:
    return lambda q, k, v: scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )


def contender(name: str, make: Callable[[], Attend], dtype: torch.dtype, backward: bool) -> Contender:
    def prepare() -> Callable[[], object]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, T, H, D).to(dtype).requires_grad_(backward) for _ in range(3))
        attend = make()
        upstream = torch.randn(1, T, H, D).to(dtype)
        if not backward:
            return lambda: attend(q, k, v)

        def call() -> object:
            out = attend(q, k, v)
            shaped = upstream if out.shape == upstream.shape else upstream.transpose(1, 2)
            return torch.autograd.grad(out, (q, k, v), shaped)

        return call

    return Contender(name, prepare, ours=name == "kernel_index")


EVERYDAY = ((1, 2048, 8, 4, 64), (1, 2048, 4, 4, 128), (1, 4096, 8, 4, 64), (4, 512, 3, 1, 64), (8, 128, 8, 8, 64))
"""B, T, H, K, D."""


def everyday(rounds: int, dtype: torch.dtype) -> list[Comparison]:
    """Forward + backward."""
    found = []
    for batch, length, heads, kv_heads, width in EVERYDAY:
        packed = ki.MaskContract(doc_ids=documents(length, DOCUMENTS)[0])
        for kind, mask in (("causal", ki.MaskContract()), (f"{DOCUMENTS} documents", packed)):
            theirs = causal() if kind == "causal" else lambda q, k, v, m=mask: ki.attention(q, k, v, m, backend="cpu")
            name = "SDPA, is_causal" if kind == "causal" else "backend='cpu'"

            def prepare(attend: Attend, sizes=(batch, length, heads, kv_heads, width)) -> Callable[[], object]:
                b, t, h, k, d = sizes
                leaves = [torch.randn(b, t, n, d).to(dtype).requires_grad_() for n in (h, k, k)]
                return lambda: torch.autograd.grad(attend(*leaves).sum(), leaves)

            pair = [
                Contender("kernel_index", lambda m=mask, p=prepare: p(ours(m)), ours=True),
                Contender(name, lambda a=theirs, p=prepare: p(a)),
            ]
            title = f"{kind}, {str(dtype).removeprefix('torch.')}, {batch} × {length}, {heads} on {kv_heads} of {width}"
            found.append(compare(title, pair, rounds=rounds))
    return found


def plans(rounds: int) -> Comparison:
    ids = documents(PLANNED, DOCUMENTS)

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (ids[b, q] == ids[b, k])

    def fresh(lower: Callable[[ki.MaskContract], object]) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: lower(ki.MaskContract(doc_ids=ids))  # a new contract each time: nothing is kept

    def theirs() -> Callable[[], object]:
        return lambda: create_block_mask(predicate, 1, None, PLANNED, PLANNED, device="cpu")

    contenders = [
        Contender("kernel_index", fresh(lambda mask: mask.block_plan(128, 128)), ours=True),
        Contender("flex_block_mask()", fresh(lambda mask: mask.flex_block_mask(128))),
        Contender("create_block_mask", theirs),
    ]
    title = f"block plan, {DOCUMENTS} documents, T={PLANNED}"
    return compare(title, contenders, rounds=rounds, targets={"create_block_mask": 1 / 200})


def main(rounds: int = 9) -> list[Comparison]:
    packed, window = ki.MaskContract(doc_ids=documents(T, 16)), ki.MaskContract(window=(511, 0))
    results = [plans(rounds)]
    for dtype in (torch.bfloat16, torch.float32):
        for backward in (False, True):
            passes = "forward + backward" if backward else "forward"
            tail = f"{str(dtype).removeprefix('torch.')}, T={T} H={H} D={D}, {passes}"
            name = "SDPA, dense mask"
            for title, mask, memory in (("16 documents", packed, {name: 0.1}), ("window 512", window, None)):
                contenders = [
                    contender("kernel_index", lambda m=mask: ours(m), dtype, backward),
                    contender(name, lambda m=mask: dense(m), dtype, backward),
                ]
                if not backward:
                    contenders.append(contender("FlexAttention", lambda m=mask: flex(m), dtype, backward))
                few = max(1, rounds // 4)  # the dense mask takes seconds to tens of seconds
                targets = {name: 1 / 8}
                found = compare(f"{title}, {tail}", contenders, rounds=few, targets=targets, memory_targets=memory)
                results.append(found)
            contenders = [
                contender("kernel_index", lambda: ours(ki.MaskContract()), dtype, backward),
                contender("SDPA, is_causal", causal, dtype, backward),
            ]
            few = max(1, rounds // 2)
            results.append(compare(f"causal, {tail}", contenders, rounds=few, targets={"SDPA, is_causal": 1.05}))
        results += everyday(rounds, dtype)
    return results
