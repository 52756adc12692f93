"""One prompt with several answers as a tree, against one row for each answer: attention, forward and backward.

``python -m benchmarks.prefix_tree`` prints the time of both on this machine, taken by turns, and their ratio.  The
ideal ratio is that of the scores: both sides run the same backend.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--answers", type=int, default=8, help="answers to it")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads")
    parser.add_argument("--width", type=int, default=64, help="head size")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of q, k and v")
    parser.add_argument("--backend", default="auto", help="of attention")
    parser.add_argument("--rounds", type=int, default=5, help="times each side is taken")
    return parser.parse_args()


def step(tensors: list[Tensor], mask: ki.MaskContract, backend: Any) -> None:
    """Forward and backward; the contract is new in each step, so its plan is counted."""
    out = ki.attention(*tensors, mask, backend=backend)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


def seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    a = arguments()
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, a.dtype)
    tree = ki.pack_tree([-1, *[0] * a.answers], [a.prompt, *[a.tokens] * a.answers])
    ends, positions = tree.subtree_end.to(device), tree.positions.to(device)

    def drawn(rows: int, length: int) -> list[Tensor]:
        heads = (a.heads, a.kv_heads, a.kv_heads)
        shapes = [(rows, length, h, a.width) for h in heads]
        return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]

    packed, apart = drawn(1, len(positions)), drawn(a.answers, a.prompt + a.tokens)
    sides = {
        "tree": lambda: step(packed, ki.MaskContract(subtree_end=ends), a.backend),
        "rows": lambda: step(apart, ki.MaskContract(), a.backend),
    }
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(a.rounds):
        for name, run in sides.items():
            times[name].append(seconds(run, device))
    with ki.receipts() as log:
        sides["tree"]()
    medians = {name: statistics.median(found) for name, found in times.items()}
    row = a.prompt + a.tokens
    scores = a.answers * row * (row + 1) / 2
    shared = a.prompt * (a.prompt + 1) / 2 + a.answers * (a.tokens * a.prompt + a.tokens * (a.tokens + 1) / 2)
    print(f"backend {log[0].ran}, {a.dtype}, {device}; PyTorch {torch.__version__}")
    for name, median in medians.items():
        print(f"{name}: {median * 1e3:.1f} ms")
    print(f"tokens {a.answers * row / len(positions):.2f} x fewer, scores {scores / shared:.2f} x fewer")
    print(f"rows / tree: {medians['rows'] / medians['tree']:.2f}")


if __name__ == "__main__":
    main()
