"""Rotary grouped-query attention under one mask contract."""

from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.nn.linear import Linear
from kernel_index.nn.mixer import Mixer, cache_dtype
from kernel_index.nn.residual import Branch


class Attention(Mixer):
    """Causal self-attention; ``window`` keeps only the nearest previous tokens.

    Args:
        dim: channels C of the stream.
        heads: query heads H.
        kv_heads: key and value heads K; H must be a multiple of K.
        head_dim: D.
        window: previous tokens that a query sees besides itself; None for all.
        bias: whether the output projection has a bias.  It is returned, not added: the block boundary adds it.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, window: int | None = None, bias: bool = True
    ):
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            checks.is_int(name, size, minimum=1)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads ({kv_heads}), got {heads}")
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.q = Linear(dim, heads * head_dim, bias=False)
        self.k = Linear(dim, kv_heads * head_dim, bias=False)
        self.v = Linear(dim, kv_heads * head_dim, bias=False)
        self.rope_dim = head_dim
        self.out = Linear(heads * head_dim, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(
        self,
        x_BTC: Tensor,
        mask: "ki.MaskContract | None",
        rope: tuple[Tensor, Tensor],
        cache: dict[str, Any] | None = None,
    ) -> Branch:
        """``cache``: this layer's arguments from ``KVCache.layer``.  Its lengths then determine the visible keys."""
        B, T, _ = x_BTC.shape  # −1 heads: a process of a tensor-parallel group has only some of them
        q_BTHD = self.q(x_BTC).view(B, T, -1, self.head_dim)
        k_BTKD = self.k(x_BTC).view(B, T, -1, self.head_dim)
        v_BTKD = self.v(x_BTC).view(B, T, -1, self.head_dim)
        q_BTHD, k_BTKD = ki.fused_rope_qk(q_BTHD, k_BTKD, *rope)
        if cache is not None:
            dtype = cache_dtype(cache, self.k.weight)
            new = {"k": k_BTKD.to(dtype), "v": v_BTKD.to(dtype), "window_size": (self.window, 0)}
            out_BTHD = ki.fa4_kvcache_decode(q_BTHD.to(dtype), **new, **cache).to(q_BTHD.dtype)
        elif mask is not None:
            out_BTHD = ki.attention(q_BTHD, k_BTKD, v_BTKD, mask)
        else:
            raise ValueError("mask must be given where no cache is, got None")
        return self.out(out_BTHD.reshape(B, T, -1)), self.bias
