"""``kernel-index tune``: measure on this machine's GPU what ``auto`` asks when it chooses a backend."""

import contextlib
import json
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kernel_index.core import measured
from kernel_index.core.atomic_write import write_whole
from kernel_index.core.target import target_of
from kernel_index.core.terminal import check_output, clear_errors, console, errors, hanging, print_table
from kernel_index.proofs.record import machine
from kernel_index.proofs.tune import attention_cells, decode_cells, rows

REFUSED = 4
"""Exit status without a GPU, as that of ``prove fa4``."""


def tune(
    out: Annotated[Path | None, typer.Option(help="Write the table as JSON.", show_default="none")] = None,
    only: Annotated[str, typer.Option(help="Only cells whose name contains this.", show_default="all")] = "",
) -> None:
    """Time the backends of attention and decoding on this GPU, those that give the right result.

    `auto` passes over a backend where the table of the GPU's architecture says that another one is faster.  A file
    counts once it lies in kernel_index/core/crossovers.
    """
    check_output("--out", out)
    if not any(only in cell.name for cell in (*attention_cells.TUNED, *decode_cells.CELLS)):
        raise typer.BadParameter(f"no cell's name contains {only!r}", param_hint="--only")
    if not torch.cuda.is_available():
        errors.print("error: kernel-index tune needs a CUDA or ROCm device", soft_wrap=True)
        raise typer.Exit(REFUSED)
    with clear_errors():
        found = _begun(out, _facts())
    torch.cuda.set_stream(torch.cuda.Stream())
    torch._dynamo.config.recompile_limit = 4096  # FlexAttention is compiled for each cell
    for op, made in (
        ("attention", rows.attention_rows([c for c in attention_cells.TUNED if only in c.name], _say)),
        ("fa4_kvcache_decode", rows.decode_rows([c for c in decode_cells.CELLS if only in c.name], _say)),
    ):
        for row in made:
            found[op] = [r for r in found[op] if r["cell"] != row["cell"]] + [row]
            console.print(f"{row['cell']}: {_times(row)}", soft_wrap=True)
            if out is not None:
                with clear_errors():
                    write_whole(out, rows.text_of(_facts(), found))
            torch.cuda.empty_cache()
    _show(found)
    arch = measured.file_name(measured.name_of(target_of(torch.device("cuda", torch.cuda.current_device()))))
    console.print(f"Place of this table: kernel_index/core/crossovers/{arch}", soft_wrap=True)


def _begun(out: Path | None, facts: dict[str, Any]) -> dict[str, list[rows.Row]]:
    """The rows that the file holds already, so that several calls fill one table."""
    content = json.loads(out.read_text()) if out is not None and out.exists() else {}
    if content and {key: content.get(key) for key in facts} != facts:
        raise ValueError(f"--out must be a new file or one of this machine, these versions and this day, got {out}")
    return {op: content.get(op, []) for op in ("attention", "fa4_kvcache_decode")}


def _say(line: str) -> None:
    hanging(console, "left out: ", line)


def _times(row: rows.Row) -> str:
    return ", ".join(f"{name} {us:,.1f} µs" for name, us in sorted(row["us"].items(), key=lambda item: item[1]))


def _show(found: dict[str, list[rows.Row]]) -> None:
    """How often each backend was the fastest."""
    for op, made in found.items():
        names = list(dict.fromkeys(name for row in made for name in row["us"]))
        best = [min(row["us"], key=row["us"].__getitem__) for row in made if row["us"]]
        cells = [[n, str(sum(n in r["us"] for r in made)), str(best.count(n))] for n in names]
        if cells:
            print_table(console, (op, "cells", "fastest in"), cells)


def _facts() -> dict[str, Any]:
    versions = machine("cuda")
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["flash-attn-4"] = metadata.version("flash-attn-4")
    return {"device": versions.pop("device"), "date": versions.pop("date"), "versions": versions}
