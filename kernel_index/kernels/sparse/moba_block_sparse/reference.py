"""The specification of ``moba_decode``: gather the tokens of each query's selected blocks, and attend to them."""

from torch import Tensor

from kernel_index.kernels.sparse.moba_block_sparse.contract import MobaDecodeCall
from kernel_index.kernels.sparse.moba_block_sparse.decoding import route
from kernel_index.kvcache.selected import attend_selected, selected_tokens


def decode_reference(call: MobaDecodeCall) -> Tensor:
    selected, intervals = route(call)
    tokens = selected_tokens(selected.indices, call.block_size, intervals, call.cache)
    return attend_selected(call.q, call.cache, call.k, call.v, tokens, call.scale, call.softcap)
