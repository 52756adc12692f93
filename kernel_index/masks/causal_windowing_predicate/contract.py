"""Argument checks of ``can_score_tile`` and ``causal_windowing_plan``: integers by value, arrays by dtype only."""

from typing import Any

from torch import Tensor

from kernel_index.core import checks


def check_scalar_or_array(name: str, value: Any, minimum: int | None = None) -> None:
    """An integer, or an array of integers.  Values of arrays are never read, as that could wait for a device."""
    if isinstance(value, Tensor):
        checks.is_integer_tensor(name, value)
    elif hasattr(value, "dtype") and hasattr(value, "shape"):  # JAX and NumPy, without importing either
        if str(value.dtype).lstrip("u").rstrip("0123456789") != "int":
            raise TypeError(f"{name} must be an integer or an array of integers, got {value.dtype}")
    else:
        checks.is_int(name, value, minimum=minimum)


def check_plan(
    num_blocks: Any, tile_size: Any, block_stride: Any, q_chunk_start: Any, q_chunk_size: Any, left_window: Any
) -> None:
    checks.is_int("num_blocks", num_blocks, minimum=0)
    checks.is_int("tile_size", tile_size, minimum=1)
    checks.is_int("block_stride", block_stride, minimum=1)
    checks.is_int("q_chunk_start", q_chunk_start, minimum=0)
    checks.is_int("q_chunk_size", q_chunk_size, minimum=1)
    if left_window is not None:
        checks.is_int("left_window", left_window)
