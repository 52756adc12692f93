"""What does sparse attention take on a GPU, routing and plans included, beside dense attention and other kernels?

``python -m benchmarks.gpu_sparse --out FILE``: bfloat16, heads of 128, causal, 4k to 256k tokens.  ``blocks``: 16 of 64
keys for each query; ``clustered`` routes for each KV head, ``moba query_head`` for each head, ``attend`` is given
the blocks.  ``tokens``: 2048 single tokens.  Selections at random share nothing, ``shared`` ones are those of 64
neighbours.  Each call forward, then forward and backward, with the most memory that it takes; the results and query
gradients of the last 64 queries are compared with float32.  At the end: from which length on ours is faster than
flash-attn-4, and the longest row that trains.  A contender that cannot run is named with its error.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import typer

import kernel_index as ki
from benchmarks.gpu_session import DryRun, Only, Out, Seconds, Session, Warm, failures
from benchmarks.gpu_sparse_calls import OURS, Cell, Inputs, Prepared
from benchmarks.harness import console
from kernel_index.core.terminal import print_table
from kernel_index.proofs.tune.timing import elapsed, error_of, is_broken

OPS = ("clustered_sparse_attention", "moba_attention", "block_sparse_attention", "exact_token_attention")
KINDS = {"blocks": "sparse", "tokens": "exact_tokens"}
"""The kinds of cells, and where the file has their rows."""

LENGTHS = (4, 6, 8, 12, 16, 32, 64, 128, 256)
POWERS = (4, 8, 16, 32, 64, 128, 256)
CELLS = sorted(
    (
        *(Cell("blocks", t * 1024, 32, 4, shared) for t in LENGTHS for shared in (False, True)),
        *(Cell("blocks", 32 * 1024, 64, 4, shared) for shared in (False, True)),
        *(Cell("tokens", t * 1024, 32, 4, shared, count=2048) for t in POWERS for shared in (False, True)),
    ),
    key=lambda cell: max(cell.tokens, 65_536),
)
"""Where time is short the long rows are those that lack: they take most of it."""

TINY = tuple(
    Cell(kind, 32, 2, 1, shared, width=16, block=8, count=2)  # type: ignore[arg-type]
    for kind, shared in (("blocks", False), ("blocks", True), ("tokens", False))
)
LONGEST = 512 * 1024
"""Where the search for the longest row begins; it goes on by doubling."""

LONG = 300_000.0
"""Microseconds from which on a call is timed once."""

DENSE = "dense FA4", "dense SDPA"


def measure(session: Session, inputs: Inputs, prepared: Prepared) -> dict[str, Any]:
    """Times in ms, the most extra memory in MiB, what ran and the worst error; a failed backward pass has none."""
    call, seen, trains, waits = prepared
    truth = inputs.truth(seen()) if seen and not session.warm else None
    found: dict[str, Any] = {}
    errors = []

    def infer() -> Any:
        with torch.no_grad():
            return call()

    def train() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(call(), inputs.leaves, inputs.upstream)

    with ki.receipts() as log:
        out = infer()
    if log:
        found["by"] = log[0].ran
    if truth:
        errors.append(error_of(out[0, -len(truth[0]) :], truth[0]))
    del out
    found |= _timed(session, "forward", infer, waits)
    if trains:
        try:
            if truth:
                errors.append(error_of(train()[0][0, -len(truth[1]) :], truth[1]))
            found |= _timed(session, "train", train, waits)
        except failures() as error:
            if is_broken(error):
                raise
            found["no train"] = f"{type(error).__name__}: {error}"
            error.__traceback__ = None
    return found | ({"error": float(f"{max(errors):.2g}")} if errors else {})


def _timed(session: Session, what: str, call: Callable[[], object], waits: bool) -> dict[str, Any]:
    if session.dry or session.warm:
        call()
        return {f"{what}_ms": 1.0, "MiB": 0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    us, how = 1e6 * elapsed(call), "events"
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    if waits:
        us = min(us, *(1e6 * elapsed(call) for _ in range(4)))
    elif us < LONG:
        us, how = session.device([call], budget=0.08)
    return {f"{what}_ms": round(us / 1e3, 4), "MiB": round(peak), "how": how}


def longest(session: Session, name: str) -> None:
    """Rows of ever more tokens, forward and backward, until one does not fit the memory or the time."""
    known = [row["tokens"] for row in session.rows("longest") if row["contender"] == name]
    for tokens in (LONGEST * 2**n for n in itertools.count()):
        if tokens in known or not session.wants(f"longest {name} {tokens // 1024}k", done=bool(session.warm)):
            if tokens in known:
                continue
            return
        row: dict[str, Any] = {"contender": name, "tokens": tokens}
        try:
            inputs = Inputs(Cell("blocks", tokens, 32, 4, True), "cuda")
            call = inputs.contenders()[name]().call
            torch.cuda.reset_peak_memory_stats()

            def train(call=call, inputs=inputs) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(call(), inputs.leaves, inputs.upstream)

            train()
            seconds = elapsed(train)
            row |= {"train_ms": round(seconds * 1e3, 1), "peak_MiB": round(torch.cuda.max_memory_allocated() / 2**20)}
        except failures() as error:
            row["stopped"] = f"{type(error).__name__}: {str(error)[:80]}"
            error.__traceback__ = None
        session.add(row, "longest")
        inputs = call = train = None
        torch.cuda.empty_cache()
        if "stopped" in row:
            return


def crossing(points: Iterable[tuple[int, float]]) -> float | None:
    """Tokens from which on the ratio is below 1: between two measured lengths on a line in logarithms of both."""
    found = sorted(points)
    above = [i for i, (_, ratio) in enumerate(found) if ratio >= 1]
    if not found or (above and above[-1] == len(found) - 1):
        return None
    if not above:
        return float(found[0][0])
    (t0, r0), (t1, r1) = found[above[-1]], found[above[-1] + 1]
    part = math.log(r0) / (math.log(r0) - math.log(r1))
    return t0 * (t1 / t0) ** part


def with_ratios(session: Session) -> None:
    """Every row's times ÷ those of the dense contender that ran first at this length."""
    sizes = ("tokens", "heads", "kv_heads")
    dense: dict[tuple[int, ...], dict[str, Any]] = {}
    for name in reversed(DENSE):
        dense |= {tuple(r[s] for s in sizes): r for r in session.rows("sparse") if r["contender"] == name}
    for kind in KINDS.values():
        for row in session.rows(kind):
            base = dense.get(tuple(row[s] for s in sizes), {})
            for what in ("forward", "train"):
                if f"{what}_ms" in row and f"{what}_ms" in base:
                    row[f"{what}_of_dense"] = round(row[f"{what}_ms"] / base[f"{what}_ms"], 4)


