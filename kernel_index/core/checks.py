"""The argument checks that every contract shares.  Each message reads ``<argument> must be <rule>, got <value>``."""

import math
from typing import Any

import torch
from torch import Tensor


def is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}")


def is_floating(name: str, value: Any) -> None:
    is_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def is_integer_tensor(name: str, value: Any) -> None:
    is_tensor(name, value)
    if value.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")


def has_rank(name: str, value: Tensor, rank: int, legend: str) -> None:
    if value.ndim != rank:
        raise ValueError(f"{name} must be {legend}, got shape {tuple(value.shape)}")


def has_shape(name: str, value: Tensor, shape: tuple[int, ...], legend: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {legend} {tuple(shape)}, got shape {tuple(value.shape)}")


def on_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {value.device}")


def is_device(name: str, value: Any) -> None:
    """A device of this machine, or ``"meta"``."""
    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name} must be a torch.device or its name, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises depends on how it was built
        raise ValueError(f"{name} must be a device of this machine, got {value!r}") from error


def has_values(name: str, value: Any, device: torch.device | str) -> None:
    """Raise for a meta tensor that is to be copied to another device: it holds no values."""
    if isinstance(value, Tensor) and value.is_meta and torch.device(device).type != "meta":
        raise ValueError(f"{name} must hold values to be used on {device}, got a tensor on the meta device")


def has_dtype(name: str, value: Tensor, dtype: torch.dtype, why: str) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {f'{dtype} {why}'.rstrip()}, got {value.dtype}")


def is_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def is_int(name: str, value: Any, *, minimum: int | None = None) -> None:
    """A Python or symbolic integer, not a bool."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if isinstance(value, int) and not _fits(value):
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def is_real(name: str, value: Any) -> None:
    """A finite Python number, not a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, int) and not _fits(value):
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    # Dynamo may trace a float as a SymFloat, which has no isfinite.
    if not torch.compiler.is_compiling() and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def is_probability(name: str, value: Any) -> None:
    is_real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; False for the meta device, for which PyTorch would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of a linear layer's result here: autocast's where it is on."""
    return torch.get_autocast_dtype(weight.device.type) if is_autocast(weight.device) else weight.dtype
