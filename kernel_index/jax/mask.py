"""Which keys each query may attend to, for JAX arrays: the mask contract and its intervals, inside jit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernel_index.core import checks as host
from kernel_index.jax import checks
from kernel_index.masks.attention_validity_prefix import api as torch_validity
from kernel_index.masks.doc_window_mask import contract
from kernel_index.masks.doc_window_mask import mask as torch_mask


@dataclass(frozen=True, eq=False)
class AttentionValidity:
    """The valid prefix of each row; made by ``attention_validity``.  The fields are those of torch's, int32 [B].

    >>> import kernel_index.jax as kij
    >>> kij.attention_validity(valid_token_counts=[3, 0]).mode
    'token_prefix'
    """

    mode: str = "none"
    token_prefix: jax.Array | None = None
    slot_counts: jax.Array | None = None
    base_block_tokens: int | None = None

    @property
    def tokens(self) -> jax.Array | None:
        """Valid tokens of each row, int32 [B]; None for mode ``none``."""
        tokens = None if self.mode == "none" else self.token_prefix
        if self.slot_counts is not None and self.base_block_tokens is not None:
            slots = self.slot_counts * self.base_block_tokens
            tokens = slots if tokens is None else jnp.minimum(tokens, slots)
        return None if tokens is None else jnp.maximum(tokens, 0)


def attention_validity(
    *,
    attention_meta: Mapping[str, Any] | None = None,
    valid_token_counts: Any = None,
    valid_slot_counts: Any = None,
    base_block_tokens: int | None = None,
) -> AttentionValidity:
    """``kernel_index.attention_validity`` over JAX arrays: the same arguments, modes and errors.

    Counts may also be lists, NumPy arrays, or tracers, whose values are not checked; a negative one acts as 0.

    >>> import kernel_index.jax as kij
    >>> kij.attention_validity(valid_slot_counts=[2, 1], base_block_tokens=4).tokens.tolist()
    [8, 4]
    """
    if attention_meta is not None and not isinstance(attention_meta, Mapping):
        raise TypeError(f"attention_meta must be a mapping, got {type(attention_meta).__name__}")
    given = dict(attention_meta or {})
    for key, value in (
        ("row_valid_token_counts", valid_token_counts),
        ("row_valid_slot_counts", valid_slot_counts),
        ("base_block_tokens", base_block_tokens),
    ):
        if value is not None:
            given[key] = value
    names = ("row_valid_token_counts", "row_valid_slot_counts")
    # Torch's function checks the arguments: values where they are on the host, else shape and dtype alone.
    checked = torch_validity.attention_validity(
        attention_meta=given | {n: _stand_in(given[n]) for n in names if given.get(n) is not None}
    )
    token_prefix, slot_counts = (_as_counts(given.get(n)) for n in names)
    return AttentionValidity(checked.mode, token_prefix, slot_counts, checked.base_block_tokens)


def _stand_in(value: Any) -> Any:
    """A NumPy array for torch's checks: the values of a JAX array, or zeros where reading them would wait."""
    if not isinstance(value, jax.Array):
        return value
    waits = checks.is_traced(value) or any(d.platform != "cpu" for d in value.devices())
    return np.zeros(value.shape, value.dtype) if waits else np.asarray(value)


def _as_counts(value: Any) -> jax.Array | None:
    return None if value is None else jnp.asarray(_from_torch(value), jnp.int32).reshape(-1)


