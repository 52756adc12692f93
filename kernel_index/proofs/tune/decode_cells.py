"""The calls of ``fa4_kvcache_decode`` that are measured: one step over pages, its inputs, and float32 results."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.proofs.tune.timing import sets_for


@dataclass(frozen=True)
class DecodeCell:
    """One new token for each row, in bfloat16; ``tokens`` are in the cache with it, in pages in random order."""

    rows: int
    tokens: int
    page: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128

    @property
    def name(self) -> str:
        tokens = f"{self.tokens // 1024}k" if self.tokens >= 1024 else str(self.tokens)
        return f"{self.rows} row{'s' * (self.rows > 1)} of {tokens} page {self.page}"

    @property
    def bytes(self) -> int:
        """Of the keys and values that every kernel reads."""
        return 4 * self.rows * self.tokens * self.kv_heads * self.head_size

    def small(self) -> "DecodeCell":
        """The same call at a size for an interpreter."""
        return replace(self, rows=min(self.rows, 2), tokens=48, page=16, heads=4, kv_heads=2, head_size=16)


TOKENS, PAGES = (1024, 8192, 65536), (64, 16, 256)
CELLS = tuple(DecodeCell(rows, tokens, page) for rows in (1, 8, 64) for tokens in TOKENS for page in PAGES)


class DecodeInputs:
    """``sets`` sets of queries, pages and tables, which do not fit the L2 cache together."""

    def __init__(self, cell: DecodeCell, device: str = "cuda"):
        self.cell, options = cell, {"device": device, "dtype": torch.bfloat16}
        torch.manual_seed(0)
        self.sets = 1 if device == "cpu" else sets_for(cell.bytes)
        slots = cell.tokens // cell.page
        pages = (self.sets * cell.rows * slots, cell.page, cell.kv_heads, cell.head_size)
        self.k_pages, self.v_pages = torch.randn(*pages, **options), torch.randn(*pages, **options)
        order = torch.randperm(pages[0], device=device).to(torch.int32)
        self.tables = list(order.view(self.sets, cell.rows, slots))
        self.q = [torch.randn(cell.rows, 1, cell.heads, cell.head_size, **options) for _ in range(self.sets)]
        self.k, self.v = (torch.randn(cell.rows, 1, cell.kv_heads, cell.head_size, **options) for _ in range(2))
        self.before = torch.full((cell.rows,), cell.tokens - 1, dtype=torch.int32, device=device)
        self.after = self.before + 1

    def ours(self, backend: Any) -> Callable[[int], Tensor]:
        return lambda i: ki.fa4_kvcache_decode(
            self.q[i],
            self.k_pages,
            self.v_pages,
            cache_seqlens=self.before,
            k=self.k,
            v=self.v,
            block_table=self.tables[i],
            backend=backend,
        )

    def contiguous(self, i: int) -> list[Tensor]:
        """Keys and values of a set as [rows, K, tokens, D], without the new token."""
        return [x[self.tables[i].long()].flatten(1, 2).transpose(1, 2) for x in (self.k_pages, self.v_pages)]

    def write_new(self) -> None:
        """Append the new token in every set by plain indexing, for contenders that only attend."""
        for table in self.tables:
            pages = table[:, -1].long()
            self.k_pages[pages, -1], self.v_pages[pages, -1] = self.k[:, 0], self.v[:, 0]

    def truth(self) -> Tensor:
        """[1, H, D] in float32: the first row of the first set."""
        k, v = (x[self.tables[0][0].long()].flatten(0, 1).float() for x in (self.k_pages, self.v_pages))
        k[-1], v[-1] = self.k[0, 0].float(), self.v[0, 0].float()
        q = self.q[0][0, 0].float().view(self.cell.kv_heads, -1, self.cell.head_size)
        z = torch.einsum("kgd,skd->kgs", q, k) * self.cell.head_size**-0.5
        return torch.einsum("kgs,skd->kgd", z.softmax(-1), v).reshape(1, self.cell.heads, -1)
