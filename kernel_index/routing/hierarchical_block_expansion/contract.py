"""Who may call ``hierarchical_block_select``, and what sizes it works with."""

from typing import Any

from torch import Tensor

from kernel_index.core import checks, native
from kernel_index.masks.attention_arguments import host_plan_why_not
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.legal_blocks import check_causal, num_blocks

FORCED = ("current", "sink", "local")


def check_tensors(q: Any, block_keys: Any) -> None:
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


def check_options(
    coarse_ratio: Any, coarse_topc: Any, final_topk: Any, block_size: Any, forced: Any, mask: Any, recall: Any
) -> tuple[str, ...]:
    for name, value in (("coarse_ratio", coarse_ratio), ("coarse_topc", coarse_topc), ("block_size", block_size)):
        checks.is_int(name, value, minimum=1)
    if isinstance(forced, str) or not isinstance(forced, tuple | list | set | frozenset):
        raise TypeError(f"forced must be a tuple of {', '.join(FORCED)}, got {forced!r}")
    for name in forced:
        checks.one_of("forced", name, FORCED)
    wanted = tuple(name for name in FORCED if name in forced)
    checks.is_int("final_topk", final_topk, minimum=max(1, len(wanted)))
    if not isinstance(mask, MaskContract):
        raise TypeError(f"mask must be a MaskContract, got {type(mask).__name__}")
    check_causal(mask)
    checks.is_bool("recall", recall)
    return wanted


def sizes_of(q: Tensor, block_keys: Tensor, mask: MaskContract, block_size: int, kv_len: int | None) -> Sizes:
    queries, blocks = q.shape[1], block_keys.shape[1]
    if kv_len is None and mask.doc_ids is None:
        kv_len = queries if num_blocks(queries, block_size) == blocks else blocks * block_size
    sizes = mask.sizes(q.shape[0], queries, kv_len, q.device)
    if num_blocks(sizes.keys, block_size) != blocks:
        rule = f"[B, {num_blocks(sizes.keys, block_size)}, K, D], the blocks of {sizes.keys} keys,"
        raise ValueError(f"block_keys must be {rule} got shape {tuple(block_keys.shape)}")
    return sizes


def native_why_not(q: Tensor, block_keys: Tensor) -> str | None:
    """Why the native search does not serve this call, or None; a rule reads metadata only."""
    if (rule := host_plan_why_not(q) or native.why_not(q, block_keys)) is not None:
        return rule
    return "nothing to score" if q.numel() == 0 or block_keys.numel() == 0 else None
