"""``MaskContract``: which keys each query may attend to, and the forms of it that kernels take (lowerings)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.masks.doc_window_mask import contract, lowerings
from kernel_index.masks.doc_window_mask.fields import as_rows
from kernel_index.masks.doc_window_mask.intervals import (
    BlockPlan,
    Intervals,
    RowBounds,
    Sizes,
    interval_of,
    plan_blocks,
)
from kernel_index.masks.doc_window_mask.lowerings import KernelIntervals
from kernel_index.masks.doc_window_mask.packed import PackedMask
from kernel_index.masks.prefix_tree.bounds import Tree, tree_bounds
from kernel_index.masks.prefix_tree.contract import TREE_HAS_NO_INTERVALS
from kernel_index.masks.prefix_tree.runs import Level, Stretch, levels_of, parents_in_row, stretches_of
from kernel_index.masks.prefix_tree.tiles import Tiles, cover_of, ranges_of, tiles_of


@dataclass(frozen=True, eq=False)
class MaskContract(PackedMask):
    """Which keys each query may attend to; immutable.

    With ``p(t) = t + offset`` the position of query t among the S keys, query t may attend to key s if all hold::

        causal:    s ≤ p(t)
        window:    p(t) − left ≤ s ≤ p(t) + right
        documents: doc_ids is constant from p(t) to s, and not negative
        validity:  0 ≤ p(t) < count and s < count; with key_validity t < count and s < key count
        prefix:    both among the first ``prefix`` tokens of a document, whatever causality and window say
        tree:      s ≤ p(t) < subtree_end[s]; the window is positions[p(t)] − positions[s] ≤ left

    A document is a maximal run of equal ids: an id that is repeated after another one begins a new document.  A query
    whose position is outside the keys is in no document.

    Without a tree the allowed keys of a query are one interval, and neither bound decreases from one query to the next.
    In a tree each query has a first key and each key an end of its queries.  Both cost O(T) and are computed on the
    tensors' device without waiting for it; all lowerings derive from them.

    Lowerings take ``batch_size``, ``seq_len`` (T), ``kv_len`` (S) and ``device``.  Sizes that the tensors have may be
    left out: B and S come from their shapes, S and T default to each other, and B to 1 where all rows are alike.  The
    contract keeps the latest lowering of each kind, so layers that share a contract share the work; it rebuilds one
    whose source tensors or result were changed in place.  Inside torch.compile nothing is kept: the compiler merges
    equal computations.

    Equality compares window bounds and all tensors by value; the hash reads metadata only.

    Args:
        causal: no query attends to a later position.
        window: ``(left, right)``, tokens before and after; None or negative is unlimited, ``left=0`` is the token only.
        doc_ids: integers [B, S], or [S] for every row alike; negative ids are padding and attend to nothing.
        validity: the valid prefix of each row, from ``attention_validity``.
        key_validity: the valid prefix of the keys alone, as in cross-attention to a padded source; ``validity`` then
            counts queries from query 0 on, and no key.
        q_offset: the position of query 0 among the keys, or integers [B].  None aligns the last query with the last key
            (``offset = S − T``, bottom-right), which for T = S is the same as 0.  Where T ≠ S the two differ: 0 puts
            query 0 at key 0.
        prefix: a number of tokens, or integers [B]: the first so many tokens of every document see each other in both
            directions, as in a prefix language model.
        subtree_end: integers [B, S], or [S] for every row alike, from ``pack_tree``: the first index after everything
            that continues the token.  A token that no query may see, such as padding, has its own index.
        positions: integers [B, S] or [S] that increase along each path; a window counts in them.  None counts indices.
            A contract with positions has the forms of a tree, also without ``subtree_end``.
        cu_seqlens: ``(cu_seqlens_q, cu_seqlens_k or None)``: see ``from_cu_seqlens``.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: fields that exclude each other, tensors of different sizes, or subtrees that are not nested.

    >>> import torch, kernel_index as ki
    >>> mask = ki.MaskContract(doc_ids=torch.tensor([[7, 7, 4, 4, 7, -1]]))
    >>> mask.intervals().start.tolist(), mask.intervals().end.tolist()
    ([[0, 0, 2, 2, 4, 5]], [[1, 2, 3, 4, 5, 5]])
    """

    def bounds(self, queries: Tensor, sizes: Sizes) -> Intervals:
        """The intervals of the given query indices [n], int64 [rows, n]; not kept."""
        left, right = self.window_bounds
        position = self._position(queries, sizes)
        documents = self._documents(queries, position, sizes)
        window = (None if self.is_tree else left, right)  # in a tree the window is along the path
        return interval_of(queries, position, sizes, window, documents, *self._prefix_tokens(), self.prefix)

    def positions_of_queries(self, sizes: Sizes) -> Tensor:
        """The position of every query among the keys, int64 [rows or 1, T]."""
        return self._position(torch.arange(sizes.queries, device=sizes.device), sizes)

    def intervals(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Intervals:
        """The keys of each query as ``Intervals(start, end)``, int32 [B, T], both non-decreasing along T.

        A query without an allowed key has ``start == end``, at a position that keeps both bounds non-decreasing.
        Raises ``ValueError`` for a tree, where the keys of a query are no interval.
        """
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        return Intervals(*(bound.expand(sizes.batch, -1).contiguous() for bound in self.row_intervals(sizes)))

    def row_intervals(self, sizes: Sizes) -> Intervals:
        """``intervals``, but with one row where all rows are alike."""
        if self.is_tree:
            raise ValueError(f"mask must have intervals of keys: {TREE_HAS_NO_INTERVALS}, got subtree_end or positions")

        def build() -> Intervals:
            bounds = self.bounds(torch.arange(sizes.queries, device=sizes.device), sizes)
            return Intervals(*(bound.to(torch.int32) for bound in bounds))

        return self.remember("intervals", sizes, build)

    def row_origins(self, sizes: Sizes) -> Tensor:
        """The first key of the document of each query, int32 [rows, T]; 0 where there are no documents."""

        def build() -> tuple[Tensor]:
            queries = torch.arange(sizes.queries, device=sizes.device)
            position = self._position(queries, sizes)
            documents = self._documents(queries, position, sizes)
            first = torch.zeros_like(position) if documents is None else documents.low
            return (first.to(torch.int32).expand(sizes.rows, -1).contiguous(),)

        return self.remember("origins", sizes, build)[0]

    def row_bounds(self, sizes: Sizes) -> RowBounds:
        """Which keys each query may attend to, for every contract; one row where all rows are alike."""
        if not self.is_tree:
            return RowBounds(*self.row_intervals(sizes), None)

        def build() -> RowBounds:
            queries = torch.arange(sizes.queries, device=sizes.device)
            whole = self.cu_seqlens is None and self.doc_ids is None
            tree = Tree(as_rows(self.subtree_end), as_rows(self.positions), self.window[0], whole)
            bounds, clipped = self.bounds(queries, sizes), self.key_validity is not None
            return tree_bounds(bounds, self._position(queries, sizes), tree, sizes.keys, clipped)

        return self.remember("row_bounds", sizes, build)

    def dense(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
        allow_large: bool = False,
    ) -> Tensor:
        """The mask as bool [B, 1, T, S], True where query t may attend to key s; B·T·S bytes.

        Raises ``ValueError`` (``dense_mask_too_large``) above T = 8192 unless ``allow_large``.
        """
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        contract.check_dense(sizes.batch, sizes.queries, sizes.keys, allow_large)

        def build() -> Tensor:
            allowed = self.row_bounds(sizes).all_allowed(slice(None), sizes.keys)[:, None]
            return allowed.expand(sizes.batch, -1, -1, -1).contiguous()

        return self.remember("dense", sizes, build)

    def block_plan(
        self,
        q_block: int,
        kv_block: int,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> BlockPlan:
        """For each block of queries, the key blocks to visit and those that need no mask; int32 [B, ceil(T/q_block)].

        Costs O(T / q_block), plus O(S) where there are documents: the intervals of a block's first and last query bound
        those of the others.  In a tree some blocks of the range may hold no allowed key, and full ones may lie outside
        of ``first_full ≤ j < last_full``; ``flex_block_mask`` lists all full ones.
        """
        checks.is_int("q_block", q_block, minimum=1)
        checks.is_int("kv_block", kv_block, minimum=1)
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        plan = self.row_block_plan(q_block, kv_block, sizes)
        return BlockPlan(*(bound.expand(sizes.batch, -1).contiguous() for bound in plan))

    def row_block_plan(self, q_block: int, kv_block: int, sizes: Sizes) -> BlockPlan:
        """``block_plan``, but with one row where all rows are alike."""

        def build() -> BlockPlan:
            if self.is_tree:
                ranges = ranges_of(self.row_bounds(sizes), sizes.keys, q_block, kv_block)
                return cover_of(ranges, tiles_of(ranges).full)
            first = torch.arange(0, sizes.queries, q_block, device=sizes.device)
            last = (first + (q_block - 1)).clamp(max=sizes.queries - 1)
            blocks = first.shape[0]
            bounds = self.bounds(torch.cat([first, last]), sizes)
            block = torch.arange(blocks, device=sizes.device)
            return plan_blocks(bounds, block, block + blocks, kv_block)

        return self.remember("block_plan", (q_block, kv_block, sizes), build)

    def row_tiles(self, q_block: int, kv_block: int, sizes: Sizes) -> Tiles:
        """The blocks of keys that each block of queries visits: those that need the mask, and those that do not."""
        if self.is_tree:
            return tiles_of(ranges_of(self.row_bounds(sizes), sizes.keys, q_block, kv_block))
        return lowerings.tiles_of_plan(self.row_block_plan(q_block, kv_block, sizes), sizes, (q_block, kv_block))

    def kernel_intervals(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> KernelIntervals:
        """The intervals of the queries and, for dK and dV, of the keys; int32, one row where all rows are alike.

        Costs O(T + S·log T) on the device, without waiting for it.
        """
        return self.row_kernel_intervals(self.sizes(batch_size, seq_len, kv_len, device))

    def row_kernel_intervals(self, sizes: Sizes) -> KernelIntervals:
        """``kernel_intervals`` for given ``Sizes``."""

        def build() -> KernelIntervals:
            start, end, q_end = self.row_bounds(sizes)
            if q_end is None:
                bounds = Intervals(start.contiguous(), end.contiguous())
                return KernelIntervals(*bounds, *lowerings.transposed(bounds, sizes.keys))
            first_query = self.positions_of_queries(sizes)[:, :1].to(torch.int32)
            q_start = torch.arange(sizes.keys, device=sizes.device, dtype=torch.int32) - first_query
            q_start = q_start.clamp(0, sizes.queries).expand(q_end.shape).contiguous()
            return KernelIntervals(start, end, q_start, q_end)

        return self.remember("kernel_intervals", sizes, build)

    def mask_mod(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's predicate ``(b, h, q_idx, kv_idx) → bool`` for these sizes: two loads and two comparisons."""
        return lowerings.mask_mod(self._bounds_of_each_row(self.sizes(batch_size, seq_len, kv_len, device)))

    def _bounds_of_each_row(self, sizes: Sizes) -> RowBounds:
        return self.row_bounds(sizes).each(lambda x: x.expand(sizes.batch, -1).contiguous())

    def flex_block_mask(
        self,
        block_size: int | tuple[int, int] = 128,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Any:
        """FlexAttention's ``BlockMask`` with ``mask_mod``, from the block plan; the same for all heads.

        The plan costs O(T / block), and nothing of size T·S is allocated; the lists of the format take
        (T / block)·(S / block) integers.  ``create_block_mask`` would evaluate its predicate T·S times.
        """
        blocks = (block_size, block_size) if isinstance(block_size, int) else block_size
        sizes = self.sizes(batch_size, seq_len, kv_len, device)

        def build() -> tuple[Any]:
            tiles = self.row_tiles(*blocks, sizes)
            return (lowerings.flex_block_mask(tiles, self._bounds_of_each_row(sizes), sizes, blocks),)

        return self.remember("flex_block_mask", (blocks, sizes), build)[0]

    def tree_parents(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The token that each token continues, int64 [rows, S], −1 for none; nothing waits."""
        sizes = self.sizes(batch_size, seq_len, seq_len, device)
        return self.remember("parents", sizes, lambda: (parents_in_row(self.subtree_end, sizes),))[0]

    def stretches(self, sizes: Sizes) -> tuple[list[Stretch], ...]:
        """The runs of each row in which each token continues the one before it; reads values."""

        def build() -> tuple[list[Stretch], ...]:
            return tuple(stretches_of((self.on_the_host() or self).subtree_end, sizes.keys))

        return self.remember("stretches", (sizes.keys,), build)

    def tree_levels(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> tuple[Level, ...]:
        """The runs of all trees of a batch by levels, for recurrences.

        It waits for the device, once for each contract, unless the contract was made on the host and moved with ``to``.
        """
        sizes = self.sizes(batch_size, seq_len, seq_len, device)

        def build() -> tuple[Level, ...]:
            return levels_of(self.stretches(sizes), sizes)

        return self.remember("levels", sizes, build)


torch.serialization.add_safe_globals([MaskContract])
"""``torch.load`` takes a contract from files that are not trusted: it holds tensors and numbers, and checks them."""
