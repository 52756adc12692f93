"""The calls that ``gpu_sparse`` times: ours, dense attention, other libraries', and what the last queries must give."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernel_index as ki
from benchmarks.gpu_session import LeftOut

Kind = Literal["blocks", "tokens"]
OURS = "kernel_index "
LAST = 64
"""The queries at the end of a row whose results are compared."""

WINDOW = 512
"""Tokens of the third branch of native sparse attention, which fla's call leaves out."""

SDPA_TOKENS = 65_536
"""Above so many SDPA is left out: it takes twice the time of flash-attn-4."""


class Prepared(NamedTuple):
    """A call; what the last queries see, bool [last, G, T], where it can be told; whether it has a backward pass; and
    whether it waits for the device, so that no graph can hold it."""

    call: Callable[[], Any]
    seen: Callable[[], Tensor] | None = None
    trains: bool = True
    waits: bool = False


@dataclass(frozen=True)
class Cell:
    """``count`` blocks of ``block`` keys or single tokens for each query; ``shared``: 64 neighbours select alike."""

    kind: Kind
    tokens: int
    heads: int
    kv_heads: int
    shared: bool
    width: int = 128
    block: int = 64
    count: int = 16

    @property
    def name(self) -> str:
        return f"{self.kind} {self.tokens / 1024:g}k {self.heads}/{self.kv_heads} {self.selection}"

    @property
    def selection(self) -> str:
        return "shared" if self.shared else "random"


