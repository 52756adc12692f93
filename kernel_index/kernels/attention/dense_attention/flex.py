"""FlexAttention under the contract's own block mask; its kernel is compiled at the first call of a shape."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.excluded import guarded
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.masks.attention_arguments import scale_of


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


@guarded
def attention_flex(call: AttentionCall) -> OutAndLse:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, mask, sizes, sink = call.q, call.k, call.v, call.mask, call.sizes, call.sink
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    out, lse = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=_capped(call.softcap),
        block_mask=mask.flex_block_mask(128, sizes.batch, sizes.queries, sizes.keys, device=q.device),
        scale=scale_of(q, call.scale),
        enable_gqa=q.shape[2] != k.shape[2],
        return_lse=True,
    )
    start, end, _ = mask.row_bounds(sizes)
    empty = (start == end)[:, None]
    if sink is not None:  # the sink logit is a term of the denominator of every query that has a key
        known = lse.masked_fill(empty, 0.0)
        lse = torch.logaddexp(known, sink.to(lse.dtype)[:, None])
        out = (out * torch.exp(known - lse)[..., None]).to(q.dtype)
    return out.transpose(1, 2).contiguous(), lse.masked_fill(empty, -torch.inf)
