"""The specification: a table of what each query selects, joined over the queries of a tile."""

import torch

from kernel_index.routing.membership import membership
from kernel_index.routing.union_selection_query_mask.contract import UnionCall
from kernel_index.routing.union_selection_query_mask.maps import UnionMaps


def union_reference(call: UnionCall) -> UnionMaps:
    selected, is_selected, blocks = call.selected, call.is_selected, call.num_blocks
    queries, tile = selected.shape[1], call.query_tile_size
    own = membership(selected, call.selected_valid, blocks)  # [B, T, K, blocks]
    own = torch.nn.functional.pad(own, (0, 0, 0, 0, 0, call.tiles * tile - queries))
    union = own.unflatten(1, (call.tiles, tile)).any(2)  # [B, tiles, K, blocks]
    block = torch.arange(blocks, dtype=torch.int32, device=selected.device)
    listed = torch.where(union, block, blocks).sort(-1).values[..., : call.width]
    listed = torch.where(listed < blocks, listed, -1)
    rank = union.cumsum(-1) - 1  # of a block among those of its union
    rank = torch.nn.functional.pad(rank, (0, 1)).repeat_interleave(tile, 1)[:, :queries]  # one more column: none
    index = torch.where(is_selected, selected, blocks).to(torch.int64)
    own_rank = torch.where(is_selected, rank.gather(-1, index), -1)
    return UnionMaps(
        listed.to(torch.int32).contiguous(), union.sum(-1, dtype=torch.int32), own_rank.to(torch.int32), is_selected
    )
