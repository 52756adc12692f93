"""``kernel-index prove tpu``: the terminal's side of the ahead-of-time compilation for TPUs."""

from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.text import Text

from kernel_index.core.terminal import (
    STDOUT,
    Cell,
    JsonFile,
    check_output,
    console,
    errors,
    only_json,
    print_table,
    write_figures,
)
from kernel_index.proofs import choice
from kernel_index.proofs import tpu as proof
from kernel_index.proofs.tpu_dumps import KernelFigures, believable


def tpu(
    generation: Annotated[list[str] | None, typer.Option(help="v5e, v6e, v5p or 7x.", show_default="all")] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"{', '.join(proof.CASES)}.", show_default="all")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Lengths.", show_default="8192, 32768")] = None,
    cycles: Annotated[bool, typer.Option(help="Also ask for libtpu's estimated cycles; slow.")] = False,
    out: JsonFile = None,
) -> None:
    """Compile every Pallas kernel, forward and backward, for TPUs that need not be here; compare with Splash."""
    generations = _chosen("--generation", generation, tuple(proof.GENERATIONS))
    cases = _chosen("--case", case, proof.CASES)
    check_output("--json", out)
    reason = proof.why_not()
    if reason is not None:
        errors.print(f"error: {reason}", style="red", soft_wrap=True)
        raise typer.Exit(2)
    with only_json(out == STDOUT):
        found = list(proof.prove(generations, cases, tuple(tokens or (8192, 32768)), cycles=cycles))
        header = (
            "case",
            "TPU",
            "tokens",
            "kernel",
            "bundles",
            "of a step",
            "spill stores",
            "VMEM",
            "SMEM",
            "MXU, VALU",
        )
        print_table(console, (*header, "cycles or problem"), list(_rows(found, len(header))))
        _memory(found)
        comparisons = _compare(found)
        passed = bool(found) and not any(c.error for c in found)
        versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
        content = {"proof": "tpu", "state": "compiled", "passed": passed, "versions": versions}
        write_figures(out, content | {"rows": [asdict(c) for c in found], "comparisons": comparisons})
        verdict = ("compiled", "green") if passed else ("failed", "red")
        console.print(Text.assemble("tpu: ", verdict, "; nothing was executed"))
    if not passed:
        raise typer.Exit(1)


def _rows(found: list[proof.Compiled], width: int) -> Iterator[list[Cell]]:
    for compiled in found:
        place: list[Cell] = [compiled.case, compiled.generation, str(compiled.tokens)]
        if compiled.error:
            yield [*place, *[""] * (width - len(place)), Text(compiled.error, style="red")]
        for kernel in compiled.kernels:
            yield [*place, *_cells(kernel, compiled)]


def _chosen(option: str, given: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    for name in given or ():
        choice.of_list(option, name, known)
    return tuple(given or known)


def _cells(kernel: KernelFigures, compiled: proof.Compiled) -> list[str]:
    inner = kernel.at_depth(2) or kernel.at_depth(1)
    step = " + ".join(str(loop.bundles) for loop in inner)
    slots = f"{kernel.slots['MXU']:.0%}, {kernel.slots['VALU']:.0%}"
    sizes = (f"{kernel.vmem / 2**20:.1f} MiB", f"{kernel.smem / 2**10:.1f} KiB")
    return [kernel.name, str(kernel.bundles), step, str(kernel.spill_stores), *sizes, slots, _cycles(kernel, compiled)]


def _cycles(kernel: KernelFigures, compiled: proof.Compiled) -> str:
    """libtpu's estimate, or why it is refused.  The flops are the least that a causal call of the kernel does."""
    if kernel.cycles is None:
        return ""
    from kernel_index.proofs.tpu_plans import least_flops

    refused = believable(kernel.cycles, least_flops(kernel.name, compiled.case, compiled.tokens), compiled.generation)
    return f"{kernel.cycles:,} cycles" + (f" refused: {refused}" if refused else "")


def _memory(found: list[proof.Compiled]) -> None:
    rows = []
    for c in found:
        sizes = (f"{size / 2**20:,.0f} MiB" for size in c.memory.values())
        if c.memory:
            rows.append([c.case, c.generation, str(c.tokens), *sizes])
    print_table(console, ("case", "TPU", "tokens", "arguments", "results", "temporary HBM"), rows)


def _compare(found: list[proof.Compiled]) -> list[dict[str, Any]]:
    """Against Splash compiled for the same heads, length and generation."""
    by_place = {(c.case, c.generation, c.tokens): c for c in found if not c.error}
    rows = []
    for (case, generation, length), compiled in by_place.items():
        peer = by_place.get(("splash", generation, length))
        if peer is None or case not in ("attention", "clustered"):
            continue
        from kernel_index.proofs.tpu_plans import compare

        for row in compare(case, compiled, peer, length):
            rows.append({"generation": generation, "tokens": length} | row)
    if rows:
        shown = []
        for r in rows:
            ratios = (f"{r[k]:.3f}" for k in ("tiles_ratio", "bundles_ratio", "bytes_ratio"))
            shown.append([str(r["work"]), str(r["generation"]), str(r["tokens"]), f"{r['tiles']:,.0f}", *ratios])
        header = ("work", "TPU", "tokens", "tiles", "tiles ÷", "bundles ÷", "bytes ÷")
        print_table(console, header, shown, "Forward, against Splash")
        console.print(r"tiles: 512 × 512 scores of a head; ÷: Kernel Index over Splash, less is better")
    return rows