def _from_torch(value: Any) -> Any:
    """A torch tensor as a NumPy array; anything else as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


class Intervals(NamedTuple):
    """Query t attends to the keys ``start[t] ≤ s < end[t]``; int32, both non-decreasing along T."""

    start: jax.Array
    end: jax.Array


@dataclass(frozen=True, eq=False)
class MaskContract:
    """``kernel_index.MaskContract`` over JAX arrays: the same fields, and the same intervals.

    A pytree: ``doc_ids``, the validities and ``q_offset`` are its leaves and may be traced, the rest is static.

    Args:
        causal: no query attends to a later position.
        window: ``(left, right)``, tokens before and after; None or negative is unlimited, ``left=0`` is self only.
        doc_ids: integers [B, S], or [S] for every row alike; negative ids are padding and attend to nothing.
        validity: the valid prefix of each row, from ``attention_validity``.
        q_offset: the position of query 0 among the keys; None aligns the last query with the last key.
        key_validity: the valid prefix of the keys alone; ``validity`` then counts queries, and no key.

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
    q_offset: Any = None
    key_validity: AttentionValidity | None = None

    def __post_init__(self) -> None:
        host.is_bool("causal", self.causal)
        object.__setattr__(self, "window", contract.normalize_window(self.window))
        if self.doc_ids is not None:
            if isinstance(self.doc_ids, np.ndarray):
                object.__setattr__(self, "doc_ids", jnp.asarray(self.doc_ids))
            checks.is_integer_array("doc_ids", self.doc_ids)
            if self.doc_ids.ndim not in (1, 2):
                raise ValueError(
                    f"doc_ids must be [B, S], or [S] for every row alike, got shape {tuple(self.doc_ids.shape)}"
                )
        for name, value in (("validity", self.validity), ("key_validity", self.key_validity)):
            if value is not None and not isinstance(value, AttentionValidity):
                raise TypeError(f"{name} must be an AttentionValidity, got {type(value).__name__}")
        if self.q_offset is not None and not isinstance(self.q_offset, jax.Array):
            host.is_int("q_offset", self.q_offset)
        self.rows()

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

    def rows(self) -> int:
        """B as far as the arrays carry it; 1 where all rows are alike."""
        found = self.doc_ids.shape[0] if self.doc_ids is not None and self.doc_ids.ndim == 2 else None
        owner = "doc_ids"
        for name, counts in (("validity", self.counts), ("key_validity", self.key_counts)):
            if counts is not None and found is not None and counts.shape[0] != found:
                raise ValueError(f"{name} must be for the {found} rows of {owner}, got {counts.shape[0]} rows")
            if counts is not None and found is None:
                found, owner = counts.shape[0], name
        return 1 if found is None else found

    def check_sizes(self, batch: int, keys: int) -> None:
        """Raise where the contract's arrays are not for this many rows and keys."""
        carried = self.rows()
        if carried not in (1, batch) or (carried == 1 and batch > 1 and self._carries_rows()):
            raise ValueError(
                f"batch_size must be {carried}, the size of the contract's doc_ids or validity, got {batch}"
            )
        if self.doc_ids is not None and self.doc_ids.shape[-1] != keys:
            raise ValueError(f"kv_len must be {self.doc_ids.shape[-1]}, the size of doc_ids [B, S], got {keys}")

    def _carries_rows(self) -> bool:
        return (
            self.counts is not None
            or self.key_counts is not None
            or (self.doc_ids is not None and self.doc_ids.ndim == 2)
        )

    def intervals(self, batch: int, queries: int, keys: int) -> Intervals:
        """The interval of each query; int32 [1 or B, T], one row where all rows are alike."""
        self.check_sizes(batch, keys)
        return self.bounds_of(jnp.arange(queries, dtype=jnp.int32), queries, keys)

    def bounds_of(self, query: jax.Array, queries: int, keys: int) -> Intervals:
        """The intervals of the given query indices [n]: O(n), and O(S) where there are documents.

        Both bounds are non-decreasing; an empty interval is placed so that they stay so.
        """
        # The same formula for torch tensors is interval_of in masks/doc_window_mask/intervals.py: neither array library
        # can trace the other.  tests/jax/test_mask.py compares the two.
        left, right = self.window_bounds
        offset = keys - queries if self.q_offset is None else self.q_offset
        position = (query + offset)[None]  # [1, n]
        low, high = jnp.zeros_like(position), jnp.full_like(position, keys)
        outside = jnp.zeros(position.shape, bool)
        after = high
        if self.doc_ids is not None and keys > 0:
            ids = jnp.atleast_2d(self.doc_ids)
            at = jnp.clip(position[0], 0, keys - 1)
            low, high = (bound[:, at] for bound in segments(ids))
            high = jnp.where(ids[:, at] < 0, low, high)
            outside = (position < 0) | (position >= keys)
        of_keys = self.counts if self.key_counts is None else self.key_counts
        if of_keys is not None:
            high, after = jnp.minimum(high, of_keys[:, None]), jnp.minimum(after, of_keys[:, None])
        if self.counts is not None:
            limit = self.counts[:, None]
            beyond = (position < 0) | (position >= limit) if self.key_counts is None else query[None] >= limit
            outside = outside | beyond
        nothing = jnp.where(position < 0, 0, after)
        low, high = jnp.where(outside, nothing, low), jnp.where(outside, nothing, high)
        end = high if right is None else jnp.minimum(high, position + (right + 1))
        end = jnp.maximum(end, 0)
        start = low if left is None else jnp.maximum(low, position - left)
        shape = (self.rows(), query.shape[0])
        return Intervals(jnp.broadcast_to(jnp.minimum(start, end), shape), jnp.broadcast_to(end, shape))

    def dense(self, batch: int, queries: int, keys: int, *, allow_large: bool = False) -> jax.Array:
        """The mask as bool [B, 1, T, S]; refused above 8192 queries unless ``allow_large``."""
        contract.check_dense(batch, queries, keys, allow_large)
        start, end = self.intervals(batch, queries, keys)
        key = jnp.arange(keys, dtype=jnp.int32)
        allowed = (key >= start[:, None, :, None]) & (key < end[:, None, :, None])
        return jnp.broadcast_to(allowed, (batch, 1, queries, keys))


