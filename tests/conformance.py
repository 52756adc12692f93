"""The measuring half of the conformance test: run a call, measure its error, derive the budget."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.cases import Maker, Suite


def clone_inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same values in tensors of their own, strides kept."""
    return {k: _copy(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def _copy(t: Tensor) -> Tensor:
    if 0 in t.stride() and t.numel():  # expanded: keep it so
        base = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())].clone()
        return base.expand(t.shape)
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    return tuple(t for t in result if isinstance(t, Tensor))


def differentiable(suite: Suite, kwargs: dict[str, Any]) -> list[str]:
    return [n for n in suite.differentiable if isinstance(kwargs.get(n), Tensor)]


def upstream_like(outputs: tuple[Tensor, ...], seed: int = 7) -> list[Tensor]:
    """Non-uniform, non-contiguous gradients: every second element of a wider tensor."""
    maker = Maker(torch.float64, seed=seed)
    return [maker.normal(*o.shape, 2)[..., 0].to(o.dtype).expand(o.shape) for o in outputs]


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
        outs, ups = zip(*live, strict=True)
        ups = [u.to(o.dtype) for o, u in live]
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
