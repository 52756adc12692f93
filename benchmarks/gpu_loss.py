"""What does the loss of a large vocabulary take on a GPU, beside quack, Liger-Kernel and compiled full logits?

``python -m benchmarks.gpu_loss --out FILE``: forward and backward in bfloat16, milliseconds, and what a step holds at
most beyond its arguments, gradients included.  Contenders take turns, several times, since a GPU at its power limit
runs slower for whoever comes later; ``ms`` is the median, ``min_ms`` the best.  Targets for 8192 tokens of 4096
channels and 128,256 classes: 38 ms with 3.5 GB, 47 ms with 1.25 GB, 1.02 times as much with the log-sum-exp, and
``token_stats`` 1.1 times ``token_log_probs``.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import torch.nn.functional as F
import typer
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_experts import memory_mib
from benchmarks.gpu_session import DryRun, LeftOut, Only, Out, Seconds, Session, Warm
from benchmarks.harness import console
from kernel_index.core.terminal import print_table
from kernel_index.proofs.tune import timing

SIZES = ((8192, 4096, 128_256), (16_384, 2048, 128_256))
TINY = ((24, 16, 48),)

REST = 0.2
"""Seconds between two contenders."""

Step = Callable[[], object]


class Inputs:
    def __init__(self, tokens: int, channels: int, vocab: int, device: str):
        g = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(tokens, channels, generator=g, device=device).to(torch.bfloat16).requires_grad_()
        weight = torch.randn(vocab, channels, generator=g, device=device) * channels**-0.5
        self.weight = weight.to(torch.bfloat16).requires_grad_()
        self.bias = torch.randn(vocab, generator=g, device=device).to(torch.bfloat16).requires_grad_()
        self.targets = torch.randint(vocab, (tokens,), generator=g, device=device)
        self.half = torch.where(torch.arange(tokens, device=device) % 2 == 0, self.targets, -100)
        self.upstream = torch.randn(tokens, generator=g, device=device) / tokens

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


def of_loss(inputs: Inputs, function: Callable[..., Tensor], targets: Tensor | None = None, **options: Any) -> Step:
    def step() -> object:
        loss = function(*inputs.leaves, inputs.targets if targets is None else targets, **options)
        return loss.detach(), torch.autograd.grad(loss, inputs.leaves)

    return step


def with_lse(inputs: Inputs, **options: Any) -> Step:
    """Both outputs have gradients, of which the second one differs by token."""

    def step() -> object:
        found = ki.fused_linear_cross_entropy_with_lse(*inputs.leaves, inputs.targets, **options)
        upstream = torch.ones_like(found.loss), inputs.upstream
        return found.loss.detach(), torch.autograd.grad((found.loss, found.lse), inputs.leaves, upstream)

    return step


def with_bias(inputs: Inputs, **options: Any) -> Step:
    leaves = (*inputs.leaves, inputs.bias)

    def step() -> object:
        loss = ki.fused_linear_cross_entropy(*inputs.leaves, inputs.targets, bias=inputs.bias, **options)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    return step


def of_tokens(inputs: Inputs, function: Callable[..., Any]) -> Step:
    def step() -> object:
        found = function(*inputs.leaves, inputs.targets)
        found = found if isinstance(found, Tensor) else found.log_prob
        return found.sum().detach(), torch.autograd.grad(found, inputs.leaves, inputs.upstream)

    return step


def quack(inputs: Inputs) -> Step:
    """With quack's own choice of configurations, which takes it no first call of minutes."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return of_loss(inputs, chunked_linear_cross_entropy, tuned=False)


def liger(inputs: Inputs) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return of_loss(inputs, liger_fused_linear_cross_entropy)


def compiled(inputs: Inputs) -> Step:
    if not inputs.hidden.is_cuda:
        raise LeftOut("compiling takes long in a dry run")
    torch._dynamo.reset()
    return of_loss(inputs, torch.compile(lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t)))


def contenders(inputs: Inputs) -> dict[str, Callable[[], Step]]:
    loss, tokens = ki.fused_linear_cross_entropy, inputs.targets.numel()
    every = {"chunk_size": tokens}
    ours = {
        "default": lambda: of_loss(inputs, loss),
        "all tokens": lambda: of_loss(inputs, loss, **every),
        "log-sum-exp, default": lambda: with_lse(inputs),
        "log-sum-exp, all tokens": lambda: with_lse(inputs, **every),
        "an eighth of the tokens": lambda: of_loss(inputs, loss, chunk_size=tokens // 8),
        "half of the tokens": lambda: of_loss(inputs, loss, chunk_size=tokens // 2),
        "softcap": lambda: of_loss(inputs, loss, softcap=30.0),
        "half ignored": lambda: of_loss(inputs, loss, targets=inputs.half),
        "bias": lambda: with_bias(inputs),
        "token_log_probs": lambda: of_tokens(inputs, ki.token_log_probs),
        "token_stats": lambda: of_tokens(inputs, ki.token_stats),
    }
    others = {"quack": quack, "Liger-Kernel": liger, "full logits, compiled": compiled}
    return ours | {name: partial(make, inputs) for name, make in others.items()}


def prepared(step: Step) -> Step:
    step()
    step()
    return step


def measured(session: Session, cell: str, given: dict[str, Callable[[], Step]], rounds: int) -> dict[str, Any]:
    """Milliseconds and MiB of those that run, all of them in turn."""
    dry = session.dry or bool(session.warm)
    steps = session.measured(cell, given, prepared)
    found: dict[str, Any] = {name: {"ms": 1.0, "min_ms": 1.0, "MiB": 1.0} for name in steps}
    if dry:
        return found
    for name, step in steps.items():
        found[name]["MiB"] = round(memory_mib(step))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            time.sleep(REST)
            timing.elapsed(step)
            seconds[name].append(timing.elapsed(step))
    for name, times in seconds.items():
        found[name] |= {"ms": round(1e3 * statistics.median(times), 2), "min_ms": round(1e3 * min(times), 2)}
    return found


PAIRS = (
    ("log-sum-exp, default", "default"),
    ("log-sum-exp, all tokens", "all tokens"),
    ("token_stats", "token_log_probs"),
)


def show(row: dict[str, Any]) -> None:
    found = row["contenders"]
    lines = [[name, f"{of['ms']:.2f}", f"{of['min_ms']:.2f}", f"{of['MiB']:.0f}"] for name, of in found.items()]
    print_table(console, ("", "ms", "best", "MiB"), lines, row["case"])
    for a, b in PAIRS:
        if a in found and b in found:
            console.print(f"{a} ÷ {b}: {found[a]['ms'] / found[b]['ms']:.3f}", highlight=False)


def main(
    out: Out,
    only: Only = "",
    seconds: Seconds = 540.0,
    dry_run: DryRun = False,
    warm: Warm = "",
    rounds: Annotated[int, typer.Option(help="How often every contender has its turn.")] = 7,
    names: Annotated[str, typer.Option(help="Only contenders of these names, separated by semicolons.")] = "",
) -> None:
    """Time the loss beside its peers."""
    session = Session("loss", Path(out), only, seconds, dry_run, warm)
    for size in TINY if dry_run else SIZES:
        cell = "N={} C={} V={}".format(*size)
        if not session.wants(cell, cell in {row["case"] for row in session.rows()}):
            continue
        given = contenders(Inputs(*size, "cpu" if dry_run else "cuda"))
        given = {name: make for name, make in given.items() if not names or name in names.split(";")}
        row = {"case": cell, "contenders": measured(session, cell, given, rounds)}
        session.add(row)
        show(row)
        del given
        gc.collect()


if __name__ == "__main__":
    typer.run(main)
