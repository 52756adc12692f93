"""What does block-sparse attention take on a GPU, routing included, beside dense attention?

``python -m benchmarks.gpu_sparse``: 16 blocks of 64 keys for each query, bfloat16, heads of 128, causal; forward, then
forward and backward.  A group of heads or each head routes for itself.  Random queries share nothing; ``shared`` ones
are 64 neighbours that ask for nearly the same.  The core alone is given the blocks.  Times are of the device, by CUDA
graphs where a call can be captured; ``÷ dense`` is of the first dense contender that ran.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernel_index as ki
from benchmarks.harness import console
from kernel_index.core.terminal import print_table
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.proofs.numerics import launch_errors
from kernel_index.proofs.tune import timing

OPS = ("clustered_sparse_attention", "moba_attention", "block_sparse_attention")

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Cell:
    tokens: int
    heads: int
    kv_heads: int
    width: int
    block: int
    count: int

    def __str__(self) -> str:
        return f"{self.tokens // 1024}k {self.heads}/{self.kv_heads}"


CELLS = tuple(Cell(t * 1024, h, 4, 128, 64, 16) for t, h in ((8, 32), (32, 32), (32, 64), (64, 32), (128, 32)))
TINY = (Cell(64, 4, 2, 16, 16, 2),)


def inputs(cell: Cell, shared: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (cell.heads, cell.kv_heads, cell.kv_heads)
    q, k, v = (torch.randn(1, cell.tokens, n, cell.width, device=device) for n in heads)
    if shared:
        q = 0.95 * q[:, ::64].repeat_interleave(64, 1)[:, : cell.tokens] + 0.05**0.5 * torch.randn_like(q)
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in (q, k, v))
    return q, k, v


def sparse_calls(cell: Cell, leaves: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> dict[str, Call]:
    q, k, v = leaves
    config = ki.ClusteredSparseConfig(block_size=cell.block, topk=cell.count)
    routed = {"block_size": cell.block, "topk": cell.count}
    with torch.no_grad():
        picks = ki.moba_route(q, k, **routed, route_per="kv_group")

    def core() -> Tensor:
        found = block_sparse_attention(
            q, k, v, picks.indices, selected_valid=picks.valid, block_size=cell.block, **options
        )
        return found.out

    return {
        "clustered, per KV group": lambda: ki.clustered_sparse_attention(q, k, v, config=config, **options),
        "MoBA, per query head": lambda: ki.moba_attention(q, k, v, **routed, **options),
        "the core, per KV group": core,
    }


def dense_calls(leaves: tuple[Tensor, Tensor, Tensor]) -> dict[str, Call]:
    which = SDPBackend.FLASH_ATTENTION if leaves[0].is_cuda else SDPBackend.MATH

    def fa4() -> Tensor:
        from flash_attn.cute import flash_attn_func

        found = flash_attn_func(*leaves, causal=True)
        return found[0] if isinstance(found, tuple) else found

    def sdpa() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return {"dense, flash-attn-4": fa4, "dense, SDPA": sdpa}


def milliseconds(call: Call, leaves: tuple[Tensor, ...], upstream: Tensor, dry: bool) -> tuple[float, float]:
    """Forward, and forward and backward."""

    def infer() -> Tensor:
        with torch.no_grad():
            return call()

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, upstream)

    if dry:
        infer()
        train()
        return 1.0, 1.0
    return timing.device_us([infer])[0] / 1e3, timing.device_us([train])[0] / 1e3


def measured(cell: Cell, shared: bool, device: str) -> Iterator[tuple[str, float, float]]:
    dry = device == "cpu"
    leaves = inputs(cell, shared, device)
    upstream = torch.randn_like(leaves[0])
    calls = sparse_calls(cell, leaves, {"backend": "triton"} if dry else {})
    for name, call in (calls if shared else dense_calls(leaves) | calls).items():
        try:
            yield name, *milliseconds(call, leaves, upstream, dry)
        except (ImportError, ki.Ineligible, *launch_errors()) as error:
            console.print(f"{cell}, {name}: left out: {type(error).__name__}: {str(error)[:100]}", highlight=False)


def main(rounds: int = 1, device: str = "cuda") -> None:
    """``device="cpu"``: tiny sizes through the interpreter; its times mean nothing.  The best of ``rounds`` counts."""
    if device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
        console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", highlight=False)
    rows = []
    for cell in TINY if device == "cpu" else CELLS:
        dense: dict[str, tuple[float, float]] = {}
        for shared in (False, True):
            best: dict[str, tuple[float, float]] = {}
            for _ in range(rounds):
                for name, infer, train in measured(cell, shared, device):
                    known = best.get(name, (infer, train))
                    best[name] = min(known[0], infer), min(known[1], train)
            dense = dense or {name: times for name, times in best.items() if name.startswith("dense")}
            base = next(iter(dense.values()), (float("nan"), float("nan")))
            for name, times in best.items():
                ratios = [f"{took / whole:.3f}" for took, whole in zip(times, base, strict=True)]
                words = f"{cell} {'shared' if shared else 'random'}", name
                rows.append([*words, f"{times[0]:.2f}", ratios[0], f"{times[1]:.2f}", ratios[1]])
            if device == "cuda":
                torch.cuda.empty_cache()
    print_table(console, ("cell", "call", "forward, ms", "÷ dense", "and backward", "÷ dense"), rows)


if __name__ == "__main__":
    main()
