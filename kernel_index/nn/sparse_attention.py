"""Attention that reads a few blocks or tokens of the past: four ways to select them, one layer."""

import contextlib
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.numerics import is_invariant, needs_ordinary_numerics
from kernel_index.core.rules import wants_gradient
from kernel_index.nn.linear import Linear
from kernel_index.nn.mixer import Mixer, cache_dtype, in_order, prefixes, rows_by_length
from kernel_index.nn.native_sparse import attend_to_branches, attend_to_cached_branches, gates_of_seeing
from kernel_index.nn.residual import Branch

SparseKind = Literal["exact_token", "moba", "clustered", "nsa"]
KINDS: tuple[SparseKind, ...] = get_args(SparseKind)


class ExactTokenCache(NamedTuple):
    """The caches of one layer with ``kind="exact_token"``: its keys and values, and the keys of its indexer."""

    attention: "ki.CacheLayer"
    index: "ki.CacheLayer"


class SparseAttention(Mixer):
    """Rotary grouped-query attention over the blocks or tokens that a router selects.

    - ``"moba"``: each query head selects ``topk`` blocks by their mean keys (``ki.moba_attention``);
    - ``"clustered"``: each KV head does, and a tile of queries shares the union (``ki.clustered_sparse_attention``);
    - ``"exact_token"``: the layer's indexer selects ``tokens`` single tokens (``ki.lightning_indexer``);
    - ``"nsa"``: native sparse attention.  Three branches, each times a gate of every head, ``sigmoid`` of a projection:
      the means of the complete blocks before the current one; ``topk`` blocks, which are the current one, the one
      before it, the first, and those that a KV head weighs most among the means (``ki.importance_route``); and a window
      of ``tokens`` tokens.  Its source is arXiv 2502.11089; blocks are compressed to means, as in
      flash-linear-attention.

    Blocks count from the start of a row.  A document that begins inside a block can select other blocks than it would
    alone; under ``ki.numerics("invariant")`` they count from the start of each document (not ``"nsa"``).

    The routers of blocks have no parameters.  The indexer learns by a loss of its own, ``ki.lightning_indexer_loss``,
    which is added to the gradient at this layer's result and changes nothing but the indexer's gradient.

    ``dense = True`` attends to everything instead, for a dense warm-up, and so that the two can be compared.  The
    indexer learns meanwhile, from the tokens that it would have selected.
    ``hierarchy = (ratio, topc)`` lets ``"clustered"`` score groups of blocks first; ``report_unions = True`` joins the
    selections of a tile by ``ki.union_selection`` first, so that the receipt tells how many blocks they share.

    Args:
        dim, heads, kv_heads, head_dim, window: as of ``Attention``; ``"nsa"`` takes no window besides its own.
        kind: one of the four.
        block: tokens of a block.
        topk: blocks for each query, the current one counted; at least 3 for ``"nsa"``.
        tokens: tokens for each query of ``"exact_token"``; those of the window of ``"nsa"``, the query's own counted.
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
        kind: SparseKind,
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
        if kind == "nsa" and topk < 3:
            raise ValueError(f"topk must be at least 3 for 'nsa', which always selects three blocks, got {topk}")
        if kind == "nsa" and window is not None:
            raise ValueError(f"window must be None for 'nsa', whose window is `tokens`, got {window}")
        self.kind, self.heads, self.kv_heads, self.head_dim, self.window = kind, heads, kv_heads, head_dim, window
        self.rope_dim, self.block, self.topk, self.tokens = head_dim, block, topk, tokens
        self.index_loss = index_loss
        self.q = Linear(dim, heads * head_dim, bias=False)
        self.k = Linear(dim, kv_heads * head_dim, bias=False)
        self.v = Linear(dim, kv_heads * head_dim, bias=False)
        self.out = Linear(heads * head_dim, dim, bias=False)
        self.index = Indexer(dim, index_heads, index_dim) if kind == "exact_token" else None
        self.gates = Linear(dim, heads * 3, bias=False) if kind == "nsa" else None

    def forward(
        self,
        x_BTC: Tensor,
        mask: "ki.MaskContract | None",
        rope: tuple[Tensor, Tensor],
        cache: Any = None,
    ) -> Branch:
        """``cache`` holds this layer's part of a ``KVCache``, or an ``ExactTokenCache``."""
        q_BTHD, k_BTKD, v_BTKD = (f(x_BTC).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        q_BTHD, k_BTKD = ki.fused_rope_qk(q_BTHD, k_BTKD, *rope)
        if cache is not None:
            kept = cache.attention if isinstance(cache, ExactTokenCache) else cache
            dtype = cache_dtype(kept, self.k.weight)
            new = (q_BTHD.to(dtype), k_BTKD.to(dtype), v_BTKD.to(dtype))
            out_BTHD = self._decode(x_BTC, *new, cache).to(q_BTHD.dtype)
        elif mask is not None:
            out_BTHD = self._attend(x_BTC, q_BTHD, k_BTKD, v_BTKD, mask)
        else:
            raise ValueError("mask must be given where no cache is, got None")
        return self.out(out_BTHD.flatten(2)), None

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: "ki.MaskContract",
        index_keys: Tensor | None = None,
    ) -> Tensor:
        """``index_keys``: the indexer's of all keys, where x has not all tokens."""
        if self.kind == "exact_token":
            assert self.index is not None
            learns = bool(self.index_loss) and self.training and torch.is_grad_enabled()
            selected = None
            if learns or not self.dense:
                known = self.index.keys(x) if index_keys is None else index_keys
                selected = self.index.select(x, known, self.tokens, mask)
            out = ki.exact_token_attention(q, k, v, None if self.dense else selected, mask=mask)
            if selected is None or not learns:
                return out
            # It trains the indexer alone, and no log-probability has a part of it.
            with ki.numerics("ordinary") if is_invariant() else contextlib.nullcontext():
                index_loss = ki.lightning_indexer_loss(selected, q, k)
            return _JoinLoss.apply(out, self.index_loss * index_loss)
        if self.dense:
            return ki.attention(q, k, v, mask)
        if self.kind == "nsa":
            needs_ordinary_numerics(
                "nn.SparseAttention", "the branches of native sparse attention have no invariant form"
            )
            branches = attend_to_branches(q, k, v, mask, block=self.block, topk=self.topk, window=self.tokens)
            return branches.joined(gates_of_seeing(self._gates(x, q), mask, k.shape[1]))
        if self.kind == "moba":
            return ki.moba_attention(q, k, v, block_size=self.block, topk=self.topk, mask=mask)
        config = ki.ClusteredSparseConfig(
            block_size=self.block,
            topk=self.topk,
            hierarchy=self.hierarchy,
            report_unions=self.report_unions and not torch.compiler.is_compiling(),  # a trace has no values to report
        )
        return ki.clustered_sparse_attention(q, k, v, config=config, mask=mask)

    def _gates(self, x: Tensor, q: Tensor) -> Tensor:
        """[B, T, H, 3] in q's dtype."""
        assert self.gates is not None
        return torch.sigmoid(self.gates(x)).unflatten(-1, (self.heads, 3)).to(q.dtype)

    def _decode_by_rows(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        """The training form over each row's cached tokens: the same calls, so the same bits."""
        layer, index_keys = cache.attention if self.index is not None else cache, None
        layer.write(k, v)
        if self.index is not None:
            self.index.remember(x, cache.index)
        groups, outs = rows_by_length(layer.lengths_after), []
        for total, rows in groups.items():
            keys, values = prefixes(layer, rows)
            if self.index is not None:
                index_keys = prefixes(cache.index, rows)[0].squeeze(2)
            mask = ki.MaskContract(window=(self.window, 0), q_offset=total - x.shape[1])
            if wants_gradient(k, v):  # the cache holds constants
                before = total - x.shape[1]
                keys, values = (torch.cat([old[:, :before], new[rows]], 1) for old, new in ((keys, k), (values, v)))
            outs.append(self._attend(x[rows], q[rows], keys, values, mask, index_keys))
        return in_order(outs, groups)

    def _decode(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        if is_invariant():
            return self._decode_by_rows(x, q, k, v, cache)
        step: dict[str, Any] = {"k": k, "v": v, "window_size": (self.window, 0)}
        if self.kind == "exact_token":
            return self._decode_tokens(x, q, cache, step)
        if self.dense:
            return ki.fa4_kvcache_decode(q, **step, **cache)
        if self.kind == "nsa":
            if wants_gradient(q, k, v) or q.shape[1] > self.block:  # a prompt, whose means are not known yet
                return self._decode_by_rows(x, q, k, v, cache)
            branches = attend_to_cached_branches(q, k, v, cache, block=self.block, topk=self.topk, window=self.tokens)
            return branches.joined(self._gates(x, q))
        if self.kind == "clustered" and self.hierarchy is not None:
            cache.write(k, v)  # this step may complete a block, whose mean is then scored
            blocks = self._select_cached_blocks(q, cache, self.hierarchy)
            return ki.selected_decode(q, cache, blocks, block_size=self.block, **step)
        # The clustered kernel selects by KV head; the union only tells which blocks are loaded together.
        per = "query_head" if self.kind == "moba" else "kv_group"
        return ki.moba_decode(q, cache, block_size=self.block, topk=self.topk, route_per=per, **step)

    def _select_cached_blocks(self, q: Tensor, cache: "ki.CacheLayer", hierarchy: tuple[int, int]) -> Tensor:
        """The blocks [B, T, K, topk] of each query: groups of cached block means first, then their children."""
        means, T = cache.block_means(self.block), q.shape[1]
        rows = []
        for b, total in enumerate(cache.lengths_after):
            block_keys = means[b : b + 1, : total // self.block]
            if total % self.block:  # the block that is still growing is selected as the current one: it needs no mean
                block_keys = torch.nn.functional.pad(block_keys, (0, 0, 0, 0, 0, 1))
            selection = ki.hierarchical_block_select(
                q[b : b + 1],
                block_keys,
                coarse_ratio=hierarchy[0],
                coarse_topc=hierarchy[1],
                final_topk=self.topk,
                mask=ki.MaskContract(window=(self.window, 0), q_offset=total - T),
                block_size=self.block,
                kv_len=total,
            )
            rows.append(selection.indices)
        return torch.cat(rows)

    def _decode_tokens(self, x: Tensor, q: Tensor, cache: ExactTokenCache, step: dict[str, Any]) -> Tensor:
        """The indexer scores all cached tokens; of keys and values only the selected rows are read."""
        assert self.index is not None
        self.index.remember(x, cache.index)
        if self.dense:
            return ki.fa4_kvcache_decode(q, **step, **cache.attention)
        keys_BS1I, first_B = cache.index.right_aligned_keys()
        padding = None
        if len(set(cache.index.lengths_after)) > 1:  # the columns before a row's first token
            column = torch.arange(keys_BS1I.shape[1], device=q.device)
            padding = torch.where(column < first_B[:, None], -1, 0)
        mask = ki.MaskContract(doc_ids=padding, window=(self.window, 0))
        token_BTn, valid_BTn, _ = self.index.select(x, keys_BS1I.squeeze(2), self.tokens, mask)
        if padding is not None:
            token_BTn = torch.where(valid_BTn, token_BTn - first_B[:, None, None], -1)
        return ki.selected_decode(q, cache.attention, token_BTn, **step)


class Indexer(nn.Module):
    """Scores past tokens for every query, ``Σ_j w_j·relu(q_j·k)``; it sends no gradient to the stream."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, heads * width, bias=False)
        self.k = Linear(dim, width, bias=False)
        self.w = Linear(dim, heads, bias=False)

    def keys(self, x_BSC: Tensor) -> Tensor:
        return self.k(x_BSC.detach())

    def select(self, x_BTC: Tensor, keys_BSI: Tensor, topk: int, mask: "ki.MaskContract") -> "ki.TokenSelection":
        """The ``topk`` tokens, of those whose keys these are, for each query."""
        x, dtype = x_BTC.detach(), keys_BSI.dtype
        q_BTJI = self.q(x).to(dtype).unflatten(-1, (self.heads, -1))
        return ki.lightning_indexer(q_BTJI, keys_BSI, self.w(x).to(dtype), topk=topk, mask=mask)

    def remember(self, x_BTC: Tensor, cache: "ki.CacheLayer") -> None:
        """Write the keys of new tokens."""
        new = self.keys(x_BTC)[:, :, None].to(cache["k_cache"].dtype)
        cache.write(new, new)


class _JoinLoss(torch.autograd.Function):
    """Returns a result unchanged, and adds the gradient of a loss as if the loss had been added to the model's own."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
