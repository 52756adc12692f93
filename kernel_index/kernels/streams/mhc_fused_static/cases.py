"""Named calls of the stream-mixing functions and of ``sinkhorn``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.streams.mhc_fused_static.api import (
    BACKENDS,
    SINKHORN_BACKENDS,
    mhc_branch_input,
    mhc_merge,
    mhc_merge_and_branch_input,
    sinkhorn,
)


def coefficients(m: Maker, *rows: int, streams: int = 4) -> dict[str, Tensor]:
    """Off the identity everywhere, so that a transposed h_res or a forgotten stream shows."""
    dtype = torch.float64 if m.dtype == torch.float64 else torch.float32
    return {
        "h_post": m.normal(*rows, streams, dtype=dtype, scale=1.0),
        "h_res": m.normal(*rows, streams, streams, dtype=dtype, scale=0.5),
        "h_pre": m.normal(*rows, streams, dtype=dtype, scale=1.0),
    }


def both(m: Maker, *shape: int, rows: tuple[int, ...] = (), **extra: Any) -> dict[str, Any]:
    """``shape`` is that of hidden."""
    tensors = {"hidden": m.normal(*shape), "branch_out": m.normal(*shape[:-2], shape[-1])}
    return tensors | coefficients(m, *rows, streams=shape[-2]) | extra


def merge(m: Maker, *shape: int, **options: Any) -> dict[str, Any]:
    return {k: v for k, v in both(m, *shape, **options).items() if k != "h_pre"}


def read(m: Maker, *shape: int, **options: Any) -> dict[str, Any]:
    return {k: v for k, v in both(m, *shape, **options).items() if k in ("hidden", "h_pre")}


def strided(m: Maker, *shape: int) -> dict[str, Any]:
    return both(m, *shape) | {
        "hidden": m.normal(shape[0], 1, *shape[2:]).expand(shape),
        "branch_out": m.normal(shape[0], shape[3], shape[1]).transpose(1, 2),
    }


SHAPES = (
    ("layer", "batch × tokens × streams × channels, one set of coefficients", (2, 9, 4, 48), ()),
    ("rows", "a set of coefficients for each batch row", (3, 7, 4, 48), (3,)),
    ("batch is time", "as many rows as tokens: coefficients still go by row", (5, 5, 4, 48), (5,)),
    ("tokens", "a set of coefficients for each token", (2, 5, 4, 48), (2, 5)),
    ("odd", "no dimension is a power of two or a multiple of a vector width", (3, 5, 4, 17), ()),
    ("one token", "decoding", (1, 1, 4, 33), ()),
    ("wide", "several blocks of channels for each token", (1, 2, 4, 2100), ()),
    ("no tokens", "a data-parallel rank without work", (2, 0, 4, 16), ()),
    ("two streams", "served by the reference", (2, 3, 2, 16), ()),
    ("flat tokens", "served by the reference", (6, 4, 16), ()),
    ("two leading", "a document dimension: served by the reference", (2, 3, 4, 4, 16), (2,)),
)

FUSED_ONLY = (
    Case("strided", "expanded and transposed", lambda m: strided(m, 2, 6, 4, 48)),
    Case(
        "mixed rows",
        "h_res for each row, the others shared",
        lambda m: both(m, 3, 4, 4, 48) | {"h_res": coefficients(m, 3)["h_res"]},
    ),
    Case(
        "mixed tokens",
        "h_res for each token, h_post for each row, h_pre shared",
        lambda m: (
            both(m, 3, 4, 4, 48) | {"h_res": coefficients(m, 3, 4)["h_res"], "h_post": coefficients(m, 3)["h_post"]}
        ),
    ),
    Case(
        "fp32 streams",
        "streams in float32 around a branch in the case's dtype",
        lambda m: both(m, 2, 5, 4, 48, hidden=m.normal(2, 5, 4, 48, dtype=torch.float32)),
    ),
)


def cases(build: Any) -> tuple[Case, ...]:
    return tuple(Case(name, why, lambda m, s=shape, r=rows: build(m, *s, rows=r)) for name, why, shape, rows in SHAPES)


def over_tokens(coefficient: Tensor, rank: int, hidden: Tensor) -> Tensor:
    """A copy for every token that has none of its own."""
    lead = hidden.shape[:-2]
    if rank < coefficient.ndim < rank + len(lead):
        coefficient = coefficient[(slice(None), *(None,) * (len(lead) - 1))]
    return coefficient.expand(*lead, *coefficient.shape[-rank:]).to(hidden.dtype)


def merge_oracle(hidden: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    mixed = torch.einsum("...on,...nc->...oc", over_tokens(h_res, 2, hidden), hidden)
    return mixed + torch.einsum("...o,...c->...oc", over_tokens(h_post, 1, hidden), branch_out.to(hidden.dtype))


def read_oracle(hidden: Tensor, h_pre: Tensor) -> Tensor:
    return torch.einsum("...n,...nc->...c", over_tokens(h_pre, 1, hidden), hidden)


def both_oracle(hidden: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor, h_pre: Tensor) -> tuple:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    merged = merge_oracle(hidden.to(wide), branch_out, h_post, h_res)
    return merged.to(hidden.dtype), read_oracle(merged, h_pre).to(hidden.dtype)


def sinkhorn_oracle(
    logits: Tensor, iters: int = 20, temperature: float = 1.0, eps: float = 1e-8, eps_in: str = "sums"
) -> Tensor:
    """On the matrix itself; the largest entry of each row is brought to 1 first, which the first row step undoes."""
    matrix = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    if eps_in == "elements":
        matrix = matrix / matrix.sum(-1, keepdim=True) + eps
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        iters -= 1
    for _ in range(iters):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


# A coefficient's gradient is a running float32 sum of n products of random sign: rounding errors of √n/4.9 units (rms)
# against its own size, 6 for the 864 of the largest layer case, and the yardstick's happen to cancel as often as not.
UNITS = dict.fromkeys((b.name for b in BACKENDS), 6.0)


def compulsory(call: dict[str, Any]) -> tuple[int, int]:
    """Every input once and every output once, each way; the coefficients' gradients too."""
    branch, coefficient = call.get("branch_out"), [v for k, v in call.items() if k.startswith("h_")]
    streams, read = size_of(call["hidden"]), size_of(call["hidden"]) // 4 if "h_pre" in call else 0
    numbers = size_of(*coefficient)
    if branch is None:
        return streams + read + numbers, 2 * streams + read + 2 * numbers
    return 2 * streams + size_of(branch) + read + numbers, 3 * streams + 2 * size_of(branch) + read + 2 * numbers


