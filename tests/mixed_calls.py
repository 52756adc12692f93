"""One small call of every public function with backends, on every backend that runs here, for any size."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.proofs.errors import differentiable, run


@dataclass(frozen=True)
class Mixed:
    """``results(n)`` are the outputs and gradients of the call of size ``n``: the same tensors every time."""

    suite: Suite
    backend: str

    def __str__(self) -> str:
        return f"{self.suite.op}-{self.backend}"

    def results(self, n: int) -> list[Tensor | None]:
        kwargs: dict[str, Any] = self.suite.sized(Maker(torch.float32, seed=n), n)
        outputs, grads = run(
            self.suite.function, kwargs, differentiable(self.suite, kwargs, self.backend), backend=self.backend
        )
        return [None if t is None else t.detach() for t in (*outputs, *grads)]


def mixed_calls(without: tuple[str, ...] = ()) -> list[Mixed]:
    found = []
    for suite in suites():
        kwargs = suite.sized(Maker(torch.float32), 8)
        found += [
            Mixed(suite, b.name)
            for b in suite.backends
            if b.name not in without and ki.explain(suite.function, **kwargs, backend=b.name).verdicts[b.name] is None
        ]
    return found


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )
