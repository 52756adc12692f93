"""Named calls of ``fused_bias_dropout_add``."""

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.boundary.fused_bias_dropout_add.api import BACKENDS, fused_bias_dropout_add


def call(m: Maker, *shape: int, **extra):
    return {"x": m.normal(*shape), "residual": m.normal(*shape), "p": 0.3, "seed": 2**40 + 11} | extra


def with_bias(m: Maker, *shape: int, **extra):
    return call(m, *shape, bias=m.normal(shape[-1]), **extra)


def expanded(m: Maker):
    return with_bias(m, 6, 64) | {"x": m.normal(1, 64).expand(6, 64), "residual": m.normal(6, 1).expand(6, 64)}


def transposed(m: Maker):
    return with_bias(m, 5, 64) | {"x": m.normal(64, 5).t(), "residual": m.normal(64, 5).t()}


def mixed(m: Maker):
    single = {"residual": m.normal(3, 128, dtype=torch.float32), "bias": m.normal(128, dtype=torch.float32)}
    return call(m, 3, 128) | single


def philox(counter: int, key: int) -> list[int]:
    """Philox-4x32-10 on Python's own integers, as the paper states it."""
    c = [counter >> 32 * i & 0xFFFFFFFF for i in range(4)]
    k = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def kept(shape: torch.Size, p: float, seed: int | Tensor | None) -> Tensor:
    """The mask by its definition, element by element."""
    calls: dict[int, list[int]] = {}
    flags = []
    for e in range(shape.numel()):
        block, rest = divmod(e, 64)
        word, lane = divmod(rest, 16)
        number = 16 * block + lane
        if number not in calls:
            calls[number] = philox(number, int(seed or 0) % 2**64)
        flags.append(calls[number][word] >= round(p * 2**32))
    return torch.tensor(flags, dtype=torch.bool).reshape(shape)


def oracle(x, residual, *, bias=None, p=0.0, training=True, seed=None):
    y = x if bias is None else x + bias
    if not training or p == 0:
        return (residual + y).to(residual.dtype)
    keep = kept(x.shape, p, seed)
    dropped = torch.zeros_like(y)
    return (residual + torch.where(keep, y, dropped) / max(1 - p, 0.5 * (p == 1))).to(residual.dtype)


CASES = (
    Case("block", "batch × tokens × channels with bias, as at the end of a block", lambda m: with_bias(m, 2, 24, 128)),
    Case("no bias", "a bias-free projection", lambda m: call(m, 2, 24, 64)),
    Case("flat", "64 divides the count but not the width", lambda m: call(m, 64, 17)),
    Case("ragged", "no dimension is a multiple of the mask's block", lambda m: with_bias(m, 3, 5, 17)),
    Case("ragged, no bias", "the last block of the mask is partial", lambda m: call(m, 5, 33)),
    Case("scalar", "rank 0", lambda m: call(m)),
    Case("empty", "a rank without tokens", lambda m: with_bias(m, 0, 64)),
    Case("empty, ragged", "the same with an odd width", lambda m: with_bias(m, 0, 17)),
    Case("expanded", "strides of 0: the mask goes by the logical index", expanded),
    Case("transposed", "not contiguous: the mask goes by the logical index", transposed),
    Case("mixed", "float32 residual and bias, x in the case's dtype", mixed),
    Case("p=0", "no dropout", lambda m: with_bias(m, 9, 64, p=0.0, seed=None)),
    Case("p=0, no bias", "a bare residual addition", lambda m: call(m, 9, 33, p=0.0, seed=None)),
    Case("p=1", "everything dropped: the residual alone", lambda m: with_bias(m, 9, 64, p=1.0)),
    Case("eval", "training=False ignores p", lambda m: with_bias(m, 9, 64, training=False, seed=None)),
    Case("negative seed", "every 64-bit pattern is a seed", lambda m: with_bias(m, 9, 64, seed=-5)),
    Case("tensor seed", "as under CUDA graphs", lambda m: with_bias(m, 9, 64, seed=m.integers(0, 99, 1))),
)

SUITES = (
    Suite(
        op="fused_bias_dropout_add", function=fused_bias_dropout_add, backends=BACKENDS, cases=CASES,
        differentiable=("x", "residual", "bias"), oracle=oracle, sized=lambda m, n: with_bias(m, n, 24),
        real=lambda m, rows=8192: with_bias(m, rows, 4096, p=0.1),
        compulsory=lambda call: (
            size_of(call["x"], call["bias"]) + 2 * size_of(call["residual"]),
            size_of(call["x"], call["residual"], call["bias"]),
        ),
        double_backward=True, nonfinite=("x", "residual", "bias"),
    ),
)  # fmt: skip
