"""RMS norms.  A norm is recognised by its values, not by the name of its class."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core.numerics import is_invariant
from kernel_index.integrations.hugging_face.change import (
    ALREADY,
    Change,
    Plan,
    Recipe,
    agree,
    draw,
    replace_forward,
    takes_one_tensor,
    twin,
)
from kernel_index.integrations.hugging_face.lazy import Lazy, is_observed

KIND = "norms"
WIDEST = 8192
"""Channels up to which ``ki.gated_rms_norm`` has a kernel."""
FUSED = "fused_residual_add_rms_norm"
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


class Convention(NamedTuple):
    """``x·rsqrt(mean(x²) + eps)·(offset + weight)``; ``widens`` where a float32 weight makes the result float32.

    ``eps`` is the name of the module's attribute: it is read at each call, as the module itself does.
    """

    eps: str
    offset: float
    widens: bool


def is_candidate(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def plan(name: str, module: nn.Module, of_heads: bool = False, of_layer: bool = False) -> Plan:
    """``of_heads``: the norm's result is handed to a rotation that can do it in the same pass.

    ``of_layer``: it is handed to modules of its layer, and is no result of the model.
    """
    found = convention_of(module)
    if isinstance(found, str):
        return Plan(Change(name, KIND, why=found))
    alone = _is_alone(module.get_parameter("weight"))
    by = "fused_rope_qk" if of_heads else "gated_rms_norm" if alone else FUSED
    recipe = Recipe(forward_of, (found, of_heads, of_layer))
    return Plan(Change(name, KIND, by=by), lambda: replace_forward(module, recipe))


def convention_of(module: nn.Module) -> Convention | str:
    """The convention of the module's own forward, or the reason why it cannot be replaced."""
    if "forward" in vars(module):
        return ALREADY
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"weight"} or parameters["weight"].ndim != 1:
        return "is not a norm with one weight per channel and no bias"
    if any(True for _ in module.buffers(recurse=False)):
        return "has buffers"
    eps = next((n for n in EPS_NAMES if isinstance(getattr(module, n, None), float)), None)
    if eps is None:
        return "has no eps"
    if not takes_one_tensor(module):
        return "its forward takes a second argument"
    return _tried(module, eps, parameters["weight"].shape[0])


def _tried(module: nn.Module, name: str, channels: int) -> Convention | str:
    eps, weight = getattr(module, name), draw(channels, seed=2)
    tried = twin(module, weight=weight)
    for offset in (0.0, 1.0):
        # Small values show a misplaced eps, large ones a bound.
        if all(_behaves(tried, x, eps, offset + weight.double()) for x in _probes(channels, eps)):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                narrow = tried.forward(draw(1, channels, seed=1).bfloat16())
            return Convention(name, offset, narrow.dtype == torch.float32)
    return "does not compute x·rsqrt(mean(x²) + eps)·(weight or 1 + weight)"


def _probes(channels: int, eps: float) -> list[Tensor]:
    x = draw(3, channels, seed=1)
    return [x * eps**0.5, x * 1e4]


def _behaves(tried: nn.Module, x: Tensor, eps: float, weight: Tensor) -> bool:
    wide = x.double()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        actual = tried.forward(x)
    return agree(actual, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight)


def forward_of(base: type, convention: Convention, of_heads: bool, of_layer: bool) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        eps = getattr(self, convention.eps)
        if (of_heads or of_layer) and not torch.compiler.is_compiling() and not is_observed(self):
            if of_heads and hidden_states.ndim == 4 and not is_invariant():  # no recipe has norm and rotation in one
                return LazyNorm.of(hidden_states, self.weight, convention, eps)
            if of_layer and _is_narrowed(hidden_states, self.weight, convention):
                return LazyInput.of(hidden_states, self.weight, convention, eps)
        return normed(hidden_states, self.weight, convention, eps)

    return forward


