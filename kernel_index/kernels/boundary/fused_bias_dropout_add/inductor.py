"""A small compiled pass for the mask, then one over the data; the same in backward.  Only the seed is kept."""

import math

import torch
from torch import Tensor

from kernel_index.core.inductor import Region, sum_rows
from kernel_index.kernels.boundary.fused_bias_dropout_add import philox

_WHOLE_BLOCKS = philox.BLOCK // philox.LANES, philox.LANES


def _keep_bits(blocks: Tensor, seed: Tensor, threshold: Tensor) -> Tensor:
    return philox.keep_bits(blocks.shape[0], seed, threshold)


def _keep_mask(elements: Tensor, seed: Tensor, threshold: Tensor) -> Tensor:
    return philox.keep_mask(elements.shape, seed, threshold)


def _kept(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    bit = 1 << torch.arange(_WHOLE_BLOCKS[0], dtype=torch.int32, device=mask.device)
    return (mask & bit[:, None]) != 0


def formula(
    x: Tensor, residual: Tensor, bias: Tensor | None, mask: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    out = residual.to(dtype)
    out = out + y if mask is None or scale is None else torch.where(_kept(mask), out + y * scale.to(dtype), out)
    return out.to(residual.dtype)


def gradients(
    g: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and bias, None where no dtype is given for them."""
    dx = g.to(dtype)
    if mask is not None and scale is not None:
        dx = torch.where(_kept(mask), dx * scale.to(dtype), 0.0)
    return None if x_dtype is None else dx.to(x_dtype), None if bias_dtype is None else sum_rows(dx).to(bias_dtype)


_ROWS = (0,)
_bits_region = Region(_keep_bits, blocks=_ROWS)
_mask_region = Region(_keep_mask, elements=_ROWS)
_forward_region = Region(formula, x=_ROWS, residual=_ROWS, mask=_ROWS)
_backward_region = Region(gradients, g=_ROWS, mask=_ROWS)


def _layout(shape: torch.Size, has_bias: bool) -> tuple[int, ...]:
    """[rows, C], with C divided into blocks of the mask where they fit; without a bias any number of rows will do."""
    count, width = math.prod(shape), shape[-1] if shape else 1
    if not has_bias and count % philox.BLOCK == 0:
        return count // philox.BLOCK, 1, *_WHOLE_BLOCKS
    rows = math.prod(shape[:-1])
    return (rows, width) if width % philox.BLOCK else (rows, width // philox.BLOCK, *_WHOLE_BLOCKS)


def _mask(layout: tuple[int, ...], seed: Tensor | None, threshold: Tensor | None) -> Tensor | None:
    """The mask in the form that the layout asks for."""
    if seed is None:
        return None
    if len(layout) == 2:
        return _mask_region(torch.empty(layout, dtype=torch.uint8, device=seed.device), seed, threshold)
    rows, blocks = layout[:2]
    bits = _bits_region(torch.empty(rows * blocks, 0, device=seed.device), seed, threshold)
    return bits.view(rows, blocks, 1, philox.LANES)


def forward(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    layout = _layout(x.shape, bias is not None)
    own_bias = None if bias is None else bias.reshape(layout[1:])
    mask = _mask(layout, seed, threshold)
    return _forward_region(x.reshape(layout), residual.reshape(layout), own_bias, mask, scale, dtype).view(x.shape)


def backward(
    g: Tensor,
    seed: Tensor | None,
    threshold: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    has_bias: bool,
    x_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Under create_graph the same formula, uncompiled, so that it is differentiable."""
    formula = gradients if torch.is_grad_enabled() else _backward_region
    layout = _layout(g.shape, has_bias)
    mask = _mask(layout, seed, threshold)
    dx, dbias = formula(g.reshape(layout), mask, scale, dtype, x_dtype, bias_dtype)
    return None if dx is None else dx.view(g.shape), None if dbias is None else dbias.view(-1)
