"""Keeps a result together with the state of its source tensors, and rebuilds it when one of them changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import rules


def kept_or_built(
    kept: dict[str, tuple], name: str, key: tuple, sources: tuple[Tensor | None, ...], build: Callable[[], Any]
) -> Any:
    """The result kept under ``name`` if its key and sources are unchanged, else a new one from ``build()``, kept there.

    A source on the host is compared by value, which also finds writes that PyTorch does not count (through NumPy or
    ``.data``).  A source on an accelerator is compared by version counter and address, without waiting for the device.
    A kept result that was written to in place is rebuilt.  Only the latest result of a name is kept.
    """
    if not _keepable(sources):
        return build()
    value = kept_value(kept, name, key, sources)
    if value is None:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version counter and no backward
            value = build()
        keep(kept, name, key, sources, value)
    return value


def kept_value(kept: dict[str, tuple], name: str, key: tuple, sources: tuple[Tensor | None, ...]) -> Any:
    """The result kept under ``name`` if it still holds, else None."""
    if name not in kept or not _keepable(sources):
        return None
    old_key, states, value, versions = kept[name]
    holds = old_key == key and _versions(value) == versions and all(map(_unchanged, sources, states))
    return value if holds else None


def keep(kept: dict[str, tuple], name: str, key: tuple, sources: tuple[Tensor | None, ...], value: Any) -> None:
    """Keep a result that was made from these sources as they are now, if a change of them can be seen."""
    if not _keepable(sources) or any(t.is_inference() for t in _tensors(value)):  # a view made in inference mode
        kept.pop(name, None)
    else:
        kept[name] = (key, tuple(map(_state, sources)), value, _versions(value))


def _keepable(sources: tuple[Tensor | None, ...]) -> bool:
    """Not inside FakeTensorMode, a functorch transform or the like: their tensors must not outlive them.

    Unlike ``rules.host_readable`` this allows tensors on an accelerator, whose values are not read, and no subclass.
    """
    if rules.inside_dispatch_mode() or rules.inside_functorch():
        return False
    return all(s is None or (type(s) is Tensor and (s.device.type == "cpu" or not s.is_inference())) for s in sources)


def _state(source: Tensor | None) -> Any:
    if source is None:
        return None
    return source.detach().clone() if source.device.type == "cpu" else (source._version, source.data_ptr())


def _unchanged(source: Tensor | None, state: Any) -> bool:
    if source is None:
        return True
    if source.device.type == "cpu":
        return torch.equal(source, state)
    return state == (source._version, source.data_ptr())


def _versions(value: Any) -> tuple[int, ...]:
    return tuple(t._version for t in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    parts = (value,) if isinstance(value, Tensor) else value
    return [t for t in parts if isinstance(t, Tensor)]
