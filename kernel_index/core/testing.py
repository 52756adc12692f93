"""The types of a kernel's ``cases.py``: named inputs, an independent oracle, and settings of the conformance test.

There is one ``Suite`` for each public function with backends.  Tests, proofs, benchmarks and docs read the same suites.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOW_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)


class Maker:
    """Draws the tensors of a case; the values depend on the seed alone, then they are rounded to the dtype."""

    def __init__(self, dtype: torch.dtype, *, seed: int = 0, scale: float = 1.0, device: str = "cpu"):
        self.dtype, self.scale, self.device = dtype, scale, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float | None = None) -> Tensor:
        """Normal values times ``scale`` (the maker's own by default)."""
        if self.device == "meta":  # sizes without values, for a proof that only compiles
            return torch.empty(shape, dtype=self.dtype if dtype is None else dtype, device="meta")
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        values = values * (self.scale if scale is None else scale)
        return values.to(device=self.device, dtype=self.dtype if dtype is None else dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype if dtype is None else dtype, device="meta")
        values = low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return values.to(device=self.device, dtype=self.dtype if dtype is None else dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers in [low, high)."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self.generator).to(device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One call: ``build(maker)`` returns the keyword arguments of the public function, without ``backend``."""

    name: str
    why: str
    build: Callable[[Maker], dict[str, Any]]


SOFTMAX_UNITS = 20.0
"""``Suite.units`` where ``torch.softmax`` is called: on a CPU without AVX-512 its exponential is right to 20."""


@dataclass(frozen=True)
class Suite:
    """The inputs and settings of the conformance test for one public function.

    ``oracle`` computes the same mathematics in plain differentiable PyTorch, written independently of
    ``reference.py``; it takes the keywords of the public function.  In float64 its result counts as exact.  In the
    dtype of the inputs it is the plain formula, whose error bounds the error of the reference.
    """

    op: str
    function: Callable[..., Any]
    backends: tuple[Any, ...]
    cases: tuple[Case, ...]
    differentiable: tuple[str, ...]
    oracle: Callable[..., Any]
    sized: Callable[[Maker, int], dict[str, Any]]  # a call of the given size in the dimension that varies in practice
    dtypes: tuple[torch.dtype, ...] = LOW_AND_FULL
    scales: tuple[float, ...] = (1e-3, 1.0, 16.0, 300.0)
    double_backward: bool = False
    nonfinite: tuple[str, ...] = ()  # arguments that are tested with inf and NaN
    without_gradient: tuple[str, ...] = ()  # backends that decline a call whose result needs a graph
    rounding: tuple[str, ...] = ()  # backends whose kernel or matmul rounds intermediate values to the inputs' dtype
    units: Mapping[str, float] = field(
        default_factory=dict
    )  # float32 units of rounding that a backend's algorithm adds, derived
    real: Callable[..., dict[str, Any]] | None = None  # (maker[, rows]) -> a call of production size, for proofs
    compulsory: Callable[[dict[str, Any]], tuple[int, int]] | None = (
        None  # bytes that any kernel must move: (forward, backward)
    )

    def __str__(self) -> str:
        return self.op


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of all tensors together; None counts as 0."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def suites() -> tuple[Suite, ...]:
    """The suites of every kernel folder that has a ``cases.py``."""
    root = Path(__file__).parent.parent
    found: list[Suite] = []
    for path in sorted(root.rglob("cases.py")):
        name = ".".join(("kernel_index", *path.relative_to(root).with_suffix("").parts))
        found.extend(importlib.import_module(name).SUITES)
    return tuple(found)
