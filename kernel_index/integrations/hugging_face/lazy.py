"""A tensor whose values are computed when something reads them: what a model hands from one module to another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Lazy(Tensor):
    """Shape, dtype and device are known; a subclass says in ``compute`` what the values are.

    An operation that ``record`` knows gives another lazy tensor.  Every other one is done on the values, which are
    computed once: so code that does not know of lazy tensors sees an ordinary one.
    """

    made: list[Tensor]

    @classmethod
    def wrap(cls, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        lazy.made = []
        return lazy

    def compute(self) -> Tensor:
        raise NotImplementedError

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on this tensor without its values, or ``NotImplemented``."""
        return NotImplemented

    def values(self) -> Tensor:
        """An ordinary tensor, computed at the first call."""
        if not self.made:
            self.made.append(self.compute())
        return self.made[0]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, Lazy) and not first.made:
            found = first.record(func, tuple(args), kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map(lambda x: x.values() if isinstance(x, Lazy) else x, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(
            f"a lazy tensor cannot be passed to {func}, which is called outside of Python: pass its values() there"
        )


METADATA = frozenset(
    {getattr(Tensor, n).__get__ for n in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta")}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.element_size}
)
