"""The loss and ``token_stats`` with the vocabulary spread over a process group: each process holds rows of the weight.

Per chunk two small all-reduces, of the rows' maxima and of three sums, and one of the hidden states' gradient at the
end; no logit leaves its process, but for the largest ``top_k`` that ``token_stats`` truncates by.
"""

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import torch_op, torch_op_stats
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import (
    Call,
    CrossEntropyOutput,
    StatsCall,
    TokenStats,
    rows_per_chunk,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.stats_pass import Constants


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _classes(weight: DTensor, vocab: int) -> tuple[int, int]:
    """The first class of this process and how many it has; (0, 0) for one with padding alone."""
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    here = max(0, min(shape[0], vocab - offset[0]))
    return (offset[0] if here else 0), here


def spread_over(group: Any, *rows: Tensor | None) -> tuple[Any, ...]:
    """DTensors of the rows that each process of ``group`` has, as many on each, in the order of its ranks."""
    meshes = {t.device.type: DeviceMesh.from_group(group, t.device.type) for t in rows if t is not None}
    return tuple(
        None if t is None else DTensor.from_local(t, meshes[t.device.type], [Shard(0)], run_check=False) for t in rows
    )


def token_stats_sharded(call: StatsCall) -> TokenStats:
    weight: Any = call.weight
    bias: Any = call.bias
    mesh, o = weight.device_mesh, call.options
    first, here = _classes(weight, o.vocab)
    width = -(-weight.shape[0] // mesh.size())
    group = mesh.get_group().group_name
    constants = Constants(o.softcap, o.temperature, o.top_k, o.top_p, here, first, width, group, "plain")
    tensors = _local(call.hidden), weight.to_local(), None if bias is None else bias.to_local(), _local(call.targets)
    return torch_op_stats.token_stats_of(*tensors, o.ignore_index, constants)


def linear_cross_entropy_sharded(call: Call) -> CrossEntropyOutput:
    weight: Any = call.weight
    bias: Any = call.bias
    mesh, options = weight.device_mesh, call.options
    first, here = _classes(weight, options.vocab)
    local_bias = None if bias is None else bias.to_local()
    tokens = torch_op.tokens_of(_local(call.hidden), weight.to_local(), local_bias, _local(call.targets), options)
    # The same on every process, although shards may differ by a row: all processes reduce once for each chunk.
    chunk = rows_per_chunk(tokens.hidden, -(-weight.shape[0] // mesh.size()), options.chunk_size)
    shard = torch_op.VocabShard(first, here, mesh.get_group().group_name)
    return torch_op.shaped(torch_op.by_chunks(tokens, options._replace(chunk_size=chunk), "plain", shard), call)