def break_even(session: Session) -> list[dict[str, Any]]:
    """For the number of heads that is measured at many lengths, the least."""
    found: list[dict[str, Any]] = []
    heads = min((r["heads"] for kind in KINDS.values() for r in session.rows(kind)), default=0)
    for kind, what in itertools.product(KINDS.values(), ("forward", "train")):
        rows = [r for r in session.rows(kind) if r["heads"] == heads and f"{what}_of_dense" in r]
        for name, selection in dict.fromkeys((r["contender"], r["selection"]) for r in rows):
            if name.startswith(OURS) and "router" not in name and "indexer" not in name:
                at = [
                    (r["tokens"], r[f"{what}_of_dense"])
                    for r in rows
                    if (r["contender"], r["selection"]) == (name, selection)
                ]
                tokens = crossing(at)
                found.append({"contender": name, "selection": selection, "what": what,
                              "tokens": None if tokens is None else round(tokens)})  # fmt: skip
    return found


def show(session: Session) -> None:
    rows = []
    for kind in KINDS.values():
        for r in session.rows(kind):
            cell = f"{kind} {r['tokens'] / 1024:g}k {r['heads']}/{r['kv_heads']} {r['selection']}"
            columns = [f"{r[w]:.3f}" if w in r else "" for w in _COLUMNS]
            rows.append([cell, r["contender"], r.get("by", ""), *columns, str(r["MiB"]), f"{r.get('error', '')}"])
    head = ("cell", "call", "by", "forward, ms", "÷ dense", "and backward", "÷ dense", "MiB", "error")
    print_table(console, head, rows)
    for row in session.content["break_even"]:
        since = "at no measured length" if row["tokens"] is None else f"from {row['tokens']} tokens on"
        console.print(f"{row['contender']}, {row['selection']}, {row['what']}: faster {since}", highlight=False)
    for row in session.rows("longest"):
        console.print(row, highlight=False)
    for name, why in session.content.get("left_out", {}).items():
        console.print(f"left out: {name}: {why}", highlight=False, markup=False, soft_wrap=True)


_COLUMNS = ("forward_ms", "forward_of_dense", "train_ms", "train_of_dense")


def main(
    out: Out = Path("runs/gpu-sparse.json"),
    only: Only = "",
    seconds: Seconds = 1e9,
    dry_run: DryRun = False,
    warm: Warm = "",
) -> None:
    """Time sparse attention on this machine's GPU beside dense attention and other libraries' kernels."""
    session = Session("sparse", out, only, seconds, dry_run, warm)
    for cell in TINY if dry_run else CELLS:
        identity = {"tokens": cell.tokens, "heads": cell.heads, "kv_heads": cell.kv_heads, "selection": cell.selection}
        rows = session.rows(KINDS[cell.kind])
        done = [row["contender"] for row in rows if identity.items() <= row.items()]
        inputs = Inputs(cell, "cpu" if dry_run else "cuda")
        for name, make in inputs.contenders().items():
            if not session.wants(cell.name, name in done):
                continue
            found = session.measured(cell.name, {name: make}, lambda p, inputs=inputs: measure(session, inputs, p))
            for row in found.values():
                if "no train" in row:
                    session.say(f"{name}, backward", row.pop("no train"))
                session.add(identity | {"contender": name} | row, KINDS[cell.kind])
        del inputs
    if not dry_run and not warm:
        for name in ("clustered", "moba query_head"):
            longest(session, OURS + name)
    if not warm:
        with_ratios(session)
        session.content |= {"break_even": break_even(session), "left_out": session.left_out}
        session.save()
        show(session)


if __name__ == "__main__":
    typer.run(main)
