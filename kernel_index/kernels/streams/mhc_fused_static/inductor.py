"""Forward and backward as one compiled pass each over ``[batches, N, 4, C]``, stream by stream.

``batches`` is 1 where every coefficient is shared.  Each coefficient is ``[1 or batches, 4]`` or ``[…, 4, 4]``.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.dtypes import compute_dtype
from kernel_index.core.inductor import Region
from kernel_index.core.stable import PYTORCH
from kernel_index.kernels.streams.mhc_fused_static.contract import STREAMS, Rows

_ALL = range(STREAMS)


def _add(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _column(coefficient: Tensor, *index: int) -> Tensor:
    """One entry for each batch, against ``[batches, N, C]``."""
    return coefficient[:, *index, None, None]


def mix(
    hidden: Tensor, branch_out: Tensor | None, h_post: Tensor | None, h_res: Tensor | None, h_pre: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    dtype = compute_dtype(hidden, branch_out, h_post, h_res, h_pre)
    streams = [hidden[:, :, n].to(dtype) for n in _ALL]
    merged = read = None
    if branch_out is not None and h_post is not None and h_res is not None:
        written = [_column(h_post, o) * branch_out.to(dtype) for o in _ALL]
        streams = [_add([*(_column(h_res, o, n) * streams[n] for n in _ALL), written[o]]) for o in _ALL]
        merged = torch.stack([s.to(hidden.dtype) for s in streams], 2)
    if h_pre is not None:
        read = _add(_column(h_pre, n) * streams[n] for n in _ALL).to(hidden.dtype)
    return merged, read


def gradients(
    d_merged: Tensor | None,
    d_read: Tensor | None,
    hidden: Tensor | None,
    branch_out: Tensor | None,
    h_post: Tensor | None,
    h_res: Tensor | None,
    h_pre: Tensor | None,
    like: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool, bool],
    *,
    f: Any = PYTORCH,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_hidden, d_branch_out, and for each token the products that ``add_up`` turns into coefficient gradients.

    ``like`` holds the dtypes of hidden and branch_out; ``wanted`` says which of the three are needed.  ``f`` has the
    sums: PyTorch's, or those of ``core.stable``.
    """
    dtype = compute_dtype(d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre)
    dy = None if d_read is None else d_read.to(dtype)[:, :, None]
    through = [] if d_merged is None else [d_merged.to(dtype)]
    if dy is not None and h_pre is not None:
        through.append(h_pre[:, None, :, None] * dy)
    d_new = _add(through)  # of the merged streams
    d_hidden = d_branch = products = None
    merging = h_post is not None and h_res is not None
    if wanted[0]:
        back = [_add(_column(h_res, o, n) * d_new[:, :, o] for o in _ALL) for n in _ALL] if merging else None
        d_hidden = (d_new if back is None else torch.stack(back, 2)).to(like[0])
    if wanted[1] and merging:
        d_branch = _add(_column(h_post, o) * d_new[:, :, o] for o in _ALL).to(like[1])
    if wanted[2] and hidden is not None:
        x = hidden.to(dtype)
        read = torch.zeros_like(x[..., 0]) if dy is None else f.row_sum(dy * x)
        if merging and branch_out is not None:
            out = branch_out.to(dtype)[:, :, None]
            post, res = f.row_sum(d_new * out), f.row_sum(d_new[:, :, :, None] * x[:, :, None])
            branch = torch.zeros_like(read[..., :1]) if dy is None else f.row_sum(dy * out)
            products = torch.cat([post, res.flatten(2), read, branch], -1)
        else:
            products = read
    return d_hidden, d_branch, products


def add_up(sums: Tensor, h_post: Tensor | None, h_res: Tensor | None) -> Tensor:
    """``[batches, …]`` sums of the products over tokens into ``[batches, 24]`` gradients of h_post, h_res and h_pre."""
    if h_post is None or h_res is None:
        return torch.nn.functional.pad(sums, (STREAMS + STREAMS**2, 0))
    post, res, read, branch = sums.split([STREAMS, STREAMS**2, STREAMS, 1], 1)
    # d h_pre[n] = Σ d_read · merged stream n, and that stream is linear in the four streams and the branch.
    pre = (h_res * read[:, None]).sum(-1) + h_post * branch
    return torch.cat([post, res, pre], 1)


_TOKENS = (0, 1)
_ROW = (0,)
_COEFFICIENTS = {"h_post": _ROW, "h_res": _ROW, "h_pre": _ROW}
forward = Region(mix, hidden=_TOKENS, branch_out=_TOKENS, **_COEFFICIENTS)
_backward = Region(gradients, d_merged=_TOKENS, d_read=_TOKENS, hidden=_TOKENS, branch_out=_TOKENS, **_COEFFICIENTS)


def backward(
    upstream: tuple[Tensor | None, Tensor | None],
    saved: Rows,
    like: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gradients`` with those of the coefficients added up.

    Under create_graph the same formula, uncompiled, so that it is differentiable.
    """
    formula = gradients if torch.is_grad_enabled() else _backward
    d_hidden, d_branch, products = formula(*upstream, *saved, like, wanted)
    return d_hidden, d_branch, None if products is None else add_up(products.sum(1), saved.h_post, saved.h_res)
