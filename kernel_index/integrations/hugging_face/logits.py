"""Logits that are computed only when their values are read."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Factors(NamedTuple):
    """Logits as ``cap(scale · (weight · hidden))`` with ``cap(z) = softcap · tanh(z / softcap)``, or none."""

    scale: float
    softcap: float | None


class LazyLogits(Tensor):
    """``hidden · weightᵀ + bias`` and the elementwise steps after it, as a formula.

    Shape, dtype and device are known.  Scaling, ``tanh`` and casts are recorded.  Any other operation computes the
    values first, once, with their gradients.  If the weights have changed since, it raises ``RuntimeError``: the logits
    of the old weights can no longer be computed.

    >>> import torch
    >>> from kernel_index.integrations.hugging_face.logits import LazyLogits
    >>> logits = LazyLogits.of(torch.ones(1, 2), torch.eye(3, 2), None)
    >>> (logits * 2).shape, logits + 1
    (torch.Size([1, 3]), tensor([[2., 2., 1.]]))
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...]
    made: list[Tensor]
    stamp: tuple[int, ...]
    grad_was_on: bool

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "LazyLogits":
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        lazy = _wrapper((*hidden.shape[:-1], weight.shape[0]), dtype, hidden.device)
        lazy.hidden, lazy.weight, lazy.bias, lazy.steps, lazy.made = hidden, weight, bias, (), []
        lazy.stamp, lazy.grad_was_on = _versions(hidden, weight, bias), torch.is_grad_enabled()
        if dtype != hidden.dtype:
            lazy.hidden, lazy.weight = hidden.to(dtype), weight.to(dtype)
            lazy.bias = None if bias is None else bias.to(dtype)
            lazy.stamp = _versions(lazy.hidden, lazy.weight, lazy.bias)
        return lazy

    def then(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> "LazyLogits":
        """The same with one more elementwise step."""
        with torch._C.DisableTorchFunctionSubclass():
            dtype = function(torch.empty(0, dtype=self.dtype), *args).dtype
            lazy = _wrapper(self.shape, dtype, self.device)
        vars(lazy).update(vars(self))
        lazy.steps, lazy.made = (*self.steps, (function, args)), []
        return lazy

    def values(self) -> Tensor:
        """The logits as an ordinary tensor, computed at the first call."""
        if not self.made:
            if _versions(self.hidden, self.weight, self.bias) != self.stamp:
                raise RuntimeError("logits must be read before the weights change: they are computed when first used")
            kind = self.hidden.device.type
            with torch.set_grad_enabled(self.grad_was_on), torch.autocast(kind, enabled=False):
                found = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
                for function, args in self.steps:
                    found = function(found, *args)
            self.made.append(found)
        return self.made[0]

    def factors(self) -> Factors | None:
        """The steps as one scale and one softcap, or None if they are not of this form."""
        scale, cap, state = 1.0, None, "scale"  # then "tanh", then "cap"
        for function, args in self.steps:
            if function in CASTS:
                if not _widens(function, args):
                    return None
            elif function in TANH and state == "scale":
                state = "tanh"
            elif function not in TANH and state != "cap":
                value = float(args[0]) if function in TIMES else 1.0 / float(args[0])
                if state == "scale":
                    scale *= value
                else:
                    cap, state = value, "cap"
            else:
                return None
        if state == "tanh":
            cap = 1.0
        if not math.isfinite(scale) or (cap is not None and not 0 < cap < math.inf):
            return None
        return Factors(scale if cap is None else scale * cap, cap)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return _plain(func, *args, **kwargs)
        if func in STEPS and isinstance(args[0], LazyLogits) and not kwargs and _is_constant(func, args[1:]):
            return args[0].then(func, args[1:])
        made = tree_map(lambda x: x.values() if isinstance(x, LazyLogits) else x, (tuple(args), kwargs))
        return func(*made[0], **made[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(
            f"lazy logits cannot be passed to {func}, which is called outside of Python: pass logits.values() there"
        )


TIMES = frozenset({Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul})
OVER = frozenset({Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide})
TANH = frozenset({Tensor.tanh, torch.tanh})
CASTS = frozenset({Tensor.float, Tensor.to})
STEPS = TIMES | OVER | TANH | CASTS
METADATA = frozenset(
    {getattr(Tensor, n).__get__ for n in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta")}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.element_size}
)


def _wrapper(shape: Any, dtype: torch.dtype, device: torch.device) -> LazyLogits:
    return Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def _plain(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _is_constant(func: Any, args: tuple[Any, ...]) -> bool:
    if func is Tensor.to:
        return len(args) == 1 and isinstance(args[0], torch.dtype)
    return all(isinstance(a, int | float) and not isinstance(a, bool) and a != 0 for a in args)


def _widens(function: Any, args: tuple[Any, ...]) -> bool:
    return function is Tensor.float or args[0] in (torch.float32, torch.float64)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None or t.is_inference() else t._version for t in tensors)
