"""The checks on prefix counts: all on metadata, and on values only where reading them waits for nobody."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks, rules


def counts(name: str, value: Any) -> Tensor | None:
    """``value`` as int64 ``[B]``; None stays None.  An int64 tensor of rank 1 is kept, not copied."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = _host_counts(name, value)
    checks.is_integer_tensor(name, value)
    if value.ndim > 1:
        raise ValueError(f"{name} must be one count for each row, shape [B], got shape {tuple(value.shape)}")
    if rules.host_readable(value) and bool((value < 0).any()):
        raise ValueError(f"{name} must be at least 0, got {int(value.min())}")
    return value.reshape(-1).to(torch.int64)


def _host_counts(name: str, value: Any) -> Tensor:
    """Python integers and NumPy arrays, without the roundings that ``torch.as_tensor`` would allow."""
    if hasattr(value, "__array__"):
        return torch.as_tensor(value)
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return torch.tensor([_integer(name, item) for item in items], dtype=torch.int64)


def _integer(name: str, value: Any) -> Any:  # an int, or a symbol of one
    if not isinstance(value, bool | torch.SymInt) and hasattr(value, "__index__"):
        value = operator.index(value)  # NumPy's integers too
    checks.is_int(name, value)
    return value


def block_tokens(value: Any) -> int | None:
    """``base_block_tokens`` as a positive int; None stays None."""
    name = "base_block_tokens"
    if value is None:
        return None
    if isinstance(value, Tensor):
        checks.is_integer_tensor(name, value)
        if value.numel() != 1 or not rules.host_readable(value):
            raise ValueError(
                f"{name} must be one integer on the host, got shape {tuple(value.shape)} on {value.device}"
            )
        value = int(value)
    value = _integer(name, value)
    checks.is_int(name, value, minimum=1)
    return value


def agree(token_prefix: Tensor | None, slot_counts: Tensor | None) -> None:
    """The two counts speak about the same rows, on the same device."""
    if token_prefix is None or slot_counts is None:
        return
    if token_prefix.shape != slot_counts.shape:
        raise ValueError(
            f"valid_slot_counts must be one count for each of the {token_prefix.shape[0]} rows of valid_token_counts, "
            f"got {slot_counts.shape[0]}"
        )
    checks.on_device("valid_slot_counts", slot_counts, token_prefix, "valid_token_counts")
