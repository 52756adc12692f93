"""``MaskContract``: which keys each query may attend to, and the forms of it that kernels take (lowerings)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks
from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity, same_values
from kernel_index.masks.doc_window_mask import contract, lowerings
from kernel_index.masks.doc_window_mask.intervals import BlockPlan, Intervals, Sizes, interval_of, plan_blocks
from kernel_index.masks.doc_window_mask.lowerings import KernelIntervals, SegmentIds, Varlen
from kernel_index.masks.doc_window_mask.memo import kept_or_built


@dataclass(frozen=True, eq=False)
class MaskContract:
    """Which keys each query may attend to; immutable.

    With ``p(t) = t + offset`` the position of query t among the S keys, query t may attend to key s if all hold::

        causal:    s ≤ p(t)
        window:    p(t) − left ≤ s ≤ p(t) + right
        documents: doc_ids is constant from p(t) to s, and not negative
        validity:  0 ≤ p(t) < count and s < count; with key_validity t < count and s < key count

    A document is a maximal run of equal ids: an id that is repeated after another one begins a new document.  A query
    whose position is outside the keys is in no document.

    The allowed keys of a query are always one interval, and neither bound decreases from one query to the next.  The
    intervals cost O(T) and are computed on the tensors' device without waiting for it; all lowerings derive from them.

    Lowerings take ``batch_size``, ``seq_len`` (T), ``kv_len`` (S) and ``device``.  Sizes that ``doc_ids`` or
    ``validity`` have may be left out: B and S come from their shapes, S and T default to each other, and B to 1 where
    all rows are alike.  The contract keeps the latest lowering of each kind, so layers that share a contract share the
    work; it rebuilds one whose source tensors or result were changed in place.  Inside torch.compile nothing is kept:
    the compiler merges equal computations.

    Equality compares window bounds, offset, documents and validity, tensors by value; the hash reads metadata only.

    Args:
        causal: no query attends to a later position.
        window: ``(left, right)``, tokens before and after; None or negative is unlimited, ``left=0`` is the token only.
        doc_ids: integers [B, S], or [S] for every row alike; negative ids are padding and attend to nothing.
        validity: the valid prefix of each row, from ``attention_validity``.
        key_validity: the valid prefix of the keys alone, as in cross-attention to a padded source; ``validity`` then
            counts queries from query 0 on, and no key.
        q_offset: the position of query 0 among the keys.  None aligns the last query with the last key
            (``offset = S − T``, bottom-right), which for T = S is the same as 0.  Where T ≠ S the two differ: 0 puts
            query 0 at key 0.

    >>> import torch, kernel_index as ki
    >>> mask = ki.MaskContract(doc_ids=torch.tensor([[7, 7, 4, 4, 7, -1]]))
    >>> mask.intervals().start.tolist(), mask.intervals().end.tolist()
    ([[0, 0, 2, 2, 4, 5]], [[1, 2, 3, 4, 5, 5]])
    """

    causal: bool = True
    window: contract.Window = (None, None)
    doc_ids: Tensor | None = None
    validity: AttentionValidity | None = None
    q_offset: int | None = None
    key_validity: AttentionValidity | None = None
    _kept: dict[str, tuple] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        checks.is_bool("causal", self.causal)
        object.__setattr__(self, "window", contract.normalize_window(self.window))
        contract.check_doc_ids(self.doc_ids)
        for name, value in (("validity", self.validity), ("key_validity", self.key_validity)):
            if value is not None and not isinstance(value, AttentionValidity):
                raise TypeError(f"{name} must be an AttentionValidity, got {type(value).__name__}")
        if self.q_offset is not None:
            checks.is_int("q_offset", self.q_offset)
        self._rows_of_tensors()

    @property
    def window_bounds(self) -> contract.Window:
        """How many keys a query may attend to on its left and on its right, causality included; None is unlimited."""
        return self.window[0], 0 if self.causal else self.window[1]

    @property
    def counts(self) -> Tensor | None:
        """The counts of the validity, or None if every token is valid."""
        return None if self.validity is None else self.validity.counts

    @property
    def key_counts(self) -> Tensor | None:
        """The counts of the key validity, or None where the keys have no prefix of their own."""
        return None if self.key_validity is None else self.key_validity.counts

    @property
    def doc_rows(self) -> Tensor | None:
        """The ids as [B, S], or as [1, S] if they are the same for every row."""
        return self.doc_ids[None] if self.doc_ids is not None and self.doc_ids.ndim == 1 else self.doc_ids

    @property
    def has_tensors(self) -> bool:
        """Whether the contract has document ids or counts, so that rows may differ."""
        return self.doc_ids is not None or self.counts is not None or self.key_counts is not None

    def _rows_of_tensors(self) -> int | None:
        """B, if the tensors have a batch dimension; else None."""
        in_docs = None if self.doc_ids is None or self.doc_ids.ndim == 1 else self.doc_ids.shape[0]
        found, owner = in_docs, "doc_ids"
        for name, counts in (("validity", self.counts), ("key_validity", self.key_counts)):
            if counts is not None and found is not None and counts.shape[0] != found:
                raise ValueError(f"{name} must be for the {found} rows of {owner}, got {counts.shape[0]} rows")
            if counts is not None and found is None:
                found, owner = counts.shape[0], name
        return found

    def sizes(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        device: torch.device | str | None = None,
    ) -> Sizes:
        """All sizes of a call, completed from the contract's tensors.

        Raises ``ValueError`` for a size that is missing or contradicts the tensors.
        """
        of_tensors = self._rows_of_tensors()
        batch = contract.agreed_size("batch_size", batch_size, of_tensors, "the contract's doc_ids or validity")
        in_docs = None if self.doc_ids is None else self.doc_ids.shape[-1]
        if seq_len is None and kv_len is None and in_docs is None:
            raise ValueError("seq_len must be given where the contract has no doc_ids to take it from, got None")
        if kv_len is None and in_docs is None:
            kv_len = seq_len
        keys = contract.agreed_size("kv_len", kv_len, in_docs, "doc_ids [B, S]")
        queries = contract.agreed_size("seq_len", seq_len, None, "") if seq_len is not None else keys
        found = contract.device_of(device, self.doc_ids, self.counts, self.key_counts)
        offset = keys - queries if self.q_offset is None else self.q_offset
        rows = 1 if of_tensors is None else of_tensors
        return Sizes(1 if batch is None else batch, rows, queries, keys, offset, found)

    def window_bounds_within(self, sizes: Sizes) -> contract.Window:
        """``window_bounds`` with None for a side that excludes no key of these sizes."""
        left, right = self.window_bounds
        if left is not None and left >= sizes.offset + sizes.queries - 1:
            left = None
        if right is not None and sizes.offset + right >= sizes.keys - 1:
            right = None
        return left, right

    def bounds(self, queries: Tensor, sizes: Sizes) -> Intervals:
        """The intervals of the given query indices [n], int64 [rows, n]; not kept."""
        return interval_of(queries, sizes, self.window_bounds, self.doc_rows, *self._prefix_tokens())

    def _prefix_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """Valid tokens [B] of ``validity`` and of ``key_validity``."""
        of_rows = None if self.validity is None else self.validity.tokens
        return of_rows, None if self.key_validity is None else self.key_validity.tokens

    def remember(self, name: str, key: tuple, build: Callable[[], Any]) -> Any:
        """The kept result of ``name`` if key and tensors are unchanged, else ``build()``, which is then kept."""
        if torch.compiler.is_compiling():
            return build()
        return kept_or_built(self._kept, name, key, (self.doc_ids, *self._prefixes()), build)

    def _prefixes(self) -> tuple[Tensor | None, ...]:
        given = [v for v in (self.validity, self.key_validity) if v is not None]
        return tuple(tensor for v in given for tensor in (v.token_prefix, v.slot_counts))

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
        """
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        return Intervals(*(bound.expand(sizes.batch, -1).contiguous() for bound in self.row_intervals(sizes)))

    def row_intervals(self, sizes: Sizes) -> Intervals:
        """``intervals``, but with one row where all rows are alike."""

        def build() -> Intervals:
            bounds = self.bounds(torch.arange(sizes.queries, device=sizes.device), sizes)
            return Intervals(*(bound.to(torch.int32) for bound in bounds))

        return self.remember("intervals", sizes, build)

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
            start, end = self.row_intervals(sizes)
            key = torch.arange(sizes.keys, device=sizes.device, dtype=torch.int32)
            allowed = key >= start[:, None, :, None]
            allowed &= key < end[:, None, :, None]
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
        those of the others.
        """
        checks.is_int("q_block", q_block, minimum=1)
        checks.is_int("kv_block", kv_block, minimum=1)
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        plan = self.row_block_plan(q_block, kv_block, sizes)
        return BlockPlan(*(bound.expand(sizes.batch, -1).contiguous() for bound in plan))

    def row_block_plan(self, q_block: int, kv_block: int, sizes: Sizes) -> BlockPlan:
        """``block_plan``, but with one row where all rows are alike."""

        def build() -> BlockPlan:
            first = torch.arange(0, sizes.queries, q_block, device=sizes.device)
            last = (first + (q_block - 1)).clamp(max=sizes.queries - 1)
            blocks = first.shape[0]
            bounds = self.bounds(torch.cat([first, last]), sizes)
            block = torch.arange(blocks, device=sizes.device)
            return plan_blocks(bounds, block, block + blocks, kv_block)

        return self.remember("block_plan", (q_block, kv_block, sizes), build)

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
            bounds = Intervals(*(bound.contiguous() for bound in self.row_intervals(sizes)))
            return KernelIntervals(*bounds, *lowerings.transposed(bounds, sizes.keys))

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
        return lowerings.mask_mod(self.intervals(batch_size, seq_len, kv_len, device=device))

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
            bounds = self.intervals(batch_size, seq_len, kv_len, device=device)
            plan = self.block_plan(*blocks, batch_size, seq_len, kv_len, device=device)
            return (lowerings.flex_block_mask(plan, bounds, sizes, blocks),)

        return self.remember("flex_block_mask", (blocks, sizes), build)[0]

    def segment_ids(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> SegmentIds:
        """Documents and valid prefixes as ids, int32 ``q`` [B, T] and ``kv`` [B, S], for TPU kernels to compare."""
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        return self.remember("segment_ids", sizes, lambda: self._segment_ids(sizes))

    def _segment_ids(self, sizes: Sizes) -> SegmentIds:
        return lowerings.segment_ids(sizes, self.doc_rows, *self._prefix_tokens())

    def varlen_why_not(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> str | None:
        """Why ``varlen`` raises for these sizes, or None; reads metadata only."""
        return self.row_varlen_why_not(self.sizes(batch_size, seq_len, kv_len, device))

    def row_varlen_why_not(self, sizes: Sizes) -> str | None:
        """``varlen_why_not`` for given ``Sizes``."""
        return lowerings.varlen_why_not(sizes, self.has_tensors, self.key_counts is not None)

    def varlen(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Varlen:
        """The contract as packed sequences with cumulative lengths.

        With documents or a valid prefix the number of sequences and the longest length depend on the data: reading them
        waits for the device, once for each contract.  No other lowering waits.  Raises ``ValueError`` with the reason
        of ``varlen_why_not`` where packed sequences cannot express the contract.
        """
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        reason = self.row_varlen_why_not(sizes)
        if reason is not None:
            raise ValueError(f"mask must have a form with packed lengths ({reason}), got T, S, offset = {sizes[2:5]}")

        def build() -> Varlen:
            ids = self._segment_ids(sizes).kv if self.has_tensors else None
            return lowerings.varlen(sizes, self.window_bounds, ids)

        return self.remember("varlen", sizes, build)

    def to(self, device: torch.device | str) -> "MaskContract":
        """The same contract with its tensors on another device."""
        return self._changed(lambda tensors: tensors.to(device))

    def pin_memory(self) -> "MaskContract":
        """The same contract with its tensors in pinned memory; a DataLoader with ``pin_memory=True`` calls it."""
        return self._changed(lambda tensors: tensors.pin_memory())

    def _changed(self, change: Callable[[Any], Any]) -> "MaskContract":
        given = (self.doc_ids, self.validity, self.key_validity)
        docs, rows, keys = (None if tensors is None else change(tensors) for tensors in given)
        return MaskContract(self.causal, self.window, docs, rows, self.q_offset, keys)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskContract):
            return NotImplemented
        return self._statics() == other._statics() and same_values(self.doc_ids, other.doc_ids)

    def __hash__(self) -> int:
        return hash((*self._statics(), None if self.doc_ids is None else self.doc_ids.shape))

    def _statics(self) -> tuple:
        absent = AttentionValidity()
        return self.window_bounds, self.q_offset, self.validity or absent, self.key_validity or absent

    def __reduce__(self) -> tuple:
        # Copies and pickles hold the fields, not the kept lowerings.
        fields = (self.causal, self.window, self.doc_ids, self.validity, self.q_offset, self.key_validity)
        return MaskContract, fields


torch.serialization.add_safe_globals([MaskContract])
"""``torch.load`` takes a contract from files that are not trusted: it holds tensors and numbers, and checks them."""
