"""Argument checks and backend eligibility of ``fused_rope_qk``; argument checks of ``rope_tables``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from kernel_index.core import checks, inductor, native, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.core.numerics import is_invariant
from kernel_index.kernels.attention.fused_rope_qk import tables


class Call(NamedTuple):
    """A checked call."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool
    q_weight: Tensor | None  # [D]; None is no norm of q
    k_weight: Tensor | None
    eps: float
    weight_offset: float

    @property
    def norms(self) -> bool:
        return self.q_weight is not None or self.k_weight is not None


def check(
    q: Any,
    k: Any,
    cos: Any,
    sin: Any,
    interleaved: Any,
    q_weight: Any = None,
    k_weight: Any = None,
    eps: Any = 1e-6,
    weight_offset: Any = 0.0,
) -> Call:
    if isinstance(cos, tuple):
        cos, sin = _both_tables(cos, sin)
    q, k = cast_like_sdpa(q, k)
    for name, value in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        checks.is_floating(name, value)
    checks.is_bool("interleaved", interleaved)
    checks.has_rank("q", q, 4, "[B, T, H, D]")
    checks.has_rank("k", k, 4, "[B, T, K, D]")
    b, t, _, d = q.shape
    if k.shape[0] != b or k.shape[1] != t or k.shape[3] != d:
        raise ValueError(f"k must be [B, T, K, D] with q's B={b}, T={t} and D={d}, got shape {tuple(k.shape)}")
    checks.has_dtype("k", k, q.dtype, "like q")
    checks.on_device("k", k, q, "q")
    _check_tables_fit(cos, sin, b, t, d)
    checks.on_device("cos", cos, q, "q")
    checks.on_device("sin", sin, q, "q")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            checks.is_floating(name, weight)
            checks.has_shape(name, weight, (d,), "[D] with q's D,")
            checks.on_device(name, weight, q, "q")
    checks.is_real("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    checks.is_real("weight_offset", weight_offset)
    return Call(q, k, cos, sin, interleaved, q_weight, k_weight, eps, weight_offset)


def _both_tables(pair: tuple, sin: Any) -> tuple[Any, Any]:
    if sin is not None:
        raise TypeError(f"sin must be left out where cos holds both tables, got {type(sin).__name__}")
    if len(pair) != 2:
        raise TypeError(f"cos must be a tensor or the two tables of rope_tables, got {len(pair)} values")
    return pair[0], pair[1]


def _check_tables_fit(cos: Tensor, sin: Tensor, b: int, t: int, d: int) -> None:
    """Every size is compared: a table of length 1 or for one head of many would broadcast to a wrong answer."""
    checks.has_rank("cos", cos, 4, "[1 or B, T, 1, R/2]")
    batch, length, heads, half = cos.shape
    if batch not in (1, b):
        raise ValueError(f"cos must be [1 or B, T, 1, R/2] with q's B={b}, got shape {tuple(cos.shape)}")
    if length != t:
        raise ValueError(f"cos must be [1 or B, T, 1, R/2] with q's T={t}, got shape {tuple(cos.shape)}")
    if heads != 1:
        raise ValueError(f"cos must be [1 or B, T, 1, R/2], the same for every head, got shape {tuple(cos.shape)}")
    if half < 1 or 2 * half > d:
        raise ValueError(f"cos must be [1 or B, T, 1, R/2] with 2 <= R <= D={d}, got shape {tuple(cos.shape)}")
    checks.has_shape("sin", sin, tuple(cos.shape), "of cos's shape")
    checks.has_dtype("sin", sin, cos.dtype, "like cos")


def check_tables(
    positions: Tensor, dim: int, base: float | None, scaling: Mapping[str, Any] | None, seq_len: int | None
) -> None:
    checks.is_integer_tensor("positions", positions)
    if positions.ndim not in (1, 2):
        raise ValueError(f"positions must be [T] or [B, T], got shape {tuple(positions.shape)}")
    checks.is_int("dim", dim, minimum=2)
    if base is not None:
        _check_base("base", base)
    if seq_len is not None:
        checks.is_int("seq_len", seq_len, minimum=1)
    if scaling is not None:
        tables.check_scaling(scaling, dim, base, seq_len)
    elif dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    if base is None:
        if tables.base_of(base, scaling) is None:
            raise ValueError("base must be given where scaling holds no 'rope_theta', got None")
        _check_base("scaling['rope_theta']", tables.base_of(base, scaling))


def _check_base(name: str, base: Any) -> None:
    checks.is_real(name, base)
    if base <= 1:
        raise ValueError(f"{name} must be greater than 1, got {base}")


def inductor_why_not(call: Call) -> str | None:
    return inductor.why_not(*call) or _tables_rule(call)


def inductor_not_worth(call: Call) -> str | None:
    return inductor.not_worth(call.q)


def native_why_not(call: Call) -> str | None:
    if call.norms:
        return "has no norm: it rotates only"
    if is_invariant():
        return native.op_why_not(call.q, call.k, call.cos, call.sin) or _tables_rule(call)
    return native.rows_why_not((call.q, call.k), call.cos, call.sin)


def native_not_worth(call: Call) -> str | None:
    return native.rows_not_worth(call.q)


def invariant_tables_why_not(angles: Tensor) -> str | None:
    if angles.is_cuda:
        return None
    if not angles.is_cpu:
        return rules.NEEDS_CPU
    return rules.INSIDE_FUNCTORCH if rules.inside_functorch() else native.machine_why_not()


def triton_why_not(call: Call) -> str | None:
    return rules.triton_why_not(*call) or _tables_rule(call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.q)


def _tables_rule(call: Call) -> str | None:
    if rules.wants_gradient(call.cos, call.sin):
        return "cos or sin needs a gradient: only the reference computes it"
    return None
