"""Argument checks and backend eligibility of ``importance_route``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.masks import attention_arguments as arguments
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.forced_blocks import check_forced, forced_blocks
from kernel_index.routing.legal_blocks import LegalBlocks, check_causal, legal_blocks, num_blocks


class ImportanceCall(NamedTuple):
    """One checked call."""

    q: Tensor  # [B, T, H, D]
    block_keys: Tensor  # [B, N, K, D], of the N complete blocks
    lse: Tensor  # [B, H, T]
    block_size: int
    topk: int
    mask: MaskContract
    sizes: Sizes
    scale: float
    forced: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """All blocks, the one that is still growing counted."""
        return num_blocks(self.sizes.keys, self.block_size)

    @property
    def selected(self) -> int:
        """Columns of the result: there are no more than there are blocks, and at least one."""
        return min(self.topk, max(1, self.blocks))

    def legal_and_forced(self) -> tuple[LegalBlocks, Tensor]:
        """The routable blocks of each query, and its forced ones int64 [rows, T, 1, F]."""
        legal = legal_blocks(self.mask, self.sizes, self.block_size)
        forced = forced_blocks(legal, self.blocks, self.forced)[..., : self.selected]
        return legal, forced


def check(
    q: Any,
    block_keys: Any,
    lse: Any,
    block_size: Any,
    topk: Any,
    mask: Any,
    scale: Any,
    forced: Any,
    kv_len: Any,
) -> ImportanceCall:
    q, block_keys = cast_like_sdpa(q, block_keys)
    for name, value, legend in (("q", q, "[B, T, H, D]"), ("block_keys", block_keys, "[B, blocks, K, D]")):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, legend)
        checks.has_dtype(name, value, q.dtype, "like q")
        checks.on_device(name, value, q, "q")
    batch, queries, heads, width = q.shape
    kv_heads = block_keys.shape[2]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"q must be of a multiple of block_keys' {kv_heads} heads, got {heads}")
    checks.is_floating("lse", lse)
    checks.on_device("lse", lse, q, "q")
    checks.has_shape("lse", lse, (batch, heads, queries), "[B, H, T] of q's heads and queries,")
    checks.is_int("block_size", block_size, minimum=1)
    wanted = check_forced(forced)
    checks.is_int("topk", topk, minimum=max(1, len(wanted)))
    if not isinstance(mask, MaskContract):
        raise TypeError(f"mask must be a MaskContract, got {type(mask).__name__}")
    check_causal(mask)
    if scale is not None:
        checks.is_real("scale", scale)
    if kv_len is not None:
        checks.is_int("kv_len", kv_len, minimum=0)
    sizes = mask.sizes(batch, queries, queries if kv_len is None and mask.doc_ids is None else kv_len, q.device)
    shape = (batch, sizes.keys // block_size, kv_heads, width)
    checks.has_shape("block_keys", block_keys, shape, "[B, S // block_size, K, D] with q's B and D,")
    return ImportanceCall(q, block_keys, lse, block_size, topk, mask, sizes, arguments.scale_of(q, scale), wanted)


def details(call: ImportanceCall) -> tuple[tuple[str, Any], ...]:
    if torch.compiler.is_compiling():  # sizes are symbols in a trace
        return ()
    return ("blocks", call.blocks), ("picks", call.selected), ("forced", ", ".join(call.forced))


MOST_BLOCKS = 64
"""Blocks of a query that the Triton kernel keeps in registers."""

MOST_ROWS = 128
"""Query heads of a KV head that the Triton kernel multiplies at once."""


def triton_why_not(call: ImportanceCall) -> str | None:
    if call.topk > MOST_BLOCKS and call.blocks > MOST_BLOCKS:
        return "keeps at most 64 blocks of a query"
    if call.q.shape[3] > rules.WIDEST_HEAD:
        return rules.NEEDS_NARROW_HEADS
    if call.q.shape[2] > MOST_ROWS * call.block_keys.shape[2]:
        return "needs at most 128 query heads for each KV head"
    return rules.triton_why_not(call.q, call.block_keys, call.lse)


def triton_not_worth(call: ImportanceCall) -> str | None:
    return rules.triton_not_worth(call.q)
