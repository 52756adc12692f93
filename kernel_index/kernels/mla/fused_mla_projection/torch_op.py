"""Both directions as registered ops, opaque to torch.compile: a compiled model recomputes what the policy says.

If they were traced, ``x·w_downᵀ`` of forward and of backward would be one node, whose result would be kept.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops
from kernel_index.core.autocast import without_autocast
from kernel_index.kernels.mla.fused_mla_projection import norm
from kernel_index.kernels.mla.fused_mla_projection.contract import (
    POLICIES,
    Call,
    statistics_dtype,
)
from kernel_index.kernels.mla.fused_mla_projection.reference import mla_projection_reference

MANY_TILES = 256
"""Tiles of 128 × 128, about two for each processor: no sum over rows is divided to occupy more of them.

On an H200 54 products of 60 to 560 such tiles, over 512 to 65,536 rows, had the values of the float32 result, rounded.
"""

FEW_ROWS = 256
"""Rows up to which a sum has four steps of 64 at the most."""


def _triton_normalise(latent: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    from kernel_index.kernels.mla.fused_mla_projection import triton

    return triton.normalise(latent, weight, eps)


def _triton_gradients(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from kernel_index.kernels.mla.fused_mla_projection import triton

    return triton.gradients(*arguments)


class _Norm(NamedTuple):
    normalise: Any
    gradients: Any


_NORMS = {
    "triton": _Norm(_triton_normalise, _triton_gradients),
    "inductor": _Norm(norm.normalise_region, norm.gradients_region),
    "eager": _Norm(norm.normalise, norm.gradients),
}


def _allocate(x, w_down, w_up, norm_weight, eps, dtype, kept, backend):
    """out, 1/rms, and latent and normed, empty where they are not kept: an op's outputs have a fixed number."""
    rows, latent = x.shape[0], w_down.shape[0]
    return (
        x.new_empty((rows, w_up.shape[0]), dtype=dtype),
        x.new_empty((rows,), dtype=statistics_dtype(dtype, norm_weight)),
        x.new_empty((rows, latent) if kept >= 1 else (0,), dtype=dtype),
        x.new_empty((rows, latent) if kept >= 2 else (0,), dtype=dtype),
    )


def _project(x, w_down, w_up, norm_weight, eps, dtype, kept, backend):
    """The casts are made here, so that the originals are what is kept and weight gradients are not rounded."""
    latent = torch.mm(x.to(dtype), w_down.to(dtype).T)
    normed, rstd = _NORMS[backend].normalise(latent, norm_weight, eps)
    out = torch.mm(normed, w_up.to(dtype).T)
    latent, normed = (t if kept >= n else t.new_empty((0,)) for n, t in enumerate((latent, normed), 1))
    return out, rstd, latent, normed


def _allocate_gradients(g, x, w_down, w_up, norm_weight, rstd, latent, normed, wanted, backend):
    like = (x, w_down, w_up, rstd if norm_weight is None else norm_weight)
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip(like, wanted, strict=True))


def _gradients(g, x, w_down, w_up, norm_weight, rstd, latent, normed, wanted, backend):
    dtype = g.dtype
    d_x, d_down, d_up, d_norm = (
        t.new_empty((0,)) for t in (x, w_down, w_up, rstd if norm_weight is None else norm_weight)
    )
    with without_autocast(x):  # for a backward() that is called inside of it
        rounded = x.to(dtype)
        down = w_down.to(dtype)
        if latent is None:
            latent = torch.mm(rounded, down.T)
        d_normed = torch.mm(g, w_up.to(dtype)) if wanted[0] or wanted[1] or wanted[3] else None
        needed = (wanted[2] and normed is None, wanted[0] or wanted[1], wanted[3])
        again, d_latent, weight_sum = _NORMS[backend].gradients(d_normed, latent, rstd, norm_weight, needed)
        if wanted[2]:
            d_up = _over_rows(g, again if normed is None else normed, w_up.dtype)
        if wanted[1]:
            d_down = _over_rows(d_latent, rounded, w_down.dtype)
        if wanted[0]:
            d_x = torch.mm(d_latent, down).to(x.dtype)
        if wanted[3]:
            d_norm = weight_sum.to(norm_weight.dtype)
    return d_x, d_down, d_up, d_norm


