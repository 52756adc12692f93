"""flash-attn-4: windows by its own arguments, documents as packed sequences, any other mask as lists of tiles."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_index.core import ops, rules
from kernel_index.core.excluded import guarded_on_device
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.kernels.attention.dense_attention.gpu_rules import fa4_form, fa4_tile
from kernel_index.kernels.attention.dense_attention.packing import no_tokens, packed, unpacked
from kernel_index.kernels.attention.dense_attention.tile_mask import tile_mask
from kernel_index.masks.attention_arguments import scale_of


@guarded_on_device
def attention_fa4(call: AttentionCall) -> OutAndLse:
    options: dict[str, Any] = {
        "softmax_scale": scale_of(call.q, call.scale),
        "softcap": call.softcap,
        "learnable_sink": call.sink,
        "return_lse": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return _WAYS[fa4_form(call)](call, options)


def _band(call: AttentionCall, options: dict[str, Any]) -> OutAndLse:
    from flash_attn.cute import flash_attn_func

    q, k, v = (x.contiguous() for x in (_finite_queries(call), call.k, call.v))
    out, lse = flash_attn_func(q, k, v, **_window(call), **options)
    return out, _of_empty(call, lse)


def _window(call: AttentionCall) -> dict[str, Any]:
    """A ``mask_mod`` would disable both; None is "no window", and -1 beside causal would be one without a left end."""
    left, right = call.mask.window_bounds_within(call.sizes)
    windowed = left is not None or right not in (None, 0)
    return {"causal": right == 0, "window_size": (left, right) if windowed else (None, None)}


def _lists(call: AttentionCall, options: dict[str, Any]) -> OutAndLse:
    """Tiles that are partly allowed ask a predicate; the others are visited as they are, or not at all."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    from kernel_index.kernels.attention.dense_attention import fa4_predicates

    mask, sizes, tile = call.mask, call.sizes, fa4_tile(call.q.shape[3])
    tiles = tile_mask(mask, sizes, tile)
    q, k, v = (x.contiguous() for x in (_finite_queries(call), call.k, call.v))
    out, lse = flash_attn_func(
        q, k, v, **options,
        mask_mod=getattr(fa4_predicates, tiles.predicate),
        aux_tensors=list(tiles.bounds),
        block_sparse_tensors=BlockSparseTensorsTorch(*tiles.by_query, block_size=tile),
        block_sparse_tensors_bwd=BlockSparseTensorsTorch(*tiles.by_key, block_size=tile),
    )  # fmt: skip
    return out, _of_empty(call, lse)


def _empty(call: AttentionCall) -> Tensor:
    start, end, _ = call.mask.row_bounds(call.sizes)
    return start >= end


def _finite_queries(call: AttentionCall) -> Tensor:
    """q, with 0 in the queries that see no key where their values would reach a gradient."""
    if rules.wants_gradient(call.q, call.k, call.v) and call.may_have_padding:
        return ops.apply(_WithoutEmpty, _empty(call), call.q)
    return call.q


def _of_empty(call: AttentionCall, lse: Tensor) -> Tensor:
    """The package counts the sink of a query without keys."""
    if call.sink is None or not call.may_have_padding:
        return lse
    return lse.masked_fill(_empty(call)[:, None], float("-inf"))


class _Lengths(NamedTuple):
    """Cumulative lengths with one more sequence, the padding, and where that begins, [1]; bool [T] tells of padding."""

    lengths: Tensor
    last: Tensor
    padding: Tensor


def _given_lengths(call: AttentionCall) -> _Lengths:
    cu_seqlens, queries = call.mask.cu_seqlens, call.q.shape[1]
    assert cu_seqlens is not None

    def build() -> _Lengths:
        given = cu_seqlens[0].to(torch.int32).clamp(max=queries)
        padding = torch.arange(queries, device=given.device) >= given[-1]
        return _Lengths(F.pad(given, (0, 1), value=queries), given[-1:].clone(), padding)

    return call.mask.remember("given_lengths", call.sizes, build)


