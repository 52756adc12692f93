"""The loss with the vocabulary spread over a process group: each process holds rows of the weight.

Per chunk two small all-reduces, of the rows' maxima and of three sums, and one of the hidden states' gradient at the
end; no logit leaves its process.
"""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import torch_op
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import Options, rows_per_chunk


def rule(hidden: Any, weight: Any, bias: Any) -> str | None:
    """Why these shards cannot be used as they lie, or None."""
    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        return "needs a weight sharded over the vocabulary on a mesh of one dimension"
    if isinstance(hidden, DTensor) and not all(p.is_replicate() for p in hidden.placements):
        return "needs hidden states that every process has in full"
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != weight.placements):
        return "needs a bias sharded like the weight"
    return None


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def linear_cross_entropy_sharded(
    hidden: Tensor,
    weight: DTensor,
    targets: Tensor,
    bias: DTensor | None,
    options: Options,
    reduction: str,
    chunk_size: int | None,
) -> Tensor:
    mesh = weight.device_mesh
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    here = max(0, min(shape[0], options.vocab - offset[0]))
    flat, flat_targets = _local(hidden).reshape(-1, hidden.shape[-1]), _local(targets).reshape(-1)
    # The same on every process, whose shards may differ by a row: they meet once for each chunk.
    chunk = rows_per_chunk(flat, -(-weight.shape[0] // mesh.size()), chunk_size or 0)
    shard = (offset[0] if here else 0, here, mesh.get_group().group_name)
    own_bias = None if bias is None else bias.to_local()
    loss = torch_op.run(flat, weight.to_local(), flat_targets, own_bias, options, reduction, chunk, "plain", shard)
    return loss.view(targets.shape) if reduction == "none" else loss
