"""``kernel-index prove fa4`` and ``kernel-index prove --verify``: the terminal's side of the execute proof."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from kernel_index.core.terminal import check_output, clear_errors, console, errors
from kernel_index.kernels.attention.dense_fa4_execute_proof.api import Proof, fa4_execute_proof
from kernel_index.kernels.attention.dense_fa4_execute_proof.request import DtypeName, ProofShape
from kernel_index.kernels.attention.dense_fa4_execute_proof.verify import verify_file
from kernel_index.proofs import rollout

FAILED, COMPILED, REFUSED = 1, 3, 4
"""Exit statuses beside 0, which only an executed and verified proof gets; 2 is a mistake in the command line."""


def fa4(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = ProofShape().batch,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = ProofShape().seq,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = ProofShape().heads,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = ProofShape().kv_heads,
    head_dim: Annotated[int, typer.Option(min=8, help="Size of a head.")] = ProofShape().head_dim,
    dtype: Annotated[DtypeName, typer.Option(help="Of the inputs.")] = "bfloat16",
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="With the causal mask.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the inputs.")] = 0,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds for each process.")] = 600.0,
    out: Annotated[Path, typer.Option(help="The receipt, written on failure too.")] = Path("fa4-proof.json"),
) -> None:
    """Prove that FlashAttention-4 runs here and is right.  Exit 0: executed and passed; 1: failed; 3: compiled only,
    there is no CUDA device; 4: refused, the package is missing.
    """
    shape = ProofShape(batch, seq, heads, kv_heads, head_dim)
    check_output("--out", out)
    with clear_errors():
        proof = fa4_execute_proof(shape, dtype=dtype, causal=causal, seed=seed, time_limit=time_limit, out=out)
    _show(proof)
    console.print(f"Receipt: {out}", soft_wrap=True)
    if not proof.passed:
        raise typer.Exit(REFUSED if proof.refusal else COMPILED if proof.state == "compiled" else FAILED)


def _show(proof: Proof) -> None:
    console.print(Text.assemble((proof.state, "bold"), f": {'passed' if proof.passed else 'no proof of execution'}"))
    if proof.refusal:
        console.print(f"  refused, {proof.refusal.code}: {proof.refusal.reason}")
        return
    for run in proof.receipt["runs"]:
        report = run["report"]
        for row in report.get("cubins", ()):
            line = f"  {run['target']}: {row['kernel']}, {row['bytes']:,} bytes of machine code"
            console.print(line, soft_wrap=True)
        for label, row in report.get("numerics", {}).items():
            line = f"  {label}: error {row['max_abs_error']}, PyTorch in the same dtype {row['baseline_max_abs_error']}"
            console.print(line, soft_wrap=True)
    if proof.state != "compiled":
        for problem in proof.problems:
            console.print(f"  ✗ {problem}", soft_wrap=True)


def verify(path: Path) -> None:
    """Accept a receipt or say why not; exit 1 if not."""
    receipt = rollout_receipt(path)
    found = _of_another_file(path) if receipt is None else rollout.problems(receipt)
    for problem in found:
        errors.print(f"✗ {problem}", soft_wrap=True)
    if found:
        raise typer.Exit(FAILED)
    proven = "flash-attn-4 executed and was right" if receipt is None else "training and rollout have the same bits"
    console.print(f"{path}: a proof that {proven}", soft_wrap=True)


def _of_another_file(path: Path) -> list[str]:
    found = verify_file(path)
    if any("KeyError: 'schema'" in problem for problem in found):
        return ["is no receipt: `kernel-index prove fa4 --json` and `kernel-index rollout-check --json` write those"]
    return found


def rollout_receipt(path: Path) -> dict[str, Any] | None:
    """The content of a file that ``rollout-check`` wrote, else None."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("proof") == "rollout-check" else None
