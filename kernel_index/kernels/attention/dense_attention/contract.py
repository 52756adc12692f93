"""Argument checks and backend eligibility of ``attention`` and ``attention_with_lse``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import document_attention, native, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.core.excluded import PairSight, Sight, sight_of_intervals
from kernel_index.core.numerics import is_invariant
from kernel_index.masks.attention_arguments import check_attention, host_plan_why_not, sizes_of
from kernel_index.masks.doc_window_mask.contract import DENSE_LIMIT
from kernel_index.masks.doc_window_mask.intervals import RowBounds, Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract


class AttentionCall(NamedTuple):
    """One checked call.  ``with_lse``: whether the log-sum-exp is asked for, which not every backend returns."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor  # [B, S, K, Dv]
    mask: MaskContract
    scale: float | None
    softcap: float
    sink: Tensor | None  # [H]
    with_lse: bool

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.q, self.k, self.mask)

    @property
    def excludes(self) -> bool:
        """Whether the mask excludes a key from some query."""
        return lowering(self.sizes, self.mask) != "none"

    def sight(self) -> Sight | PairSight:
        return sight_of(self.mask.row_bounds(self.sizes))

    @property
    def is_empty(self) -> bool:
        return self.q.shape[0] * self.q.shape[1] * self.k.shape[1] == 0

    @property
    def may_have_padding(self) -> bool:
        """Whether a query may see no key."""
        mask, sizes = self.mask, self.sizes
        if mask.is_band and sizes.offset == sizes.keys - sizes.queries >= 0:
            return False
        if sizes.offset != 0 or sizes.queries > sizes.keys:
            return True
        if mask.lengths_are_known(sizes):  # reads nothing: the host knows which tokens are in a document
            return mask.varlen(sizes.batch, sizes.queries, sizes.keys, device=sizes.device).kept is not None
        told = (mask.doc_ids, mask.counts, mask.key_counts, mask.cu_seqlens, mask.subtree_end)  # a tree may have gaps
        return any(x is not None for x in told)


def sight_of(bounds: RowBounds) -> Sight | PairSight:
    """What the queries of a mask see."""
    start, end, q_end = bounds
    if q_end is None:
        return sight_of_intervals(start, end)
    return PairSight(start, end, lambda queries: bounds.all_allowed(queries, q_end.shape[1]))


OutAndLse = tuple[Tensor, Tensor | None]
"""What a backend returns: ``out`` [B, T, H, Dv] and ``lse`` [B, H, T]; None where the call did not ask for it."""


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any, softcap: Any, sink: Any, *, with_lse: bool
) -> AttentionCall:
    q, k, v = cast_like_sdpa(q, k, v)
    check_attention(q, k, v, mask, scale, softcap, sink)
    return AttentionCall(q, k, v, mask, scale, softcap, sink, with_lse)


# PyTorch's scaled_dot_product_attention


def lowering(sizes: Sizes, mask: MaskContract) -> str:
    """What torch's attention needs for this mask: ``none``, ``is_causal`` or ``dense``."""
    if mask.is_band:
        left, right = mask.window_bounds_within(sizes)
        if left is None and right is None:
            return "none"
        # torch's flag is aligned top-left, so it means offset 0; it is used for the square case alone.
        if left is None and right == 0 and sizes.offset == 0 and sizes.queries == sizes.keys:
            return "is_causal"
    return "dense"


def sdpa_details(call: AttentionCall) -> tuple[tuple[str, str], ...]:
    return (("mask_lowering", lowering(call.sizes, call.mask)),)


def sdpa_why_not(call: AttentionCall) -> str | None:
    if call.with_lse:
        return "scaled_dot_product_attention returns no log-sum-exp"
    if call.softcap != 0:
        return "scaled_dot_product_attention has no softcap"
    if call.sink is not None:
        return "scaled_dot_product_attention has no sink"
    if call.q.device.type != "cpu" and call.q.shape[0] == 0:
        return "scaled_dot_product_attention returns nothing for an empty batch on a GPU"
    sizes = call.sizes
    if sizes.queries > DENSE_LIMIT and lowering(sizes, call.mask) == "dense":
        return "dense_mask_too_large: this mask needs its dense form, which is refused above 8192 queries"
    return None


def needs_no_mask(call: AttentionCall) -> bool:
    """Whether ``sdpa`` takes the call, and without a dense mask."""
    return sdpa_why_not(call) is None and lowering(call.sizes, call.mask) != "dense"


NO_MASK = "torch's own kernel needs no mask here"


# The CPU's own


FEW_QUERIES, FEW_SCORES = 64, 128 * 128
SMALL = 256 * 256


def native_why_not(call: AttentionCall) -> str | None:
    if is_invariant():
        return _documents_why_not(call)
    if (rule := host_plan_why_not(call.q)) is not None:
        return rule
    if call.q.shape[3] % 2 or call.v.shape[3] % 2 or call.v.shape[3] == 0:
        return "needs even head sizes: bfloat16 is multiplied in pairs"
    return native.why_not(*(t for t in (call.q, call.k, call.v, call.sink) if t is not None))


def _documents_why_not(call: AttentionCall) -> str | None:
    if call.mask.is_tree and not call.is_empty:
        if torch.compiler.is_compiling():
            return "torch.compile is tracing: the paths of a tree are read on the host"
        if call.sizes.offset != 0 or call.q.shape[1] != call.k.shape[1]:
            return "in a tree its invariant form needs a query for each key, from the first on"
        if not rules.host_readable(call.mask.subtree_end, call.mask.positions):
            return "in a tree its invariant form needs plain tensors of the contract: it reads the paths"
    return document_attention.why_not(call.q, call.k, call.v, call.sink)


def native_not_worth(call: AttentionCall) -> str | None:
    queries, keys = call.q.shape[1], call.k.shape[1]
    few = queries < FEW_QUERIES or queries * keys < FEW_SCORES
    return "too few scores for tiles of 64 queries to pay" if few else None


def cpu_why_not(call: AttentionCall) -> str | None:
    return host_plan_why_not(call.q)


def cpu_not_worth(call: AttentionCall) -> str | None:
    if needs_no_mask(call):
        return NO_MASK
    return "too small for skipping to pay" if call.q.shape[1] * call.k.shape[1] <= SMALL else None
