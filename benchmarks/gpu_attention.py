"""``ki.attention`` on a GPU, by ``auto`` and by each backend, beside FlashAttention-4, SDPA and FlexAttention.

``python -m benchmarks.gpu_attention --out FILE`` measures 14 cells, each forward without gradients (``infer``) and
forward + backward (``train``).  Several calls with ``--only`` or ``--seconds`` may share the file; ``python -m
benchmarks.gpu_session FILE… --out FILE`` joins the files of several machines.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_peers import attention_peers
from benchmarks.gpu_session import DryRun, Only, Out, Seconds, Session, Warm, failures, show, verdict
from kernel_index.proofs.tune.attention_cells import CELLS, AttentionCell, AttentionInputs
from kernel_index.proofs.tune.timing import error_of, is_broken

OURS = ("fa4", "triton", "gluon", "varlen", "sdpa")
DIRECTIONS = ("infer", "train")
OPS = ("attention",)

Attend = Callable[[], Tensor]


def contenders(inputs: AttentionInputs) -> dict[str, Callable[[], Attend]]:
    names = OURS if inputs.q.is_cuda else ("triton", "sdpa")
    ours = {name: lambda name=name: inputs.ours(name) for name in ("auto", *names)}
    return ours | attention_peers(inputs)


def measure(session: Session, inputs: AttentionInputs, known: tuple[Tensor, ...], attend: Attend) -> dict[str, Any]:
    """Of one contender: for each direction µs, host µs, what ran, and the worst error; a failed backward has none."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        with ki.receipts() as log:
            error = error_of(*inputs.last(attend()), known[0])
        found["infer"] = _timed(session, attend) | {"ran": log[0].ran if log else "", "error": error}
    step = inputs.train(attend)
    try:
        with ki.receipts() as log:
            gradients = inputs.last(*step())
        error = max(error_of(got, want) for got, want in zip(gradients, known[1:], strict=True))
        found["train"] = _timed(session, step) | {"ran": log[0].ran if log else "", "error": error}
    except failures() as error:
        if is_broken(error):
            raise
        found["no train"] = str(error)
    return found


def _timed(session: Session, call: Callable[[], object]) -> dict[str, Any]:
    us, how = session.device([call])
    return {"us": us, "how": how, "host": session.host(call, us)}


def row_of(cell: AttentionCell, direction: str, found: dict[str, dict[str, Any]], bandwidth: float) -> dict[str, Any]:
    """One row of the file; empty where auto could not be measured."""
    rows = {name: contender[direction] for name, contender in found.items() if direction in contender}
    if "auto" not in rows:
        return {}
    us = {name: row["us"] for name, row in rows.items()}
    auto, ours = us["auto"], {name: t for name, t in us.items() if name in OURS}
    peers = {name: t for name, t in us.items() if name not in ours and name != "auto"}
    moved = cell.bytes[DIRECTIONS.index(direction)]
    return {
        "case": f"{cell.name} {direction}",
        "ms": round(auto / 1e3, 4),
        **verdict(auto, rows["auto"]["ran"], ours, peers),
        "share": round(moved / auto / bandwidth * 1e6, 3),
        "all_ms": {name: round(t / 1e3, 4) for name, t in us.items() if name != "auto"},
        "host_us": {name: round(row["host"], 1) for name, row in rows.items()},
        "how": rows["auto"]["how"],
        "error": {name: float(f"{row['error']:.2g}") for name, row in rows.items()},
    }


def line(row: dict[str, Any]) -> list[str]:
    others = " ".join(f"{name} {ms:.2f}" for name, ms in row["all_ms"].items())
    regret = f"{row['regret']:.2f} {row['best']}" if "regret" in row else ""
    ratio = f"{row['ratio']:.2f} {row['peer']}" if "ratio" in row else ""
    host = f"{row['host_us']['auto']:.0f}"
    return [row["case"], f"{row['ms']:.3f}", row["ran"], host, f"{100 * row['share']:.0f} %", regret, ratio, others]


def main(
    out: Out = Path("runs/gpu-attention.json"),
    only: Only = "",
    seconds: Seconds = 1e9,
    dry_run: DryRun = False,
    warm: Warm = "",
) -> None:
    """Time attention on this machine's GPU beside other libraries' kernels."""
    session = Session("attention", out, only, seconds, dry_run, warm)
    for cell in CELLS:
        done = [row["case"] for row in session.rows()]
        if not session.wants(cell.name, f"{cell.name} infer" in done):
            continue
        small = cell.small() if dry_run else cell
        inputs = AttentionInputs(small, "cpu" if dry_run else "cuda")
        known = inputs.truth()
        found = session.measured(
            cell.name,
            contenders(inputs),
            lambda attend, inputs=inputs, known=known: measure(session, inputs, known, attend),
        )
        for name, contender in found.items():
            if "no train" in contender:
                session.say(f"{name}, backward", contender["no train"])
        for direction in DIRECTIONS:
            if row := row_of(cell, direction, found, session.bandwidth):
                session.add(row)
        del inputs, known
    head = ("case", "ms", "by", "host µs", "share", "regret", "÷ peer", "others, ms")
    if not warm:
        show(session.rows(), "attention", head, line)


if __name__ == "__main__":
    typer.run(main)