def _is_narrowed(x: Tensor, weight: Tensor, convention: Convention) -> bool:
    """Whether linear layers under autocast read the norm in another dtype than that of its result."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return False
    dtype = _result_dtype(x, weight, convention)
    return dtype == torch.float32 and torch.get_autocast_dtype(kind) != dtype


def _result_dtype(x: Tensor, weight: Tensor, convention: Convention) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if convention.widens else x.dtype


def _is_alone(weight: Tensor) -> bool:
    """Whether ``ki.gated_rms_norm`` makes the norm: it has no addition, and no kernel for a CPU."""
    return weight.is_cuda and weight.shape[0] <= WIDEST and not is_invariant()


def normed(x: Tensor, weight: Tensor, convention: Convention, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """In ``dtype``, or in that of the module's result."""
    result = _result_dtype(x, weight, convention)
    if _is_alone(weight):
        if convention.offset:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + convention.offset
        return ki.gated_rms_norm(x, None, weight, eps=eps, dtype=dtype or result)
    x = x.to(result)
    # A norm alone is the fused step with nothing added.
    pair = ki.fused_residual_add_rms_norm(
        x, x.detach(), weight, scale=0.0, eps=eps, weight_offset=convention.offset
    )  # fmt: skip
    return pair.normed if dtype is None else pair.normed.to(dtype)


class LazyInput(Lazy):
    """The norm before the linear layers of a block under autocast, which read it in autocast's dtype.

    It is made in that dtype once for all of them, where each would cast the float32 result by itself.
    """

    convention: Convention
    eps: float
    versions: tuple[int, ...]
    narrow: dict[torch.dtype, Tensor]

    @staticmethod
    def of(x: Tensor, weight: Tensor, convention: Convention, eps: float) -> "LazyInput":
        same = {"convention": convention, "eps": eps, "versions": _versions(x, weight)}
        dtype = _result_dtype(x, weight, convention)
        lazy = LazyInput.wrap(x.shape, dtype, x.device, x, weight, **same)
        lazy.narrow = {}
        return lazy

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self.device.type
        if func is not nn.functional.linear or kwargs or not torch.is_autocast_enabled(kind):
            return NotImplemented
        return func(self._in(torch.get_autocast_dtype(kind)), *args[1:])

    def _in(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.narrow:
            self.check()
            x, weight = self.operands
            self.narrow[dtype] = normed(x, weight, self.convention, self.eps, dtype)
        return self.narrow[dtype]

    def check(self) -> None:
        super().check()
        _check_versions(self.operands, self.versions)

    def formula(self, *operands: Tensor) -> Tensor:
        x, weight = operands
        return normed(x, weight, self.convention, self.eps)


class LazyNorm(Lazy):
    """The norm of every head of queries or keys, put off until the rotation, which does both in one pass.

    A transposition of heads and tokens is recorded: ``transposed`` tells whether it is [B, H, T, D].
    """

    convention: Convention
    eps: float
    transposed: bool
    versions: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, weight: Tensor, convention: Convention, eps: float) -> "LazyNorm":
        dtype = _result_dtype(x, weight, convention)
        same = {"convention": convention, "eps": eps, "transposed": False, "versions": _versions(x, weight)}
        return LazyNorm.wrap(x.shape, dtype, x.device, x, weight, **same)

    @property
    def weight(self) -> Tensor:
        return self.operands[1]

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not Tensor.transpose or kwargs or args[1:] not in ((1, 2), (2, 1)):
            return NotImplemented
        shape = (self.shape[0], self.shape[2], self.shape[1], self.shape[3])
        same = {"convention": self.convention, "eps": self.eps, "versions": self.versions}
        return LazyNorm.wrap(shape, self.dtype, self.device, *self.operands, transposed=not self.transposed, **same)

    def check(self) -> None:
        super().check()
        _check_versions(self.operands, self.versions)

    def tokens_first(self) -> Tensor:
        """What is to be normed, [B, T, H, D] where this is [B, H, T, D]."""
        self.check()
        return self.operands[0] if self.transposed else self.operands[0].transpose(1, 2)

    def formula(self, *operands: Tensor) -> Tensor:
        x, weight = operands
        found = normed(x, weight, self.convention, self.eps)
        return found.transpose(1, 2) if self.transposed else found


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def _check_versions(operands: tuple[Tensor, ...], versions: tuple[int, ...]) -> None:
    if _versions(*operands) != versions:
        raise RuntimeError("the input of a norm must not change in place before the norm is used")
