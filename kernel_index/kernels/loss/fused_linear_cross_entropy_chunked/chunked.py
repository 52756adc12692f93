"""The chunk loop with plain, compiled and Triton passes over a chunk: three backends, one operator."""

from torch import Tensor

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import torch_op
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import Options


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    reduction: str,
    chunk_size: int | None,
    passes: str,
) -> Tensor:
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    loss = torch_op.run(flat, weight, flat_targets, bias, options, reduction, chunk_size or 0, passes)
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_cross_entropy_chunked(hidden, weight, targets, bias, options, reduction, chunk_size) -> Tensor:
    return _run(hidden, weight, targets, bias, options, reduction, chunk_size, "plain")


def linear_cross_entropy_inductor(hidden, weight, targets, bias, options, reduction, chunk_size) -> Tensor:
    return _run(hidden, weight, targets, bias, options, reduction, chunk_size, "inductor")


def linear_cross_entropy_triton(hidden, weight, targets, bias, options, reduction, chunk_size) -> Tensor:
    return _run(hidden, weight, targets, bias, options, reduction, chunk_size, "triton")
