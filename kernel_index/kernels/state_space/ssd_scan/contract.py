"""Argument checks and backend eligibility of ``ssd_scan``."""

from typing import Any, NamedTuple

from torch import Tensor

from kernel_index.core import checks, rules
from kernel_index.core.autocast import cast_like_sdpa
from kernel_index.kernels.state_space.segments import check_segments

WIDEST = 128
"""Most rows and columns of a state whose tile fits into a program of the Triton kernels."""


class Call(NamedTuple):
    """A checked call."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    dt_bias: Tensor | None
    segments: Tensor | None
    state: Tensor | None
    dt_softplus: bool
    chunk: int


def check(
    x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, dt_bias: Any, dt_softplus: Any, segments: Any, state: Any,
    chunk: Any,
) -> Call:  # fmt: skip
    checks.is_floating("x", x)
    checks.has_rank("x", x, 4, "[B, T, H, P]")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, T, H, P] with no T, H or P of 0, got shape {tuple(x.shape)}")
    B, T, H, P = x.shape
    _check_shared(b, c, x)
    _check_tensor("dt", dt, x, (B, T, H), "[B, T, H]")
    _check_tensor("a", a, x, (H,), "[H]")
    for name, value in (("d", d), ("dt_bias", dt_bias)):
        if value is not None:
            _check_tensor(name, value, x, (H,), "[H]")
    checks.is_bool("dt_softplus", dt_softplus)
    if segments is not None:
        check_segments(segments, x)
    if state is not None:
        _check_tensor("state", state, x, (B, H, P, b.shape[3]), "[B, H, P, N]")
    checks.is_int("chunk", chunk, minimum=1)
    x, b, c = cast_like_sdpa(x, b, c)
    return Call(x, dt, a, b, c, d, dt_bias, segments, state, dt_softplus, chunk)


def _check_tensor(name: str, value: Any, x: Tensor, shape: tuple[int, ...], legend: str) -> None:
    checks.is_floating(name, value)
    checks.on_device(name, value, x, "x")
    checks.has_shape(name, value, shape, legend)


def _check_shared(b: Any, c: Any, x: Tensor) -> None:
    """The tensors that the heads of a group share."""
    for name, value in (("b", b), ("c", c)):
        checks.is_floating(name, value)
        checks.on_device(name, value, x, "x")
        checks.has_rank(name, value, 4, "[B, T, G, N]")
    B, T, H, _ = x.shape
    groups, columns = b.shape[2:]
    if groups == 0 or columns == 0 or H % groups:
        raise ValueError(f"b must be [B, T, G, N] with G a divisor of {H} heads and N > 0, got shape {tuple(b.shape)}")
    checks.has_shape("b", b, (B, T, groups, columns), "[B, T, G, N]")
    checks.has_shape("c", c, tuple(b.shape), "of b's shape")
    if checks.is_autocast(x.device):  # which makes one dtype of them
        return
    for name, value in (("b", b), ("c", c)):
        checks.has_dtype(name, value, x.dtype, "like x")


def triton_why_not(call: Call) -> str | None:
    if max(call.x.shape[3], call.b.shape[3]) > WIDEST:
        return "needs P and N of at most 128"  # WIDEST
    return rules.triton_why_not(*call)


def triton_not_worth(call: Call) -> str | None:
    return rules.triton_not_worth(call.x)
