"""What do prefix trees save on a GPU, against one row for each answer?  One prompt of 4,096 tokens, 8 answers of 512.

``python -m benchmarks.gpu_trees``: attention, forward and backward, four trees of 32 query heads on 8 of 128, each call
with a new contract, so that the plan is counted; then a training step of ``small`` under bfloat16 autocast, on 4 trees,
and on 16 with recomputation.  Peaks are of PyTorch's allocator, with parameters, gradients and activations.

Targets: 2.2 times as fast as flash-attn-4 on the rows; the step 2.5 times, at 0.45 of the memory.  Predicted: the
scores are 3.24 times fewer and the tokens 4.5 times; flash-attn-4 by lists of tiles took 0.31 of the time for the rows,
without a plan.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_session import needs_gpu
from benchmarks.harness import console, duration
from kernel_index.lm.config import PRESETS
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.trees import TokenTree, TreeBatch

OPS = ("attention", "fused_linear_cross_entropy")
PROMPT, ANSWERS, TOKENS = 4096, 8, 512
PARENTS, RUNS = [-1, *[0] * ANSWERS], [PROMPT, *[TOKENS] * ANSWERS]

Step = Callable[[], object]


def leaves(rows: int, length: int) -> list[Tensor]:
    options = {"device": "cuda", "dtype": torch.bfloat16}
    return [torch.randn(rows, length, heads, 128, **options).requires_grad_() for heads in (32, 8, 8)]


def attention_steps(trees: int) -> dict[str, Step]:
    ends = ki.pack_tree(PARENTS, RUNS).subtree_end.cuda()
    shared = leaves(trees, sum(RUNS))
    apart = leaves(trees * ANSWERS, PROMPT + TOKENS)

    def step(tensors: list[Tensor], attend: Callable[..., Tensor]) -> None:
        out = attend(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    def peer(*tensors: Tensor) -> Tensor:
        from flash_attn.cute import flash_attn_func

        out = flash_attn_func(*tensors, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return {
        "trees": lambda: step(shared, lambda *x: ki.attention(*x, ki.MaskContract(subtree_end=ends))),
        "trees, triton": lambda: step(
            shared, lambda *x: ki.attention(*x, ki.MaskContract(subtree_end=ends), backend="triton")
        ),
        "rows": lambda: step(apart, lambda *x: ki.attention(*x, ki.MaskContract())),
        "rows, triton": lambda: step(apart, lambda *x: ki.attention(*x, ki.MaskContract(), backend="triton")),
        "rows, flash-attn-4": lambda: step(apart, peer),
    }


def model_steps(trees: int, recompute: bool) -> dict[str, Step]:
    config = replace(PRESETS["small"].model, context=PROMPT + TOKENS)
    torch.manual_seed(0)
    model = LanguageModel(config).cuda()
    for block in model.hybrid_blocks():
        block.recompute = recompute
    found = [TokenTree(PARENTS, [torch.randint(0, config.vocab, (n,)) for n in RUNS]) for _ in range(trees)]
    shared = TreeBatch.of(found)
    tokens = torch.stack([torch.cat((t.runs[0], answer)) for t in found for answer in t.runs[1:]])
    at = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    apart = Batch(tokens, tokens.roll(-1, 1), at, torch.zeros_like(tokens), torch.full((len(tokens),), at.shape[1]))
    apart = Batch(*(t.cuda() for t in apart))

    def step(batch: Batch | TreeBatch) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            model.loss(batch).backward()
        model.zero_grad(set_to_none=True)

    return {"trees": lambda: step(shared.to("cuda")), "rows": lambda: step(apart)}


def show(title: str, steps: dict[str, Step], rounds: int) -> None:
    """Median seconds, by turns, and GiB at the peak of the second step: the first one compiles."""
    peaks, seconds = {}, {name: list[float]() for name in steps}
    for name, step in steps.items():
        step()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds["trees"])
    for name, times in seconds.items():
        median = statistics.median(times)
        console.print(f"{title}: {name}: {duration(median)}, {median / ours:.2f} of trees', peak {peaks[name]:.1f} GiB")


def main(rounds: int = 5) -> None:
    needs_gpu()
    console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    show("attention", attention_steps(4), rounds)
    for trees, recompute in ((4, False), (16, True)):
        gc.collect()
        torch.cuda.empty_cache()
        try:
            show(f"small on {trees} trees" + ", recomputed" * recompute, model_steps(trees, recompute), rounds)
        except torch.OutOfMemoryError as error:
            console.print(f"{trees} trees: {str(error)[:120]}")


if __name__ == "__main__":
    main()
