"""How right a backend is: run a call, measure its error against float64, derive the budget.

The conformance test and ``kernel-index prove numerics`` both read it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Maker, Suite
from kernel_index.masks.doc_window_mask.mask import MaskContract


def clone_inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same values in tensors of their own, strides kept."""
    return {k: _copy(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def _copy(t: Tensor) -> Tensor:
    if 0 in t.stride() and t.numel():  # expanded: keep it so
        base = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())].clone()
        return base.expand(t.shape)
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Tensors, and those inside of a mask."""
    moved = {k: v.to("cpu") for k, v in kwargs.items() if isinstance(v, MaskContract)}
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kwargs.items()} | moved


def in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    return tuple(t for t in result if isinstance(t, Tensor))


def differentiable(suite: Suite, kwargs: dict[str, Any], backend: str) -> list[str]:
    """The arguments whose gradients are compared; none for a backend that declines calls that need them."""
    if backend in suite.without_gradient:
        return []
    return [n for n in suite.differentiable if isinstance(kwargs.get(n), Tensor)]


def upstream_like(outputs: tuple[Tensor, ...], seed: int = 7) -> list[Tensor]:
    """Non-uniform, non-contiguous gradients: every second element of a wider tensor."""
    maker = Maker(torch.float64, seed=seed)
    return [maker.normal(*o.shape, 2)[..., 0].to(device=o.device, dtype=o.dtype) for o in outputs]


def run(function, kwargs: dict[str, Any], names: list[str], upstream=None, **extra: Any):
    """Outputs and the gradients of ``names``; inputs are taken as leaves of their own."""
    kwargs = dict(kwargs)
    for name in names:
        kwargs[name] = kwargs[name].detach().requires_grad_()
    outputs = tensors_of(function(**kwargs, **extra))
    outputs = tuple(o for o in outputs if o.is_floating_point())
    grads: list[Tensor | None] = []
    live = [(o, g) for o, g in zip(outputs, upstream or upstream_like(outputs), strict=True) if o.requires_grad]
    if names and live:
        outs = [o for o, _ in live]
        ups = [u.to(device=o.device, dtype=o.dtype) for o, u in live]
        grads = list(torch.autograd.grad(outs, [kwargs[n] for n in names], ups, allow_unused=True))
    return [o.detach() for o in outputs], grads


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """max |a − t| / (|t| + rms(t)): elementwise for large values, against the tensor's own level for small ones.

    Where the truth is infinite (the log-sum-exp of an empty row) nothing but that infinity will do.
    """
    truth = truth.double()
    infinite = truth.isinf()
    if infinite.any():
        if not torch.equal(actual[infinite].double(), truth[infinite]):
            return float("inf")
        actual, truth = actual[~infinite], truth[~infinite]
    if truth.numel() == 0:
        return 0.0
    level = truth.square().mean().sqrt()
    error = (actual.double() - truth).abs() / (truth.abs() + level).clamp_min(torch.finfo(torch.float64).tiny)
    return float(error.max())


def floor(dtype: torch.dtype) -> float:
    """What rounding the result alone may cost: four units in the last place of its dtype."""
    return 4 * torch.finfo(dtype).eps


FAST_EXP = 20 * torch.finfo(torch.float32).eps
"""What PyTorch's attention on the CPU adds: its vectorised exponential is right to 20 units in float32."""


@dataclass(frozen=True)
class Finding:
    """One output or gradient of a call: its error, the budget, and why there is no figure if there is none."""

    label: str
    error: float
    budget: float
    note: str = ""

    @property
    def passes(self) -> bool:
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """Of the budget, how much the error uses."""
        return self.error / self.budget if self.budget else float(self.error > 0)


def assess(suite: Suite, backend: str, kwargs: dict[str, Any]) -> list[Finding]:
    """Error ≤ 2 × the error of the yardstick + floor, and the error of PyTorch's fast exponential where it is used.

    The truth is the suite's oracle in float64 on the CPU.  The yardstick is the reference; for the reference itself,
    and for kernels that round their intermediates to the inputs' dtype, it is the plain formula in that dtype, which
    is FlashAttention's own rule.
    """
    names = differentiable(suite, kwargs, backend)
    outputs, grads = run(suite.function, kwargs, names, backend=backend)
    upstream = upstream_like(tuple(outputs))
    on_host = on_cpu(kwargs)
    truth, truth_grads = run(suite.oracle, in_float64(on_host), names, upstream)
    if backend == "reference" or backend in suite.rounding:
        plain, plain_grads = run(suite.oracle, on_host, names, upstream)
    else:
        plain, plain_grads = run(suite.function, kwargs, names, upstream, backend="reference")
    labels = [f"output {i}" for i in range(len(outputs))] + [f"gradient of {n}" for n in names[: len(grads)]]
    found = zip(labels, outputs + grads, truth + truth_grads, plain + plain_grads, strict=True)
    extra = FAST_EXP if backend in ("sdpa", "cpu") else 0.0
    extra += suite.units.get(backend, 0.0) * torch.finfo(torch.float32).eps
    return [_finding(label, *map(_to_host, tensors), extra=extra) for label, *tensors in found]


def _to_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _finding(label: str, actual: Tensor | None, exact: Tensor | None, eager: Tensor | None, extra: float) -> Finding:
    wrong = float("inf")
    if exact is None:
        zero = actual is None or not actual.any()
        return Finding(label, 0.0 if zero else wrong, 0.0, "must be zero or absent")
    if actual is None or eager is None:
        return Finding(label, wrong, 0.0, "is missing")
    if actual.shape != exact.shape:
        return Finding(label, wrong, 0.0, f"has shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
    if (~torch.isfinite(eager) & torch.isfinite(exact)).any():  # the dtype itself overflows: same places or better
        worse = bool((~torch.isfinite(actual) & torch.isfinite(eager)).any())
        return Finding(label, wrong if worse else 0.0, 0.0, "overflows where the plain formula may or may not")
    budget = 2 * relative_error(eager, exact) + floor(actual.dtype) + extra
    return Finding(label, relative_error(actual, exact), budget)
