"""The frequencies of rotary embedding: plain, and the published ways to stretch them.

The keys and formulas are those of Hugging Face's ``rope_parameters``, so that a model's configuration can be passed as
it is; unlike there, a key that nothing reads is an error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks

PARTIAL = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"
MAXIMUM = "max_position_embeddings"
"""Not part of Hugging Face's mapping but of its configuration: ``dynamic`` and ``longrope`` may need it."""


class RopeTables(NamedTuple):
    """What ``rope_tables`` returns: the cosines and sines of every position and channel pair.

    >>> import torch, kernel_index as ki
    >>> ki.rope_tables(torch.arange(3), 8).sin.dtype
    torch.float32
    """

    cos: Tensor
    sin: Tensor


class _Rope(NamedTuple):
    """What every stretch begins with."""

    dim: int  # rotated channels
    base: float
    seq_len: int | None
    device: torch.device

    @property
    def plain(self) -> Tensor:
        """Radians per token of each pair, float64 [dim / 2]."""
        return float(self.base) ** (torch.arange(0, self.dim, 2, dtype=torch.float64, device=self.device) / -self.dim)


@dataclass(frozen=True)
class _Kind:
    """One ``rope_type``: the keys it needs, the keys it may have, and its formula."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    stretch: Callable[..., tuple[Tensor, float]]


def frequencies(
    dim: int, base: float | None, scaling: Mapping[str, Any] | None, device: torch.device, seq_len: int | None = None
) -> tuple[Tensor, float]:
    """Radians per token for each channel pair, float64 ``[R/2]``, and the factor on cos and sin."""
    rope = _Rope(rotated(dim, scaling), base_of(base, scaling), seq_len, device)
    if scaling is None:
        return rope.plain, 1.0
    kind = _KINDS[_rope_type(scaling)]
    given = {key: scaling[key] for key in (*kind.required, *kind.optional) if scaling.get(key) is not None}
    return kind.stretch(rope, **given)


def base_of(base: float | None, scaling: Mapping[str, Any] | None) -> Any:
    """``base``, or the mapping's ``rope_theta`` where it is None."""
    return scaling.get("rope_theta") if base is None and scaling is not None else base


def rotated(dim: int, scaling: Mapping[str, Any] | None) -> int:
    """R: the part of a head that rotates; ``proportional`` keeps the whole width and rotates some pairs by 0."""
    if scaling is None or scaling.get(PARTIAL) is None or _rope_type(scaling) == "proportional":
        return dim
    return int(dim * scaling[PARTIAL])


def check_scaling(scaling: Any, dim: int, base: float | None, seq_len: int | None) -> None:
    """Refuse a mapping that holds a wrong key or value; nothing in it is ignored."""
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping with a rope_type, or None, got {type(scaling).__name__}")
    rope_type = _rope_type(scaling)
    checks.one_of("scaling['rope_type']", rope_type, tuple(_KINDS))
    kind = _KINDS[rope_type]
    for key in kind.required:
        if scaling.get(key) is None:
            raise ValueError(f"scaling must hold {key!r} for rope_type {rope_type!r}, got only {_names(scaling)}")
    known = (*kind.required, *kind.optional, PARTIAL)
    for key, value in scaling.items():
        if key in ("rope_type", "type"):
            continue
        if key not in known and key != "rope_theta":
            named = _names(k for k in known if k != PARTIAL)
            raise ValueError(f"scaling must hold only {named} for rope_type {rope_type!r}, got {key!r}")
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
    _check_dim(scaling, dim)
    if rope_type == "dynamic":
        _check_dynamic(scaling, seq_len)
    if rope_type == "longrope":
        _check_longrope(scaling, dim)


def _check_dim(scaling: Mapping[str, Any], dim: int) -> None:
    """With a partial factor ``dim`` is the head size, and R is what has to be even."""
    width = rotated(dim, scaling)
    if width == dim and dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    if width < 2 or width % 2:
        raise ValueError(f"scaling[{PARTIAL!r}] must make an even number of dim {dim}, at least 2, got {width}")


def _check_dynamic(scaling: Mapping[str, Any], seq_len: int | None) -> None:
    if seq_len is not None and all(scaling.get(key) is None for key in (ORIGINAL, MAXIMUM)):
        raise ValueError(f"scaling must hold {ORIGINAL!r} or {MAXIMUM!r} where seq_len is given, got only "
                         f"{_names(scaling)}")  # fmt: skip


def _check_longrope(scaling: Mapping[str, Any], dim: int) -> None:
    pairs = rotated(dim, scaling) // 2
    for key in ("short_factor", "long_factor"):
        if len(scaling[key]) != pairs:
            raise ValueError(f"scaling[{key!r}] must hold {pairs} numbers, one for each pair, got {len(scaling[key])}")
    if all(scaling.get(key) is None for key in ("attention_factor", "factor", MAXIMUM)):
        wanted = f"'attention_factor', 'factor' or {MAXIMUM!r}"
        raise ValueError(f"scaling must hold {wanted} for rope_type 'longrope', got only {_names(scaling)}")


