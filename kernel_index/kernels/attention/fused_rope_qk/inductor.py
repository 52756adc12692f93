"""One compiled pass over q and k, which is its own backward pass with −sin."""

import torch
from torch import Tensor

from kernel_index.core.inductor import Region


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
    batch = cos.shape[0]
    if batch == 1:
        return _region(q, k, cos, sin, interleaved)
    # Every token has its own angles: the batch is one long row, so that a batch of any size is one variant.
    flat = [None if x is None else x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in (q, k, cos, sin)]
    rows = _region(*flat, interleaved)
    return tuple(None if x is None else y.view(x.shape) for x, y in zip((q, k), rows, strict=True))