def segments(doc_ids: jax.Array) -> Intervals:
    """First position and end of the maximal run of equal ids around each position, int32 [rows, S]."""
    rows, keys = doc_ids.shape
    ids = jnp.maximum(doc_ids, -1)  # adjacent padding is one run, whatever its ids
    position = jnp.arange(keys, dtype=jnp.int32)
    is_new = jnp.concatenate([jnp.ones((rows, 1), bool), ids[:, 1:] != ids[:, :-1]], 1)
    start = lax.cummax(jnp.where(is_new, position, 0), axis=1)
    following = jnp.concatenate([jnp.where(is_new, position, keys)[:, 1:], jnp.full((rows, 1), keys)], 1)
    return Intervals(start, lax.cummin(following, axis=1, reverse=True))


def as_contract(mask: Any) -> MaskContract:
    """A mask for JAX: itself, or a torch ``MaskContract`` with its tensors copied over."""
    if isinstance(mask, MaskContract):
        return mask
    if not isinstance(mask, torch_mask.MaskContract):
        raise TypeError(f"mask must be a MaskContract, got {type(mask).__name__}")
    if mask.is_tree or mask.prefix is not None or mask.cu_seqlens is not None or hasattr(mask.q_offset, "shape"):
        raise ValueError("mask must be told by causality, a window, documents, counts and one offset for JAX")
    docs = None if mask.doc_ids is None else jnp.asarray(_from_torch(mask.doc_ids), jnp.int32)
    rows, keys = (None if v is None else _validity_of(v) for v in (mask.validity, mask.key_validity))
    return MaskContract(mask.causal, mask.window, docs, rows, mask.q_offset, keys)


def _validity_of(validity: Any) -> AttentionValidity:
    counts = _as_counts(validity.token_prefix), _as_counts(validity.slot_counts)
    return AttentionValidity(validity.mode, *counts, validity.base_block_tokens)


def _register(cls: type, leaves: tuple[str, ...], static: tuple[str, ...]) -> None:
    """Make a dataclass a pytree whose fields are not checked again: JAX also fills trees with markers."""

    def flatten(x: Any) -> tuple:
        return tuple(getattr(x, n) for n in leaves), tuple(getattr(x, n) for n in static)

    def unflatten(aux: tuple, children: Any) -> Any:
        x = object.__new__(cls)
        for name, value in zip((*leaves, *static), (*children, *aux), strict=True):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


_register(AttentionValidity, ("token_prefix", "slot_counts"), ("mode", "base_block_tokens"))
_register(MaskContract, ("doc_ids", "validity", "q_offset", "key_validity"), ("causal", "window"))

EVERYTHING_BEFORE = MaskContract()
"""The default mask: causal, aligned with the last key."""
