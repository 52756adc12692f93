"""The fields of a ``MaskContract``: their checks, the sizes that follow from them, copies and equality."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.core.transfers import to_device
from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity, same_values
from kernel_index.masks.doc_window_mask import contract
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.prefix_tree.contract import check_nested, check_rows, check_tree_mask

CuSeqlens = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class MaskFields:
    """What ``MaskContract`` is made of; its docstring describes the fields."""

    causal: bool = True
    window: contract.Window = (None, None)
    doc_ids: Tensor | None = None
    validity: AttentionValidity | None = None
    q_offset: int | Tensor | None = None
    key_validity: AttentionValidity | None = None
    prefix: int | Tensor | None = None
    subtree_end: Tensor | None = None
    positions: Tensor | None = None
    cu_seqlens: CuSeqlens | None = None
    _kept: dict[str, tuple] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        checks.is_bool("causal", self.causal)
        object.__setattr__(self, "window", contract.normalize_window(self.window))
        check_rows("doc_ids", self.doc_ids)
        for name, value in (("validity", self.validity), ("key_validity", self.key_validity)):
            if value is not None and not isinstance(value, AttentionValidity):
                raise TypeError(f"{name} must be an AttentionValidity, got {type(value).__name__}")
        contract.check_count("q_offset", self.q_offset)
        contract.check_count("prefix", self.prefix, minimum=0)
        check_rows("subtree_end", self.subtree_end)
        check_rows("positions", self.positions)
        contract.check_cu_seqlens(self.cu_seqlens)
        self._check_together()
        self._rows_of_tensors()
        self._keys_of_tensors()

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        causal: bool = True,
        window: contract.Window = (None, None),
    ) -> Self:
        """The contract of packed rows ``[1, total, …]``, from the cumulative lengths that varlen kernels take.

        Document d has the tokens ``cu_seqlens[d] ≤ s < cu_seqlens[d + 1]``; tokens after the last are padding.  With
        two lists document d has its own queries and its own keys, and its last query is aligned with its last key.

        Args:
            cu_seqlens_q: integers [n + 1], from 0, never decreasing.  The values are read on their device, when the
                contract is lowered: nothing waits.
            cu_seqlens_k: the same for the keys; None where queries and keys are the same tokens.
            causal: as the field.
            window: as the field.

        >>> import torch, kernel_index as ki
        >>> mask = ki.MaskContract.from_cu_seqlens(torch.tensor([0, 2, 5]))
        >>> mask.intervals(1, 5).start.tolist()
        [[0, 0, 2, 2, 2]]
        """
        return cls(causal, window, cu_seqlens=(cu_seqlens_q, cu_seqlens_k))

    @classmethod
    def from_position_ids(
        cls, position_ids: Tensor, *, causal: bool = True, window: contract.Window = (None, None)
    ) -> Self:
        """The contract of packed rows from positions [B, S] or [S]: a document begins where they do not increase.

        >>> import torch, kernel_index as ki
        >>> ki.MaskContract.from_position_ids(torch.tensor([[0, 1, 2, 0, 1]])).doc_ids.tolist()
        [[0, 0, 0, 1, 1]]
        """
        checks.is_integer_tensor("position_ids", position_ids)
        check_rows("position_ids", position_ids)
        restarts = position_ids[..., 1:] <= position_ids[..., :-1]
        ids = torch.nn.functional.pad(restarts.to(torch.int32).cumsum(-1, dtype=torch.int32), (1, 0))
        return cls(causal, window, ids[..., : position_ids.shape[-1]])

    def _check_together(self) -> None:
        """Raise for fields that exclude each other."""
        others = (self.doc_ids, self.counts, self.key_counts)
        if self.cu_seqlens is not None and any(x is not None for x in others):
            raise ValueError("cu_seqlens must be given without doc_ids and validity: it says where documents end")
        if self.cu_seqlens is not None and self.q_offset is not None:
            raise ValueError(f"q_offset must be None: cu_seqlens place the queries, got {self.q_offset}")
        if not self.is_tree:
            return
        check_tree_mask(self.causal, self.prefix is not None)
        if self.cu_seqlens is not None and self.cu_seqlens[1] is not None:
            raise ValueError("cu_seqlens must have one list in a tree, got two")
        if self.subtree_end is not None and rules.host_readable(self.subtree_end):
            check_nested(self.subtree_end)

    @property
    def is_tree(self) -> bool:
        """Whether the keys of a query are those of a path, which need not be one interval."""
        return self.subtree_end is not None or self.positions is not None

    @property
    def window_bounds(self) -> contract.Window:
        """How many keys a query may attend to on its left and on its right, causality included; None is unlimited."""
        return self.window[0], 0 if self.causal else self.window[1]

    def window_bounds_within(self, sizes: Sizes) -> contract.Window:
        """``window_bounds`` with None for a side that excludes no key of these sizes."""
        left, right = self.window_bounds
        if sizes.offset is None:
            return left, right
        if left is not None and left >= sizes.offset + sizes.queries - 1:
            left = None
        if right is not None and sizes.offset + right >= sizes.keys - 1:
            right = None
        return left, right

    @property
    def counts(self) -> Tensor | None:
        """The counts of the validity, or None if every token is valid."""
        return None if self.validity is None else self.validity.counts

    @property
    def key_counts(self) -> Tensor | None:
        """The counts of the key validity, or None where the keys have no prefix of their own."""
        return None if self.key_validity is None else self.key_validity.counts

    @property
    def is_band(self) -> bool:
        """Whether causality, a window and one offset are all there is, so that the mask has no tensor."""
        others = (self.doc_ids, self.counts, self.key_counts, self.prefix, self.cu_seqlens)
        return not self.is_tree and all(x is None for x in others) and not isinstance(self.q_offset, Tensor)

    def _tensors_by_name(self) -> dict[str, Tensor]:
        """The tensors that carry rows, by the name of their field."""
        named = {
            "doc_ids": self.doc_ids,
            "validity": self.counts,
            "key_validity": self.key_counts,
            "q_offset": self.q_offset,
            "prefix": self.prefix,
            "subtree_end": self.subtree_end,
            "positions": self.positions,
        }
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    def _rows_of_tensors(self) -> tuple[int | None, str]:
        """B, if the tensors have a batch dimension, and the name of the field that says so."""
        found, owner = (None, "") if self.cu_seqlens is None else (1, "cu_seqlens")
        for name, tensor in self._tensors_by_name().items():
            if name in contract.BY_TOKEN and tensor.ndim == 1:
                continue
            if found is not None and tensor.shape[0] != found:
                raise ValueError(f"{name} must be for the {found} rows of {owner}, got {tensor.shape[0]} rows")
            found, owner = tensor.shape[0], owner or name
        return found, owner

    def _keys_of_tensors(self) -> tuple[int | None, str]:
        """S, if a tensor has one number for each key, and the name of its field."""
        found, owner = None, ""
        for name, tensor in self._tensors_by_name().items():
            if name not in contract.BY_TOKEN:
                continue
            if found is not None and tensor.shape[-1] != found:
                raise ValueError(f"{name} must be for the {found} keys of {owner}, got {tensor.shape[-1]}")
            found, owner = tensor.shape[-1], owner or name
        return found, owner

    def sizes(
        self,
        batch_size: int | None = None,
        seq_len: int | None = None,
        kv_len: int | None = None,
        device: torch.device | str | None = None,
    ) -> Sizes:
        """All sizes of a call, completed from the contract's tensors; the latest are kept, since layers ask again.

        Raises ``ValueError`` for a size that is missing or contradicts the tensors.
        """
        asked = (batch_size, seq_len, kv_len, device)
        if not _is_plain(asked) or any(map(rules.host_readable, self._cu_seqlens_by_name().values())):
            return self._agreed_sizes(*asked)
        key = asked, [x.shape for x in self.sources() if x is not None]  # ``resize_`` changes a tensor's own shape
        kept = self._kept.get("sizes")
        if kept is None or kept[0] != key:
            kept = self._kept["sizes"] = (key, self._agreed_sizes(*asked))
        return kept[1]

    def _agreed_sizes(
        self, batch_size: int | None, seq_len: int | None, kv_len: int | None, device: torch.device | str | None
    ) -> Sizes:
        of_tensors, row_owner = self._rows_of_tensors()
        batch = contract.agreed_size("batch_size", batch_size, of_tensors, f"the contract's {row_owner}")
        of_keys, owner = self._keys_of_tensors()
        if seq_len is None and kv_len is None and of_keys is None:
            raise ValueError("seq_len must be given where the contract has no doc_ids to take it from, got None")
        if kv_len is None and of_keys is None:
            kv_len = seq_len
        keys = contract.agreed_size("kv_len", kv_len, of_keys, f"{owner} [B, S]")
        queries = contract.agreed_size("seq_len", seq_len, None, "") if seq_len is not None else keys
        self._check_lengths(queries, keys)
        found = contract.device_of(device, self._tensors_by_name() | self._cu_seqlens_by_name())
        rows = 1 if of_tensors is None else of_tensors
        return Sizes(1 if batch is None else batch, rows, queries, keys, self._offset(queries, keys), found)

    def _check_lengths(self, queries: int, keys: int) -> None:
        """Raise where cumulative lengths that may be read go beyond the tokens."""
        for (name, lengths), tokens in zip(self._cu_seqlens_by_name().items(), (queries, keys), strict=False):
            if rules.host_readable(lengths) and int(lengths[-1]) > tokens:
                raise ValueError(f"{name} must end by the {tokens} tokens, got {int(lengths[-1])}")

    def _offset(self, queries: int, keys: int) -> int | None:
        if isinstance(self.q_offset, Tensor) or (self.cu_seqlens is not None and self.cu_seqlens[1] is not None):
            return None
        if self.cu_seqlens is not None and queries != keys:
            raise ValueError(f"seq_len must be kv_len under one list of cu_seqlens, {keys}, got {queries}")
        return keys - queries if self.q_offset is None else self.q_offset

    def _cu_seqlens_by_name(self) -> dict[str, Tensor]:
        given = zip(("cu_seqlens_q", "cu_seqlens_k"), self.cu_seqlens or (), strict=False)
        return {name: x for name, x in given if x is not None}

    def sources(self) -> tuple[Tensor | None, ...]:
        """Every tensor of the contract: what is kept of it is valid while these are unchanged."""
        prefixes = [v for v in (self.validity, self.key_validity) if v is not None]
        counts = tuple(tensor for v in prefixes for tensor in (v.token_prefix, v.slot_counts))
        others = [x for x in (self.q_offset, self.prefix) if isinstance(x, Tensor)]
        return (self.doc_ids, *counts, *others, self.subtree_end, self.positions, *(self.cu_seqlens or ()))

    def to(self, device: torch.device | str) -> Self:
        """The same contract with its tensors on another device; a copy to a GPU waits for nothing there."""

        def moved(x: Any) -> Any:
            return to_device(x, torch.device(device)) if isinstance(x, Tensor) else x.to(device)

        return self._changed(moved)

    def pin_memory(self) -> Self:
        """The same contract with its tensors in pinned memory; a DataLoader with ``pin_memory=True`` calls it."""
        return self._changed(lambda tensors: tensors.pin_memory())

    def _changed(self, change: Callable[[Any], Any]) -> Self:
        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            return change(value) if isinstance(value, Tensor | AttentionValidity) else value

        return type(self)(self.causal, self.window, *map(changed, self._fields()[2:]))

    def _fields(self) -> tuple[Any, ...]:
        return (
            self.causal, self.window, self.doc_ids, self.validity, self.q_offset, self.key_validity, self.prefix,
            self.subtree_end, self.positions, self.cu_seqlens,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskFields):
            return NotImplemented
        return self._statics() == other._statics() and all(map(_same, self._varying(), other._varying()))

    def __hash__(self) -> int:
        shapes = tuple(x.shape if isinstance(x, Tensor) else x for x in self._varying())
        return hash((*self._statics(), *shapes))

    def _statics(self) -> tuple:
        absent = AttentionValidity()
        return self.window_bounds, self.validity or absent, self.key_validity or absent

    def _varying(self) -> tuple:
        lists = self.cu_seqlens or (None, None)
        return self.doc_ids, self.q_offset, self.prefix, self.subtree_end, self.positions, *lists

    def __reduce__(self) -> tuple:
        # Copies and pickles hold the fields, not the kept lowerings.
        return type(self), self._fields()


def _is_plain(asked: tuple) -> bool:
    """Whether sizes are numbers, not symbols of a trace, and the device is one that stays the same."""
    *sizes, device = asked
    return (
        not torch.compiler.is_compiling()
        and all(size is None or type(size) is int for size in sizes)
        and isinstance(device, torch.device)
    )


def as_rows(tensor: Tensor | None) -> Tensor | None:
    """[B, S], or [1, S] of a tensor for every row alike."""
    return tensor[None] if tensor is not None and tensor.ndim == 1 else tensor


def _same(a: Any, b: Any) -> bool:
    """Equal numbers, or tensors of equal values on one device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_values(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
