"""Rotary embedding: an attention layer's forward stays, and its rotary function becomes ``ki.fused_rope_qk``.

Where the layer norms the heads of q and k before it rotates them, the same call does both.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.integrations.hugging_face.change import ALREADY, Change, Plan, Recipe, agree, draw, replace_forward
from kernel_index.integrations.hugging_face.norms import LazyNorm

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
    found = {n: rotation_of(forward.__globals__.get(n)) for n in names_in(module)}
    rotations = tuple((n, r) for n, r in found.items() if r is not None)
    if not rotations:
        return Plan(Change(name, KIND, why="does not rotate halves or neighbouring pairs of a head's channels"))

    def do() -> Callable[[], None]:
        _ours(forward, rotations)  # with the globals of today, also where the class was patched before
        return replace_forward(module, Recipe(rebound, (rotations,)))

    return Plan(Change(name, KIND, by="fused_rope_qk"), do)


def rebound(base: type, rotations: tuple[tuple[str, Rotation], ...]) -> types.FunctionType:
    """A copy of the forward of ``base`` whose rotary functions are ours."""
    function = base.forward
    other = types.FunctionType(
        function.__code__,
        vars(_ours(function, rotations)),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


def _ours(function: Any, rotations: tuple[tuple[str, Rotation], ...]) -> types.ModuleType:
    """A module like the function's own but for the rotary functions; torch.compile looks up globals in modules."""
    home = function.__globals__["__name__"]
    name = ".".join((__name__, home.replace(".", "_"), *(n for n, _ in rotations)))
    module = sys.modules.setdefault(name, types.ModuleType(name))
    ours = {n: replacement(function.__globals__[n], rotation) for n, rotation in rotations}
    vars(module).update({**vars(sys.modules[home]), **ours, "__name__": name})
    return module


def rotation_of(function: Any) -> Rotation | None:
    """How the function rotates, found by calling it on a few values; None if it cannot be replaced."""
    if not callable(function) or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
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
    norm = {} if paired else _norms_of(q, k)  # the weights of a norm are in the order of its channels
    q, k = (x.tokens_first() if norm and isinstance(x, LazyNorm) else x.transpose(1, 2) for x in (q, k))
    if paired:  # the model's function takes neighbouring pairs and returns halves
        q, k = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
    tables = (t[..., :half].unsqueeze(-2) for t in (cos, sin))
    rotated = ki.fused_rope_qk(q, k, *tables, **norm, backend=backend)
    return rotated.q.transpose(1, 2), rotated.k.transpose(1, 2)


def _norms_of(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The arguments of ``fused_rope_qk`` that norm q and k first, where both are lazy norms alike; else none."""
    if not (isinstance(q, LazyNorm) and isinstance(k, LazyNorm)) or q.made or k.made:
        return {}
    if (q.convention, q.eps) != (k.convention, k.eps):
        return {}
    if q.shape[-1] != q.weight.shape[0] or k.shape[-1] != k.weight.shape[0]:
        return {}
    return {
        "q_weight": q.weight, "k_weight": k.weight, "eps": q.eps, "weight_offset": q.convention.offset,
    }  # fmt: skip


@functools.cache
def replacement(original: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
    """The function that the model's forward calls instead; calls in another layout go to the original."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any):
        usual = not rest and (not named or named == {"unsqueeze_dim": 1})
        if not usual or not _is_usual(q, k, cos, sin, rotation):
            return original(q, k, cos, sin, *rest, **named)
        return _rotate(q, k, cos, sin, rotation.paired, "auto")

    return rotate


def _is_usual(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> bool:
    """Whether the call is one of those that were tried: [B, heads, T, D] against [1 or B, T, R], of one dtype."""
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or cos.shape[-1] % 2:
        return False
    rows, tokens, width = q.shape[0], q.shape[2], q.shape[3]
    if k.shape[0] != rows or k.shape[2:] != q.shape[2:] or cos.shape[0] not in (1, rows) or cos.shape[1] != tokens:
        return False
    alike = q.dtype == cos.dtype or torch.is_autocast_enabled(q.device.type)  # else the tables widen the result
    if q.dtype != k.dtype or not q.dtype.is_floating_point or not alike:
        return False
    return cos.shape[-1] == width or (rotation.partial and cos.shape[-1] < width)
