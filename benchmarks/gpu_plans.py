"""How much of a step of sparse attention are its plans: sorts, unions and lists that say which queries read which keys?

``python -m benchmarks.gpu_plans --out FILE``: the calls of ``gpu_sparse`` at 64k tokens, forward and backward, kernels
by the profiler.  A kernel belongs to a plan if a function of ``PLANS`` or an op with ``_plan`` in its name launched it.
The router is part of a step and of no plan; ``attend`` is given its blocks.  Medians of ``STEPS`` steps.
"""

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import record_function

from benchmarks.gpu_profile import Kernel, kernels_of, trace
from benchmarks.gpu_session import DryRun, Only, Out, Seconds, Session
from benchmarks.gpu_sparse_calls import OURS, Cell, Inputs, Prepared
from benchmarks.harness import console
from kernel_index.core.terminal import print_table

OPS = ("clustered_sparse_attention", "moba_attention", "block_sparse_attention", "exact_token_attention")
BLOCKS, TOKENS = (
    "kernel_index.kernels.sparse.block_sparse_attention.",
    "kernel_index.kernels.attention.exact_token_sparse.",
)
PLANS = (
    (BLOCKS + "triton_plan", "with_parts"),
    (TOKENS + "triton_order", "keep_legal"),
    (TOKENS + "triton_order", "sort_alone"),
    (TOKENS + "torch_op", "unions_of"),
    (TOKENS + "triton_keys", "rounds_of"),
)
"""What makes plans inside of an op that does more."""

MARK = "plan of "
STEPS = 3
CELLS = tuple(
    Cell(kind, 65_536, 32, 4, shared, count=count)  # type: ignore[arg-type]
    for kind, count in (("blocks", 16), ("tokens", 2048))
    for shared in (False, True)
)
TINY = (Cell("blocks", 32, 2, 1, False, width=16, block=8, count=2), Cell("tokens", 32, 2, 1, True, width=16, count=2))


@contextmanager
def marked() -> Iterator[None]:
    """Inside, each function of ``PLANS`` is a range of the profiler."""
    with ExitStack() as stack:
        for module, name in PLANS:
            stack.enter_context(mock.patch.object(import_module(module), name, _in_range(module, name)))
        stack.enter_context(
            torch.autograd.set_multithreading_enabled(False)
        )  # ranges of the backward pass are there too
        yield


def _in_range(module: str, name: str) -> Callable[..., Any]:
    function = getattr(import_module(module), name)

    def run(*args: Any) -> Any:
        with record_function(MARK + name):
            return function(*args)

    return run


def of_plans(kernels: list[Kernel], events: dict[str, list[dict[str, Any]]]) -> list[Kernel]:
    """The kernels that were launched inside of a plan's range."""
    ranges = [(e["ts"], e["ts"] + e["dur"]) for e in events["user_annotation"] if e["name"].startswith(MARK)]
    ops = (e for e in events["cpu_op"] if e["name"].startswith("kernel_index::") and "_plan" in e["name"])
    ranges += [(e["ts"], e["ts"] + e["dur"]) for e in ops]
    ranges.sort()
    begins, ends = [begin for begin, _ in ranges], list[float]()
    for _, end in ranges:
        ends.append(max(end, ends[-1] if ends else end))

    def inside(kernel: Kernel) -> bool:
        at = bisect_right(begins, kernel.launched) - 1
        return at >= 0 and kernel.launched <= ends[at]

    return [kernel for kernel in kernels if inside(kernel)]


def measure(session: Session, inputs: Inputs, prepared: Prepared) -> dict[str, Any]:
    def step() -> None:
        torch.autograd.grad(prepared.call(), inputs.leaves, inputs.upstream)

    step()
    if session.dry:
        return {"step_ms": 1.0, "plan_ms": 0.0, "share": 0.0}
    step()
    found = []
    for _ in range(STEPS):
        events = trace(step)
        kernels = kernels_of(events)
        found.append((sum(k.length for k in kernels), of_plans(kernels, events)))
    whole = statistics.median(us for us, _ in found)
    plan = statistics.median(sum(k.length for k in kernels) for _, kernels in found)
    names = Counter[str]()
    for kernel in found[0][1]:
        names[kernel.name[:60]] += kernel.length
    longest = {name: round(us / 1e3, 3) for name, us in names.most_common(8)}
    numbers = {"step_ms": round(whole / 1e3, 3), "plan_ms": round(plan / 1e3, 3), "share": round(plan / whole, 4)}
    return numbers | {"launches": len(found[0][1]), "longest": longest}


def main(
    out: Out = Path("runs/gpu-plans.json"), only: Only = "", seconds: Seconds = 1e9, dry_run: DryRun = False
) -> None:
    """Measure the plans of sparse attention on this machine's GPU."""
    session = Session("plans", out, only, seconds, dry_run, "")
    for cell in TINY if dry_run else CELLS:
        identity = {"tokens": cell.tokens, "heads": cell.heads, "kv_heads": cell.kv_heads, "kind": cell.kind}
        identity["selection"] = cell.selection
        if not session.wants(cell.name, any(identity.items() <= row.items() for row in session.rows())):
            continue
        inputs = Inputs(cell, "cpu" if dry_run else "cuda")
        contenders = {
            name: made
            for name, made in inputs.contenders().items()
            if name.startswith(OURS) and "router" not in name and "indexer" not in name
        }
        with marked():
            found = session.measured(cell.name, contenders, lambda p, inputs=inputs: measure(session, inputs, p))
        for name, row in found.items():
            session.add(identity | {"contender": name.removeprefix(OURS)} | row)
    session.content["left_out"] = session.left_out
    session.save()
    head = ("cell", "call", "step, ms", "plans, ms", "share", "launches")
    print_table(console, head, [
        [f"{r['kind']} {r['tokens'] / 1024:g}k {r['selection']}", r["contender"], f"{r['step_ms']:.2f}",
         f"{r['plan_ms']:.2f}", f"{100 * r['share']:.1f} %", str(r.get("launches", ""))] for r in session.rows()
    ])  # fmt: skip
    for row in session.rows():
        console.print(row["contender"], row["selection"], row.get("longest", ""), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    import typer

    typer.run(main)
