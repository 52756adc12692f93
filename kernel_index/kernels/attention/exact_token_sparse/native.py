"""The invariant form: the kernel of ``attention``, to which all but the selected tokens are hidden."""

import torch
from torch import Tensor

from kernel_index.core.document_attention import Bounds, Scoring, attend_to_documents
from kernel_index.core.excluded import guarded
from kernel_index.kernels.attention.exact_token_sparse.contract import ExactTokenCall
from kernel_index.masks.attention_arguments import sizes_of


@guarded
def exact_token_native(call: ExactTokenCall) -> tuple[Tensor, Tensor]:
    sizes = sizes_of(call.q, call.k, call.mask)
    assert call.indices is not None
    selected = call.indices if call.valid is None else torch.where(call.valid, call.indices, -1)
    bounds = Bounds(*call.mask.row_intervals(sizes), call.mask.row_origins(sizes))
    selected = torch.where(selected < 0, -1, selected - bounds.origin[:, :, None, None]).to(torch.int32)
    selected = selected.expand(-1, -1, call.k.shape[2], -1)
    return attend_to_documents(call.q, call.k, call.v, call.sink, bounds, Scoring(*call.scoring), selected)
