"""Gated feed-forward layers: ``down(act(gate(x)) · up(x))`` by ``ki.fused_gated_activation``; squared ReLU alone.

A layer is recognised by its values: its forward is tried with small linear layers in the place of its own.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

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
)
from kernel_index.integrations.hugging_face.lazy import is_observed

KIND = "experts"
TRIED = "_kernel_index_activation_that_was_tried"
WIDTH, INNER = 6, 4
GatedKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
}
assert tuple(FORMULAS) == get_args(GatedKind)


class Gated(NamedTuple):
    """The names of a layer's children.  ``up`` is empty where one product makes both, ``gate_first`` in this order."""

    gate: str
    up: str
    down: str
    kind: GatedKind
    gate_first: bool = True


def is_candidate(module: nn.Module) -> bool:
    """A layer with two or three linear children, an activation, and no other weights."""
    linear = linear_children(module)
    others = [m for n, m in module.named_children() if n not in linear and any(True for _ in m.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    return len(linear) in (2, 3) and activation_of(module) is not None and not others and not own


def linear_children(module: nn.Module) -> list[str]:
    """Also those around which an adapter was put, which keeps the layer as ``base_layer``."""
    return [n for n, m in module.named_children() if isinstance(getattr(m, "base_layer", m), nn.Linear)]


def activation_of(module: nn.Module) -> Callable[..., Tensor] | None:
    found = [getattr(module, n, None) for n in ("act_fn", "activation_fn", "act", "activation")]
    return next((a for a in found if callable(a)), None)


def plan(name: str, module: nn.Module) -> Plan:
    if "forward" in vars(module):
        return Plan(Change(name, KIND, why=ALREADY))
    found = gated_of(module)
    if isinstance(found, str):
        return Plan(Change(name, KIND, why=found))
    return Plan(Change(name, KIND, by="fused_gated_activation"), lambda: _replace(module, found))


def _replace(module: nn.Module, form: Gated) -> Callable[[], None]:
    vars(module)[TRIED] = activation_of(module)
    undo = replace_forward(module, Recipe(forward_of, (form,)))

    def restore() -> None:
        undo()
        vars(module).pop(TRIED, None)

    return restore


def gated_of(module: nn.Module) -> Gated | str:
    """The form of the layer, or the reason why it has none of them."""
    linear = linear_children(module)
    act = activation_of(module)
    if any(m is not act for n, m in module.named_children() if n not in linear):
        return "has children beside its linear layers and its activation"
    if not takes_one_tensor(module):
        return "its forward takes a second argument"
    kind = _kind_of(act)
    if kind is None:
        return "the index has no kernel for its activation"
    x = draw(2, 3, WIDTH, seed=7)
    probes = (x, 1e3 * x)  # large values show a bound
    for form in _forms(linear, kind):
        small = _small(module, form)
        if all(agree(_result(small, p, mode), _formula(small, form, p)) for p in probes for mode in (False, True)):
            return form
    return "does not compute down(act(gate(x)) · up(x))"


def _kind_of(act: Any) -> GatedKind | None:
    x = torch.cat([scale * draw(64, seed=8) for scale in (1.0, 30.0, 1e3)])
    with torch.no_grad():
        actual = act(x)
        parts = list(zip(actual.split(64), x.double().split(64), strict=True))
        return next((k for k in get_args(GatedKind) if all(agree(a, FORMULAS[k](p)) for a, p in parts)), None)


def _forms(linear: list[str], kind: GatedKind) -> list[Gated]:
    if len(linear) == 3:
        return [Gated(gate, up, down, kind) for gate, up, down in itertools.permutations(linear)]
    pairs = itertools.permutations(linear)
    return [Gated(both, "", down, kind, first) for both, down in pairs for first in (True, False)]


def _small(module: nn.Module, form: Gated) -> nn.Module:
    """The layer with small linear children: its own forward, on other weights."""
    small = copy.copy(module)
    small.__dict__["_modules"] = dict(module._modules)
    sizes = {form.gate: (WIDTH, INNER), form.up: (WIDTH, INNER), form.down: (INNER, WIDTH)}
    if not form.up:
        sizes = {form.gate: (WIDTH, 2 * INNER), form.down: (INNER, WIDTH)}
    for seed, (name, (wide, narrow)) in enumerate(sizes.items()):
        layer = nn.Linear(wide, narrow, device="meta")  # whose first values would be drawn from the user's generator
        layer.weight = nn.Parameter(draw(narrow, wide, seed=seed))
        layer.bias = nn.Parameter(draw(narrow, seed=seed + 10))
        small._modules[name] = layer
    return small


def _result(small: nn.Module, x: Tensor, training: bool) -> Any:
    small.training = training  # of this layer alone: its activation is shared with the model's
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return small.forward(x)
    except (RuntimeError, ValueError):  # the sizes of another form
        return None


def _formula(small: Any, form: Gated, x: Tensor) -> Tensor:
    layers = {n: copy.deepcopy(small._modules[n]).double() for n in (form.gate, form.up, form.down) if n}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        gate, up = _gate_and_up(layers, form, x.double())
        return layers[form.down](FORMULAS[form.kind](gate) * up)


def _gate_and_up(layers: Any, form: Gated, x: Tensor) -> tuple[Tensor, Tensor]:
    if form.up:
        return layers[form.gate](x), layers[form.up](x)
    first, second = layers[form.gate](x).chunk(2, -1)
    return (first, second) if form.gate_first else (second, first)


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer is the product alone, of a weight that is whole: no adapter, hook or shards."""
    if type(layer) is not nn.Linear or is_observed(layer) or "forward" in vars(layer):
        return False
    return type(layer.weight) is nn.Parameter


def forward_of(base: type, form: Gated) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        act = activation_of(self)
        if act is not vars(self).get(TRIED) or (
            isinstance(act, nn.Module) and (is_observed(act) or "forward" in vars(act))
        ):
            return base.forward(self, x)  # another activation was put there, or somebody looks at its result
        gate, up = _gate_and_up(self._modules, form, x)
        down = getattr(self, form.down)
        if _is_plain(down) and not torch.compiler.is_compiling() and not is_invariant():
            return ki.fused_gated_activation(gate, up, kind=form.kind, linear=(down.weight, down.bias))
        return down(ki.fused_gated_activation(gate, up, kind=form.kind))

    return forward
