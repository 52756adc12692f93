"""Who may call ``block_sparse_attention``, and who may answer."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, native, rules
from kernel_index.masks import attention_arguments as arguments
from kernel_index.routing.legal_blocks import num_blocks
from kernel_index.routing.union_selection_query_mask.contract import check_picks, check_valid
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps

scale_of = arguments.scale_of
sizes_of = arguments.sizes_of


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    selected_valid: Any,
    block_size: Any,
    mask: Any,
    scale: Any,
    softcap: Any,
    query_tile_size: Any,
    maps: Any,
) -> None:
    arguments.check_attention(q, k, v, mask, scale, softcap)
    if q.shape[2] < 1:
        raise ValueError(f"q must be of at least one head, got shape {tuple(q.shape)}")
    checks.is_int("block_size", block_size, minimum=1)
    checks.is_int("query_tile_size", query_tile_size, minimum=1)
    check_selection(q, k.shape[2], selected, selected_valid)
    check_picks(selected, selected_valid, num_blocks(k.shape[1], block_size))
    if maps is not None:
        _check_maps(selected, query_tile_size, maps)


def check_selection(q: Tensor, kv_heads: int, selected: Any, selected_valid: Any) -> None:
    checks.is_integer_tensor("selected", selected)
    checks.has_rank("selected", selected, 4, "[B, T, G, n]")
    checks.on_device("selected", selected, q, "q")
    groups, heads = selected.shape[2], q.shape[2]
    checks.has_shape("selected", selected, (*q.shape[:2], groups, selected.shape[3]), "[B, T, G, n] with q's B and T,")
    if groups < 1 or groups % kv_heads or heads % groups:
        raise ValueError(
            f"selected must be of G groups with G a multiple of the {kv_heads} key heads and a divisor of the "
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


WIDEST = 256


def triton_why_not(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, *_: Any) -> str | None:
    if q.shape[3] > WIDEST or v.shape[3] > WIDEST:
        return "needs head sizes of at most 256"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "needs float32, bfloat16 or float16"
    return rules.triton_why_not(q, k, v, selected)


def triton_not_worth(q: Tensor, *_: Any) -> str | None:
    return rules.triton_not_worth(q)


def cpu_why_not(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    if not q.shape[3] or not v.shape[3]:
        return "needs head sizes of at least 1"
    return arguments.host_plan_why_not(q)


def native_why_not(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, *rest: Any) -> str | None:
    if (rule := cpu_why_not(q, k, v)) is not None:
        return rule
    if q.shape[3] % 2 or v.shape[3] % 2:
        return "needs even head sizes: bfloat16 is multiplied in pairs"
    return native.why_not(q, k, v, selected)


SMALL = 256 * 256


def cpu_not_worth(q: Tensor, k: Tensor, *_: Any) -> str | None:
    return "too small for skipping to pay" if q.shape[1] * k.shape[1] <= SMALL else None
