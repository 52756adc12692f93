"""Training with several processes by PyTorch's own means: FSDP2 and tensor parallelism."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernel_index.lm.model import LanguageModel


@dataclass(frozen=True)
class Group:
    """The rank of this process and the number of processes; (0, 1) unless ``torchrun`` started it."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            torch.distributed.barrier()

    def sum(self, value: float) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return float(total)


def processes() -> int:
    """The number of processes that ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> Group:
    """The group of this process, read from the variables that ``torchrun`` sets.

    Raises:
        ValueError: the device is a GPU, and PyTorch sees none.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where PyTorch sees no GPU, got 'cuda'")
    size = processes()
    if size == 1:
        return Group()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return Group(torch.distributed.get_rank(), size)


def shard(model: LanguageModel, group: Group) -> None:
    """FSDP2: each process keeps a shard of every block's parameters, and of the parameters outside the blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.head.weight.device.type, (group.size,))
    for block in model.hybrid_blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # also where no backward follows, as in evaluation
    register_fsdp_forward_method(model, "loss")


def split(model: LanguageModel, group: Group) -> None:
    """``split_heads`` over all processes."""
    from torch.distributed.device_mesh import init_device_mesh

    split_heads(model, init_device_mesh(model.head.weight.device.type, (group.size,)))


def clip_each(model: nn.Module, limit: float) -> float:
    """``clip_grad_norm_`` for a model of which some parameters are sharded and some not; returns the norm before."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([whole(g.norm()) for g in grads]).norm())
    for g in grads:
        g.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def split_heads(model: LanguageModel, mesh: Any) -> None:
    """Tensor parallelism of A blocks and of the loss: heads, hidden channels and vocabulary are sharded.

    The projections become DTensors, sharded so that each process attends with its own heads; the head of the model is
    sharded over the vocabulary, which makes ``ki.fused_linear_cross_entropy`` vocabulary-parallel.

    Raises:
        ValueError: the model has other blocks, or a size does not divide by the processes.
    """
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    c, size = model.config, mesh.size()
    if set(c.pattern) != {"A"} or c.residual.startswith("mhc"):
        raise ValueError(f"pattern must be of A blocks for tensor parallelism, got {c.pattern!r} on {c.residual}")
    for name in ("heads", "kv_heads", "hidden", "padded_vocab"):
        if getattr(c, name) % size:
            raise ValueError(f"{name} must be a multiple of the {size} processes, got {getattr(c, name)}")
    plan: dict[str, Any] = {f"mixer.{name}": ColwiseParallel() for name in "qkv"}
    plan |= {"mixer.out": RowwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for block in model.hybrid_blocks():
        parallelize_module(block, mesh, plan)
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight, mesh, [Shard(0)]))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a shard; found without importing ``torch.distributed``."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
