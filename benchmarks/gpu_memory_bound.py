"""Are the memory-bound kernels on a GPU within 2 % or 0.3 µs of the best of Liger-Kernel, quack and ``torch.compile``?

``python -m benchmarks.gpu_memory_bound --out FILE``: 82 calls in bfloat16, forward and backward by themselves.  Times
are replays of CUDA graphs over sets of inputs that do not fit the L2 cache together, the better of two medians.
``share`` is compulsory bytes ÷ time ÷ the bandwidth of a copy.  Several processes compile beside each other, and one
at a time measures (``benchmarks.gpu_processes``).
"""

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import torch._functorch.config
import typer
from torch import Tensor

from benchmarks.gpu_memory_calls import MAKERS, Calls
from benchmarks.gpu_processes import Processes, Share, Turn, alone, in_processes, is_of_share, number_of
from benchmarks.gpu_session import DryRun, Only, Out, Seconds, Session, Warm
from benchmarks.harness import console
from kernel_index.core.terminal import print_table
from kernel_index.proofs.tune import timing

ROWS, WIDTHS = (8192, 2048, 32768, 128), (4096, 7168, 2048, 8192, 1024, 16384, 5120)
WITHIN, OR_WITHIN_US = 1.02, 0.3
DIRECTIONS = ("forward", "backward")

BUDGET = 0.05
"""Seconds of replays of a call."""

ROUNDS = 2

Makers = dict[str, Callable[[], Callable[..., Any]]]


def widths_of(op: str, rows: int) -> tuple[int, ...]:
    """The widths that an operation is timed at, in that many rows."""
    few = (4096, 7168, 1024)
    return {
        "rms": WIDTHS,
        "rope": (4096, 8192),
        "relu2": few[:2],
        "dropout": few,
        "bias_add": few if rows != 2048 else (),
        "mhc": few if rows == 128 else few[:2],
        "mla": few[:2],
    }[op]


CELLS = tuple((op, rows, width) for op in MAKERS for rows in ROWS for width in widths_of(op, rows))
TINY = tuple((op, 4, 32) for op in MAKERS)


def flat(found: Any) -> list[Tensor]:
    return [t for t in (found if isinstance(found, tuple) else (found,)) if t.requires_grad]


def measured(session: Session, calls: Calls, turn: str, function: Callable[..., Any]) -> dict[str, float]:
    """Microseconds forward and backward.  Only replays need a turn: compiling and recording do not."""
    size = sum(t.nbytes for t in calls.inputs())
    is_timed = not (session.dry or session.warm)
    sets = [calls.inputs() for _ in range(timing.sets_for(2 * size, 32) if is_timed else 1)]
    outs = [flat(function(*given)) for given in sets]
    upstream = [[torch.randn_like(out) for out in of] for of in outs]
    leaves = [[t for t in given if t.requires_grad] for given in sets]
    forward = [partial(function, *given) for given in sets]
    back = [partial(torch.autograd.grad, *own, retain_graph=True) for own in zip(outs, leaves, upstream, strict=True)]
    if not is_timed:
        return {direction: session.device(each)[0] for direction, each in zip(DIRECTIONS, (forward, back), strict=True)}
    runs = [timing.replay_of(each) for each in (forward, back)]
    with alone(turn):
        spin()
        times = [timing.median_us(run, len(sets), BUDGET) for run in runs]
    return dict(zip(DIRECTIONS, times, strict=True))


