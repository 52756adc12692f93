"""Argument checks and backend eligibility of ``block_router``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, native, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.core.numerics import is_invariant
from kernel_index.masks import attention_arguments as arguments
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.legal_blocks import check_causal, num_blocks


class RouterCall(NamedTuple):
    """One checked call.  The H / G query heads of a group share a selection, by the mean of their queries."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    block_size: int
    topk: int  # blocks for each query, the current one counted
    mask: MaskContract
    groups: int  # G: a multiple of K and a divisor of H

    @property
    def sizes(self) -> Sizes:
        return arguments.sizes_of(self.q, self.k, self.mask)

    @property
    def blocks(self) -> int:
        return num_blocks(self.k.shape[1], self.block_size)

    @property
    def selected(self) -> int:
        """Columns of the result: there are no more than there are blocks, and at least one."""
        return min(self.topk, max(1, self.blocks))


def check(q: Tensor, k: Tensor, block_size: Any, topk: Any, mask: Any, groups: Any) -> RouterCall:
    q, k = cast_like_sdpa(q, k)
    arguments.check_attention(q, k, k, mask, None, 0.0)
    check_causal(mask)
    check_routing(q, block_size, topk)
    checks.is_int("groups", groups, minimum=1)
    heads, kv_heads = q.shape[2], k.shape[2]
    if groups % kv_heads or heads % groups:
        raise ValueError(
            f"groups must be a multiple of the {kv_heads} KV heads and a divisor of the {heads} query heads, "
            f"got {groups}"
        )
    return RouterCall(q, k, block_size, topk, mask, groups)


def check_routing(q: Tensor, block_size: Any, topk: Any) -> None:
    if q.shape[2] < 1:
        raise ValueError(f"q must be of at least one head, got shape {tuple(q.shape)}")
    checks.is_int("block_size", block_size, minimum=1)
    checks.is_int("topk", topk, minimum=1)


def shares(blocks: int, topk: int) -> tuple[tuple[str, Any], ...]:
    """The receipt's numbers: blocks, how many of them a query selects at most, and their share."""
    selected = min(topk, blocks)
    return ("blocks", blocks), ("picks", selected), ("density", selected / blocks if blocks else 0.0)


def details(call: RouterCall) -> tuple[tuple[str, Any], ...]:
    return () if torch.compiler.is_compiling() else shares(call.blocks, call.topk)  # sizes are symbols in a trace


MOST_BLOCKS = 64
"""Blocks of a query that the Triton kernel keeps in registers."""

WIDEST_HEAD = 128
"""Largest head size of the Triton kernel."""

FEW_SCORES = 1 << 16
"""Up to this many scores PyTorch takes no longer than the native kernel."""


def triton_why_not(call: RouterCall) -> str | None:
    if call.topk > MOST_BLOCKS and call.blocks > MOST_BLOCKS:
        return "keeps at most 64 blocks of a query"
    if call.q.shape[3] > WIDEST_HEAD:
        return "needs head sizes of at most 128"
    return rules.triton_why_not(call.q, call.k)


def triton_not_worth(call: RouterCall) -> str | None:
    return rules.triton_not_worth(call.q)


def native_why_not(call: RouterCall) -> str | None:
    if is_invariant():
        return native.op_why_not(call.q, call.k)
    if (rule := arguments.host_plan_why_not(call.q)) is not None:
        return rule
    return native.why_not(call.q, call.k)


def native_not_worth(call: RouterCall) -> str | None:
    scores = call.q.shape[0] * call.q.shape[1] * call.groups * call.blocks
    return "too few scores for it to pay" if scores <= FEW_SCORES else None
