"""Named calls of ``causal_conv1d``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.state_space.causal_conv1d.api import BACKENDS, causal_conv1d


def call(m: Maker, B: int, T: int, C: int, taps: int = 4, *, low: bool = False, **more: Any) -> dict[str, Any]:
    """The weight of float32 that a layer has, or with ``low`` x's dtype."""
    wide = m.dtype if low else torch.promote_types(m.dtype, torch.float32)
    found = {"x": m.normal(B, T, C), "weight": m.normal(C, taps, dtype=wide, scale=0.5)}
    drawn = {
        "bias": lambda: m.normal(C, dtype=wide, scale=1.0),
        "state": lambda: m.normal(B, taps - 1, C),
    }
    return found | {k: drawn[k]() if k in drawn and v is True else v for k, v in more.items()}


def documents(m: Maker, *rows: list[int]) -> Tensor:
    found = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    return torch.stack(found).to(m.device)


def layer(m: Maker, B: int, T: int, C: int, **more: Any) -> dict[str, Any]:
    return call(m, B, T, C, activation="silu", **more)


def part_of_a_projection(m: Maker) -> dict[str, Any]:
    """x is a slice of the projection's output, the weight transposed from [W, C]."""
    found = layer(m, 2, 9, 24)
    return found | {"x": m.normal(2, 9, 40)[..., 8:32], "weight": found["weight"].T.contiguous().T}


def oracle(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, activation: str | None = None,
    segments: Tensor | None = None, state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """PyTorch's own convolution, of each document by itself."""
    B, T, C = x.shape
    taps, wide = weight.shape[1], torch.promote_types(x.dtype, weight.dtype)
    weight_C1W = weight.to(wide)[:, None]
    rows = []
    for row in range(B):
        ids = torch.zeros(T, dtype=torch.int64) if segments is None else segments[row % len(segments)]
        lengths = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
        pieces = []
        for at, piece_TC in enumerate(x[row].to(wide).split(lengths)):
            before = x.new_zeros(taps - 1, C) if state is None or at else state[row]
            padded = torch.cat([before.to(wide), piece_TC]).T[None]
            pieces.append(F.conv1d(padded, weight_C1W, bias if bias is None else bias.to(wide), groups=C)[0].T)
        rows.append(torch.cat(pieces))
    z = torch.stack(rows) if rows else x.to(wide) * weight.to(wide).sum()
    return (z if activation is None else z * torch.sigmoid(z)).to(x.dtype)


def compulsory(kwargs: dict[str, Any]) -> tuple[int, int]:
    x = size_of(kwargs["x"])
    rest = size_of(kwargs["weight"], kwargs.get("bias"))
    return 2 * x + rest, 3 * x + 2 * rest


CASES = (
    Case("layer", "four taps and silu", lambda m: layer(m, 2, 37, 48)),
    Case("bias", "no activation", lambda m: call(m, 2, 20, 33, bias=True)),
    Case("documents", "resets at neighbouring tokens", lambda m: layer(
        m, 2, 20, 24, bias=True, segments=documents(m, [3, 1, 1, 15], [16, 4]))),
    Case("same documents", "one row of segments for all", lambda m: layer(m, 3, 9, 8, segments=documents(m, [4, 5]))),
    Case("continued", "inputs before the first token", lambda m: layer(m, 2, 18, 24, state=True)),
    Case("continued documents", "which the first document alone sees", lambda m: layer(
        m, 2, 18, 24, state=True, segments=documents(m, [2, 16], [1, 17]))),
    Case("a step", "one token of decoding", lambda m: layer(m, 3, 1, 24, state=True, bias=True)),
    Case("two taps", "fewer tokens than a tile", lambda m: call(m, 2, 3, 17, 2, low=True)),
    Case("eight taps", "wider than the Triton kernels take", lambda m: layer(m, 1, 21, 9, taps=8, state=True)),
    Case("three taps", "an odd filter over two runs", lambda m: layer(m, 1, 150, 9, taps=3, state=True, bias=True)),
    Case("one tap", "a product for each token", lambda m: layer(m, 2, 6, 5, taps=1)),
    Case("part of a projection", "x and weight are strided", part_of_a_projection),
    Case("no rows", "a data-parallel rank without tokens", lambda m: layer(m, 0, 4, 8)),
)  # fmt: skip

SUITES = (
    Suite(
        op="causal_conv1d", function=causal_conv1d, backends=BACKENDS, cases=CASES,
        differentiable=("x", "weight", "bias", "state"), oracle=oracle,
        sized=lambda m, n: layer(m, 2, n, 5, bias=True, state=True, segments=documents(m, [2, n - 2])),
        real=lambda m, rows=8192: layer(m, 1, rows, 4352),
    ),
)  # fmt: skip
