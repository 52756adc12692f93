"""The calls of ``attention`` that are measured: named cells, their inputs, and float32 results to compare with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernel_index as ki

LAST = 64
"""Queries and keys at the end of the first row that are compared with float32."""


@dataclass(frozen=True)
class AttentionCell:
    """One kind and size of call in bfloat16; ``left`` tokens before a query are in its window.

    ``documents`` are given by cumulative lengths, with ``ids`` by an id for each token.  ``trees`` have a prompt, which
    is half of their tokens, and eight answers.
    """

    name: str
    tokens: int
    rows: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    documents: int = 0
    ids: bool = False
    prefix: int = 0
    trees: int = 0
    left: int | None = None
    softcap: float = 0.0
    sink: bool = False
    causal: bool = True

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the call has beside causal attention, in alphabetical order."""
        has = {
            "documents": self.documents and self.ids,
            "full": not self.causal,
            "lengths": self.documents and not self.ids,
            "prefix": self.prefix,
            "sink": self.sink,
            "softcap": self.softcap,
            "tree": self.trees,
            "window": self.left is not None,
        }
        return tuple(kind for kind, present in has.items() if present)

    @property
    def bytes(self) -> tuple[int, int]:
        """What any kernel must move forward, and forward and backward: q, k, v, out; with their gradients."""
        element = 2 * self.rows * self.tokens * self.head_size
        forward = element * 2 * (self.heads + self.kv_heads)
        return forward, forward + element * (4 * self.heads + 4 * self.kv_heads)

    def small(self) -> "AttentionCell":
        """The same kind of call at a size for an interpreter."""
        small = replace(self, tokens=48, rows=1, heads=4, kv_heads=2, head_size=16)
        small = replace(small, documents=3 if self.documents else 0, left=None if self.left is None else 16)
        return replace(small, prefix=9 if self.prefix else 0, trees=1 if self.trees else 0)


CELLS = (
    AttentionCell("causal 8k", 8192, rows=4),
    AttentionCell("causal 2k", 2048, rows=16),
    AttentionCell("causal 32k", 32768),
    AttentionCell("16 documents 32k", 32768, documents=16),
    AttentionCell("window 1024 32k", 32768, left=1023),
    AttentionCell("window 4096 32k", 32768, left=4095),
    AttentionCell("documents + window 1024 32k", 32768, documents=16, left=1023),
    AttentionCell("softcap 50 8k", 8192, rows=4, softcap=50.0),
    AttentionCell("head size 64 8k", 8192, rows=4, head_size=64),
    AttentionCell("head size 256 8k", 8192, rows=2, heads=16, head_size=256),
    AttentionCell("sink 8k head size 64", 8192, rows=2, heads=64, head_size=64, sink=True),
    AttentionCell("sink + window 128 8k head size 64", 8192, rows=2, heads=64, head_size=64, left=127, sink=True),
    AttentionCell("head size 256 window 4096 32k", 32768, heads=16, head_size=256, left=4095),
    AttentionCell("64 documents 32k head size 64", 32768, heads=16, kv_heads=16, head_size=64, documents=64),
    AttentionCell("16 documents by id 32k", 32768, documents=16, ids=True),
    AttentionCell("documents by id + window 1024 32k", 32768, documents=16, ids=True, left=1023),
    AttentionCell("64 documents by id 32k head size 64", 32768, 1, 16, 16, 64, documents=64, ids=True),
    AttentionCell("prefix 4096 32k", 32768, prefix=4096),
    AttentionCell("4 trees 32k", 32768, trees=4),
    AttentionCell("4 trees 32k head size 64", 32768, head_size=64, trees=4),
)

TUNED = (
    *CELLS,
    AttentionCell("causal 512", 512, rows=32),
    AttentionCell("full 8k", 8192, rows=4, causal=False),
    AttentionCell("full 2k", 2048, rows=16, causal=False),
)
"""What ``kernel-index tune`` measures: also calls that benchmarks leave out."""


