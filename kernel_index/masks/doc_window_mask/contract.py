"""Argument checks of ``MaskContract`` and ``doc_window_mask``, and the normal form of a window."""

from typing import Any

import torch

from kernel_index.core import checks, rules

Window = tuple[int | None, int | None]
"""(left, right): how many keys before and after its own position a query may attend to; None is unlimited."""

DENSE_LIMIT = 8192
"""Above this many queries a dense mask needs ``allow_large=True``: at 8192 × 8192 it takes 64 MiB for each row."""

DENSE_TOO_LARGE = "dense_mask_too_large"

BY_TOKEN = ("doc_ids", "subtree_end", "positions")
"""Fields [B, S], or [S] for every row alike; the other tensors have one number for each row."""


def normalize_window(window: Any) -> Window:
    """``(left, right)`` in FlashAttention's sense, with None for unlimited.

    ``left`` counts previous tokens and ``right`` following ones; 0 allows only the token itself.  A side that is None
    or negative is unlimited; None instead of the pair makes both sides unlimited.

    >>> normalize_window((-1, 0)), normalize_window((128, -1)), normalize_window(None)
    ((None, 0), (128, None), (None, None))
    """
    if window is None:
        return None, None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right), got {window!r}")
    return _side("window[0]", window[0]), _side("window[1]", window[1])


def _side(name: str, tokens: Any) -> int | None:
    if tokens is None:
        return None
    checks.is_int(name, tokens)
    return None if tokens < 0 else tokens


def check_count(name: str, value: Any, minimum: int | None = None) -> None:
    """A number for all rows, or integers [B]."""
    if isinstance(value, torch.Tensor):
        checks.is_integer_tensor(name, value)
        checks.has_rank(name, value, 1, "one number for each row, shape [B]")
        if minimum is not None and rules.host_readable(value) and bool((value < minimum).any()):
            raise ValueError(f"{name} must be at least {minimum} in every row, got {value.tolist()}")
    elif value is not None:
        checks.is_int(name, value, minimum=minimum)


def check_cu_seqlens(value: Any) -> None:
    """``(cu_seqlens_q, cu_seqlens_k or None)``: integers [n + 1] that begin with 0 and do not decrease."""
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"cu_seqlens must be a pair (cu_seqlens_q, cu_seqlens_k), got {type(value).__name__}")
    for name, lengths in zip(("cu_seqlens_q", "cu_seqlens_k"), value, strict=True):
        if lengths is None and name == "cu_seqlens_k":
            continue
        checks.is_integer_tensor(name, lengths)
        checks.has_rank(name, lengths, 1, "cumulative lengths, shape [n + 1]")
        if lengths.shape != value[0].shape or lengths.shape[0] < 1:
            raise ValueError(
                f"{name} must have n + 1 numbers for n documents, in both lists alike, got {tuple(lengths.shape)}"
            )
        if rules.host_readable(lengths) and (int(lengths[0]) != 0 or bool((lengths.long().diff() < 0).any())):
            raise ValueError(f"{name} must begin with 0 and never decrease, got {lengths.tolist()}")


def agreed_size(name: str, given: Any, of_tensors: Any, owner: str) -> Any:
    """The size that is given, or that the contract's tensors have; raises ``ValueError`` if the two differ."""
    if given is None:
        return of_tensors
    checks.is_int(name, given, minimum=0)
    if of_tensors is not None and of_tensors != given:
        raise ValueError(f"{name} must be {of_tensors}, the size of {owner}, got {given}")
    return given


def check_dense(rows: int, queries: int, keys: int, allow_large: bool) -> None:
    if queries > DENSE_LIMIT and not allow_large:
        raise ValueError(
            f"seq_len must be at most {DENSE_LIMIT} for a dense mask ({DENSE_TOO_LARGE}: it would take "
            f"{rows * queries * keys} bytes; allow_large=True builds it), got {queries}"
        )


def device_of(device: Any, tensors: dict[str, torch.Tensor]) -> torch.device:
    """The device given, else that of the contract's tensors, else the CPU."""
    for tensor in tensors.values():
        if device is None:
            device = tensor.device
    found = torch.device("cpu" if device is None else device)
    for name, tensor in tensors.items():
        if not _same_device(tensor.device, found):
            raise ValueError(f"{name} must be on {found}, got {tensor.device}")
    return found


def _same_device(actual: torch.device, wanted: torch.device) -> bool:
    # "cuda" without an index matches every CUDA device
    return actual.type == wanted.type and (wanted.index is None or actual.index == wanted.index)
