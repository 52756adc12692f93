"""What does a dispatched call cost beyond the backend's own work?  Target: choosing costs under 5 µs."""

import timeit

import torch

import kernel_index as ki
from benchmarks.harness import Comparison, Row, console
from kernel_index.core.dispatch import choose
from kernel_index.kernels.experts.fused_relu_squared.api import BACKENDS


def microseconds(call, number: int = 20_000) -> list[float]:
    return [t / number for t in timeit.repeat(call, number=number, repeat=7)]


def main(rounds: int = 9) -> list[Comparison]:
    x = torch.ones(3)
    rows = [
        Row("choose()", microseconds(lambda: choose("fused_relu_squared", BACKENDS, "auto", x)), 0.0),
        Row("the whole public call", microseconds(lambda: ki.fused_relu_squared(x)), 0.0),
        Row("torch.relu(x).square()", microseconds(lambda: torch.relu(x).square()), 0.0),
    ]
    with ki.receipts() as log:

        def recorded() -> None:
            ki.fused_relu_squared(x)
            log.clear()

        rows.append(Row("the whole public call, with a receipt", microseconds(recorded), 0.0))
    for row in rows:
        console.print(f"{row.contender:>40}: {row.median * 1e6:6.2f} µs")
    verdict = "met" if rows[0].median < 5e-6 else "missed"
    console.print(f"target: choose() under 5 µs: {verdict}")
    return [Comparison("dispatch overhead", rows, "choose()")]
