"""RMS norms.  A norm is recognised by its values, not by the name of its class."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.integrations.hugging_face.change import ALREADY, Change, Plan, agree, draw, replace_forward, twin

KIND = "norms"
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


class Convention(NamedTuple):
    """``x·rsqrt(mean(x²) + eps)·(offset + weight)``; ``widens`` where a float32 weight makes the result float32."""

    eps: float
    offset: float
    widens: bool


def is_candidate(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def plan(name: str, module: nn.Module) -> Plan:
    found = convention_of(module)
    if isinstance(found, str):
        return Plan(Change(name, KIND, why=found))
    forward = forward_of(found)
    change = Change(name, KIND, by="fused_residual_add_rms_norm")
    return Plan(change, lambda: replace_forward(module, forward))


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
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if len(required) != 1 or required[0].kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD,):
        return "takes more than one tensor"
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


def forward_of(convention: Convention) -> Callable[[Any, Tensor], Tensor]:
    eps, offset, widens = convention

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        if widens and x.dtype != weight.dtype:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        # A norm alone is the fused step with nothing added.
        pair = ki.fused_residual_add_rms_norm(x, x.detach(), weight, scale=0.0, eps=eps, weight_offset=offset)
        return pair.normed

    return forward
