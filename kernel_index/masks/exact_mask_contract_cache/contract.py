"""Argument checks of ``exact_mask_key``, and the static fields of a ``MaskContract`` or of a mapping."""

from collections.abc import Mapping
from typing import Any

from kernel_index.core import checks
from kernel_index.masks.attention_validity_prefix.validity import MODES, ValidityMode
from kernel_index.masks.doc_window_mask.contract import Window, normalize_window
from kernel_index.masks.doc_window_mask.mask import MaskContract

RUNTIME = ("doc_ids", "validity", "q_offset", "key_validity", "prefix", "subtree_end", "positions", "cu_seqlens")
"""Fields whose presence is static while their values change with the batch; ``has_…`` states the presence alone."""

PRESENCE = {
    "doc_ids": "has_doc_ids",
    "validity": "has_valid_counts",
    "q_offset": "has_q_offset",
    "key_validity": "has_key_validity",
    "prefix": "has_prefix",
    "subtree_end": "has_subtree_end",
    "positions": "has_positions",
    "cu_seqlens": "has_cu_seqlens",
}

COUNTS = ("valid_token_counts", "valid_slot_counts")
"""The names of counts in ``doc_window_mask`` and ``attention_validity``; in a mapping they replace ``validity``."""

FIELDS = (
    *("causal", "window", "local_window", "block_sizes", "base_block_tokens", "dtype", "backend"),
    *RUNTIME,
    *PRESENCE.values(),
    "has_two_cu_seqlens",
    *COUNTS,
)


def fields_of(contract: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a contract or mapping, replaced by those of ``given`` that are not None."""
    if isinstance(contract, MaskContract):
        stated: dict[str, Any] = {"causal": contract.causal, "window": contract.window}
        stated |= {name: getattr(contract, name) for name in RUNTIME}
    elif isinstance(contract, Mapping):
        stated = dict(contract)
    else:
        raise TypeError(f"contract must be a MaskContract or a mapping of its fields, got {type(contract).__name__}")
    for name in stated:
        if name not in FIELDS:
            raise ValueError(f"contract must be made of the fields {', '.join(FIELDS)}, got {name!r}")
    return _with_counts(stated) | {name: value for name, value in given.items() if value is not None}


def _with_counts(stated: dict[str, Any]) -> dict[str, Any]:
    """Replace counts by ``has_valid_counts``; ``base_block_tokens`` is kept only where slots are counted."""
    tokens, slots = (stated.pop(name, None) for name in COUNTS)
    if tokens is None and slots is None:
        return stated
    if stated.get("validity") is not None:
        raise ValueError("validity must be None where counts are given, got both")
    if stated.get("has_valid_counts") is False:
        raise ValueError("has_valid_counts must be True for the counts that are given, got False")
    if slots is None:
        stated.pop("base_block_tokens", None)
    elif stated.get("base_block_tokens") is None:
        raise ValueError("base_block_tokens must be a positive integer where slot counts are given, got None")
    return stated | {"has_valid_counts": True}


def presence(fields: Mapping[str, Any], name: str) -> bool:
    """Whether a runtime field exists: its value is given, or its ``has_…`` is true; raises if the two disagree."""
    flag = PRESENCE[name]
    stated, value = fields.get(flag), fields.get(name)
    exists = value is not None and ("validity" not in name or mode_of(value) != "none")
    if stated is None:
        return exists
    checks.is_bool(flag, stated)
    if value is not None and stated != exists:
        raise ValueError(f"{flag} must be {exists} for the {name} that is given, got {stated}")
    return stated


def are_two(cu_seqlens: Any) -> bool:
    """Whether queries and keys have lists of their own: then no one offset holds for a batch."""
    return cu_seqlens is not None and cu_seqlens[1] is not None


def two_lists(fields: Mapping[str, Any], has_lists: bool) -> bool:
    """``has_two_cu_seqlens``, by the lists where they are given."""
    stated, given = fields.get("has_two_cu_seqlens"), fields.get("cu_seqlens")
    if stated is not None:
        checks.is_bool("has_two_cu_seqlens", stated)
    if given is not None and stated not in (None, are_two(given)):
        raise ValueError(f"has_two_cu_seqlens must be {are_two(given)} for the lists that are given, got {stated}")
    if stated and not has_lists:
        raise ValueError("has_two_cu_seqlens must be False without cu_seqlens, got True")
    return are_two(given) if stated is None else stated


def mode_of(validity: Any) -> ValidityMode:
    """The mode of an ``AttentionValidity``, of torch or of JAX."""
    mode = getattr(validity, "mode", None)
    if mode not in MODES:
        raise TypeError(f"validity must be an AttentionValidity, got {type(validity).__name__}")
    return mode


def slot_tokens(fields: Mapping[str, Any], has_counts: bool) -> int | None:
    """``base_block_tokens`` where slots are counted; None where tokens are counted or there are no counts."""
    size, validity = fields.get("base_block_tokens"), fields.get("validity")
    if size is not None:
        checks.is_int("base_block_tokens", size, minimum=1)
    if validity is not None:
        in_validity = validity.base_block_tokens if mode_of(validity) == "slot_prefix" else None
        if size is not None and size != in_validity:
            raise ValueError(f"base_block_tokens must be {in_validity}, as in the validity, got {size}")
        size = in_validity
    if size is not None and not has_counts:
        raise ValueError(f"base_block_tokens must be None where there are no counts, got {size}")
    return size


def causal_and_window(fields: Mapping[str, Any]) -> tuple[bool, Window]:
    """The causal flag and the window bounds; a causal mask has the right bound 0, whatever the window."""
    causal = fields.get("causal", True)
    checks.is_bool("causal", causal)
    left, right = normalize_window(fields.get("window"))
    return causal, (left, 0 if causal else right)


def local_window(value: Any) -> int | None:
    if value is None:
        return None
    checks.is_int("local_window", value)
    return None if value < 0 else int(value)


def block_sizes(value: Any) -> tuple[int, int] | None:
    """``(q_block, kv_block)``, or one size for both."""
    if value is None:
        return None
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"block_sizes must be a size or a pair (q_block, kv_block), got {value!r}")
    for name, size in zip(("block_sizes[0]", "block_sizes[1]"), pair, strict=True):
        checks.is_int(name, size, minimum=1)
    return int(pair[0]), int(pair[1])


def dtype_name(dtype: Any) -> str | None:
    """One name for torch's, NumPy's and JAX's spelling of a dtype: ``bfloat16``."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    if not isinstance(name, str) or not name.rpartition(".")[2].isidentifier():
        raise TypeError(f"dtype must be a dtype or its name, got {dtype!r}")
    return name.rpartition(".")[2]


def backend_name(backend: Any) -> str:
    if not isinstance(backend, str) or not backend:
        raise TypeError(f"backend must be a backend's name, got {backend!r}")
    return backend.lower()


def check_same(name: str, expected: bool, value: Any) -> None:
    """Raise unless ``value`` is given exactly where the key says that the field exists."""
    if expected and value is None:
        raise ValueError(f"{name} must be given: the key says that it exists, got None")
    if not expected and value is not None:
        raise ValueError(f"{name} must be None: the key says that there is none, got {type(value).__name__}")
