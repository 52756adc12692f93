"""Results kept beside the tensors they were made from, and dropped when one of those changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import rules


def recall(
    kept: dict[str, tuple], name: str, key: tuple, sources: tuple[Tensor | None, ...], build: Callable[[], Any]
) -> Any:
    """What ``build`` returns, or the result kept under ``name`` if it was built for the same key and sources.

    A source on the host is compared by value, so that even a change that PyTorch does not count (through NumPy, through
    ``.data``) is seen; a source on an accelerator is compared by its version counter and address, which waits for
    nobody.  A kept result that somebody has written to is not given out again.  Only the latest one is kept.
    """
    if not _keepable(sources):
        return build()
    if name in kept:
        old_key, states, value, versions = kept[name]
        if old_key == key and _versions(value) == versions and all(map(_unchanged, sources, states)):
            return value
    states = tuple(map(_state, sources))
    with torch.inference_mode(False), torch.no_grad():  # a tensor of that mode counts no versions and has no backward
        value = build()
    if any(t.is_inference() for t in _tensors(value)):  # a view of a source that was made in the mode
        kept.pop(name, None)
    else:
        kept[name] = (key, states, value, _versions(value))
    return value


def _keepable(sources: tuple[Tensor | None, ...]) -> bool:
    """Not under FakeTensorMode, a functorch transform and the like: their tensors must not outlive them."""
    if torch._C._len_torch_dispatch_stack() or rules.inside_functorch():
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
