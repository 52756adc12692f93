"""One decoding step on a GPU: ``ki.fa4_kvcache_decode`` by ``auto`` and by each backend, beside other libraries.

``python -m benchmarks.gpu_decode --out FILE`` measures 27 cells over pages, 32 query heads on 8 KV heads of size 128 in
bfloat16, then ``ki.moba_decode`` beside dense decoding.  Ours and FlashInfer append the new token and attend; the other
peers only attend.  Several calls with ``--only`` or ``--seconds`` may share the file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_peers import decode_peers
from benchmarks.gpu_session import DryRun, Only, Out, Seconds, Session, Warm, show, verdict
from kernel_index.proofs.tune.decode_cells import CELLS, DecodeCell, DecodeInputs
from kernel_index.proofs.tune.timing import error_of

OURS = ("fa4", "triton")
OPS = ("fa4_kvcache_decode", "moba_decode")

Step = Callable[[int], Tensor]
BF16 = torch.bfloat16


def contenders(inputs: DecodeInputs) -> dict[str, Callable[[], Step]]:
    ours = {f"kernel_index {name}": lambda name=name: inputs.ours(name) for name in ("auto", *OURS)}
    return ours | decode_peers(inputs)


def measure(session: Session, sets: int, known: Tensor | None, step: Step) -> dict[str, Any]:
    with torch.no_grad(), ki.receipts() as log:
        first = step(0)
    with torch.no_grad():
        us, how = session.device([lambda i=i: step(i) for i in range(sets)])
        found = {"us": us, "how": how, "host": session.host(lambda: step(0), us), "ran": log[0].ran if log else ""}
    return found if known is None else found | {"error": error_of(first[:1, 0], known)}


def row_of(found: dict[str, dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """One row of the file; empty where auto could not be measured.  ``auto`` says in brackets what it took."""
    if "kernel_index auto" not in found:
        return {}
    ran = found["kernel_index auto"]["ran"]
    names = {name: f"kernel_index auto({ran})" if name == "kernel_index auto" else name for name in found}
    us = {name: row["us"] for name, row in found.items()}
    ours = {n.removeprefix("kernel_index "): t for n, t in us.items() if n.removeprefix("kernel_index ") in OURS}
    peers = {name: t for name, t in us.items() if not name.startswith("kernel_index")}
    return {
        **facts,
        "us": {names[name]: round(t, 2) for name, t in us.items()},
        **verdict(us["kernel_index auto"], ran, ours, peers),
        "host_us": {names[name]: round(row["host"], 1) for name, row in found.items()},
        "how": found["kernel_index auto"]["how"],
        "error": {names[n]: float(f"{row['error']:.2g}") for n, row in found.items() if "error" in row},
    }


def decode_row(session: Session, cell: DecodeCell) -> dict[str, Any]:
    inputs = DecodeInputs(cell.small() if session.dry else cell, "cpu" if session.dry else "cuda")
    inputs.write_new()
    known = inputs.truth()
    found = session.measured(cell.name, contenders(inputs), lambda step: measure(session, inputs.sets, known, step))
    row = row_of(found, rows=cell.rows, tokens=cell.tokens, page=cell.page)
    if row:
        row["share"] = round(cell.bytes / found["kernel_index auto"]["us"] / session.bandwidth * 1e6, 3)
    return row


MOBA = tuple((8, tokens, per) for tokens in (65536, 262144) for per in ("query_head", "kv_group"))


def moba_row(session: Session, rows: int, tokens: int, per: str) -> dict[str, Any]:
    """``moba_decode`` over a contiguous cache: 16 blocks of 64 are selected for each head or KV head."""
    device = "cpu" if session.dry else "cuda"
    size, block, topk, (h, k, d) = (48, 16, 2, (4, 2, 16)) if session.dry else (tokens, 64, 16, (32, 8, 128))
    cache = ki.ContiguousKVCache(1, rows, size + block, k, d, dtype=BF16, device=device)
    cache.begin(size - 1)
    cache.append(0, *(torch.randn(rows, size - 1, k, d, dtype=BF16, device=device) for _ in range(2)))
    cache.advance()
    cache.begin(1)
    layer, new = cache.peek(0), torch.randn(rows, 1, k, d, dtype=BF16, device=device)
    queries = [torch.randn(rows, 1, h, d, dtype=BF16, device=device) for _ in range(2 if session.dry else 16)]
    options = {"k": new, "v": new, "block_size": block, "topk": topk, "route_per": per}
    keys, values = (x[0][:, :size].transpose(1, 2) for x in (cache.k, cache.v))

    def sdpa(i: int) -> Tensor:
        return F.scaled_dot_product_attention(queries[i].transpose(1, 2), keys, values, enable_gqa=True)

    found = session.measured(
        f"moba {rows} rows of {tokens // 1024}k",
        {
            "kernel_index auto": lambda: lambda i: ki.moba_decode(queries[i], layer, **options),
            "kernel_index dense": lambda: lambda i: ki.fa4_kvcache_decode(queries[i], k=new, v=new, **layer),
            "SDPA contiguous": lambda: sdpa,
        },
        lambda step: measure(session, len(queries), None, step),
    )
    return row_of(found, rows=rows, tokens=tokens, route_per=per)


def line(row: dict[str, Any]) -> list[str]:
    auto = next(name for name in row["us"] if "auto" in name)
    others = " ".join(f"{n.removeprefix('kernel_index ')} {us:.1f}" for n, us in row["us"].items() if n != auto)
    regret = f"{row['regret']:.2f} {row['best']}" if "regret" in row else ""
    ratio = f"{row['ratio']:.2f} {row['peer']}" if "ratio" in row else ""
    where = f"{row['rows']} rows of {row['tokens'] // 1024}k by {row.get('route_per')}"
    if "page" in row:
        where = DecodeCell(row["rows"], row["tokens"], row["page"]).name
    share = f"{100 * row['share']:.0f} %" if "share" in row else ""
    return [where, f"{row['us'][auto]:.1f}", row["ran"], f"{row['host_us'][auto]:.0f}", share, regret, ratio, others]


def main(
    out: Out = Path("runs/gpu-decode.json"),
    only: Only = "",
    seconds: Seconds = 1e9,
    dry_run: DryRun = False,
    warm: Warm = "",
) -> None:
    """Time decoding steps on this machine's GPU beside other libraries' kernels."""
    session = Session("decode", out, only, seconds, dry_run, warm)
    for cell in CELLS:
        done = (cell.rows, cell.tokens, cell.page) in [(r["rows"], r["tokens"], r["page"]) for r in session.rows()]
        if session.wants(cell.name, done) and (row := decode_row(session, cell)):
            session.add(row)
    for rows, tokens, per in MOBA:
        done = (rows, tokens, per) in [(r["rows"], r["tokens"], r["route_per"]) for r in session.rows("moba_decode")]
        name = f"moba {rows} rows of {tokens // 1024}k {per}"
        if session.wants(name, done) and (row := moba_row(session, rows, tokens, per)):
            session.add(row, "moba_decode")
    head = ("step", "µs", "by", "host µs", "share", "regret", "÷ peer", "others, µs")
    if not warm:
        show(session.rows(), "decoding over pages", head, line)
        show(session.rows("moba_decode"), "moba_decode", head, line)


if __name__ == "__main__":
    typer.run(main)
