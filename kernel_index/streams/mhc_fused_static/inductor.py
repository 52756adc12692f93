"""Forward and backward as one compiled pass each over ``[batches, N, 4, C]``, stream by stream.

``batches`` is 1 where every coefficient is shared.  Each coefficient is ``[1 or batches, 4]`` or ``[…, 4, 4]``.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernel_index.inductor import Region
from kernel_index.streams.mhc_fused_static.contract import STREAMS, compute_dtype

_ALL = range(STREAMS)


def _add(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _column(coefficient: Tensor, *index: int) -> Tensor:
    """One entry for each batch, against ``[batches, N, C]``."""
    return coefficient[:, *index, None, None]


def _mixed(
    streams: list[Tensor], f: Tensor, h_post: Tensor, h_res: Tensor, dtype: torch.dtype, stored: torch.dtype
) -> list[Tensor]:
    out = []
    for o in _ALL:
        terms = [_column(h_res, o, n) * streams[n] for n in _ALL]
        out.append(_add([*terms, _column(h_post, o) * f.to(dtype)]).to(stored))
    return out


def mix(
    hidden: Tensor, branch_out: Tensor | None, h_post: Tensor | None, h_res: Tensor | None, h_pre: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    dtype = compute_dtype(hidden, branch_out, h_post, h_res, h_pre)
    streams = [hidden[:, :, n].to(dtype) for n in _ALL]
    merged = read = None
    if branch_out is not None and h_post is not None and h_res is not None:
        parts = _mixed(streams, branch_out, h_post, h_res, dtype, hidden.dtype)
        merged = torch.stack(parts, 2)
        streams = [p.to(dtype) for p in parts]  # what is read is what is stored
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_hidden, d_branch_out, and for each token its part of the 24 coefficients' gradients, post, res, pre in turn.

    ``like`` holds the dtypes of hidden and branch_out; ``wanted`` says which of the three are needed.
    """
    dtype = compute_dtype(d_merged, d_read, hidden, branch_out, h_post, h_res, h_pre)
    total: list[Tensor] = []
    for n in _ALL:
        through = [] if d_merged is None else [d_merged[:, :, n].to(dtype)]
        if d_read is not None and h_pre is not None:
            through.append(_column(h_pre, n) * d_read.to(dtype))
        total.append(_add(through))
    d_hidden = d_branch = parts = None
    merging = h_post is not None and h_res is not None
    if wanted[0]:
        back = [_add(_column(h_res, o, n) * total[o] for o in _ALL) for n in _ALL] if merging else total
        d_hidden = torch.stack([d.to(like[0]) for d in back], 2)
    if wanted[1] and merging:
        d_branch = _add(_column(h_post, o) * total[o] for o in _ALL).to(like[1])
    if wanted[2] and hidden is not None:
        streams = [hidden[:, :, n].to(dtype) for n in _ALL]
        products = []
        if merging and branch_out is not None:
            products += [total[o] * branch_out.to(dtype) for o in _ALL]
            products += [total[o] * streams[n] for o in _ALL for n in _ALL]
            streams = [s.to(dtype) for s in _mixed(streams, branch_out, h_post, h_res, dtype, hidden.dtype)]
        else:
            products += [torch.zeros_like(streams[0])] * (STREAMS + STREAMS**2)
        products += [torch.zeros_like(s) if d_read is None else d_read.to(dtype) * s for s in streams]
        parts = torch.stack([p.sum(-1) for p in products], -1)
    return d_hidden, d_branch, parts


_TOKENS = (0, 1)
_ROW = (0,)
_COEFFICIENTS = {"h_post": _ROW, "h_res": _ROW, "h_pre": _ROW}
forward = Region(mix, hidden=_TOKENS, branch_out=_TOKENS, **_COEFFICIENTS)
_backward = Region(gradients, d_merged=_TOKENS, d_read=_TOKENS, hidden=_TOKENS, branch_out=_TOKENS, **_COEFFICIENTS)


def backward(*call: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gradients`` with the coefficients' summed over tokens, ``[batches, 24]``."""
    d_hidden, d_branch, parts = _backward(*call)
    return d_hidden, d_branch, None if parts is None else parts.sum(1)
