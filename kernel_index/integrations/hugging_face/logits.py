"""Logits that are computed only when their values are read."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.integrations.hugging_face.lazy import Lazy


class Factors(NamedTuple):
    """Logits as ``cap(scale · (weight · hidden))`` with ``cap(z) = softcap · tanh(z / softcap)``, or none."""

    scale: float
    softcap: float | None


class LazyLogits(Lazy):
    """``hidden · weightᵀ + bias`` and the elementwise steps after it, as a formula.

    Scaling, ``tanh`` and casts are recorded.  Any other operation computes the values first, once, with their
    gradients; from then on the values are the logits, so what a model writes into them counts.  If the operands have
    changed since the product was asked for, ``values`` raises ``RuntimeError``: the old logits can no longer be made.

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
    product: torch.dtype
    stamp: "Stamp"
    grad_was_on: bool

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "LazyLogits":
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        lazy = LazyLogits.wrap((*hidden.shape[:-1], weight.shape[0]), dtype, hidden.device)
        lazy.hidden, lazy.weight, lazy.bias, lazy.steps, lazy.product = hidden, weight, bias, (), dtype
        lazy.stamp, lazy.grad_was_on = Stamp.of(hidden, weight, bias), torch.is_grad_enabled()
        return lazy

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias in the dtype of the product."""
        hidden, weight = self.hidden.to(self.product), self.weight.to(self.product)
        return hidden, weight, None if self.bias is None else self.bias.to(self.product)

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in STEPS or kwargs or not _is_constant(func, args[1:]):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            dtype = func(torch.empty(0, dtype=self.dtype), *args[1:]).dtype
        if func in CASTS and dtype == self.dtype:
            return self  # as PyTorch returns the tensor itself
        lazy = LazyLogits.wrap(self.shape, dtype, self.device)
        vars(lazy).update(vars(self))
        lazy.steps, lazy.made = (*self.steps, (func, args[1:])), []
        return lazy

    def compute(self) -> Tensor:
        if not self.stamp.equals(Stamp.of(self.hidden, self.weight, self.bias)):
            raise RuntimeError("logits must be read before the weights change: they are computed when first used")
        kind = self.hidden.device.type
        with torch.set_grad_enabled(self.grad_was_on), torch.autocast(kind, enabled=False):
            found = torch.nn.functional.linear(*self.operands())
            for function, args in self.steps:
                found = function(found, *args)
        return found

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


TIMES = frozenset({Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul})
OVER = frozenset({Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide})
TANH = frozenset({Tensor.tanh, torch.tanh})
CASTS = frozenset({Tensor.float, Tensor.to})
STEPS = TIMES | OVER | TANH | CASTS


def _is_constant(func: Any, args: tuple[Any, ...]) -> bool:
    if func is Tensor.to:
        return len(args) == 1 and isinstance(args[0], torch.dtype)
    return all(isinstance(a, int | float) and not isinstance(a, bool) and a != 0 for a in args)


def _widens(function: Any, args: tuple[Any, ...]) -> bool:
    return function is Tensor.float or args[0] in (torch.float32, torch.float64)


class Stamp(NamedTuple):
    """What tells whether operands were changed in place: version counters, and the sum of all bits of each.

    A write through ``.data`` counts no version, so that values are looked at as well: one pass over the operands,
    which waits for no device before somebody compares.
    """

    versions: tuple[int, ...]
    bits: tuple[Tensor, ...]

    @staticmethod
    def of(*tensors: Tensor | None) -> "Stamp":
        given = [t for t in tensors if t is not None]
        with torch.no_grad():
            bits = tuple(t.detach().view(BITS[t.element_size()]).sum(dtype=torch.int64) for t in given)
        return Stamp(tuple(0 if t.is_inference() else t._version for t in given), bits)

    def equals(self, other: "Stamp") -> bool:
        return self.versions == other.versions and all(map(torch.equal, self.bits, other.bits))


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
