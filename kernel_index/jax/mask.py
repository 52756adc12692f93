"""Which keys each query may attend to, for JAX arrays: the mask contract, inside jit."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernel_index.core import checks as host
from kernel_index.jax.mask_bounds import Documents, Intervals, RowBounds, allowed, column, documents_of, interval_of
from kernel_index.jax.mask_fields import check_count, check_lengths, check_nested, check_rows, register
from kernel_index.jax.tree_bounds import Tree, tree_bounds
from kernel_index.jax.validity import AttentionValidity, from_torch, validity_of
from kernel_index.masks.doc_window_mask import contract
from kernel_index.masks.doc_window_mask import mask as torch_mask
from kernel_index.masks.prefix_tree.contract import TREE_HAS_NO_INTERVALS, check_tree_mask

ARRAYS = ("doc_ids", "q_offset", "prefix", "subtree_end", "positions")
"""Fields that are arrays, or may be; the validities hold others."""


@dataclass(frozen=True, eq=False)
class MaskContract:
    """``kernel_index.MaskContract`` over JAX arrays: the same fields, and the same mask.

    A pytree: the arrays, the validities, ``q_offset`` and ``prefix`` are its leaves and may be traced, the rest is
    static.  NumPy arrays are taken too.

    Args:
        causal: no query attends to a later position.
        window: ``(left, right)``, tokens before and after; None or negative is unlimited, ``left=0`` is self only.
        doc_ids: integers [B, S], or [S] for every row alike; negative ids are padding and attend to nothing.
        validity: the valid prefix of each row, from ``attention_validity``.
        q_offset: the position of query 0 among the keys, or integers [B]; None aligns the last query with the last key.
        key_validity: the valid prefix of the keys alone; ``validity`` then counts queries, and no key.
        prefix: a number of tokens, or integers [B]: the first so many tokens of every document see each other in both
            directions.
        subtree_end: integers [B, S], or [S] for every row alike, from ``kernel_index.pack_tree``: the first index after
            everything that continues the token.  Query t sees key s only if ``s ≤ p(t) < subtree_end[s]``.
        positions: integers [B, S] or [S] that increase along each path; a window counts in them.  None counts indices.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has the wrong shape, the sizes of two fields differ, fields exclude each other, or subtrees
            are not nested, where their values may be read without a wait.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> mask = kij.MaskContract(doc_ids=jnp.array([[7, 7, 4, 4, 7, -1]]))
    >>> bounds = mask.intervals(1, 6, 6)
    >>> bounds.start.tolist(), bounds.end.tolist()
    ([[0, 0, 2, 2, 4, 5]], [[1, 2, 3, 4, 5, 5]])
    """

    causal: bool = True
    window: contract.Window = (None, None)
    doc_ids: jax.Array | None = None
    validity: AttentionValidity | None = None
    q_offset: int | jax.Array | None = None
    key_validity: AttentionValidity | None = None
    prefix: int | jax.Array | None = None
    subtree_end: jax.Array | None = None
    positions: jax.Array | None = None

    def __post_init__(self) -> None:
        host.is_bool("causal", self.causal)
        object.__setattr__(self, "window", contract.normalize_window(self.window))
        for name in ARRAYS:
            if isinstance(getattr(self, name), np.ndarray):
                object.__setattr__(self, name, jnp.asarray(getattr(self, name)))
        for name in contract.BY_TOKEN:
            check_rows(name, getattr(self, name))
        for name, value in (("validity", self.validity), ("key_validity", self.key_validity)):
            if value is not None and not isinstance(value, AttentionValidity):
                raise TypeError(f"{name} must be an AttentionValidity, got {type(value).__name__}")
        check_count("q_offset", self.q_offset)
        check_count("prefix", self.prefix, minimum=0)
        self._check_tree()
        self.rows()
        self._keys()

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: jax.Array, tokens: int, *, causal: bool = True, window: contract.Window = (None, None)
    ) -> "MaskContract":
        """The contract of one packed row ``[1, tokens, …]``, from cumulative lengths [n + 1]; what follows is padding.

        >>> import jax.numpy as jnp, kernel_index.jax as kij
        >>> kij.MaskContract.from_cu_seqlens(jnp.array([0, 2, 4]), 5).doc_ids.tolist()
        [[0, 0, 1, 1, -1]]
        """
        check_lengths("cu_seqlens", cu_seqlens)
        host.is_int("tokens", tokens, minimum=0)
        at = jnp.arange(tokens, dtype=jnp.int32)
        ids = jnp.searchsorted(jnp.asarray(cu_seqlens)[1:], at, side="right").astype(jnp.int32)
        return cls(causal, window, jnp.where(ids < len(cu_seqlens) - 1, ids, -1)[None])

    @classmethod
    def from_position_ids(
        cls, position_ids: jax.Array, *, causal: bool = True, window: contract.Window = (None, None)
    ) -> "MaskContract":
        """The contract of packed rows from positions [B, S] or [S]: a document begins where they do not increase.

        >>> import jax.numpy as jnp, kernel_index.jax as kij
        >>> kij.MaskContract.from_position_ids(jnp.array([[0, 1, 2, 0, 1]])).doc_ids.tolist()
        [[0, 0, 0, 1, 1]]
        """
        if position_ids is None:
            raise TypeError("position_ids must be integers [B, S] or [S], got None")
        check_rows("position_ids", position_ids)
        restarts = position_ids[..., 1:] <= position_ids[..., :-1]
        first = jnp.zeros_like(restarts, shape=(*position_ids.shape[:-1], min(1, position_ids.shape[-1])))
        return cls(causal, window, jnp.concatenate([first, restarts], -1).astype(jnp.int32).cumsum(-1))

    def _check_tree(self) -> None:
        """Raise for fields that a tree excludes."""
        if not self.is_tree:
            return
        check_tree_mask(self.causal, self.prefix is not None)
        if self.subtree_end is not None:
            check_nested(self.subtree_end)

    @property
    def is_tree(self) -> bool:
        """Whether the keys of a query are those of a path, which need not be one interval."""
        return self.subtree_end is not None or self.positions is not None

    @property
    def window_bounds(self) -> contract.Window:
        """How many keys a query may attend to on its left and on its right, causality included; None is unlimited."""
        return self.window[0], 0 if self.causal else self.window[1]

    @property
    def counts(self) -> jax.Array | None:
        return None if self.validity is None else self.validity.tokens

    @property
    def key_counts(self) -> jax.Array | None:
        return None if self.key_validity is None else self.key_validity.tokens

    def _sizes_by_name(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays that carry rows or keys, by the name of their field."""
        named = {
            "doc_ids": self.doc_ids,
            "validity": self.counts,
            "key_validity": self.key_counts,
            "q_offset": self.q_offset,
            "prefix": self.prefix,
            "subtree_end": self.subtree_end,
            "positions": self.positions,
        }
        return {name: x.shape for name, x in named.items() if isinstance(x, jax.Array) and x.ndim > 0}

    def rows(self) -> int | None:
        """B, if the arrays have a batch dimension; None where all rows are alike."""
        found, owner = None, ""
        for name, shape in self._sizes_by_name().items():
            if name in contract.BY_TOKEN and len(shape) == 1:
                continue
            if found is not None and shape[0] != found:
                raise ValueError(f"{name} must be for the {found} rows of {owner}, got {shape[0]} rows")
            found, owner = shape[0], owner or name
        return found

    def _keys(self) -> tuple[int | None, str]:
        """S, if an array has one number for each key, and the name of its field."""
        found, owner = None, ""
        for name, shape in self._sizes_by_name().items():
            if name not in contract.BY_TOKEN:
                continue
            if found is not None and shape[-1] != found:
                raise ValueError(f"{name} must be for the {found} keys of {owner}, got {shape[-1]}")
            found, owner = shape[-1], owner or name
        return found, owner

    def check_sizes(self, batch: int, keys: int) -> None:
        """Raise where the contract's arrays are not for this many rows and keys."""
        rows = self.rows()
        if rows is not None and rows != batch:
            raise ValueError(f"batch_size must be {rows}, the size of the contract's doc_ids or validity, got {batch}")
        found, owner = self._keys()
        if found is not None and found != keys:
            raise ValueError(f"kv_len must be {found}, the size of {owner} [B, S], got {keys}")

    def intervals(self, batch: int, queries: int, keys: int) -> Intervals:
        """The interval of each query; int32 [1 or B, T], one row where all rows are alike.

        Raises ``ValueError`` for a tree, where the keys of a query are no interval.
        """
        if self.is_tree:
            raise ValueError(f"mask must have intervals of keys: {TREE_HAS_NO_INTERVALS}, got subtree_end or positions")
        self.check_sizes(batch, keys)
        return self.bounds_of(jnp.arange(queries, dtype=jnp.int32), queries, keys)

    def row_bounds(self, batch: int, queries: int, keys: int) -> RowBounds:
        """Which keys each query may attend to, for every contract; one row where all rows are alike."""
        self.check_sizes(batch, keys)
        query = jnp.arange(queries, dtype=jnp.int32)
        bounds = self.bounds_of(query, queries, keys)
        if not self.is_tree:
            return RowBounds(*bounds, None)
        ends, along = (None if x is None else jnp.atleast_2d(x) for x in (self.subtree_end, self.positions))
        return tree_bounds(bounds, self.position_of(query, queries, keys), Tree(ends, along, self.window[0]), keys)

    def bounds_of(self, query: jax.Array, queries: int, keys: int) -> Intervals:
        """The intervals of the given query indices [n], int32 [1 or B, n]: O(n), and O(S) where there are documents.

        Both bounds are non-decreasing; an empty interval is placed so that they stay so.  In a tree they hold the keys
        by causality, documents and counts: the window is along the path.
        """
        position = self.position_of(query, queries, keys)
        documents = self._documents(position, keys)
        given = self.counts, self.key_counts, self.prefix
        left, right = self.window_bounds
        window = (None if self.is_tree else left, right)
        bounds = interval_of(query, position, keys, window, documents, *given)
        shape = (1 if self.rows() is None else self.rows(), query.shape[0])
        return Intervals(*(jnp.broadcast_to(bound, shape) for bound in bounds))

    def position_of(self, query: jax.Array, queries: int, keys: int) -> jax.Array:
        """The positions of query indices [n] among the keys, int32 [1 or B, n]."""
        return query[None] + column(keys - queries if self.q_offset is None else self.q_offset)

    def _documents(self, position: jax.Array, keys: int) -> Documents | None:
        if self.doc_ids is None or keys == 0:
            return None
        return documents_of(jnp.atleast_2d(self.doc_ids), position)

    def dense(self, batch: int, queries: int, keys: int, *, allow_large: bool = False) -> jax.Array:
        """The mask as bool [B, 1, T, S]; refused above 8192 queries unless ``allow_large``."""
        contract.check_dense(batch, queries, keys, allow_large)
        seen = allowed(self.row_bounds(batch, queries, keys), jnp.arange(keys, dtype=jnp.int32))
        return jnp.broadcast_to(seen[:, None], (batch, 1, queries, keys))


