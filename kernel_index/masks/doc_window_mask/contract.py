"""The checks on a mask's parts, and the one normal form of a window."""

from typing import Any

import torch

from kernel_index.core import checks

Window = tuple[int | None, int | None]

DENSE_LIMIT = 8192
"""A dense mask for more queries than this is refused unless asked for: at 8192 × 8192 it takes 64 MiB for each row."""

DENSE_TOO_LARGE = "dense_mask_too_large"


def normalize_window(window: Any) -> Window:
    """``(left, right)`` in FlashAttention's sense, with None for unlimited.

    ``left`` counts previous tokens and ``right`` following ones, so that 0 leaves the token itself.  None and negative
    numbers are unlimited, and so is None in place of the pair: every spelling of "global" comes out the same.

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


def check_doc_ids(doc_ids: Any) -> None:
    if doc_ids is None:
        return
    checks.is_integer_tensor("doc_ids", doc_ids)
    if doc_ids.ndim not in (1, 2):
        raise ValueError(f"doc_ids must be [B, S], or [S] for every row alike, got shape {tuple(doc_ids.shape)}")


def agree(name: str, given: Any, carried: Any, owner: str) -> Any:
    """A size that was given, that the contract's tensors carry, or both: then they must be equal."""
    if given is None:
        return carried
    checks.is_int(name, given, minimum=0)
    if carried is not None and carried != given:
        raise ValueError(f"{name} must be {carried}, the size of {owner}, got {given}")
    return given


def check_dense(rows: int, queries: int, keys: int, allow_large: bool) -> None:
    if queries > DENSE_LIMIT and not allow_large:
        raise ValueError(
            f"seq_len must be at most {DENSE_LIMIT} for a dense mask ({DENSE_TOO_LARGE}: it would take "
            f"{rows * queries * keys} bytes; allow_large=True builds it all the same), got {queries}"
        )


def device_of(device: Any, *tensors: torch.Tensor | None) -> torch.device:
    """The device given, else that of the contract's tensors, else the CPU."""
    for tensor in tensors:
        if tensor is not None and device is None:
            device = tensor.device
    found = torch.device("cpu" if device is None else device)
    for name, tensor in zip(("doc_ids", "validity"), tensors, strict=True):
        if tensor is not None and not _same_device(tensor.device, found):
            raise ValueError(f"{name} must be on {found}, got {tensor.device}")
    return found


def _same_device(actual: torch.device, wanted: torch.device) -> bool:
    # "cuda" without an index means any one of them
    return actual.type == wanted.type and (wanted.index is None or actual.index == wanted.index)
