"""One compiled pass over q and k, which is its own backward pass with −sin; with a norm, one pass each way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.inductor import Region, sum_rows


def _rotate(x: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor | None:
    if x is None:
        return None
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    c, s = cos.to(dtype), sin.to(dtype)
    n = 2 * c.shape[-1]
    first, second = (slice(0, n, 2), slice(1, n, 2)) if interleaved else (slice(n // 2), slice(n // 2, n))
    x1, x2 = x[..., first].to(dtype), x[..., second].to(dtype)
    y1, y2 = (x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype)
    # One cat over all channels: each is stored at its index, with no pass over a joined tensor afterwards.
    rotated = (torch.stack((y1, y2), -1).flatten(-2),) if interleaved else (y1, y2)
    return torch.cat((*rotated, x[..., n:]), -1)


def _rotate_both(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor | None, Tensor | None]:
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


_region = Region(_rotate_both, q=(0, 1), k=(0, 1), cos=(0, 1), sin=(0, 1))


def rotate(q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool):
    if inverse:  # negating sin is 1/(H + K) of a pass and spares a second compilation
        sin = -sin
    rows = _region(*_as_rows(q, k, cos, sin), interleaved)
    return tuple(None if x is None else y.view(x.shape) for x, y in zip((q, k), rows, strict=True))


def _as_rows(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """[B, T, …] tensors, the tables last.  Where every token has its own angles the batch becomes one long row, so that
    a batch of any size is one variant.
    """
    tables = tensors[-1]
    if tables is None or tables.shape[0] == 1:
        return tensors
    return [None if x is None else x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in tensors]


# The same after a norm of each head


class Norm(NamedTuple):
    """The numbers of a call that normalizes."""

    eps: float
    offset: float
    interleaved: bool


def _wide(x: Tensor, weight: Tensor, cos: Tensor) -> torch.dtype:
    return torch.promote_types(
        torch.promote_types(x.dtype, weight.dtype), torch.promote_types(cos.dtype, torch.float32)
    )


def _norm_rotate(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float, interleaved: bool
) -> Tensor | None:
    if weight is None:
        return _rotate(x, cos, sin, interleaved)
    wide = x.to(_wide(x, weight, cos))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = _rotate(wide * rstd * (weight.to(wide.dtype) + offset), cos, sin, interleaved)
    return None if normed is None else normed.to(x.dtype)


def _norm_rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    offset: float, interleaved: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    rest = (cos, sin, eps, offset, interleaved)
    return _norm_rotate(q, q_weight, *rest), _norm_rotate(k, k_weight, *rest)


def _gradient(
    g: Tensor | None, x: Tensor | None, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float,
    interleaved: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Of x and of the weight; x is None where there is no norm."""
    if g is None or x is None or weight is None:
        return _rotate(g, cos, -sin, interleaved), None
    wide = x.to(_wide(x, weight, cos))
    d_normed = _rotate(g.to(wide.dtype), cos, -sin, interleaved)
    assert d_normed is not None
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    x_hat, d_hat = wide * rstd, d_normed * (weight.to(wide.dtype) + offset)
    d_x = rstd * (d_hat - x_hat * (d_hat * x_hat).mean(-1, keepdim=True))
    return d_x.to(x.dtype), sum_rows((d_normed * x_hat).flatten(0, 2)).to(weight.dtype)


def gradients(
    gq: Tensor | None, gk: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, interleaved: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Of q, k and their weights; None without an upstream gradient, or without a norm."""
    rest = (cos, sin, eps, offset, interleaved)
    (d_q, d_q_weight), (d_k, d_k_weight) = _gradient(gq, q, q_weight, *rest), _gradient(gk, k, k_weight, *rest)
    return d_q, d_k, d_q_weight, d_k_weight


_TOKENS = dict.fromkeys(("gq", "gk", "q", "k", "cos", "sin"), (0, 1))
_norm_region = Region(_norm_rotate_both, **{n: d for n, d in _TOKENS.items() if n not in ("gq", "gk")})
_norm_backward_region = Region(gradients, **_TOKENS)


def norm_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
                norm: Norm):  # fmt: skip
    rows = _norm_region(*_as_rows(q, k, cos, sin), q_weight, k_weight, *norm)
    return tuple(y.view(x.shape) for x, y in zip((q, k), rows, strict=True))


def norm_backward(
    gq: Tensor | None, gk: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, norm: Norm,
):  # fmt: skip
    d_q, d_k, *d_weights = _norm_backward_region(*_as_rows(gq, gk, q, k, cos, sin), q_weight, k_weight, *norm)
    d_x = (None if g is None else d.view(g.shape) for g, d in zip((gq, gk), (d_q, d_k), strict=True))
    return *d_x, *d_weights
