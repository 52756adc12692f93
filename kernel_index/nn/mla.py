"""Multi-head latent attention: keys and values of all heads are projected from one small latent per token."""

from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.numerics import is_invariant
from kernel_index.nn.linear import Linear
from kernel_index.nn.mixer import Mixer, cache_dtype, in_order, prefixes, rows_by_length
from kernel_index.nn.residual import Branch, invariant_norm


class MLA(Mixer):
    """Causal self-attention whose cache holds ``latent + rope`` numbers per token instead of ``2·H·D``.

    ``latent = rmsnorm(down(x))``; keys and values are ``up(latent)``, and each key has ``rope`` more channels, which
    are rotated and shared by all heads.  Without a cache the layer computes keys and values and attends to them.  With
    a cache ``up`` is absorbed into the query and into the result, and attention runs over the latents as one KV head.

    Args:
        dim: channels C of the stream.
        heads: H.
        head_dim: channels D of a head's key without position, and of its value.
        rope: rotated channels R of a query and a key; even.
        latent: channels L of the latent.
        fused: project through ``ki.fused_mla_projection``, which recomputes the latent in backward.
        eps: added to the mean square in the latent's norm.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
    """

    rope_dim: int

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        rope: int,
        latent: int,
        fused: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("head_dim", head_dim), ("latent", latent)):
            checks.is_int(name, size, minimum=1)
        if rope < 2 or rope % 2:
            raise ValueError(f"rope must be a positive even number of channels, got {rope}")
        self.heads, self.head_dim, self.rope_dim, self.latent = heads, head_dim, rope, latent
        self.fused, self.eps = fused, eps
        self.q = Linear(dim, heads * (rope + head_dim), bias=False)
        self.k_rope = Linear(dim, rope, bias=False)
        self.down = Linear(dim, latent, bias=False)
        self.norm = nn.Parameter(torch.ones(latent))
        self.up = Linear(latent, heads * 2 * head_dim, bias=False)
        self.out = Linear(heads * head_dim, dim, bias=False)

    def forward(
        self,
        x_BTC: Tensor,
        mask: "ki.MaskContract | None",
        rope: tuple[Tensor, Tensor],
        cache: dict[str, Any] | None = None,
    ) -> Branch:
        """``cache``: this layer's arguments from ``PagedLatentCache``.  Its lengths then determine the visible keys."""
        B, T, _ = x_BTC.shape
        q_BTHD = self.q(x_BTC).view(B, T, self.heads, -1)
        q_rope, q_BTHN = q_BTHD.split([self.rope_dim, self.head_dim], -1)
        q_rope, k_rope = ki.fused_rope_qk(q_rope, self.k_rope(x_BTC).view(B, T, 1, -1), *rope)
        if cache is not None and is_invariant():
            out = self._expanded(x_BTC, q_rope, q_BTHN, k_rope, cache)
        elif cache is not None:
            out = self._absorbed(x_BTC, q_rope, q_BTHN, k_rope, cache)
        elif mask is not None:
            out = self._attend(torch.cat([q_rope, q_BTHN], -1), self._project(x_BTC), k_rope, mask)
        else:
            raise ValueError("mask must be given where no cache is, got None")
        return self.out(out.reshape(B, T, -1)), None

    def _attend(self, q_BTHD: Tensor, up_BSX: Tensor, k_rope: Tensor, mask: "ki.MaskContract") -> Tensor:
        """Attention to keys and values that were projected up from the latents; ``k_rope`` [B, S, 1, R]."""
        k_BSHN, v_BSHD = up_BSX.view(*up_BSX.shape[:2], self.heads, -1).chunk(2, -1)
        k_BSHD = torch.cat([k_rope.expand(-1, -1, self.heads, -1).to(k_BSHN.dtype), k_BSHN], -1)
        return ki.attention(q_BTHD, k_BSHD, v_BSHD, mask)

    def _project(self, x_BTC: Tensor) -> Tensor:
        if self.fused and not is_invariant():
            return ki.fused_mla_projection(x_BTC, self.down.weight, self.up.weight, self.norm, eps=self.eps)
        return self.up(self._latent(x_BTC))

    def _latent(self, x_BTC: Tensor) -> Tensor:
        if is_invariant():
            return invariant_norm(self.down(x_BTC), self.norm, self.eps)
        return nn.functional.rms_norm(self.down(x_BTC), self.norm.shape, self.norm, self.eps)

    def _expanded(self, x_BTC: Tensor, q_rope: Tensor, q_BTHN: Tensor, k_rope: Tensor, cache: Any) -> Tensor:
        """The training form over the cached latents: the same products, so the same bits."""
        row_BT1W = torch.cat([self._latent(x_BTC).unsqueeze(2), k_rope], -1).to(cache_dtype(cache, self.up.weight))
        cache.write(row_BT1W, row_BT1W)
        q_BTHD, groups, outs = torch.cat([q_rope, q_BTHN], -1), rows_by_length(cache.lengths_after), []
        for total, rows in groups.items():
            row_RS1W = prefixes(cache, rows)[0].to(q_BTHD.dtype)
            latent_RSL, rope_RS1R = row_RS1W[:, :, 0, : self.latent], row_RS1W[..., self.latent :]
            mask = ki.MaskContract(q_offset=total - x_BTC.shape[1])
            outs.append(self._attend(q_BTHD[rows], self.up(latent_RSL), rope_RS1R, mask))
        return in_order(outs, groups)

    def _absorbed(self, x_BTC: Tensor, q_rope: Tensor, q_BTHN: Tensor, k_rope: Tensor, cache: dict[str, Any]) -> Tensor:
        """``q·(U_k·c) = (U_kᵀ·q)·c`` and ``Σ p·(U_v·c) = U_v·(Σ p·c)``: one KV head, the row ``[c, k_rope]``."""
        up_HDL = self.up.weight.view(self.heads, 2 * self.head_dim, self.latent)
        k_HNL, v_HDL = up_HDL.split(self.head_dim, 1)
        row_BT1W = torch.cat([self._latent(x_BTC).unsqueeze(2), k_rope], -1)
        q_BTHL = torch.einsum("bthn,hnl->bthl", q_BTHN, k_HNL)
        scale = (row_BT1W.shape[-1] / (self.rope_dim + self.head_dim)) ** 0.5  # undoes the decode's 1/√(L + R)
        q_BTHW = torch.cat([q_BTHL, q_rope.to(q_BTHL.dtype)], -1) * scale
        dtype = cache_dtype(cache, self.up.weight)
        q_BTHW, row_BT1W = q_BTHW.to(dtype), row_BT1W.to(dtype)
        out_BTHL = ki.fa4_kvcache_decode(q_BTHW, k=row_BT1W, v=row_BT1W, **cache)[..., : self.latent]
        return torch.einsum("bthl,hdl->bthd", out_BTHL.to(q_BTHL.dtype), v_HDL)


class PagedLatentCache(ki.PagedKVCache):
    """Pages of the rows ``[latent, rotated key]`` of ``MLA`` layers; keys and values share memory.

    Args:
        layers, pages, page_size: as in ``PagedKVCache``.
        width: L + R.
        dtype: dtype of the rows.
        device: device of the rows.

    >>> import torch
    >>> cache = PagedLatentCache(1, 4, 16, 40)
    >>> cache.k.data_ptr() == cache.v.data_ptr()
    True
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(layers, pages, page_size, 1, width, dtype=dtype, device=device)
        self.v = self.k