class Inputs:
    """Queries, keys and values of a cell with an upstream gradient, and its calls by name."""

    def __init__(self, cell: Cell, device: str):
        torch.manual_seed(0)
        self.cell, self.options = cell, {"backend": "triton"} if device == "cpu" else {}
        heads = (cell.heads, cell.kv_heads, cell.kv_heads)
        options = {"device": device, "dtype": torch.bfloat16}
        q, k, v = (torch.randn(1, cell.tokens, n, cell.width, **options) for n in heads)
        if cell.shared and cell.kind == "blocks":
            alike = q[:, ::64].repeat_interleave(64, 1)[:, : cell.tokens]
            q = 0.95 * alike + 0.05**0.5 * torch.randn_like(q)
        self.q, self.k, self.v = self.leaves = tuple(x.requires_grad_() for x in (q, k, v))
        self.upstream, self.last = torch.randn_like(q), min(LAST, cell.tokens)

    def contenders(self) -> dict[str, Callable[[], Prepared]]:
        """Each is prepared when its turn comes."""
        return self._of_tokens() if self.cell.kind == "tokens" else self._of_blocks()

    def _of_blocks(self) -> dict[str, Callable[[], Prepared]]:
        (q, k, v), cell, options = self.leaves, self.cell, self.options
        config = ki.ClusteredSparseConfig(block_size=cell.block, topk=cell.count)
        routed = {"block_size": cell.block, "topk": cell.count}

        def route(per: Literal["kv_group", "query_head"] = "kv_group") -> Any:
            with torch.no_grad():
                return ki.moba_route(q, k, **routed, route_per=per, **options)

        def attend() -> Prepared:
            given, size = route(), {"block_size": cell.block, **options}

            def call() -> Tensor:
                return ki.block_sparse_attention(q, k, v, given.indices, selected_valid=given.valid, **size).out

            return Prepared(call, lambda: self._seen(given))

        ours = {
            "clustered": lambda: Prepared(
                lambda: ki.clustered_sparse_attention(q, k, v, config=config, **options), lambda: self._seen(route())
            ),
            "moba query_head": lambda: Prepared(
                lambda: ki.moba_attention(q, k, v, **routed, **options), lambda: self._seen(route("query_head"))
            ),
            "attend": attend,
        }
        if not cell.shared:
            ours["router kv_group"] = lambda: Prepared(route, trains=False)
            ours["router query_head"] = lambda: Prepared(lambda: route("query_head"), trains=False)
        return self._dense() | {OURS + name: made for name, made in ours.items()} | self._peers(route)

    def _peers(self, route: Callable[[], Any]) -> dict[str, Callable[[], Prepared]]:
        """XunhaoLai's NSA, and flash-linear-attention's, which takes 16 heads and more for a KV head."""
        (q, k, v), cell = self.leaves, self.cell
        found = {"XunhaoLai NSA attend": lambda: self._xunhao_lai(route())}
        if cell.heads // cell.kv_heads < 16:
            return found
        gate = torch.ones(q.shape[:3], device=q.device, dtype=q.dtype)
        sizes: dict[str, Any] = {"block_counts": cell.count, "block_size": cell.block}

        def attend() -> Prepared:
            from fla.ops.nsa import parallel_nsa

            given = route()
            blocks = torch.where(given.valid, given.indices, -1).long().contiguous()
            return Prepared(
                lambda: parallel_nsa(q, k, v, g_slc=gate, block_indices=blocks, **sizes), lambda: self._seen(given)
            )

        def branches() -> Prepared:
            from kernel_index.nn.native_sparse import attend_to_branches

            gates, mask = torch.ones(*q.shape[:3], 3, device=q.device, dtype=q.dtype), ki.MaskContract()
            sizes: dict[str, Any] = {"block": cell.block, "topk": cell.count, "window": WINDOW}
            return Prepared(lambda: attend_to_branches(q, k, v, mask, **sizes).joined(gates))

        def whole() -> Prepared:
            from fla.ops.nsa import parallel_nsa

            return Prepared(lambda: parallel_nsa(q, k, v, g_cmp=gate, g_slc=gate, **sizes))

        def moba() -> Prepared:
            from fla.ops.moba import parallel_moba

            each, starts = cell.heads // cell.kv_heads, torch.tensor([0, cell.tokens], device=q.device).int()

            def call() -> Tensor:
                wide = (x.repeat_interleave(each, 2)[0] for x in (k, v))
                return parallel_moba(q[0], *wide, starts, cell.tokens, cell.block, cell.count).view_as(q)

            return Prepared(call)

        found |= {"fla NSA attend": attend, "fla NSA, compressed and selected": whole, "fla MoBA": moba}
        return found | {OURS + "NSA, compressed, selected and window": branches}

    def _xunhao_lai(self, given: Any) -> Prepared:
        """github.com/XunhaoLai/native-sparse-attention-triton: blocks [KV head, token, n] ascend, −1 at the end."""
        from native_sparse_attention.ops.triton.topk_sparse_attention import TopkSparseAttention

        (q, k, v), cell, nothing = self.leaves, self.cell, torch.iinfo(torch.int32).max
        blocks = torch.where(given.valid, given.indices, nothing).int()[0].sort(-1).values
        blocks = torch.where(blocks == nothing, -1, blocks).transpose(0, 1).contiguous()
        starts = torch.tensor([0, cell.tokens], device=q.device, dtype=torch.int32)

        def call() -> Tensor:
            lengths = starts, starts, cell.tokens, cell.tokens
            return TopkSparseAttention.apply(q[0], k[0], v[0], blocks, cell.block, *lengths, None)[None]

        return Prepared(call, lambda: self._seen(given), waits=True)

    def _dense(self) -> dict[str, Callable[[], Prepared]]:
        if self.cell.shared:
            return {}  # the same work as at random

        def fa4() -> Prepared:
            from flash_attn.cute import flash_attn_func

            def call() -> Tensor:
                found = flash_attn_func(*self.leaves, causal=True)
                return found[0] if isinstance(found, tuple) else found

            return Prepared(call, self._past)

        def sdpa() -> Prepared:
            if self.cell.tokens > SDPA_TOKENS:
                raise LeftOut(f"measured up to {SDPA_TOKENS} tokens")
            which = SDPBackend.FLASH_ATTENTION if self.q.is_cuda else SDPBackend.MATH

            def call() -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in self.leaves)
                with sdpa_kernel(which):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

            return Prepared(call, self._past)

        return {"dense FA4": fa4, "dense SDPA": sdpa}

    def _of_tokens(self) -> dict[str, Callable[[], Prepared]]:
        (q, k, v), cell = self.leaves, self.cell

        def attend() -> Prepared:
            indices, valid = self._tokens()

            def seen() -> Tensor:
                found = torch.zeros(self.last, 1, cell.tokens + 1, dtype=torch.bool, device=q.device)
                at = torch.where(valid, indices, cell.tokens)[0, -self.last :, None]
                return found.scatter_(2, at, True)[..., :-1] & self._past()

            return Prepared(
                lambda: ki.exact_token_attention(q, k, v, indices, indices_valid=valid, **self.options), seen
            )

        def indexer() -> Prepared:
            options = {"device": q.device, "dtype": q.dtype}
            queries, keys = (torch.randn(1, cell.tokens, *n, 64, **options) for n in ((4,), ()))
            weights = torch.rand(1, cell.tokens, 4, device=q.device)

            def call() -> Any:
                return ki.lightning_indexer(queries, keys, weights, topk=cell.count, **self.options)

            return Prepared(call, trains=False)

        return {OURS + "exact_token": attend} | ({} if cell.shared else {OURS + "indexer": indexer})

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """One token of each of ``count`` equal parts of the past, at random: ascending, and none twice."""
        cell, device = self.cell, self.q.device
        every = 64 if cell.shared else 1
        past = torch.arange(0, cell.tokens, every, device=device)[:, None] + 1
        part = torch.arange(cell.count, device=device)
        low, high = (p * past // cell.count for p in (part, part + 1))
        at = low + (torch.rand(len(past), cell.count, device=device) * (high - low)).long()
        short = past <= cell.count
        at = torch.where(short, part, at.minimum(high - 1))
        valid = ~short | (part < past)
        at, valid = (x.repeat_interleave(every, 0)[None, : cell.tokens].contiguous() for x in (at, valid))
        return at, valid

    def _past(self) -> Tensor:
        at = torch.arange(self.cell.tokens, device=self.q.device)
        return (at <= at[-self.last :, None])[:, None]

    def _seen(self, blocks: Any) -> Tensor:
        size, total = self.cell.block, self.cell.tokens
        count = -(-total // size)
        found = torch.zeros(self.last, blocks.indices.shape[2], count + 1, dtype=torch.bool, device=self.q.device)
        found.scatter_(2, torch.where(blocks.valid, blocks.indices, count)[0, -self.last :].long(), True)
        return found[..., :-1].repeat_interleave(size, 2)[..., :total] & self._past()

    def truth(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """float32 results [last, H, D] of the last queries and the gradient of those queries."""
        kv_heads, per = self.cell.kv_heads, self.cell.heads // self.cell.kv_heads
        seen = seen.repeat_interleave(self.cell.heads // seen.shape[1], 1).unflatten(1, (kv_heads, per))
        q = self.q.detach()[0, -self.last :].float().unflatten(1, (kv_heads, per)).requires_grad_()
        k, v = (x.detach()[0].float() for x in (self.k, self.v))
        scores = (torch.einsum("tkgd,skd->tkgs", q, k) * self.cell.width**-0.5).masked_fill(~seen, -torch.inf)
        out = torch.einsum("tkgs,skd->tkgd", scores.softmax(-1), v)
        upstream = self.upstream[0, -self.last :].float().view_as(out)
        (gradient,) = torch.autograd.grad(out, q, upstream)
        return out.detach().flatten(1, 2), gradient.flatten(1, 2)
