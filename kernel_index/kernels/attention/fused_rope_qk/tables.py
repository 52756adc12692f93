"""The frequencies of rotary embedding: plain, and the three published ways to stretch them.

The keys and formulas are those of Hugging Face's ``rope_scaling``, so that a model's configuration can be passed as
it is; unlike there, a key that nothing reads is an error.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_index.core import checks


@dataclass(frozen=True)
class _Kind:
    """One ``rope_type``: the keys it needs, the keys it may have, and its formula."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    stretch: Callable[..., tuple[Tensor, float]]


def frequencies(dim: int, base: float, scaling: Mapping[str, Any] | None, device: torch.device) -> tuple[Tensor, float]:
    """Radians per token for each channel pair, float64 ``[dim/2]``, and the factor on cos and sin."""
    plain = float(base) ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / -dim)
    if scaling is None:
        return plain, 1.0
    kind = _KINDS[_rope_type(scaling)]
    given = {key: scaling[key] for key in (*kind.required, *kind.optional) if scaling.get(key) is not None}
    return kind.stretch(plain, dim, base, **given)


def check_scaling(scaling: Any, base: float) -> None:
    """Refuse a mapping that holds a wrong key or value; nothing in it is ignored."""
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping with a rope_type, or None, got {type(scaling).__name__}")
    rope_type = _rope_type(scaling)
    checks.one_of("scaling['rope_type']", rope_type, tuple(_KINDS))
    kind = _KINDS[rope_type]
    for key in kind.required:
        if scaling.get(key) is None:
            raise ValueError(f"scaling must hold {key!r} for rope_type {rope_type!r}, got only {_names(scaling)}")
    known = (*kind.required, *kind.optional)
    for key, value in scaling.items():
        if key in ("rope_type", "type"):
            continue
        if key not in known and key != "rope_theta":
            raise ValueError(f"scaling must hold only {_names(known)} for rope_type {rope_type!r}, got {key!r}")
        if value is not None:
            _check_value(key, value, base)
    if rope_type == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError(
            "scaling['high_freq_factor'] must be greater than low_freq_factor "
            f"{scaling['low_freq_factor']}, got {scaling['high_freq_factor']}"
        )
    if rope_type == "yarn":
        fast, slow = (d if scaling.get(n) is None else scaling[n] for n, d in (("beta_fast", 32.0), ("beta_slow", 1.0)))
        if fast < slow:
            raise ValueError(f"scaling['beta_fast'] must be at least beta_slow {slow}, got {fast}")


def _rope_type(scaling: Mapping[str, Any]) -> Any:
    new, old = scaling.get("rope_type"), scaling.get("type")
    if new is not None and old is not None and new != old:
        raise ValueError(f"scaling['type'] must be rope_type {new!r} when both are given, got {old!r}")
    return old if new is None else new


def _names(keys: Any) -> str:
    return ", ".join(map(repr, keys)) or "rope_type"


def _check_value(key: str, value: Any, base: float) -> None:
    name = f"scaling[{key!r}]"
    if key == "truncate":
        checks.is_bool(name, value)
        return
    if key == "original_max_position_embeddings":
        checks.is_int(name, value, minimum=1)
        return
    checks.is_real(name, value)
    if key == "rope_theta" and value != base:
        raise ValueError(f"{name} must be base {base}, got {value}")
    if key == "factor" and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if key.startswith("mscale"):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    elif value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _default(plain: Tensor, dim: int, base: float) -> tuple[Tensor, float]:
    return plain, 1.0


def _linear(plain: Tensor, dim: int, base: float, factor: float) -> tuple[Tensor, float]:
    return plain / factor, 1.0


def _yarn(
    plain: Tensor,
    dim: int,
    base: float,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 0.0,
    mscale_all_dim: float = 0.0,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    def pair_that_turns(turns: float) -> float:
        """The pair (a real number) that makes this many turns within the original context."""
        return dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001  # a ramp of no width is a step
    pair = torch.arange(dim // 2, dtype=torch.float64, device=plain.device)
    stretched = ((pair - first) / width).clamp(0, 1)
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
        else:
            attention_factor = _temperature(factor, 1.0)
    return plain * (1 - stretched) + plain / factor * stretched, float(attention_factor)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _llama3(
    plain: Tensor,
    dim: int,
    base: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[Tensor, float]:
    turns = original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept), 1.0


_YARN_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KINDS = {
    "default": _Kind((), (), _default),
    "linear": _Kind(("factor",), (), _linear),
    "yarn": _Kind(("factor", "original_max_position_embeddings"), _YARN_OPTIONAL, _yarn),
    "llama3": _Kind(_LLAMA3, (), _llama3),
}
