"""Rotary embedding: an attention layer's forward stays, and its rotary function becomes ``ki.fused_rope_qk``."""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.integrations.hugging_face.change import ALREADY, Change, Plan, agree, draw, replace_forward

KIND = "rope"
PREFIX = "apply_rotary_pos_emb"


class Rotation(NamedTuple):
    """How a model's function rotates: whether pairs are interleaved, and whether some channels may stay unrotated."""

    paired: bool
    partial: bool


def names_in(module: nn.Module) -> tuple[str, ...]:
    """The rotary functions that the module's forward calls, by their global names."""
    code = getattr(type(module).forward, "__code__", None)
    return () if code is None else tuple(n for n in code.co_names if n.startswith(PREFIX))


def plan(name: str, module: nn.Module) -> Plan:
    if "forward" in vars(module):
        return Plan(Change(name, KIND, why=ALREADY))
    forward = type(module).forward
    home = sys.modules.get(forward.__module__)
    if home is None or forward.__globals__ is not vars(home):
        return Plan(Change(name, KIND, why="its forward is not from a module that can be imported"))
    ours = {}
    for called in names_in(module):
        original = forward.__globals__.get(called)
        rotation = rotation_of(original) if callable(original) else None
        if original is not None and rotation is not None:
            ours[called] = replacement(original, rotation)
    if not ours:
        return Plan(Change(name, KIND, why="does not rotate halves or neighbouring pairs of a head's channels"))
    return Plan(Change(name, KIND, by="fused_rope_qk"), lambda: replace_forward(module, rebound(forward, ours)))


def rebound(function: Callable[..., Any], names: dict[str, Any]) -> types.FunctionType:
    """A copy of the function with some of its global names bound to other objects."""
    other = types.FunctionType(
        function.__code__,
        vars(_module_with(function.__globals__["__name__"], tuple(sorted(names.items())))),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


@functools.cache
def _module_with(name: str, names: tuple[tuple[str, Any], ...]) -> types.ModuleType:
    """A module like the one called ``name`` but for some names; torch.compile looks up a function's globals there."""
    module = types.ModuleType(".".join((__name__, name.replace(".", "_"), *(n for n, _ in names))))
    vars(module).update({**vars(sys.modules[name]), **dict(names), "__name__": module.__name__})
    return sys.modules.setdefault(module.__name__, module)


def rotation_of(function: Callable[..., Any]) -> Rotation | None:
    """How the function rotates, found by calling it on a few values; None if it cannot be replaced."""
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    for paired in (False, True):
        if _behaves(function, paired, rotated=8):
            return Rotation(paired, _behaves(function, paired, rotated=4))
    return None


def _behaves(function: Callable[..., Any], paired: bool, rotated: int) -> bool:
    q, k = draw(1, 2, 3, 8, seed=4), draw(1, 1, 3, 8, seed=5)
    angle = draw(1, 3, rotated // 2, seed=6)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    try:
        actual = function(q, k, cos, sin)
    except (RuntimeError, ValueError):  # it rotates all channels or none
        return False
    expected = _rotate(q.double(), k.double(), cos.double(), sin.double(), paired, "reference")
    return all(agree(a, e) for a, e in zip(actual, expected, strict=True))


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, paired: bool, backend: Literal["auto", "reference"]
) -> tuple[Tensor, Tensor]:
    """q and k are [B, heads, T, D]; cos and sin [1 or B, T, R], both halves alike."""
    half = cos.shape[-1] // 2
    if paired:  # the model's function takes neighbouring pairs and returns halves
        q, k = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
    tables = (t[..., :half].unsqueeze(-2) for t in (cos, sin))
    rotated = ki.fused_rope_qk(q.transpose(1, 2), k.transpose(1, 2), *tables, backend=backend)
    return rotated.q.transpose(1, 2), rotated.k.transpose(1, 2)


@functools.cache
def replacement(original: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
    """The function that the model's forward calls instead; calls in another layout go to the original."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, unsqueeze_dim: int = 1, **named: Any):
        usual = not rest and unsqueeze_dim == 1 and q.ndim == 4 and cos.ndim == 3
        if not usual or (cos.shape[-1] != q.shape[-1] and not rotation.partial):
            return original(q, k, cos, sin, *rest, unsqueeze_dim=unsqueeze_dim, **named)
        return _rotate(q, k, cos, sin, rotation.paired, "auto")

    return rotate