def as_contract(mask: Any, queries: int | None = None, keys: int | None = None) -> MaskContract:
    """A mask for JAX: itself, or a torch ``MaskContract`` with its tensors copied over.

    ``queries`` and ``keys`` are the sizes of the call: documents that are given as cumulative lengths become ids of so
    many tokens, by default of as many as the lengths have.
    """
    if isinstance(mask, MaskContract):
        return mask
    if not isinstance(mask, torch_mask.MaskContract):
        raise TypeError(f"mask must be a MaskContract, got {type(mask).__name__}")
    rows, of_keys = (None if v is None else validity_of(v) for v in (mask.validity, mask.key_validity))
    offset, prefix = (_int32(x) if hasattr(x, "shape") else x for x in (mask.q_offset, mask.prefix))
    tree = (None if x is None else _int32(x) for x in (mask.subtree_end, mask.positions))
    doc_ids = _doc_ids_of(mask, queries, keys)
    return MaskContract(mask.causal, mask.window, doc_ids, rows, offset, of_keys, prefix, *tree)


def _doc_ids_of(mask: torch_mask.MaskContract, queries: int | None, keys: int | None) -> jax.Array | None:
    if mask.cu_seqlens is None:
        return None if mask.doc_ids is None else _int32(mask.doc_ids)
    lengths, of_keys = mask.cu_seqlens
    if of_keys is not None:
        raise ValueError("cu_seqlens must have one list for JAX, got two")
    sizes = mask.sizes(seq_len=queries, kv_len=int(lengths[-1]) if keys is None else keys)
    return _int32(mask.document_rows(sizes.keys))


def _int32(tensor: Any) -> jax.Array:
    return jnp.asarray(from_torch(tensor), jnp.int32)


register(MaskContract, (*ARRAYS, "validity", "key_validity"), ("causal", "window"))

EVERYTHING_BEFORE = MaskContract()
"""The default mask: causal, aligned with the last key."""