def spin() -> None:
    """Products of some 20 ms: a GPU that had nothing to do runs slower at first, for whoever comes first."""
    x = torch.zeros(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for _ in range(12):
        torch.mm(x, x)
    torch.cuda.synchronize()


def best_of_rounds(session: Session, name: str, calls: Calls, turn: str, given: Makers) -> dict[str, dict[str, float]]:
    """Every contender has ROUNDS turns, each with new tensors; the lowest median of each direction."""
    once = {who: functools.cache(make) for who, make in given.items()}
    measure = partial(measured, session, calls, turn)
    rounds = [session.measured(name, once, measure) for _ in range(1 if session.warm else ROUNDS)]
    whole = [who for who in given if all(who in found for found in rounds)]
    return {who: {d: min(found[who][d] for found in rounds) for d in DIRECTIONS} for who in whole}


def contenders(calls: Calls, dry: bool) -> Makers:
    def compiled() -> Callable[..., Any]:
        torch._dynamo.reset()
        return calls.plain if dry else torch.compile(calls.plain, dynamic=False)

    return {"kernel_index": lambda: calls.ours, **({} if dry else calls.peers), "torch.compile": compiled}


def row_of(cell: tuple[str, int, int], found: dict[str, dict[str, Any]], calls: Calls, bandwidth: float) -> dict:
    """Of each direction: our time, the best other one, and whether it is near enough."""
    all_us = {name: {direction: round(us, 2) for direction, us in times.items()} for name, times in found.items()}
    row: dict[str, Any] = {"kernel": cell[0], "rows": cell[1], "width": cell[2], "all_us": all_us}
    for direction, moved in zip(DIRECTIONS, calls.moved or (0, 0), strict=True):
        ours = found["kernel_index"][direction]
        others = {name: times[direction] for name, times in found.items() if not name.startswith("kernel_index")}
        best = min(others, key=others.__getitem__)
        near = ours <= max(WITHIN * others[best], others[best] + OR_WITHIN_US)
        share = round(1e6 * moved / ours / bandwidth, 3) if moved else None
        figures = {"us": round(ours, 2), "share": share, "ratio": round(ours / others[best], 3)}
        row[direction] = figures | {"peer": best, "near": near}
    return row


def name_of(row: dict[str, Any]) -> str:
    return "{kernel} {rows}x{width}".format(**row)


def show(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        line = [name_of(row)]
        for direction in DIRECTIONS:
            one = row[direction]
            share = "" if one["share"] is None else f"{100 * one['share']:.0f} %"
            line += [f"{one['us']:.1f}", share, f"{one['ratio']:.2f} {one['peer']}{'' if one['near'] else ' !'}"]
        lines.append(line)
    head = ("cell", "forward, µs", "of copy", "÷ best", "backward", "of copy", "÷ best")
    print_table(console, head, lines, "memory-bound calls; ! is neither within 2 % nor 0.3 µs")
    for direction in DIRECTIONS:
        near = sum(row[direction]["near"] for row in rows)
        console.print(f"{direction}: near the best or better in {near} of {len(rows)}", highlight=False)
    both = [(name_of(row), direction, row[direction]) for row in rows for direction in DIRECTIONS]
    behind = [f"{name} {direction} {one['ratio']} {one['peer']}" for name, direction, one in both if not one["near"]]
    console.print(f"within 2 % or 0.3 µs of the best in {len(both) - len(behind)} of {len(both)}", highlight=False)
    console.print(f"behind: {'; '.join(behind) or 'none'}", highlight=False, soft_wrap=True)


def main(
    out: Out,
    only: Only = "",
    seconds: Seconds = 540.0,
    dry_run: DryRun = False,
    warm: Warm = "",
    without: Annotated[str, typer.Option(help="Contenders to leave out, separated by commas.")] = "",
    processes: Processes = 0,
    share: Share = "",
    turn: Turn = "",
) -> None:
    """Time the memory-bound kernels beside their peers."""
    session = Session("memory_bound", Path(out), only, seconds, dry_run, warm)
    cells = TINY if dry_run else CELLS
    if number_of(processes) > 1 and not share and not warm:
        given = ["--only", only, "--seconds", str(seconds), "--without", without, *["--dry-run"] * dry_run]
        in_processes(session, number_of(processes), seconds, given)
        order = ["{} {}x{}".format(*cell) for cell in cells]
        session.rows().sort(key=lambda row: order.index(name_of(row)))
    else:
        torch._functorch.config.donated_buffer = False  # a backward pass is timed again and again on one graph
        measure(session, [cell for i, cell in enumerate(cells) if is_of_share(i, share)], turn, without.split(","))
    if not warm and not share:
        session.save()
        show(session.rows())


def measure(session: Session, cells: list[tuple[str, int, int]], turn: str, without: list[str]) -> None:
    done = set(map(name_of, session.rows()))
    for cell in cells:
        name = "{} {}x{}".format(*cell)
        if not session.wants(name, name in done):
            continue
        calls = MAKERS[cell[0]](*cell[1:], "cpu" if session.dry else "cuda")
        given = {who: make for who, make in contenders(calls, session.dry).items() if who not in without}
        found = best_of_rounds(session, name, calls, turn, given)
        if "kernel_index" in found and any(not name.startswith("kernel_index") for name in found):
            session.add(row_of(cell, found, calls, session.bandwidth))


if __name__ == "__main__":
    typer.run(main)