def _lengths(call: AttentionCall, options: dict[str, Any]) -> OutAndLse:
    """Packed lengths as they were given: nothing is read.  What comes after the last is one more sequence."""
    from flash_attn.cute import flash_attn_varlen_func

    queries = call.q.shape[1]
    lengths, last, padding = _given_lengths(call)
    q, k, v = (x[0].contiguous() for x in (call.q, call.k, call.v))
    if rules.wants_gradient(q, k, v):
        q, k, v = ops.apply(_WithoutPadding, padding, last, q, k, v)
    out, lse = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=queries, max_seqlen_k=queries,
        **_window(call), **options,
    )  # fmt: skip
    _clear(out.detach(), last)
    return out[None], lse.masked_fill(padding, float("-inf"))[None]


def _packed(call: AttentionCall, options: dict[str, Any]) -> OutAndLse:
    """Packed lengths that the host knows, or that it reads: that waits for the device, once for each contract."""
    from flash_attn.cute import flash_attn_varlen_func

    q, k, v, mask, sizes = call.q, call.k, call.v, call.mask, call.sizes
    lengths = mask.varlen(sizes.batch, sizes.queries, sizes.keys, device=q.device)
    if lengths.max_seqlen_q == 0:
        out, lse = no_tokens(q, k, v), q.new_empty(q.shape[2], 0, dtype=torch.float32)
    else:
        out, lse = flash_attn_varlen_func(
            *(packed(x, lengths) for x in (q, k, v)),
            cu_seqlens_q=lengths.cu_seqlens_q,
            cu_seqlens_k=lengths.cu_seqlens_k,
            max_seqlen_q=lengths.max_seqlen_q,
            max_seqlen_k=lengths.max_seqlen_k,
            **_window(call),
            **options,
        )
    lse = unpacked(lse.transpose(0, 1), lengths, sizes.batch, sizes.queries, fill=float("-inf"))
    out = unpacked(out, lengths, sizes.batch, sizes.queries)
    return out, lse.transpose(1, 2).contiguous()


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, causal: bool, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a mask without a tensor, for an op in a graph, which has a backward pass of its own."""
    from flash_attn.cute import flash_attn_func

    with torch.no_grad():
        return flash_attn_func(
            q, k, v, softmax_scale=scale, softcap=softcap, causal=causal, window_size=(left, right), return_lse=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip


def backward_pass(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, softcap: float, causal: bool, left: int | None, right: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Its gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd(
        q, k, v, out, d_out, lse, scale, causal, softcap, window_size_left=left, window_size_right=right, dlse=d_lse,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[:3]  # fmt: skip


_WAYS = {"band": _band, "lengths": _lengths, "lists": _lists, "packed": _packed}


class _WithoutEmpty(torch.autograd.Function):
    """0 in the queries that see nothing.

    Their weights are 0, and 0 · NaN would be the gradient of their tile's keys; their own gradient is 0 as it is.
    """

    @staticmethod
    def forward(ctx: Any, empty: Tensor, q: Tensor) -> Tensor:
        return torch.where(empty[..., None, None], 0.0, q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_q: Tensor) -> tuple[None, Tensor]:
        return None, d_q


class _WithoutPadding(torch.autograd.Function):
    """The same for the queries after the last document, which have no gradient, nor have their keys and values."""

    @staticmethod
    def forward(ctx: Any, padding: Tensor, last: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.last = last
        return torch.where(padding[:, None, None], 0.0, q), k.view_as(k), v.view_as(v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dense = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        for gradient in dense:
            if gradient is not None:
                _clear(gradient, ctx.last)  # in place: the kernel made it, and nobody else has it yet
        return None, None, *dense


def _clear(x: Tensor, last: Tensor) -> None:
    from kernel_index.core.triton.excluded import clear_after

    clear_after(x, last)
