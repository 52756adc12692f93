"""FlexAttention under the contract's own block mask; its kernel is compiled at the first call of a shape."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _capped(softcap: float) -> Callable[..., Tensor] | None:
    if softcap == 0:
        return None

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def attention_with_lse_flex(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    sizes = sizes_of(q, k, mask)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    out, lse = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=_capped(softcap),
        block_mask=mask.flex_block_mask(128, sizes.batch, sizes.queries, sizes.keys, device=q.device),
        scale=scale_of(q, scale),
        enable_gqa=q.shape[2] != k.shape[2],
        return_lse=True,
    )
    start, end = mask.row_intervals(sizes)
    empty = (start == end)[:, None]
    if sink is not None:  # it joins the denominator of every query that has a key
        known = lse.masked_fill(empty, 0.0)
        total = torch.logaddexp(known, sink.to(lse.dtype)[:, None])
        out = (out * torch.exp(known - total)[..., None]).to(q.dtype)
        lse = total
    return out.transpose(1, 2).contiguous(), lse.masked_fill(empty, -torch.inf)


def attention_flex(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> Tensor:
    return attention_with_lse_flex(q, k, v, mask, scale, softcap, sink)[0]
