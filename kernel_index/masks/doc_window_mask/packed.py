"""Where queries and documents lie, and the forms that tell of them: segments, and packed sequences.

Packed sequences are the one form whose sizes the host has to know.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.transfers import copied
from kernel_index.masks.doc_window_mask import lowerings
from kernel_index.masks.doc_window_mask.cu_seqlens import documents_of_lengths, ids_of_lengths, position_in_keys
from kernel_index.masks.doc_window_mask.fields import MaskFields, as_rows
from kernel_index.masks.doc_window_mask.intervals import Documents, Sizes, documents_of_ids
from kernel_index.masks.doc_window_mask.lowerings import SegmentIds, Varlen
from kernel_index.masks.doc_window_mask.memo import keep, kept_or_built, kept_value
from kernel_index.masks.prefix_tree.contract import TREE_HAS_NO_INTERVALS

ON_THE_HOST = "varlen of the host"
TWIN = "the contract on the host"


class PackedMask(MaskFields):
    """Lengths are read from a contract whose tensors are on the host, and stay known when it is moved to a device."""

    def _position(self, queries: Tensor, sizes: Sizes) -> Tensor:
        if isinstance(self.q_offset, Tensor):
            return queries + self.q_offset.to(torch.int64)[:, None]
        if sizes.offset is None and self.cu_seqlens is not None:
            return position_in_keys(queries, *self.cu_seqlens)
        return (queries + sizes.one_offset)[None]

    def _documents(self, queries: Tensor, position: Tensor, sizes: Sizes) -> Documents | None:
        if sizes.offset is None and self.cu_seqlens is not None:
            return documents_of_lengths(queries, sizes.keys, *self.cu_seqlens)
        ids = self.document_rows(sizes.keys)
        return None if ids is None or sizes.keys == 0 else documents_of_ids(ids, position, sizes.keys)

    def document_rows(self, keys: int) -> Tensor | None:
        """The ids of all documents as [B, S], or as [1, S] if they are the same for every row; None without any."""
        if self.cu_seqlens is not None:
            of_queries, of_keys = self.cu_seqlens
            return ids_of_lengths(of_queries if of_keys is None else of_keys, keys)
        return as_rows(self.doc_ids)

    def _prefix_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """Valid tokens [B] of ``validity`` and of ``key_validity``."""
        of_rows = None if self.validity is None else self.validity.tokens
        return of_rows, None if self.key_validity is None else self.key_validity.tokens

    def remember(self, name: str, key: tuple, build: Callable[[], Any]) -> Any:
        """The kept result of ``name`` if key and tensors are unchanged, else ``build()``, which is then kept."""
        if torch.compiler.is_compiling():
            return build()
        return kept_or_built(self._kept, name, key, self.sources(), build)

    def segment_ids(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> SegmentIds:
        """Documents and valid prefixes as ids, int32 ``q`` [B, T] and ``kv`` [B, S], for TPU kernels to compare.

        Raises ``ValueError`` for a tree and for a prefix that is seen in both directions.
        """
        if self.is_tree or self.prefix is not None:
            raise ValueError("mask must be told by segments and a window: it has no form for a tree or a prefix")
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        return self.remember("segment_ids", sizes, lambda: self._segment_ids(sizes))

    def _segment_ids(self, sizes: Sizes) -> SegmentIds:
        queries = torch.arange(sizes.queries, device=sizes.device)
        position = self._position(queries, sizes)
        documents = self._documents(queries, position, sizes)
        rows = self.document_rows(sizes.keys)
        return lowerings.segment_ids(sizes, position, documents, rows, *self._prefix_tokens())

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
        if self.is_tree:
            return TREE_HAS_NO_INTERVALS
        if self.prefix is not None:
            return lowerings.VARLEN_NEEDS_CAUSALITY
        if sizes.offset is None and self.cu_seqlens is not None:
            return lowerings.VARLEN_NEEDS_ONE_LIST
        return lowerings.varlen_why_not(sizes, not self.is_band, self.key_counts is not None)

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
        waits for the device, once for each contract.  It does not wait if documents were described on the host, for
        every row and up to the last token, and then moved with ``to``.  No other lowering waits.  Raises ``ValueError``
        with the reason of ``varlen_why_not`` where packed sequences cannot express the contract.
        """
        sizes = self.sizes(batch_size, seq_len, kv_len, device)
        reason = self.row_varlen_why_not(sizes)
        if reason is not None:
            raise ValueError(f"mask must have a form with packed lengths ({reason}), got T, S, offset = {sizes[2:5]}")
        known = self._known(sizes)
        if known is not None:
            return known

        def build() -> Varlen:
            ids = self._segment_ids(sizes).kv if not self.is_band else None
            return lowerings.varlen(sizes, self.window_bounds, ids)

        return self.remember("varlen", sizes, build)

    def on_the_host(self) -> Self | None:
        """The contract whose values may be read without a wait: itself, or a copy of the tree that was moved here.

        None if there is none; the copy holds until a tensor of this contract is written to.
        """
        if rules.host_readable(*(t for t in self.sources() if t is not None)):
            return self
        kept = kept_value(self._kept, TWIN, (), self.sources())
        return None if kept is None else kept[0]

    def with_window(self, left: int | None, right: int | None = None) -> Self:
        """The same contract with another window; what the host knows of its trees stays known."""
        found = dataclasses.replace(self, window=(left, right))
        known = kept_value(self._kept, TWIN, (), self.sources())
        if known is not None:
            keep(found._kept, TWIN, (), found.sources(), (known[0].with_window(left, right),))
        return found

    def lengths_are_known(self, sizes: Sizes) -> bool:
        """Whether ``varlen`` waits for nobody although there are documents or a valid prefix."""
        return self._known(sizes) is not None

    def _known(self, sizes: Sizes) -> Varlen | None:
        if torch.compiler.is_compiling():
            return None
        return kept_value(self._kept, ON_THE_HOST, sizes, self.sources())

    def to(self, device: torch.device | str) -> Self:
        """The same contract with its tensors on another device, itself where they are on it already.

        What the host knows of its lengths and of its trees stays known.
        """
        found = super().to(device)
        if all(a is b for a, b in zip(self.sources(), found.sources(), strict=True)):
            return self
        if self.is_tree and (known := self.on_the_host()) is not None:
            keep(found._kept, TWIN, (), found.sources(), (known._changed(_copied),))
        tokens, _ = self._keys_of_tensors()
        if tokens is None and self.cu_seqlens is None:
            return found
        if self.cu_seqlens is not None and self.cu_seqlens[1] is not None:
            return found
        sources = [t for t in self.sources() if t is not None]
        if not rules.host_readable(*sources):
            return found
        sizes = self.sizes(None, tokens if self.cu_seqlens is None else int(self.cu_seqlens[0][-1]))
        if self.row_varlen_why_not(sizes) is None:
            there = found.sizes(sizes.batch, sizes.queries, sizes.keys)
            lengths = self.varlen(sizes.batch, sizes.queries, sizes.keys)
            of_queries, of_keys = (x.to(there.device) for x in (lengths.cu_seqlens_q, lengths.cu_seqlens_k))
            kept = None if lengths.kept is None else lengths.kept.to(there.device)
            moved = lengths._replace(cu_seqlens_q=of_queries, cu_seqlens_k=of_keys, kept=kept)
            keep(found._kept, ON_THE_HOST, there, found.sources(), moved)
        return found


def _copied(tensors: Any) -> Any:
    """A loader may fill its buffers again.  A deep copy of a tensor would be one of all that its view lies in."""
    return copied(tensors) if isinstance(tensors, Tensor) else copy.deepcopy(tensors)
