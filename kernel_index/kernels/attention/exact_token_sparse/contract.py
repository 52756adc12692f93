"""Argument checks and backend eligibility of ``exact_token_attention``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, device_documents, document_attention, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.core.excluded import Sight, sight_of_blocks
from kernel_index.core.numerics import is_invariant
from kernel_index.core.target import target_of
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.dense_attention.api import AttentionCall
from kernel_index.masks.attention_arguments import check_attention, scale_of, sizes_of
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.lightning_indexer.contract import check_in_range, check_indices
from kernel_index.routing.lightning_indexer.selection import TokenSelection

INDEXER_RETURNED_NONE = "indexer_returned_none"
UNION_NEEDS_CPU = f"{rules.NEEDS_CPU}: the union of a chunk's selected tokens is read on the host"


class Scoring(NamedTuple):
    scale: float
    softcap: float


class ExactTokenCall(NamedTuple):
    """One checked call; ``requested`` and ``indexer`` are for the receipt alone."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor  # [B, S, K, Dv]
    indices: Tensor | None  # [B, T, K or 1, topk]; None is dense attention
    valid: Tensor | None
    mask: MaskContract
    scale: float | None
    softcap: float
    sink: Tensor | None  # [H]
    with_lse: bool
    requested: str
    indexer: str

    @property
    def scoring(self) -> Scoring:
        return Scoring(scale_of(self.q, self.scale), self.softcap)

    @property
    def selection(self) -> list[Tensor]:
        """The interval of keys of each query, then the indices, then their validity where it is given."""
        bounds = self.mask.row_intervals(sizes_of(self.q, self.k, self.mask))
        return [*bounds, *(t for t in (self.indices, self.valid) if t is not None)]

    @property
    def excludes(self) -> bool:
        """Every key that is not selected."""
        return True

    def sight(self) -> Sight:
        assert self.indices is not None
        start, end = self.selection[:2]
        return sight_of_blocks(self.indices, self.valid, 1, start, end)

    @property
    def as_dense(self) -> AttentionCall:
        """The same call without a selection."""
        return AttentionCall(self.q, self.k, self.v, self.mask, self.scale, self.softcap, self.sink, self.with_lse)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Any,
    valid: Any,
    mask: MaskContract,
    scale: Any,
    softcap: Any,
    sink: Any,
    requested: str,
    *,
    with_lse: bool,
) -> ExactTokenCall:
    indexer = "none" if indices is None else "given"
    if isinstance(indices, TokenSelection):
        if valid is not None:
            raise ValueError("indices_valid must be None beside a TokenSelection, got a second one")
        indices, valid, indexer = indices.indices, indices.valid, "lightning_indexer"
    q, k, v = cast_like_sdpa(q, k, v)
    check_attention(q, k, v, mask, scale, softcap, sink)
    options = scale, softcap, sink, with_lse, requested, indexer
    if indices is None:
        if valid is not None:
            raise ValueError(f"indices_valid must be None where indices are, got {type(valid).__name__}")
        return ExactTokenCall(q, k, v, None, None, mask, *options)
    _check_selection(q, k, indices, valid)
    if indices.ndim == 3:
        indices = indices.unsqueeze(2)
        valid = None if valid is None else valid.unsqueeze(2)
    if mask.is_tree:
        mask, valid = MaskContract(causal=False), _on_path(indices, valid, mask, sizes_of(q, k, mask))
    return ExactTokenCall(q, k, v, indices, valid, mask, *options)


def _on_path(indices: Tensor, valid: Tensor | None, mask: MaskContract, sizes: Sizes) -> Tensor:
    """Which selected tokens the tree lets each query see, bool like indices: all that is left of the mask."""
    start, end, q_end = mask.row_bounds(sizes)
    seen = (indices >= start[:, :, None, None]) & (indices < end[:, :, None, None])
    if q_end is not None and sizes.keys:
        at = indices.clamp(0, sizes.keys - 1).long()
        until = q_end.expand(at.shape[0], -1).gather(1, at.flatten(1)).view(at.shape)
        seen = seen & (torch.arange(sizes.queries, device=at.device)[:, None, None] < until)
    return seen if valid is None else seen & valid


def _check_selection(q: Tensor, k: Tensor, indices: Any, valid: Any) -> None:
    batch, queries, heads, keys = q.shape[0], q.shape[1], k.shape[2], k.shape[1]
    check_indices("indices", indices, q)
    if indices.ndim == 4:
        legend = "[B, T, K, topk] with q's B and T and k's K,"
        checks.has_shape("indices", indices, (batch, queries, heads, indices.shape[3]), legend)
    else:
        checks.has_rank("indices", indices, 3, "[B, T, K, topk] or [B, T, topk]")
        checks.has_shape("indices", indices, (batch, queries, indices.shape[2]), "[B, T, topk] with q's B and T,")
    if valid is not None:
        checks.is_tensor("indices_valid", valid)
        checks.has_dtype("indices_valid", valid, torch.bool, "")
        checks.has_shape("indices_valid", valid, tuple(indices.shape), "of the shape of indices,")
        checks.on_device("indices_valid", valid, q, "q")
    check_in_range("indices", indices, valid, keys)


def native_why_not(call: ExactTokenCall) -> str | None:
    if call.mask.is_tree or not call.mask.causal:
        return "in a tree the places of a path's tokens are not those of the path alone"
    return document_attention.why_not(call.q, call.k, call.v, call.sink)


def runtime_mode(backend: str) -> str:
    """``compiled`` while torch.compile traces, ``interpreted`` for Triton without a GPU, else ``eager``."""
    if torch.compiler.is_compiling():
        return "compiled"
    return "interpreted" if backend == "triton" and launch.interpreting() else "eager"


def triton_why_not(call: ExactTokenCall) -> str | None:
    if is_invariant():
        if not call.mask.causal:
            return "in a tree the places of a path's tokens are not those of the path alone"
        sizes = sizes_of(call.q, call.k, call.mask)
        return device_documents.mask_why_not(call.q, call.k, call.v, call.mask, sizes, call.scale, call.sink)
    if call.q.shape[3] > rules.WIDEST_HEAD or call.v.shape[3] > rules.WIDEST_HEAD:
        return rules.NEEDS_NARROW_HEADS
    if call.q.shape[2] > 64 * call.k.shape[2]:
        return "needs at most 64 query heads for each KV head"
    if call.q.dtype not in (torch.float32, *rules.HALF):
        return rules.NEEDS_TRITON_DTYPE
    return rules.triton_why_not(call.q, call.k, call.v, call.indices, call.valid, call.sink)


def triton_not_worth(call: ExactTokenCall) -> str | None:
    return rules.triton_not_worth(call.q)


def cpu_why_not(call: ExactTokenCall) -> str | None:
    if target_of(call.q.device).kind != "cpu":
        return UNION_NEEDS_CPU
    if rules.inside_functorch():
        return rules.INSIDE_FUNCTORCH
    if any(t is not None and type(t) not in rules.PLAIN for t in (*call[:5], call.sink)):
        return rules.NEEDS_PLAIN
    return None
