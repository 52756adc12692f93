"""The chunk loop in plain PyTorch and with compiled passes: two backends, one operator."""

from torch import Tensor

from kernel_index.loss.fused_linear_cross_entropy_chunked import torch_op
from kernel_index.loss.fused_linear_cross_entropy_chunked.contract import Options


def linear_cross_entropy_chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    reduction: str,
    chunk_size: int | None,
    compiled: bool = False,
) -> Tensor:
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    loss = torch_op.run(flat, weight, flat_targets, bias, options, reduction, chunk_size or 0, compiled)
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_cross_entropy_inductor(hidden, weight, targets, bias, options, reduction, chunk_size) -> Tensor:
    return linear_cross_entropy_chunked(hidden, weight, targets, bias, options, reduction, chunk_size, compiled=True)
