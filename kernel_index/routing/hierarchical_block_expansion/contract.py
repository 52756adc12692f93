"""Argument checks and backend eligibility of ``hierarchical_block_select``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, native, rules
from kernel_index.masks.attention_arguments import host_plan_why_not
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.forced_blocks import check_forced
from kernel_index.routing.hierarchical_block_expansion.selection import HierarchyPlan
from kernel_index.routing.legal_blocks import LegalBlocks, check_causal, group_queries, legal_blocks, num_blocks

FEW_BLOCKS = "blocks ≤ coarse_topc × coarse_ratio: every block would be a candidate"


class HierarchyCall(NamedTuple):
    """One checked call; ``topk`` is as asked for, where the plan's ``final_topk`` is clamped to the blocks."""

    q: Tensor  # [B, T, H, D]
    block_keys: Tensor  # [B, blocks, K, D]
    mask: MaskContract
    sizes: Sizes
    plan: HierarchyPlan
    block_size: int
    topk: int
    recall: bool

    def exhaustively(self) -> "HierarchyCall":
        """The same call with every group expanded."""
        plan = self.plan._replace(coarse_topc=self.plan.metas, exhaustive=True)
        return self._replace(plan=plan, recall=False)

    def operands(self) -> tuple[Tensor, Tensor, LegalBlocks]:
        """Mean queries [B, T, K, D] and block keys in one dtype, float32 at least; the legal blocks."""
        queries = group_queries(self.q, self.block_keys.shape[2])
        keys = self.block_keys.detach().to(queries.dtype)
        return queries, keys, legal_blocks(self.mask, self.sizes, self.block_size)


def check(
    q: Tensor,
    block_keys: Tensor,
    coarse_ratio: int,
    coarse_topc: int,
    final_topk: int,
    mask: MaskContract,
    block_size: int,
    forced: tuple[str, ...],
    kv_len: int | None,
    recall: bool,
) -> HierarchyCall:
    _check_tensors(q, block_keys)
    wanted = _check_options(coarse_ratio, coarse_topc, final_topk, block_size, forced, mask, recall)
    sizes = _sizes_of(q, block_keys, mask, block_size, kv_len)
    blocks = block_keys.shape[1]
    metas = -(-blocks // coarse_ratio)
    few = metas <= coarse_topc
    plan = HierarchyPlan(
        blocks=blocks,
        metas=metas,
        coarse_ratio=min(coarse_ratio, blocks),
        coarse_topc=min(coarse_topc, metas),
        candidates=min(coarse_topc * coarse_ratio, blocks),
        final_topk=min(final_topk, blocks),
        forced=wanted,
        exhaustive=few,
        reason=FEW_BLOCKS if few else "",
    )
    return HierarchyCall(q, block_keys, mask, sizes, plan, block_size, final_topk, recall)


def _check_tensors(q: Any, block_keys: Any) -> None:
    checks.is_floating("q", q)
    checks.has_rank("q", q, 4, "[B, T, H, D]")
    checks.is_floating("block_keys", block_keys)
    checks.has_rank("block_keys", block_keys, 4, "[B, blocks, K, D]")
    checks.on_device("block_keys", block_keys, q, "q")
    batch, _, heads, width = q.shape
    blocks, groups = block_keys.shape[1:3]
    checks.has_shape("block_keys", block_keys, (batch, blocks, groups, width), "[B, blocks, K, D] with q's B and D,")
    if groups < 1 or heads % groups:
        raise ValueError(f"q must be of a multiple of block_keys' {groups} heads, got {heads}")


def _check_options(
    coarse_ratio: Any, coarse_topc: Any, final_topk: Any, block_size: Any, forced: Any, mask: Any, recall: Any
) -> tuple[str, ...]:
    for name, value in (("coarse_ratio", coarse_ratio), ("coarse_topc", coarse_topc), ("block_size", block_size)):
        checks.is_int(name, value, minimum=1)
    wanted = check_forced(forced)
    checks.is_int("final_topk", final_topk, minimum=max(1, len(wanted)))
    if not isinstance(mask, MaskContract):
        raise TypeError(f"mask must be a MaskContract, got {type(mask).__name__}")
    check_causal(mask)
    checks.is_bool("recall", recall)
    return wanted


def _sizes_of(q: Tensor, block_keys: Tensor, mask: MaskContract, block_size: int, kv_len: int | None) -> Sizes:
    queries, blocks = q.shape[1], block_keys.shape[1]
    if kv_len is None and mask.doc_ids is None:
        kv_len = queries if num_blocks(queries, block_size) == blocks else blocks * block_size
    sizes = mask.sizes(q.shape[0], queries, kv_len, q.device)
    if num_blocks(sizes.keys, block_size) != blocks:
        rule = f"[B, {num_blocks(sizes.keys, block_size)}, K, D], the blocks of {sizes.keys} keys,"
        raise ValueError(f"block_keys must be {rule} got shape {tuple(block_keys.shape)}")
    return sizes


def details(call: HierarchyCall) -> tuple[tuple[str, Any], ...]:
    if torch.compiler.is_compiling():  # sizes are symbols in a trace
        return ()
    plan = call.plan
    return ("exhaustive", plan.exhaustive), ("reason", plan.reason), ("blocks", plan.blocks), ("metas", plan.metas)


MOST_BLOCKS = 64
"""Blocks of a query, and groups that are expanded, that the Triton kernel keeps in registers."""

WIDEST_HEAD = 128
"""Largest head size of the Triton kernel."""

MOST_CHILDREN = 64
"""Children of a group that the Triton kernel scores at once."""


def triton_why_not(call: HierarchyCall) -> str | None:
    if call.topk > MOST_BLOCKS or (call.plan.coarse_topc > MOST_BLOCKS and not call.plan.exhaustive):
        return "keeps at most 64 blocks of a query, and 64 groups"
    if call.plan.coarse_ratio > MOST_CHILDREN and not call.plan.exhaustive:
        return "scores at most 64 children of a group at once"
    if call.q.shape[3] > WIDEST_HEAD:
        return "needs head sizes of at most 128"
    return rules.triton_why_not(call.q, call.block_keys)


def triton_not_worth(call: HierarchyCall) -> str | None:
    return rules.triton_not_worth(call.q)


def native_why_not(call: HierarchyCall) -> str | None:
    return keys_why_not(call.q, call.block_keys)


def keys_why_not(q: Tensor, keys: Tensor) -> str | None:
    """The rule of the native search for block keys that are still to be made from ``keys``."""
    if (rule := host_plan_why_not(q) or native.why_not(q, keys)) is not None:
        return rule
    return "nothing to score" if q.numel() == 0 or keys.numel() == 0 else None
