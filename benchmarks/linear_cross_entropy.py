"""Is the chunked loss as fast as full logits, in a fraction of their memory?

N = 4096 tokens, C = 1024, V = 50304, mean loss, gradients of hidden and weight.  Targets: 1.25× the time and 0.2× the
memory of full logits; 0.5× (bfloat16) and 1.0× (float32) the time and 1.0× the memory of PyTorch's chunked operator.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

N, C, V = 4096, 1024, 50304


def full_logits(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), t)


def torch_chunked(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, w, t, options=torch.nn.LinearCrossEntropyOptions())


def contender(name: str, function: Callable[..., Tensor], dtype: torch.dtype) -> Contender:
    def prepare() -> Callable[[], object]:
        torch.manual_seed(0)
        h = torch.randn(N, C).to(dtype).requires_grad_()
        w = (torch.randn(V, C) * C**-0.5).to(dtype).requires_grad_()
        t = torch.randint(0, V, (N,))
        return lambda: torch.autograd.grad(function(h, w, t), (h, w))

    return Contender(name, prepare, ours=name == "kernel_index")


def main(rounds: int = 3) -> list[Comparison]:
    results = []
    for dtype, time_of_torch in ((torch.bfloat16, 0.5), (torch.float32, 1.0)):
        contenders = [
            contender("kernel_index", ki.fused_linear_cross_entropy, dtype),
            contender("full logits", full_logits, dtype),
        ]
        targets, memory = {"full logits": 1.25}, {"full logits": 0.2}
        if hasattr(F, "linear_cross_entropy"):
            contenders.append(contender("F.linear_cross_entropy", torch_chunked, dtype))
            targets["F.linear_cross_entropy"], memory["F.linear_cross_entropy"] = time_of_torch, 1.0
        title = f"linear cross-entropy, {str(dtype).removeprefix('torch.')}, N={N} C={C} V={V}, forward + backward"
        # Each call takes seconds: a third of the rounds say as much as of the elementwise ops.
        results.append(compare(title, contenders, rounds=max(1, rounds // 3), targets=targets, memory_targets=memory))
    return results