def suite(function: Any, build: Any, oracle: Any, more: tuple[Case, ...], nonfinite: tuple[str, ...]) -> Suite:
    return Suite(
        op=function.__name__,
        function=function,
        backends=BACKENDS,
        cases=cases(build) + more,
        differentiable=("hidden", "branch_out", "h_post", "h_res", "h_pre"),
        oracle=oracle,
        sized=lambda m, n: build(m, 2, n, 4, 12),
        double_backward=True,
        nonfinite=nonfinite,
        without_gradient=("native",),
        real=lambda m, rows=65536: build(m, 1, rows // 8, 4, 4096),  # a row: the 512 channels of a backward program
        compulsory=compulsory,
        units=UNITS,
    )


SUITES = (
    suite(mhc_branch_input, read, read_oracle, (), ("hidden",)),
    suite(mhc_merge, merge, merge_oracle, (), ("hidden", "branch_out")),
    suite(mhc_merge_and_branch_input, both, both_oracle, FUSED_ONLY, ("hidden", "branch_out")),
    Suite(
        op="sinkhorn",
        function=sinkhorn,
        backends=SINKHORN_BACKENDS,
        cases=(
            Case("streams", "one layer's mixing matrix", lambda m: {"logits": m.normal(4, 4)}),
            Case("layers", "all layers at once", lambda m: {"logits": m.normal(6, 4, 4), "iters": 5, "eps": 1e-6}),
            Case("sharp", "a low temperature", lambda m: {"logits": m.normal(3, 5, 5), "temperature": 0.3}),
            Case(
                "elements",
                "the convention of other kernels",
                lambda m: {"logits": m.normal(3, 4, 4), "iters": 4, "eps": 1e-2, "eps_in": "elements"},
            ),
            Case("one stream", "nothing to mix", lambda m: {"logits": m.normal(1, 1)}),
            Case("no layers", "empty", lambda m: {"logits": m.normal(0, 4, 4)}),
        ),
        differentiable=("logits",),
        oracle=sinkhorn_oracle,
        sized=lambda m, n: {"logits": m.normal(n, 3, 3), "iters": 3},
        double_backward=True,
        scales=(1e-3, 1.0),
    ),
)  # fmt: skip
