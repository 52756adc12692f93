"""FlexAttention with its FlashAttention-4 kernels: a selection becomes a block mask and a predicate for each pair."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.dispatch import Choice
from kernel_index.core.excluded import guarded
from kernel_index.kernels.sparse.block_sparse_attention.api import BlockSparseCall
from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaCall
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.routing.legal_blocks import TopBlocks, num_blocks
from kernel_index.routing.membership import membership

TILE = 128
"""Queries and keys of a tile of those kernels."""


def attend_flash(call: MobaCall, router: Choice) -> tuple[Tensor, None]:
    selected = router.run_inside(call.routing)
    return _attend(call.on_core(selected.indices, selected.valid)), None


@guarded
def _attend(call: BlockSparseCall) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return call.softcap * torch.tanh(score / call.softcap)

    assert call.selected_valid is not None
    selected = TopBlocks(call.selected, call.selected_valid)
    # Sizes that vary would become symbols, which those kernels cannot take from a mask's predicate.
    attend = flex_attention if torch.compiler.is_compiling() else torch.compile(flex_attention, dynamic=False)
    out = attend(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)),
        score_mod=cap if call.softcap else None,
        block_mask=block_mask(selected, call.q, call.k, call.block_size, call.mask),
        scale=scale_of(call.q, call.scale),
        enable_gqa=call.q.shape[2] != call.k.shape[2],
        kernel_options={"BACKEND": "FLASH"},
    )
    return out.transpose(1, 2).contiguous()


def block_mask(selected: TopBlocks, q: Tensor, k: Tensor, block_size: int, mask: MaskContract) -> Any:
    """FlexAttention's ``BlockMask``: a tile of keys is visited where a query of the tile selected a block in it."""
    from torch.nn.attention.flex_attention import BlockMask

    sizes, keys = sizes_of(q, k, mask), k.shape[1]
    member = membership(*selected, num_blocks(keys, block_size))  # [B, T, G, blocks]
    group = q.shape[2] // member.shape[2]
    start, end = mask.intervals(sizes.batch, sizes.queries, keys, device=q.device)

    def allowed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        inside = (kv_idx >= start[b, q_idx]) & (kv_idx < end[b, q_idx])
        return inside & member[b, q_idx, h // group, kv_idx // block_size]

    tiles, key_tiles = -(-sizes.queries // TILE), -(-keys // TILE)
    padded = torch.nn.functional.pad(member, (0, 0, 0, 0, 0, tiles * TILE - sizes.queries))
    union = padded.unflatten(1, (tiles, TILE)).any(2)  # [B, tiles, G, blocks]
    first = torch.arange(key_tiles, device=q.device) * TILE // block_size
    last = ((torch.arange(key_tiles, device=q.device) + 1) * TILE - 1).clamp(max=keys - 1) // block_size
    counts = torch.nn.functional.pad(union.cumsum(-1), (1, 0))
    visited = counts[..., last + 1] > counts[..., first]  # [B, tiles, G, key tiles]
    visited = visited.transpose(1, 2).repeat_interleave(group, 1)
    order = torch.argsort(visited.to(torch.int8), dim=-1, descending=True, stable=True)
    count, order = visited.sum(-1, dtype=torch.int32), order.to(torch.int32)
    return BlockMask.from_kv_blocks(
        count,
        order,
        torch.zeros_like(count),  # no tile skips the predicate; those kernels need the list anyway
        torch.zeros_like(order),
        BLOCK_SIZE=TILE,
        mask_mod=allowed,
        seq_lengths=(sizes.queries, keys),
    )