def _rope_type(scaling: Mapping[str, Any]) -> Any:
    new, old = scaling.get("rope_type"), scaling.get("type")
    if new is not None and old is not None and new != old:
        raise ValueError(f"scaling['type'] must be rope_type {new!r} when both are given, got {old!r}")
    return old if new is None else new


def _names(keys: Any) -> str:
    return ", ".join(map(repr, keys)) or "rope_type"


def _check_value(key: str, value: Any, base: float | None) -> None:
    name = f"scaling[{key!r}]"
    if key == "truncate":
        checks.is_bool(name, value)
        return
    if key in (ORIGINAL, MAXIMUM):
        checks.is_int(name, value, minimum=1)
        return
    if key in ("short_factor", "long_factor"):
        _check_factors(name, value)
        return
    checks.is_real(name, value)
    if key == "rope_theta" and base is not None and value != base:
        raise ValueError(f"{name} must be base {base}, got {value}")
    if key == PARTIAL and value > 1:
        raise ValueError(f"{name} must be at most 1, got {value}")
    if key == "factor" and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if key.startswith("mscale"):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    elif value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_factors(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list of numbers, got {type(value).__name__}")
    for i, number in enumerate(value):
        checks.is_real(f"{name}[{i}]", number)
        if number <= 0:
            raise ValueError(f"{name}[{i}] must be positive, got {number}")


def _default(rope: _Rope) -> tuple[Tensor, float]:
    return rope.plain, 1.0


def _linear(rope: _Rope, factor: float) -> tuple[Tensor, float]:
    return rope.plain / factor, 1.0


def _dynamic(
    rope: _Rope,
    factor: float,
    original_max_position_embeddings: int | None = None,
    max_position_embeddings: int | None = None,
) -> tuple[Tensor, float]:
    """The base grows with a sequence that is longer than those of training; others are left alone."""
    trained = original_max_position_embeddings or max_position_embeddings
    if rope.seq_len is None or trained is None or rope.seq_len <= trained or rope.dim == 2:  # one pair has no base
        return rope.plain, 1.0
    growth = factor * rope.seq_len / trained - (factor - 1)
    return rope._replace(base=rope.base * growth ** (rope.dim / (rope.dim - 2))).plain, 1.0


def _longrope(
    rope: _Rope,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position_embeddings: int,
    factor: float | None = None,
    attention_factor: float | None = None,
    max_position_embeddings: int | None = None,
) -> tuple[Tensor, float]:
    """A divisor for each pair, one list for sequences within the original context and one for longer ones."""
    original = original_max_position_embeddings
    longer = rope.seq_len is not None and rope.seq_len > original
    divisors = torch.tensor(long_factor if longer else short_factor, dtype=torch.float64, device=rope.device)
    if attention_factor is None:
        stretch = factor if factor is not None else (max_position_embeddings or original) / original
        if stretch > 1 and original < 2:
            raise ValueError(f"scaling[{ORIGINAL!r}] must be at least 2 without an attention_factor, got {original}")
        attention_factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return rope.plain / divisors, float(attention_factor)


def _proportional(rope: _Rope, factor: float = 1.0, partial_rotary_factor: float = 1.0) -> tuple[Tensor, float]:
    """The fastest pairs rotate as they would in a whole head, the others not at all."""
    turning = int(partial_rotary_factor * rope.dim // 2)
    pair = torch.arange(rope.dim // 2, device=rope.device)
    return torch.where(pair < turning, rope.plain / factor, 0.0), 1.0


def _yarn(
    rope: _Rope,
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
        original = original_max_position_embeddings
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = last - first if last != first else 0.001  # a ramp of no width is a step
    pair = torch.arange(rope.dim // 2, dtype=torch.float64, device=rope.device)
    stretched = ((pair - first) / width).clamp(0, 1)
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
        else:
            attention_factor = _temperature(factor, 1.0)
    return rope.plain * (1 - stretched) + rope.plain / factor * stretched, float(attention_factor)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _llama3(
    rope: _Rope,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[Tensor, float]:
    plain = rope.plain
    turns = original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept), 1.0


_YARN_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
_KINDS = {
    "default": _Kind((), (), _default),
    "linear": _Kind(("factor",), (), _linear),
    "dynamic": _Kind(("factor",), (ORIGINAL, MAXIMUM), _dynamic),
    "yarn": _Kind(("factor", ORIGINAL), _YARN_OPTIONAL, _yarn),
    "longrope": _Kind(("short_factor", "long_factor", ORIGINAL), ("factor", "attention_factor", MAXIMUM), _longrope),
    "llama3": _Kind(_LLAMA3, (), _llama3),
    "proportional": _Kind((), ("factor", PARTIAL), _proportional),
}