class AttentionInputs:
    """Leaves, mask and upstream gradient of a cell; ``lengths`` are its documents, uneven as packed rows have them."""

    def __init__(self, cell: AttentionCell, device: str = "cuda"):
        self.cell, options = cell, {"device": device, "dtype": torch.bfloat16}
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(0)
        shape = (cell.rows, cell.tokens)
        counts = (cell.heads, cell.kv_heads, cell.kv_heads)
        self.q, self.k, self.v = (torch.randn(*shape, n, cell.head_size, **options).requires_grad_() for n in counts)
        self.upstream = torch.randn(*shape, cell.heads, cell.head_size, **options)
        self.sink = torch.randn(cell.heads, **options) if cell.sink else None
        shares = torch.rand(max(cell.documents, 1), generator=generator) + 0.2
        ends = (shares.cumsum(0) / shares.sum() * cell.tokens).round().long()
        ends[-1] = cell.tokens
        self.starts = F.pad(ends, (1, 0)).to(device, torch.int32)
        lengths = torch.diff(F.pad(ends, (1, 0)))
        self.longest = int(lengths.max())
        self.ids = torch.repeat_interleave(torch.arange(len(ends)), lengths).to(device)
        self.mask = self._mask(shape)

    def _mask(self, shape: tuple[int, int]) -> ki.MaskContract:
        cell, window = self.cell, (self.cell.left, None)
        if cell.documents and not cell.ids:  # made on the host, as a collator makes it
            mask = ki.MaskContract.from_cu_seqlens(self.starts.cpu(), causal=cell.causal, window=window)
            return mask.to(self.q.device)
        return ki.MaskContract(  # ids made on the device: their lengths are not known
            causal=cell.causal,
            doc_ids=self.ids.expand(shape).contiguous() if cell.documents else None,
            window=window,
            prefix=cell.prefix or None,
            subtree_end=self._subtree_end() if cell.trees else None,
        )

    def tree_and_answer(self) -> tuple[Tensor, Tensor]:
        """Of each token its tree, and its answer or −1 in the prompt."""
        size = self.cell.tokens // self.cell.trees
        token = torch.arange(self.cell.tokens, device=self.q.device)
        inside = token % size
        return token // size, torch.where(inside < size // 2, -1, (inside - size // 2) // (size // 16))

    def _subtree_end(self) -> Tensor:
        size = self.cell.tokens // self.cell.trees
        tree, answer = self.tree_and_answer()
        return size * tree + torch.where(answer < 0, size, size // 2 + (answer + 1) * (size // 16))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def ours(self, backend: Any) -> Callable[[], Tensor]:
        softcap, sink = self.cell.softcap, self.sink
        return lambda: ki.attention(self.q, self.k, self.v, self.mask, softcap=softcap, sink=sink, backend=backend)

    def train(self, call: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward as one call."""
        return lambda: torch.autograd.grad(call(), self.leaves, self.upstream)

    def last(self, *results: Tensor) -> list[Tensor]:
        """The part of the results that ``truth`` has."""
        return [t[:1, -LAST:] for t in results]

    def truth(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output and gradients of q, k and v in float32, of the last queries and keys of the first row.

        Causally the last keys are seen by the last queries alone; else all queries count, some heads at a time.
        """
        cell, last = self.cell, min(LAST, self.cell.tokens)
        if cell.causal:
            return self._of_queries(last, slice(None))
        of_heads = [self._of_queries(cell.tokens, slice(h, h + 1)) for h in range(cell.kv_heads)]
        out, dq, dk, dv = (torch.cat(parts, 2)[:, -last:] for parts in zip(*of_heads, strict=True))
        return out, dq, dk, dv

    def _of_queries(self, last: int, kv_heads: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the ``last`` queries, and of as many keys, of some KV heads of the first row."""
        cell, groups = self.cell, self.cell.heads // self.cell.kv_heads
        heads = slice(*(None if i is None else i * groups for i in (kv_heads.start, kv_heads.stop)))
        parts = self.q[:1, -last:, heads], self.k[:1, :, kv_heads], self.v[:1, :, kv_heads]
        q, k, v = (x.detach().float().requires_grad_() for x in parts)
        z = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(groups, 2)) * cell.head_size**-0.5
        z = cell.softcap * torch.tanh(z / cell.softcap) if cell.softcap else z
        s = torch.arange(cell.tokens, device=z.device)
        t = s[-last:, None]
        seen = ((s <= t) | (not cell.causal)) & (self.ids[s] == self.ids[t])
        seen = seen if cell.left is None else seen & (t - s <= cell.left)
        seen = seen | ((s < cell.prefix) & (t < cell.prefix))
        if cell.trees:
            tree, answer = self.tree_and_answer()
            seen = seen & (tree[s] == tree[t]) & ((answer[s] < 0) | (answer[s] == answer[t]))
        z = z.masked_fill(~seen, float("-inf"))
        if self.sink is not None:
            z = torch.cat((z, self.sink[heads].float().view(1, -1, 1, 1).expand(1, -1, last, 1)), -1)
        p = z.softmax(-1)[..., : cell.tokens]
        out = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(groups, 2))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.upstream[:1, -last:, heads].float())
        return out.detach(), dq, dk[:, -last:], dv[:, -last:]
