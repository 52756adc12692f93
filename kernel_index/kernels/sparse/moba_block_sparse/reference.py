"""The specification of ``moba_decode``: gather the tokens of each query's selected blocks, and attend to them."""

from torch import Tensor

from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaDecodeCall
from kernel_index.kernels.sparse.moba_block_sparse.decoding import route
from kernel_index.kvcache.selected import attend_selected, selected_tokens


def decode_reference(call: MobaDecodeCall) -> Tensor:
    routed = route(call)
    blocks, left = routed.selected.indices, call.window[0]
    tokens = selected_tokens(blocks, call.block_size, routed.position, left, call.cache)
    return attend_selected(call.q, call.cache, call.k, call.v, tokens, call.scale, call.softcap, call.sink)
