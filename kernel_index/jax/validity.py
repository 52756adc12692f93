"""The valid prefix of each row, for JAX arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernel_index.jax import checks
from kernel_index.jax.mask_fields import register
from kernel_index.masks.attention_validity_prefix import api as torch_validity


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
    token_prefix, slot_counts = (as_counts(given.get(n)) for n in names)
    return AttentionValidity(checked.mode, token_prefix, slot_counts, checked.base_block_tokens)


def _stand_in(value: Any) -> Any:
    """A NumPy array for torch's checks: the values of a JAX array, or zeros where reading them would wait."""
    if not isinstance(value, jax.Array):
        return value
    return np.asarray(value) if checks.is_readable(value) else np.zeros(value.shape, value.dtype)


def as_counts(value: Any) -> jax.Array | None:
    return None if value is None else jnp.asarray(from_torch(value), jnp.int32).reshape(-1)


def from_torch(value: Any) -> Any:
    """A torch tensor as a NumPy array; anything else as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def validity_of(validity: Any) -> AttentionValidity:
    """A torch ``AttentionValidity`` with its tensors copied over."""
    counts = as_counts(validity.token_prefix), as_counts(validity.slot_counts)
    return AttentionValidity(validity.mode, *counts, validity.base_block_tokens)


register(AttentionValidity, ("token_prefix", "slot_counts"), ("mode", "base_block_tokens"))
