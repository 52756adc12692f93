"""Activations of experts and other feed-forward layers: squared ReLU becomes ``ki.fused_relu_squared``."""

from collections.abc import Callable

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
)

KIND = "experts"


def activations_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The activation of a feed-forward layer or of a set of experts, with its attribute's name."""
    found = getattr(module, "act_fn", None)
    return [("act_fn", found)] if isinstance(found, nn.Module) else []


def plan(name: str, module: nn.Module) -> Plan:
    if "forward" in vars(module):
        return Plan(Change(name, KIND, why=ALREADY))
    if not is_squared_relu(module):
        return Plan(Change(name, KIND, why=f"the index has no kernel for {type(module).__name__} alone"))
    return Plan(Change(name, KIND, by="fused_relu_squared"), lambda: replace_forward(module, Recipe(forward_of)))


def is_squared_relu(module: nn.Module) -> bool:
    """Decided by values, not by the name of the class."""
    if not takes_one_tensor(module) or any(True for _ in module.parameters()):
        return False
    x = draw(64, seed=3)
    with torch.no_grad():
        return agree(module.forward(x), x.double().clamp(min=0).square())


def forward_of(base: type) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return ki.fused_relu_squared(hidden_states)

    return forward
