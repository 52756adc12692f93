"""What ``torch.autocast`` means for a kernel: its check casts the arguments, and the kernel itself runs without it."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks


def autocast_dtype(value: Any) -> torch.dtype | None:
    """The dtype to which autocast casts this argument now; None where it leaves it as it is.

    PyTorch's own rule: a floating-point tensor on a device for which autocast is on, but never float64.
    """
    if not isinstance(value, Tensor) or not checks.is_autocast(value.device):
        return None
    if not value.is_floating_point() or value.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(value.device.type)


def cast_like_sdpa(*values: Any) -> tuple[Any, ...]:
    """The arguments as autocast casts those of ``F.scaled_dot_product_attention``.

    The cast is part of the graph, so each gradient comes back in its caller's dtype.
    """
    return tuple(map(_cast, values))


def _cast(value: Any) -> Any:
    dtype = autocast_dtype(value)
    return value if dtype is None else value.to(dtype)


class _Off:
    """Autocast off, by its switch alone: ``torch.autocast`` takes 8 µs for that, in every call."""

    def __init__(self, kind: str):
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


def without_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block in which float32 arithmetic stays float32; it costs nothing where autocast is off."""
    if not checks.is_autocast(like.device):
        return contextlib.nullcontext()
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _Off(kind)
