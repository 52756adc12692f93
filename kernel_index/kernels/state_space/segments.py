"""The documents of a row, as the convolution and the scan take them."""

from typing import Any

from torch import Tensor

from kernel_index.core import checks, rules


def check_segments(segments: Any, x: Tensor) -> None:
    """Raise unless ``segments`` are integers [B or 1, T] for x [B, T, …] that never decrease along T.

    A number that came back would be one document for a sum over a chunk, and two for a recurrence.  On a device the
    values are not read.
    """
    B, T = x.shape[:2]
    checks.is_integer_tensor("segments", segments)
    checks.on_device("segments", segments, x, "x")
    if segments.ndim != 2 or segments.shape[0] not in (1, B) or segments.shape[1] != T:
        raise ValueError(f"segments must be [B or 1, T] = [{B} or 1, {T}], got shape {tuple(segments.shape)}")
    if not rules.host_readable(segments):
        return
    falls = segments[:, 1:] < segments[:, :-1]
    if bool(falls.any()):
        row, token = falls.nonzero()[0].tolist()
        before, after = segments[row, token : token + 2].tolist()
        raise ValueError(f"segments must not decrease along a row, got {after} after {before} at [{row}, {token + 1}]")
