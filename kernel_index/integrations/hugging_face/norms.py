"""RMS norms.  A norm is recognised by its values, not by the name of its class."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernel_index as ki
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
from kernel_index.integrations.hugging_face.lazy import Lazy

KIND = "norms"
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


class Convention(NamedTuple):
    """``x·rsqrt(mean(x²) + eps)·(offset + weight)``; ``widens`` where a float32 weight makes the result float32."""

    eps: float
    offset: float
    widens: bool


def is_candidate(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def plan(name: str, module: nn.Module, of_heads: bool = False) -> Plan:
    """``of_heads``: the norm's result is handed to a rotation that can do it in the same pass."""
    found = convention_of(module)
    if isinstance(found, str):
        return Plan(Change(name, KIND, why=found))
    by = "fused_rope_qk" if of_heads else "fused_residual_add_rms_norm"
    recipe = Recipe(forward_of, (found, of_heads))
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
    eps = next((e for e in (getattr(module, n, None) for n in EPS_NAMES) if isinstance(e, float)), None)
    if eps is None:
        return "has no eps"
    if not takes_one_tensor(module):
        return "its forward takes a second argument"
    return _tried(module, eps, parameters["weight"].shape[0])


def _tried(module: nn.Module, eps: float, channels: int) -> Convention | str:
    x = draw(3, channels, seed=1) * eps**0.5  # small, so that a misplaced eps shows
    weight = draw(channels, seed=2)
    tried = twin(module, weight=weight)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        actual = tried.forward(x)
        wide = x.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            if agree(actual, normed * (offset + weight.double())):
                narrow = tried.forward(x.bfloat16())
                return Convention(eps, offset, narrow.dtype == torch.float32)
    return "does not compute x·rsqrt(mean(x²) + eps)·(weight or 1 + weight)"


def forward_of(base: type, convention: Convention, of_heads: bool) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if of_heads and not torch.compiler.is_compiling() and hidden_states.ndim == 4:
            return LazyNorm.of(hidden_states, self.weight, convention)
        return normed(hidden_states, self.weight, convention)

    return forward


def normed(x: Tensor, weight: Tensor, convention: Convention) -> Tensor:
    eps, offset, widens = convention
    if widens and x.dtype != weight.dtype:
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
    # A norm alone is the fused step with nothing added.
    pair = ki.fused_residual_add_rms_norm(x, x.detach(), weight, scale=0.0, eps=eps, weight_offset=offset)
    return pair.normed


class LazyNorm(Lazy):
    """The norm of every head of queries or keys, put off until the rotation, which does both in one pass.

    A transposition of heads and tokens is recorded: ``transposed`` tells whether it is [B, H, T, D].
    """

    input: Tensor
    weight: Tensor
    convention: Convention
    transposed: bool
    grad_was_on: bool

    @staticmethod
    def of(x: Tensor, weight: Tensor, convention: Convention) -> "LazyNorm":
        dtype = torch.promote_types(x.dtype, weight.dtype) if convention.widens else x.dtype
        lazy = LazyNorm.wrap(x.shape, dtype, x.device)
        lazy.input, lazy.weight, lazy.convention, lazy.transposed = x, weight, convention, False
        lazy.grad_was_on = torch.is_grad_enabled()
        return lazy

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not Tensor.transpose or kwargs or args[1:] not in ((1, 2), (2, 1)):
            return NotImplemented
        shape = (self.shape[0], self.shape[2], self.shape[1], self.shape[3])
        lazy = LazyNorm.wrap(shape, self.dtype, self.device)
        vars(lazy).update(vars(self))
        lazy.transposed, lazy.made = not self.transposed, []
        return lazy

    def tokens_first(self) -> Tensor:
        """What is to be normed, [B, T, H, D] where this is [B, H, T, D]."""
        return self.input if self.transposed else self.input.transpose(1, 2)

    def compute(self) -> Tensor:
        with torch.set_grad_enabled(self.grad_was_on):
            found = normed(self.input, self.weight, self.convention)
            return found.transpose(1, 2) if self.transposed else found
