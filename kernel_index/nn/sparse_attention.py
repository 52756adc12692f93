"""Attention that reads a few blocks or tokens of the past: three ways to choose them, one layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.nn.mixer import Mixer
from kernel_index.nn.residual import Branch

KINDS = ("exact_token", "moba", "clustered")

QUERIES_AT_ONCE = 64
"""Queries whose picked tokens are gathered together while decoding."""


class ExactTokenCache(NamedTuple):
    """What ``kind="exact_token"`` decodes with: its keys and values, and the keys of its indexer."""

    attention: "ki.CacheLayer"
    index: "ki.CacheLayer"


class SparseAttention(Mixer):
    """Rotary grouped-query attention over what a router picks.

    - ``"moba"``: each query head picks ``topk`` blocks by their mean keys (``ki.moba_attention``);
    - ``"clustered"``: each key head does, and a tile of queries shares the union (``ki.clustered_sparse_attention``);
    - ``"exact_token"``: an indexer of its own picks ``tokens`` single tokens (``ki.lightning_indexer``).

    The routers of blocks have no parameters.  While it trains, the indexer learns by a loss of its own, which joins the
    gradient at this layer's result and reaches nothing but the indexer: ``ki.lightning_indexer_loss``.

    ``dense = True`` attends to everything instead, for a dense warm-up, and so that the two can be compared.  The
    indexer learns meanwhile, from what it would have picked.
    ``hierarchy = (ratio, topc)`` lets ``"clustered"`` score groups of blocks first; ``report_unions = True`` joins the
    picks of a tile by ``ki.union_selection`` before anything else, so that its receipt tells how much they share.

    Args:
        dim, heads, kv_heads, head_dim, window, bias: as of ``Attention``.
        kind: one of the three.
        block: tokens of a block.
        topk: blocks for each query, its own counted.
        tokens: tokens for each query of ``"exact_token"``.
        index_heads, index_dim: of the indexer.
        index_loss: factor of the indexer's loss; 0 leaves the indexer as it is.
    """

    dense = False
    hierarchy: tuple[int, int] | None = None
    report_unions = False

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        kind: str,
        block: int = 64,
        topk: int = 4,
        tokens: int = 64,
        index_heads: int = 2,
        index_dim: int = 32,
        index_loss: float = 1.0,
        window: int | None = None,
    ):
        super().__init__()
        checks.one_of("kind", kind, KINDS)
        sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block": block, "topk": topk}
        sizes |= {"tokens": tokens, "index_heads": index_heads, "index_dim": index_dim}
        for name, size in sizes.items():
            checks.is_int(name, size, minimum=1)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads ({kv_heads}), got {heads}")
        self.kind, self.heads, self.kv_heads, self.head_dim, self.window = kind, heads, kv_heads, head_dim, window
        self.rope_dim, self.block, self.topk, self.tokens = head_dim, block, topk, tokens
        self.index_loss = index_loss
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.index = Indexer(dim, index_heads, index_dim) if kind == "exact_token" else None

    def forward(
        self,
        x_BTC: Tensor,
        mask: "ki.MaskContract | None",
        rope: tuple[Tensor, Tensor],
        cache: Any = None,
    ) -> Branch:
        """``cache`` holds this layer's part of a ``KVCache``, or an ``ExactTokenCache``."""
        B, T, _ = x_BTC.shape
        q_BTHD = self.q(x_BTC).view(B, T, -1, self.head_dim)
        k_BTKD = self.k(x_BTC).view(B, T, -1, self.head_dim)
        v_BTKD = self.v(x_BTC).view(B, T, -1, self.head_dim)
        q_BTHD, k_BTKD = ki.fused_rope_qk(q_BTHD, k_BTKD, *rope)
        if cache is not None:
            kept = cache.attention if isinstance(cache, ExactTokenCache) else cache
            dtype = kept["k_cache"].dtype  # autocast may be on now and not where the cache was made, or the reverse
            new = (q_BTHD.to(dtype), k_BTKD.to(dtype), v_BTKD.to(dtype))
            out_BTHD = self._decode(x_BTC, *new, cache).to(q_BTHD.dtype)
        elif mask is not None:
            out_BTHD = self._attend(x_BTC, q_BTHD, k_BTKD, v_BTKD, mask)
        else:
            raise ValueError("mask must be given where no cache is, got None")
        return self.out(out_BTHD.reshape(B, T, -1)), None

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: "ki.MaskContract") -> Tensor:
        if self.kind == "exact_token":
            assert self.index is not None
            learns = bool(self.index_loss) and self.training and torch.is_grad_enabled()
            picked = self.index.pick(x, self.index.keys(x), self.tokens, mask) if learns or not self.dense else None
            out = ki.exact_token_attention(q, k, v, None if self.dense else picked, mask=mask)
            if picked is None or not learns:
                return out
            return _JoinLoss.apply(out, self.index_loss * ki.lightning_indexer_loss(picked, q, k))
        if self.dense:
            return ki.attention(q, k, v, mask)
        if self.kind == "moba":
            return ki.moba_attention(q, k, v, block_size=self.block, topk=self.topk, mask=mask)
        config = ki.ClusteredSparseConfig(
            block_size=self.block,
            topk=self.topk,
            hierarchy=self.hierarchy,
            report_unions=self.report_unions and not torch.compiler.is_compiling(),  # a trace has no values to report
        )
        return ki.clustered_sparse_attention(q, k, v, config=config, mask=mask)

    def _decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        window = (self.window, 0)
        if self.kind == "exact_token":
            return _NoGradient.apply(self._decode_tokens(x, q, k, v, cache))
        if self.dense:
            return ki.fa4_kvcache_decode(q, k=k, v=v, window_size=window, **cache)
        if self.kind == "clustered" and self.hierarchy is not None:
            return _NoGradient.apply(self._decode_by_groups(q, k, v, cache, self.hierarchy))
        # A selection by key head is what the clustered kernel makes; the union only says what is loaded together.
        per = "query_head" if self.kind == "moba" else "kv_group"
        options = {"block_size": self.block, "topk": self.topk, "window_size": window}
        return ki.moba_decode(q, cache, k=k, v=v, route_per=per, **options)

    def _decode_by_groups(
        self, q: Tensor, k: Tensor, v: Tensor, kept: "ki.CacheLayer", hierarchy: tuple[int, int]
    ) -> Tensor:
        """Groups of cached block means, then their children; of keys and values only the picked blocks are read."""
        kept.write(k, v)
        means, T = kept.block_means(self.block), q.shape[1]
        rows = []
        for b, total in enumerate(kept.lengths_after):
            whole = means[b : b + 1, : total // self.block]
            if total % self.block:  # the block that is still growing is every later query's own: it needs no mean
                whole = torch.cat([whole, means.new_zeros(1, 1, *means.shape[2:])], 1)
            picked = ki.hierarchical_block_select(
                q[b : b + 1],
                whole,
                coarse_ratio=hierarchy[0],
                coarse_topc=hierarchy[1],
                final_topk=min(self.topk, whole.shape[1]),
                mask=ki.MaskContract(window=(self.window, 0), q_offset=total - T),
                block_size=self.block,
                kv_len=total,
            )
            at = torch.arange(total - T, total, device=q.device)
            for t in range(0, T, QUERIES_AT_ONCE):
                now = slice(t, t + QUERIES_AT_ONCE)
                rows.append(self._attend_blocks(q[b, now], kept, b, picked.indices[0, now], at[now]))
        return torch.cat(rows).view(q.shape)

    def _attend_blocks(
        self, q_THD: Tensor, kept: "ki.CacheLayer", row: int, blocks_TKn: Tensor, at_T: Tensor
    ) -> Tensor:
        """Every query of every key head is a batch row of its own, with the keys of the blocks picked for it."""
        (T, H, D), K = q_THD.shape, self.k.out_features // self.head_dim
        token = blocks_TKn.long()[..., None] * self.block + torch.arange(self.block, device=at_T.device)
        now = at_T[:, None, None, None]
        seen = (blocks_TKn >= 0)[..., None] & (token <= now)
        if self.window is not None:
            seen = seen & (token >= now - self.window)
        token = torch.where(seen, token, now)
        page = kept["k_cache"].shape[1]
        place = kept["block_table"][row].long()[token // page] * page + token % page
        head = torch.arange(K, device=place.device)[:, None, None]
        pools = (kept["k_cache"].view(-1, 1, D), kept["v_cache"].view(-1, 1, D))
        k, v = (x.view(T * K, -1, 1, D) for x in ki.gather_rows_pair(*pools, (place * K + head).flatten()))
        return attend_each(q_THD.reshape(T * K, H // K, D), k, v, seen.view(T * K, -1)).view(T, H, D)

    def _decode_tokens(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: ExactTokenCache) -> Tensor:
        """The indexer scores all cached tokens; of keys and values only the picked rows are read."""
        assert self.index is not None
        kept = cache.attention
        if self.dense:
            self.index.remember(x, cache.index)
            return ki.fa4_kvcache_decode(q, k=k, v=v, window_size=(self.window, 0), **kept)
        kept.write(k, v)
        places, mask = right_aligned(kept, self.window)
        keys_BSI = self.index.remember(x, cache.index)[places.clamp_min(0)]
        picked = self.index.pick(x, keys_BSI, self.tokens, mask)
        pools = (kept["k_cache"].flatten(0, 1), kept["v_cache"].flatten(0, 1))
        rows = [
            self._attend_picked(
                q[:, t : t + QUERIES_AT_ONCE], pools, places, picked.indices[:, t : t + QUERIES_AT_ONCE]
            )
            for t in range(0, q.shape[1], QUERIES_AT_ONCE)
        ]
        return torch.cat(rows, 1)

    def _attend_picked(
        self, q_BTHD: Tensor, pools: tuple[Tensor, Tensor], places_BS: Tensor, picks_BTn: Tensor
    ) -> Tensor:
        """Every query is a batch row of its own, with the keys that were picked for it."""
        B, T, n = picks_BTn.shape
        at = places_BS.gather(1, picks_BTn.clamp_min(0).flatten(1)).clamp_min(0)
        k, v = ki.gather_rows_pair(*pools, at.flatten())
        k, v = (t.view(B * T, n, *t.shape[1:]) for t in (k, v))
        seen = picks_BTn >= 0  # the best first: only a query of padding has none, and what it reads goes nowhere
        seen[..., 0] = True
        return attend_each(q_BTHD.flatten(0, 1), k, v, seen.view(B * T, n)).view(q_BTHD.shape)


def attend_each(q_NHD: Tensor, k_NnKD: Tensor, v_NnKD: Tensor, seen_Nn: Tensor) -> Tensor:
    """Queries with keys of their own, those that ``seen`` allows; the heads of a key head are rows of one product."""
    N, H, D = q_NHD.shape
    k, v = (x.transpose(1, 2) for x in (k_NnKD, v_NnKD))
    q = q_NHD.view(N, k.shape[1], H // k.shape[1], D)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen_Nn[:, None, None]).reshape(N, H, D)


class Indexer(nn.Module):
    """Scores past tokens for every query, ``Σ_j w_j·relu(q_j·k)``; it reads the stream but sends no gradient there."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, heads * width, bias=False)
        self.k = nn.Linear(dim, width, bias=False)
        self.w = nn.Linear(dim, heads, bias=False)

    def keys(self, x_BSC: Tensor) -> Tensor:
        return self.k(x_BSC.detach())

    def pick(self, x_BTC: Tensor, keys_BSI: Tensor, topk: int, mask: "ki.MaskContract") -> "ki.TokenSelection":
        """The ``topk`` tokens, of those whose keys these are, for each query."""
        x, dtype = x_BTC.detach(), keys_BSI.dtype
        q_BTJI = self.q(x).to(dtype).unflatten(-1, (self.heads, -1))
        return ki.lightning_indexer(q_BTJI, keys_BSI, self.w(x).to(dtype), topk=topk, mask=mask)

    def remember(self, x_BTC: Tensor, cache: "ki.CacheLayer") -> Tensor:
        """Write the keys of new tokens; all cached keys, one row for each slot of the pool."""
        new = self.keys(x_BTC)[:, :, None].to(cache["k_cache"].dtype)
        cache.write(new, new)
        return cache["k_cache"].flatten(0, 2)


class _JoinLoss(torch.autograd.Function):
    """Hands a result on, and lets a loss of the layer's own into the gradient as if it had been added at the end."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)


class _NoGradient(torch.autograd.Function):
    """Keys and values that are read from a cache are constants: a backward pass would leave out their part."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("cache must be None where gradients are wanted: this kind reads new keys back as constants")


def right_aligned(layer: "ki.CacheLayer", window: int | None) -> tuple[Tensor, "ki.MaskContract"]:
    """Where the tokens of each row lie in a paged pool, [B, S], the last in the last column, −1 in front of the first.

    Rows of different lengths then share one contract: their queries end where their keys end.
    """
    lengths, device = layer.lengths_after, layer["cache_seqlens"].device
    longest = max(lengths)
    token = torch.arange(longest, device=device) - (longest - torch.tensor(lengths, device=device)[:, None])
    page, table = layer["k_cache"].shape[1], layer["block_table"].long()
    slot = table.gather(1, token.clamp_min(0) // page) * page + token % page
    if min(lengths) == longest:
        return slot, ki.MaskContract(window=(window, 0))
    inside = token >= 0
    mask = ki.MaskContract(doc_ids=torch.where(inside, 0, -1), window=(window, 0))
    return torch.where(inside, slot, -1), mask
