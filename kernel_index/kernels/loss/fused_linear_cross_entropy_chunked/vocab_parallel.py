"""The loss with the vocabulary spread over a process group: each process holds rows of the weight.

Per chunk two small all-reduces, of the rows' maxima and of three sums, and one of the hidden states' gradient at the
end; no logit leaves its process.
"""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import torch_op
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import (
    Call,
    CrossEntropyOutput,
    rows_per_chunk,
)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def linear_cross_entropy_sharded(call: Call) -> CrossEntropyOutput:
    weight: Any = call.weight
    bias: Any = call.bias
    mesh, options = weight.device_mesh, call.options
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    here = max(0, min(shape[0], options.vocab - offset[0]))
    local_bias = None if bias is None else bias.to_local()
    tokens = torch_op.tokens_of(_local(call.hidden), weight.to_local(), local_bias, _local(call.targets), options)
    # The same on every process, although shards may differ by a row: all processes reduce once for each chunk.
    chunk = rows_per_chunk(tokens.hidden, -(-weight.shape[0] // mesh.size()), options.chunk_size)
    shard = torch_op.VocabShard(offset[0] if here else 0, here, mesh.get_group().group_name)
    return torch_op.shaped(torch_op.by_chunks(tokens, options._replace(chunk_size=chunk), "plain", shard), call)
