"""The specification of ``selected_decode``: gather each query's selected tokens, and attend to them."""

from torch import Tensor

from kernel_index.kernels.sparse.selected_decode.contract import SelectedDecodeCall
from kernel_index.kernels.sparse.selected_decode.selection import distinct, write_new_tokens
from kernel_index.kvcache.selected import attend_selected, key_intervals, selected_tokens


def selected_decode_reference(call: SelectedDecodeCall) -> Tensor:
    write_new_tokens(call)
    intervals = key_intervals(call.cache, call.q.shape[1], call.window[0])
    blocks = distinct(call.indices, call.blocks)
    kv_heads = call.cache["k_cache"].shape[2]
    blocks = blocks.expand(-1, -1, kv_heads, -1)
    tokens = selected_tokens(blocks, call.block_size, intervals, call.cache)
    return attend_selected(call.q, call.cache, call.k, call.v, tokens, call.scale, call.softcap)
