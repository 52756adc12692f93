"""Argument checks and backend eligibility of ``lightning_indexer``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, native, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.core.numerics import is_invariant
from kernel_index.core.target import target_of
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.lightning_indexer.selection import TokenSelection

NOTHING_TO_SELECT = "a recorded selection is replayed: there is nothing to select"


class IndexerCall(NamedTuple):
    """One checked call."""

    q: Tensor  # [B, T, J, D]
    k: Tensor  # [B, S, D]
    weights: Tensor  # [B, T, J]
    topk: int
    mask: MaskContract
    replay: TokenSelection | None

    @property
    def sizes(self) -> Sizes:
        return self.mask.sizes(self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.device)

    def intervals(self) -> tuple[Tensor, Tensor]:
        """The keys ``start ≤ s < end`` that each query may see, int32 [B or 1, T]."""
        return self.mask.row_intervals(self.sizes)


class LossCall(NamedTuple):
    """One checked call of the loss."""

    selection: TokenSelection
    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    scale: float
    softcap: float


def check(q: Any, k: Any, weights: Any, topk: Any, mask: Any, replay: Any) -> IndexerCall:
    q, k, weights = cast_like_sdpa(q, k, weights)
    legends = ("[B, T, J, D]", "[B, S, D]", "[B, T, J]")
    for name, value, legend in zip(("q_idx", "k_idx", "weights"), (q, k, weights), legends, strict=True):
        checks.is_floating(name, value)
        checks.has_rank(name, value, legend.count(",") + 1, legend)
        checks.on_device(name, value, q, "q_idx")
    batch, queries, heads, width = q.shape
    checks.has_dtype("k_idx", k, q.dtype, "like q_idx")
    if weights.dtype not in (q.dtype, torch.promote_types(q.dtype, torch.float32)):
        raise TypeError(f"weights must be {q.dtype} like q_idx, or float32 beside less, got {weights.dtype}")
    checks.has_shape("k_idx", k, (batch, k.shape[1], width), "[B, S, D] with q_idx's B and D,")
    checks.has_shape("weights", weights, (batch, queries, heads), "[B, T, J] like q_idx,")
    checks.is_int("topk", topk, minimum=1)
    if not isinstance(mask, MaskContract):
        raise TypeError(f"mask must be a MaskContract, got {type(mask).__name__}")
    mask.sizes(batch, queries, k.shape[1], q.device)
    if replay is not None:
        _check_replay(replay, q, topk, k.shape[1])
    return IndexerCall(q, k, weights, topk, mask, replay)


def _check_replay(replay: Any, q: Tensor, topk: int, keys: int) -> None:
    batch, queries = q.shape[:2]
    if not isinstance(replay, TokenSelection):
        raise TypeError(f"replay must be a TokenSelection, got {type(replay).__name__}")
    check_indices("replay.indices", replay.indices, q)
    checks.has_shape("replay.indices", replay.indices, (batch, queries, topk), "[B, T, topk] with q_idx's B and T,")
    checks.has_shape("replay.valid", replay.valid, (batch, queries, topk), "of the shape of replay.indices,")
    check_in_range("replay.indices", replay.indices, replay.valid, keys)


def check_indices(name: str, indices: Any, like: Tensor) -> None:
    checks.is_tensor(name, indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {indices.dtype}")
    checks.on_device(name, indices, like, "q")


def check_in_range(name: str, indices: Tensor, valid: Tensor | None, keys: int) -> None:
    """Values are read on the host alone; on a device an index outside [0, keys) selects nothing."""
    if indices.numel() == 0 or not rules.host_readable(indices, valid):
        return
    looked_at = indices if valid is None else torch.where(valid, indices, -1)
    low, high = (int(x) for x in looked_at.aminmax())
    if low < -1 or high >= keys:
        raise ValueError(f"{name} must be below {keys}, or -1 for none, got {low if low < -1 else high}")


def triton_why_not(call: IndexerCall) -> str | None:
    if call.replay is not None:
        return NOTHING_TO_SELECT
    if call.q.shape[3] > rules.WIDEST_HEAD:
        return rules.NEEDS_NARROW_HEADS
    if call.q.dtype not in (torch.float32, *rules.HALF):
        return rules.NEEDS_TRITON_DTYPE
    if call.sizes.offset is None or call.mask.prefix is not None:
        return "takes one offset for all rows, and no prefix"
    return rules.triton_why_not(call.q, call.k, call.weights)


def triton_not_worth(call: IndexerCall) -> str | None:
    return rules.triton_not_worth(call.q)


def triton_loss_why_not(call: LossCall) -> str | None:
    if call.q.shape[3] > rules.WIDEST_HEAD:
        return rules.NEEDS_NARROW_HEADS
    if call.q.shape[2] > 64 * call.k.shape[2]:
        return "needs at most 64 query heads for each KV head"
    if call.q.dtype not in (torch.float32, *rules.HALF):
        return rules.NEEDS_TRITON_DTYPE
    return rules.triton_why_not(call.q, call.k, *call.selection)


def triton_loss_not_worth(call: LossCall) -> str | None:
    return rules.triton_not_worth(call.q)


def chunked_why_not(call: IndexerCall) -> str | None:
    if rules.inside_functorch():
        return rules.INSIDE_FUNCTORCH
    if any(type(t) not in rules.PLAIN for t in (call.q, call.k, call.weights)):
        return rules.NEEDS_PLAIN
    if call.sizes.offset is None or call.mask.prefix is not None:
        return "takes one offset for all rows, and no prefix"
    return None


def native_why_not(call: IndexerCall) -> str | None:
    if is_invariant() and call.replay is None:
        return native.op_why_not(call.q, call.k, call.weights)
    if call.replay is not None:
        return NOTHING_TO_SELECT
    if (rule := chunked_why_not(call)) is not None:
        return rule
    if target_of(call.q.device).kind != "cpu":
        return rules.NEEDS_CPU
    if (rule := native.why_not(call.q, call.k, call.weights)) is not None:
        return rule
    return "nothing to score" if call.q.numel() == 0 or call.k.numel() == 0 else None


def native_details(call: IndexerCall) -> tuple[tuple[str, Any], ...]:
    """What makes the selection."""
    return (("choice", "native"),)


def triton_details(call: IndexerCall) -> tuple[tuple[str, Any], ...]:
    return (("choice", "triton"),)


def chunked_details(call: IndexerCall) -> tuple[tuple[str, Any], ...]:
    return () if call.replay is not None else (("choice", "torch"),)
