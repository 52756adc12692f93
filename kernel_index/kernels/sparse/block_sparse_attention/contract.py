"""Argument checks and backend eligibility of ``block_sparse_attention``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, device_documents, document_attention, native, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.core.excluded import Sight, sight_of_blocks
from kernel_index.core.numerics import is_invariant
from kernel_index.masks.attention_arguments import check_attention, host_plan_why_not, sizes_of
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.legal_blocks import num_blocks, without_empty_end
from kernel_index.routing.union_selection_query_mask.contract import check_blocks_exist, check_valid
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps


class BlockSparseCall(NamedTuple):
    """One checked call."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor  # [B, S, K, Dv]
    selected: Tensor  # [B, T, G, n]
    selected_valid: Tensor | None
    block_size: int
    mask: MaskContract
    scale: float | None
    softcap: float
    query_tile_size: int
    maps: UnionMaps | None
    sink: Tensor | None = None  # [H]

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.q, self.k, self.mask)

    @property
    def blocks(self) -> int:
        return num_blocks(self.k.shape[1], self.block_size)

    @property
    def excludes(self) -> bool:
        """Every block that is not selected."""
        return True

    def sight(self) -> Sight:
        origin = self.mask.row_origins(self.sizes) if is_invariant() else None
        bounds = self.mask.row_intervals(self.sizes)
        return sight_of_blocks(self.selected, self.selected_valid, self.block_size, *bounds, origin)

    @property
    def few_scores(self) -> bool:
        return self.q.shape[1] * self.k.shape[1] <= SMALL


SMALL = 256 * 256


def check(call: BlockSparseCall) -> BlockSparseCall:
    call = call._replace(**dict(zip("qkv", cast_like_sdpa(call.q, call.k, call.v), strict=True)))
    check_attention(call.q, call.k, call.v, call.mask, call.scale, call.softcap, call.sink)
    if call.mask.is_tree:
        raise ValueError("mask must be no tree: blocks lie in the row, not along a path, got subtree_end or positions")
    if call.q.shape[2] < 1:
        raise ValueError(f"q must be of at least one head, got shape {tuple(call.q.shape)}")
    checks.is_int("block_size", call.block_size, minimum=1)
    checks.is_int("query_tile_size", call.query_tile_size, minimum=1)
    check_selection(call.q, call.k.shape[2], call.selected, call.selected_valid)
    check_blocks_exist(call.selected, call.selected_valid, call.blocks)
    if call.maps is not None:
        _check_maps(call.selected, call.query_tile_size, call.maps)
    return call._replace(block_size=without_empty_end(call.block_size, call.k.shape[1]))


def check_selection(q: Tensor, kv_heads: int, selected: Any, selected_valid: Any) -> None:
    checks.is_integer_tensor("selected", selected)
    checks.has_rank("selected", selected, 4, "[B, T, G, n]")
    checks.on_device("selected", selected, q, "q")
    groups, heads = selected.shape[2], q.shape[2]
    checks.has_shape("selected", selected, (*q.shape[:2], groups, selected.shape[3]), "[B, T, G, n] with q's B and T,")
    if groups < 1 or groups % kv_heads or heads % groups:
        raise ValueError(
            f"selected must be of G groups with G a multiple of the {kv_heads} KV heads and a divisor of the "
            f"{heads} query heads, got G = {groups}"
        )
    check_valid(selected, selected_valid)


def _check_maps(selected: Tensor, query_tile_size: int, maps: Any) -> None:
    if not isinstance(maps, UnionMaps):
        raise TypeError(f"maps must be UnionMaps, got {type(maps).__name__}")
    batch, queries, groups, _ = selected.shape
    tiles = -(-queries // query_tile_size)
    checks.has_shape("maps", maps.union_sizes, (batch, tiles, groups), "of this selection's tiles, [B, tiles, G]")
    checks.has_shape("maps", maps.query_union_indices, tuple(selected.shape), "of selected's shape")


def triton_why_not(call: BlockSparseCall) -> str | None:
    if is_invariant():
        return device_documents.mask_why_not(call.q, call.k, call.v, call.mask, call.sizes, call.scale, call.sink)
    if call.q.shape[3] > rules.WIDEST_HEAD or call.v.shape[3] > rules.WIDEST_HEAD:
        return rules.NEEDS_NARROW_HEADS
    if call.q.dtype not in (torch.float32, *rules.HALF):
        return rules.NEEDS_TRITON_DTYPE
    if call.q.shape[0] * call.q.shape[2] > rules.MOST_HEADS_OF_ROWS:
        return rules.NEEDS_FEW_HEADS_OF_ROWS
    return rules.triton_why_not(call.q, call.k, call.v, call.selected, call.sink)


def triton_not_worth(call: BlockSparseCall) -> str | None:
    return rules.triton_not_worth(call.q)


def cpu_why_not(call: BlockSparseCall) -> str | None:
    if not call.q.shape[3] or not call.v.shape[3]:
        return "needs head sizes of at least 1"
    return host_plan_why_not(call.q)


def native_why_not(call: BlockSparseCall) -> str | None:
    if is_invariant():
        return document_attention.why_not(call.q, call.k, call.v, call.sink)
    if (rule := cpu_why_not(call)) is not None:
        return rule
    if call.q.shape[3] % 2 or call.v.shape[3] % 2:
        return "needs even head sizes: bfloat16 is multiplied in pairs"
    return native.why_not(*(t for t in (call.q, call.k, call.v, call.selected, call.sink) if t is not None))


def cpu_not_worth(call: BlockSparseCall) -> str | None:
    return "too small for skipping to pay" if call.few_scores else None
