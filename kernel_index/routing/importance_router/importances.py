"""The importance of each block in plain PyTorch."""

import torch
from torch import Tensor

from kernel_index.routing.importance_router.contract import ImportanceCall


def importances(call: ImportanceCall, at: slice) -> Tensor:
    """``Σ_h exp(scale · q·block_key − lse)`` over the heads of a KV head, at least float32 [B, T', K, N]."""
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    kv_heads = call.block_keys.shape[2]
    q_BTKGD = (call.q.detach()[:, at].to(dtype) * call.scale).unflatten(2, (kv_heads, -1))
    lse_BTKG = call.lse.detach()[:, :, at].to(dtype).transpose(1, 2).unflatten(2, (kv_heads, -1))
    z = torch.einsum("btkgd,bnkd->btkgn", q_BTKGD, call.block_keys.detach().to(dtype))
    return torch.exp(z - lse_BTKG[..., None]).sum(3)
