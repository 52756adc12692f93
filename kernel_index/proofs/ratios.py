"""The table of ``prove traffic``: bytes ÷ compulsory bytes, launches and ATen ops, forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.core.triton import launch
from kernel_index.proofs import peers
from kernel_index.proofs.errors import differentiable, tensors_of
from kernel_index.proofs.traffic import Traffic, counted

ROWS = (528, 1056, 1584)
"""Multiples of 132, so that every program of a persistent kernel has as much to do as its neighbours."""

AT = 8192


@dataclass(frozen=True)
class Ratio:
    """Bytes at ``ROWS`` and what they come to at ``AT`` rows; ``affine`` says that the three lie on a line."""

    op: str
    direction: str
    sectors: tuple[int, ...]
    compulsory: tuple[int, ...]
    launches: int
    others: int
    atomics: int

    @property
    def affine(self) -> bool:
        a, b, c = self.sectors
        return c - b == b - a

    @property
    def at_scale(self) -> float:
        """Bytes ÷ compulsory bytes at ``AT`` rows, along the line through the first two sizes."""
        return _along(self.sectors) / _along(self.compulsory)


def _along(values: tuple[int, ...]) -> float:
    slope = (values[1] - values[0]) / (ROWS[1] - ROWS[0])
    return values[0] + slope * (AT - ROWS[0])


def prove(ops: tuple[str, ...] | None = None) -> Iterator[Ratio]:
    """Count every suite that states its compulsory bytes, in bfloat16, as on a GPU of 132 processors."""
    before, launch.INTERPRETED[0] = launch.INTERPRETED[0], launch.PROCESSORS[90]
    try:
        for suite in suites():
            if is_counted(suite) and (ops is None or suite.op in ops):
                yield from _directions(suite.op, [_count(suite, rows) for rows in ROWS])
    finally:
        launch.INTERPRETED[0] = before


def is_counted(suite: Suite) -> bool:
    """Whether it says which bytes any kernel must move, and has a call of production size."""
    return suite.real is not None and suite.compulsory is not None


def prove_peers(ops: tuple[str, ...] | None = None) -> Iterator[Ratio]:
    """The same for Liger-Kernel's kernels, in float32: its bfloat16 arithmetic fails in the interpreter."""
    with peers.on_the_interpreter():
        for suite in suites():
            if not is_counted(suite) or (ops is not None and suite.op not in ops):
                continue
            assert suite.real is not None
            assert suite.compulsory is not None
            found = []
            for rows in ROWS:
                call: dict[str, Any] = suite.real(Maker(torch.float32), rows)
                function = peers.prepare(suite.op, call)
                if function is None:
                    break
                leaves = {n: call[n].detach().requires_grad_() for n in differentiable(suite, call, "triton")}
                counts = _passes(lambda f=function, t=leaves: f(**t), list(leaves.values()))
                found.append((counts, suite.compulsory(call)))
            if found:
                yield from _directions(f"{peers.NAME}: {suite.op}", found)


def _count(suite: Suite, rows: int) -> tuple[tuple[Traffic, Traffic], tuple[int, int]]:
    call: dict[str, Any] = suite.real(Maker(torch.bfloat16), rows)  # type: ignore[misc]
    return both_ways(suite.function, call, differentiable(suite, call, "triton")), suite.compulsory(call)  # type: ignore[misc]


def both_ways(function: Callable[..., Any], call: dict[str, Any], names: list[str]) -> tuple[Traffic, Traffic]:
    """The traffic of a forward and of a backward pass through the Triton backend."""
    leaves = {name: call[name].detach().requires_grad_() for name in names}
    return _passes(lambda: function(**(call | leaves), backend="triton"), list(leaves.values()))


def _passes(run: Callable[[], Any], leaves: list[torch.Tensor]) -> tuple[Traffic, Traffic]:
    with counted() as forward:
        outputs = [o for o in tensors_of(run()) if o.requires_grad]
    upstream = [torch.randn_like(o) for o in outputs]
    with counted() as backward:
        torch.autograd.grad(outputs, leaves, upstream)
    return forward, backward


def _directions(op: str, found: list[tuple[tuple[Traffic, Traffic], tuple[int, int]]]) -> Iterator[Ratio]:
    for i, direction in enumerate(("forward", "backward")):
        seen = [traffic[i] for traffic, _ in found]
        yield Ratio(
            op,
            direction,
            tuple(t.sectors for t in seen),
            tuple(compulsory[i] for _, compulsory in found),
            seen[0].launches,
            seen[0].others,
            seen[0].atomics,
        )