def _over_rows(d: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """``dᵀ·a``, summed over the rows in float32 at least and rounded once, to the weight's own dtype."""
    if d.dtype.itemsize >= 4 or (dtype == d.dtype and d.device.type == "cpu"):  # a CPU's products sum in float32
        return torch.mm(d.T, a).to(dtype)
    if d.is_cuda and torch.version.hip is None:  # in the product's accumulator: no half-precision split sums
        if dtype == d.dtype and is_never_split(d.shape[1] * a.shape[1], d.shape[0]):
            return torch.mm(d.T, a)  # a float32 result would be written, read and rounded by passes of its own
        return torch.mm(d.T, a, out_dtype=torch.float32).to(dtype)
    return torch.mm(d.T.to(torch.float32), a.to(torch.float32)).to(dtype)


def is_never_split(elements: int, rows: int) -> bool:
    """Whether a GPU's product sums over all rows in one accumulator: it has tiles enough, or too few rows to divide."""
    return elements >= MANY_TILES * 128 * 128 or rows <= FEW_ROWS


_forward_op = ops.register(
    "mla_projection(Tensor x, Tensor w_down, Tensor w_up, Tensor? norm_weight, float eps, ScalarType dtype, int kept, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _project,
    _allocate,
)
_backward_op = ops.register(
    "mla_projection_backward(Tensor g, Tensor x, Tensor w_down, Tensor w_up, Tensor? norm_weight, Tensor rstd, "
    "Tensor? latent, Tensor? normed, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _allocate_gradients,
)


class _Constants(NamedTuple):
    """What a call has beside its tensors; ``copies`` of ``[N, L]`` are kept for backward: the latent, then normed."""

    eps: float
    dtype: torch.dtype
    copies: int
    backend: str


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_down: Tensor,
        w_up: Tensor,
        norm_weight: Tensor | None,
        constants: _Constants,
    ) -> Tensor:
        eps, dtype, copies, backend = constants
        kept = copies if any(ctx.needs_input_grad) else 0
        out, rstd, latent, normed = _forward_op(_rows(x), w_down, w_up, norm_weight, eps, dtype, kept, backend)
        latent, normed = latent if kept >= 1 else None, normed if kept >= 2 else None
        ctx.save_for_backward(x, w_down, w_up, norm_weight, rstd, latent, normed)
        ctx.constants = constants
        return out.view(*x.shape[:-1], w_up.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w_down, w_up, norm_weight, rstd, latent, normed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph: the plain formula, so that any further derivative exists too
            return *_with_history(ctx.constants, g, (x, w_down, w_up, norm_weight), needs), None
        saved = (norm_weight, rstd, latent, normed)
        gradients = _backward_op(_rows(g), _rows(x), w_down, w_up, *saved, list(needs), ctx.constants.backend)
        d_x, *d_weights = (d if need else None for d, need in zip(gradients, needs, strict=True))
        return None if d_x is None else d_x.view(x.shape), *d_weights, None


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _with_history(
    constants: _Constants, g: Tensor, inputs: tuple[Any, Any, Any, Any], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    out = mla_projection_reference(Call(*inputs, constants.eps, "latent", constants.dtype))
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
    return [next(found) if need else None for need in needs]


def _apply(call: Call, backend: str) -> Tensor:
    constants = _Constants(call.eps, call.dtype, POLICIES.index(call.recompute), backend)
    return ops.apply(_Projection, call.x, call.w_down, call.w_up, call.norm_weight, constants)


def mla_projection_triton(call: Call) -> Tensor:
    return _apply(call, "triton")


def mla_projection_inductor(call: Call) -> Tensor:
    return _apply(call, "inductor")


def mla_projection_eager(call: Call) -> Tensor:
    return _apply(call, "eager")
