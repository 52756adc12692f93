"""The specification of ``selected_decode``: gather each query's selected tokens, and attend to them."""

from torch import Tensor

from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall
from kernel_index.kernels.sparse.selected_decode.selection import distinct, write_new_tokens
from kernel_index.kvcache.selected import attend_selected, query_positions, selected_tokens


def selected_decode_reference(call: SelectedDecodeCall) -> Tensor:
    write_new_tokens(call)
    position = query_positions(call.cache, call.q.shape[1])
    kv_heads = call.cache["k_cache"].shape[2]
    blocks_BTKn = distinct(call.indices).expand(-1, -1, kv_heads, -1)
    tokens = selected_tokens(blocks_BTKn, call.block_size, position, call.window[0], call.cache)
    return attend_selected(call.q, call.cache, call.k, call.v, tokens, call.scale, call.softcap)
