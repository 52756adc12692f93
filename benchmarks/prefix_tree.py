"""What does a prefix tree save against one row for each answer?  Attention, forward and backward, by the same backend.

One prompt of 4,096 tokens and 8 answers of 512, 8 query heads on 2 KV heads of 64.  The tree has 4.5 times fewer tokens
and 3.24 times fewer scores.  Each call makes a new contract, so its plan is counted.

Target, as time of the tree ÷ that of the rows: 1 / 2.75.  Predicted: the scores decide, 1 / 3.2, where a tile of keys
that is on no path costs nothing; less for ``cpu``, which gathers the keys of each chunk of queries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from benchmarks.harness import Comparison, Contender, compare

PROMPT, ANSWERS, TOKENS = 4096, 8, 512
HEADS, KV_HEADS, WIDTH = 8, 2, 64
CALLS = (("auto", torch.bfloat16), ("auto", torch.float32), ("cpu", torch.bfloat16))


def leaves(rows: int, length: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = [(rows, length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


def step(tensors: list[Tensor], contract: Callable[[], ki.MaskContract], backend: Any) -> None:
    out = ki.attention(*tensors, contract(), backend=backend)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    if out.is_cuda:
        torch.cuda.synchronize()


def tree(backend: str, dtype: torch.dtype, device: str) -> Callable[[], Callable[[], None]]:
    def prepare() -> Callable[[], None]:
        packing = ki.pack_tree([-1, *[0] * ANSWERS], [PROMPT, *[TOKENS] * ANSWERS])
        ends, tensors = packing.subtree_end.to(device), leaves(1, len(packing.positions), dtype, device)
        return lambda: step(tensors, lambda: ki.MaskContract(subtree_end=ends), backend)

    return prepare


def rows(backend: str, dtype: torch.dtype, device: str) -> Callable[[], Callable[[], None]]:
    def prepare() -> Callable[[], None]:
        tensors = leaves(ANSWERS, PROMPT + TOKENS, dtype, device)
        return lambda: step(tensors, ki.MaskContract, backend)

    return prepare


def main(rounds: int = 5) -> list[Comparison]:
    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for backend, dtype in CALLS:
        if device == "cuda" and (backend != "auto" or dtype != torch.bfloat16):
            continue
        title = f"a prompt with {ANSWERS} answers, {str(dtype).removeprefix('torch.')}, backend {backend}, {device}"
        contenders = [
            Contender("tree", tree(backend, dtype, device), ours=True),
            Contender("a row for each answer", rows(backend, dtype, device)),
        ]
        targets = {"a row for each answer": 1 / 2.75}
        found.append(compare(title, contenders, rounds=rounds, targets=targets))
    return found


if __name__ == "__main__":
    main()
