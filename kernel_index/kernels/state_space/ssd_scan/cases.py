"""Named calls of ``ssd_scan``, and the recurrence as it is written."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.state_space.ssd_scan.api import BACKENDS, ssd_scan

SIZES = {"H": 4, "P": 8, "G": 2, "N": 16}


def call(m: Maker, B: int, T: int, *, fast: float = 1.0, **more: Any) -> dict[str, Any]:
    """Steps and decays as a layer has them: positive, float32; ``fast`` multiplies the decay."""
    sizes = SIZES | {k: more.pop(k) for k in list(more) if k in SIZES}
    H, P, G, N = sizes.values()
    wide = torch.promote_types(m.dtype, torch.float32)
    found = {
        "x": m.normal(B, T, H, P),
        "dt": m.uniform(0.01, 0.5, B, T, H, dtype=wide),
        "a": m.uniform(-2.0 * fast, -0.2 * fast, H, dtype=wide),
        "b": m.normal(B, T, G, N),
        "c": m.normal(B, T, G, N),
    }
    return found | {k: v(m, sizes | {"B": B}) if callable(v) else v for k, v in more.items()}


def of_heads(m: Maker, sizes: dict[str, int]) -> Tensor:
    return m.normal(sizes["H"], dtype=torch.promote_types(m.dtype, torch.float32), scale=1.0)


def state(m: Maker, sizes: dict[str, int]) -> Tensor:
    shape = sizes["B"], sizes["H"], sizes["P"], sizes["N"]
    return m.normal(*shape, dtype=torch.promote_types(m.dtype, torch.float32))


def segments(*rows: list[int]) -> Any:
    """The lengths of each row's documents."""
    return lambda m, sizes: torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    ).to(m.device)


def raw(m: Maker, B: int, T: int, **more: Any) -> dict[str, Any]:
    """dt as a projection gives it: x's dtype, before bias and softplus."""
    found = call(m, B, T, d=of_heads, dt_bias=of_heads, dt_softplus=True, **more)
    return found | {"dt": m.normal(B, T, found["x"].shape[2], scale=2.0)}


def one_tensor(m: Maker) -> dict[str, Any]:
    """x, b and c are parts of the convolution's output, and dt of the projection's."""
    found = raw(m, 2, 20)
    joined = torch.cat([found[n].flatten(2) for n in ("x", "b", "c")], -1)
    parts = joined.split([found[n][0, 0].numel() for n in ("x", "b", "c")], -1)
    views = {n: p.unflatten(-1, found[n].shape[2:]) for n, p in zip(("x", "b", "c"), parts, strict=True)}
    return found | views | {"dt": m.normal(2, 20, 9, scale=2.0)[..., 5:]}


def transposed(m: Maker) -> dict[str, Any]:
    found = call(m, 2, 19)
    strided = {n: found[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("x", "b", "dt")}
    return found | strided | {"c": found["c"].transpose(2, 3).contiguous().transpose(2, 3)}


def oracle(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, d: Tensor | None = None, dt_bias: Tensor | None = None,
    dt_softplus: bool = False, segments: Tensor | None = None, state: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token after token.  In a narrow dtype each token's addition, state and output are tensors of that dtype."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide) + (0.0 if dt_bias is None else dt_bias)
    dt = torch.log1p(torch.exp(dt)) if dt_softplus else dt
    per_group = x.shape[2] // b.shape[2]
    b, c = (t.repeat_interleave(per_group, 2).to(wide) for t in (b, c))
    h = x.new_zeros((*x[:, 0].shape, b.shape[-1]), dtype=wide) if state is None else state
    rows = []
    for t in range(x.shape[1]):
        if segments is not None and t:
            h = h * (segments[:, t] == segments[:, t - 1]).to(wide).view(-1, 1, 1, 1)
        step = (dt[:, t, :, None] * x[:, t]).to(dtype).to(wide)
        h = (torch.exp(dt[:, t] * a)[..., None, None] * h + step[..., None] * b[:, t, :, None]).to(dtype).to(wide)
        y = (h * c[:, t, :, None]).sum(-1)
        rows.append((y if d is None else y + d[:, None] * x[:, t]).to(dtype))
    return torch.stack(rows, 1), h


def compulsory(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Forward reads the arguments and writes y; backward reads them and d_y, and writes their gradients."""
    read = size_of(*(v for v in kwargs.values() if isinstance(v, Tensor)))
    return read + size_of(kwargs["x"]), 2 * read + size_of(kwargs["x"])


CASES = (
    Case("layer", "two groups, bias, softplus, skip, and several chunks", lambda m: raw(m, 2, 37)),
    Case("plain", "steps as they are, one group", lambda m: call(m, 1, 33, G=1)),
    Case("one token", "T = 1", lambda m: raw(m, 2, 1)),
    Case("short", "fewer tokens than a chunk has", lambda m: call(m, 2, 5, H=2, G=2)),
    Case("documents", "resets inside of chunks, at their edge, and one in each row", lambda m: raw(
        m, 2, 40, segments=segments([3, 13, 1, 23], [16, 17, 7]))),
    Case("same documents", "one row of segments for all rows", lambda m: raw(m, 2, 24, segments=segments([9, 15]))),
    Case("continued", "from a state, which goes on into the second chunk", lambda m: call(m, 2, 21, state=state)),
    Case("continued documents", "a state that only the first document sees", lambda m: raw(
        m, 2, 35, state=state, segments=segments([2, 20, 13], [18, 17]))),
    Case("odd sizes", "P and N are no powers of 2", lambda m: call(m, 1, 18, H=3, G=3, P=5, N=3)),
    Case("wide", "the widest state; one d_a alone may be right by chance", lambda m: call(
        m, 1, 17, H=8, G=1, P=128, N=128)),
    Case("fast decay", "decays that underflow within a few tokens", lambda m: call(m, 1, 40, fast=400.0)),
    Case("one tensor", "views into the outputs of the convolution and of the projection", one_tensor),
    Case("transposed", "not contiguous", transposed),
    Case("no rows", "a data-parallel rank without tokens", lambda m: call(m, 0, 4)),
)  # fmt: skip


def real(m: Maker, tokens: int = 8192) -> dict[str, Any]:
    """The mixer of a model of 2048 channels."""
    return raw(m, 1, tokens, H=64, P=64, G=1, N=128)


SUITES = (
    Suite(
        op="ssd_scan", function=ssd_scan, backends=BACKENDS, cases=CASES,
        differentiable=("x", "dt", "a", "b", "c", "d", "dt_bias", "state"), oracle=oracle,
        sized=lambda m, n: raw(m, 2, n, P=4, N=3, state=state), real=real,
        scales=(1e-3, 1.0, 16.0), rounding=("triton",),
    ),
)  # fmt: skip
