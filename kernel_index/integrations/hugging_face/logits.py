"""Logits that are computed only when their values are read."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.integrations.hugging_face.lazy import Lazy
from kernel_index.integrations.hugging_face.one_order import product_in_order


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

    steps: tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...]
    product: torch.dtype
    invariant: bool
    rows: Tensor | None
    stamp: "Stamp"

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, invariant: bool = False, rows: Tensor | None = None
    ) -> "LazyLogits":
        """``rows``: the order of the rows of hidden states [B, T, C], of which the others are padding."""
        dtype = _autocast_dtype(hidden.device.type) or hidden.dtype
        operands = (hidden, weight) if bias is None else (hidden, weight, bias)
        shape = (*hidden.shape[:-1], weight.shape[0])
        stamp = Stamp.of(*operands)
        form = {"steps": (), "product": dtype, "invariant": invariant, "rows": rows, "stamp": stamp}
        return LazyLogits.wrap(shape, dtype, hidden.device, *operands, **form)

    @property
    def hidden(self) -> Tensor:
        return self.operands[0]

    @property
    def weight(self) -> Tensor:
        return self.operands[1]

    @property
    def bias(self) -> Tensor | None:
        return self.operands[2] if len(self.operands) == 3 else None

    def factors_of_product(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias in the dtype of the product."""
        self.check()
        hidden, weight, *bias = (x.to(self.product) for x in self.operands)
        return hidden, weight, bias[0] if bias else None

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in STEPS or kwargs or not _is_constant(func, args[1:]):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            dtype = func(torch.empty(0, dtype=self.dtype), *args[1:]).dtype
        if func in CASTS and dtype == self.dtype:
            return self  # as PyTorch returns the tensor itself
        same = {"product": self.product, "invariant": self.invariant, "rows": self.rows, "stamp": self.stamp}
        steps = (*self.steps, (func, args[1:]))
        return LazyLogits.wrap(self.shape, dtype, self.device, *self.operands, steps=steps, **same)

    def check(self) -> None:
        super().check()
        if not self.stamp.equals(Stamp.of(*self.operands)):
            raise RuntimeError("logits must be read before the weights change: they are computed when first used")

    def formula(self, *operands: Tensor) -> Tensor:
        with torch.autocast(operands[0].device.type, enabled=False):
            hidden, weight, *bias = (x.to(self.product) for x in operands)
            multiply = functools.partial(_product, weight, bias[0] if bias else None, self.invariant)
            found = product_in_order(multiply, hidden, self.rows)
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


def _product(weight: Tensor, bias: Tensor | None, invariant: bool, hidden: Tensor) -> Tensor:
    return product(hidden, weight, bias, invariant)


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, invariant: bool) -> Tensor:
    """What an output layer computes."""
    if not invariant:
        return torch.nn.functional.linear(hidden, weight, bias)
    with ki.numerics("invariant"):
        return ki.linear(hidden, weight, bias)


TIMES = frozenset({Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul})
OVER = frozenset({Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide})
TANH = frozenset({Tensor.tanh, torch.tanh})
CASTS = frozenset({Tensor.float, Tensor.to})
STEPS = TIMES | OVER | TANH | CASTS


def _autocast_dtype(kind: str) -> torch.dtype | None:
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


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
    def of(*tensors: Tensor) -> "Stamp":
        with torch.no_grad():
            bits = tuple(t.detach().view(BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors)
        return Stamp(tuple(0 if t.is_inference() else t._version for t in tensors), bits)

    def equals(self, other: "Stamp") -> bool:
        return self.versions == other.versions and all(map(torch.equal, self.bits, other.bits))


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
