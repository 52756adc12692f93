"""Named calls of ``fused_residual_add_rms_norm``."""

import torch

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.boundary.fused_residual_add_rms_norm.api import BACKENDS, fused_residual_add_rms_norm


def call(m: Maker, *shape: int, **extra):
    return {"residual": m.normal(*shape), "delta": m.normal(*shape), "weight": m.normal(shape[-1], scale=1.0)} | extra


def expanded(m: Maker):
    return call(m, 6, 40) | {"residual": m.normal(1, 40).expand(6, 40), "delta": m.normal(6, 1).expand(6, 40)}


def transposed(m: Maker):
    return call(m, 5, 24) | {"residual": m.normal(24, 5).t(), "delta": m.normal(24, 5).t()}


def mixed(m: Maker):
    single = {"residual": m.normal(7, 48, dtype=torch.float32), "weight": m.normal(48, dtype=torch.float32)}
    return call(m, 7, 48, fp32_residual=True) | single


def oracle(residual, delta, weight, *, scale=1.0, eps=1e-8, fp32_residual=False, weight_offset=0.0):
    stream = residual + delta * scale
    if fp32_residual and stream.dtype != torch.float64:
        stream = residual.float() + delta.float() * scale
    rms = torch.sqrt((stream * stream).sum(-1, keepdim=True) / stream.shape[-1] + eps)
    normed = (stream / rms) * (weight_offset + weight)
    if torch.float64 not in (residual.dtype, delta.dtype):
        stream = stream.to(torch.float32 if fp32_residual else residual.dtype)
    return stream, normed.to(delta.dtype)


def compulsory(call):
    """Forward reads residual, delta, weight; backward new_residual and two gradients, and writes one for both."""
    residual, delta, weight = call["residual"], call["delta"], call["weight"]
    per_row = 4 * (residual.numel() // residual.shape[-1])  # 1/rms
    forward = 2 * size_of(residual) + 2 * size_of(delta) + size_of(weight) + per_row
    return forward, 3 * size_of(residual) + size_of(delta) + 2 * size_of(weight) + per_row


CASES = (
    Case("block", "batch × tokens × channels, as between two blocks", lambda m: call(m, 2, 24, 96)),
    Case("odd", "no dimension is a multiple of a vector width", lambda m: call(m, 3, 5, 17)),
    Case("one row", "rank 1: a single token in decoding", lambda m: call(m, 33)),
    Case("one channel", "every value becomes its own sign", lambda m: call(m, 6, 1)),
    Case("no rows", "a data-parallel rank without tokens", lambda m: call(m, 0, 64)),
    Case("expanded", "strides of 0", expanded),
    Case("transposed", "not contiguous", transposed),
    Case("wide", "a row of more than 64 KB in every dtype", lambda m: call(m, 2, 33_000)),
    Case("number", "a fixed scale, as in depth-scaled residuals", lambda m: call(m, 9, 32, scale=0.25)),
    Case("learned", "a learned scale with a gradient", lambda m: call(m, 9, 32, scale=m.normal(scale=1.0))),
    Case("one learned", "a parameter of one element", lambda m: call(m, 9, 32, scale=m.normal(1, scale=1.0))),
    Case("layer-scale", "one learned scale for each channel", lambda m: call(m, 9, 32, scale=m.normal(32, scale=1.0))),
    Case("offset", "weights stored around zero", lambda m: call(m, 9, 32, weight_offset=1.0, eps=1e-5)),
    Case("fp32 stream", "the first block: the stream becomes float32", lambda m: call(m, 9, 48, fp32_residual=True)),
    Case("mixed", "float32 stream and weight, delta in the case's dtype", mixed),
)

SUITES = (
    Suite(
        op="fused_residual_add_rms_norm", function=fused_residual_add_rms_norm, backends=BACKENDS,
        cases=CASES, differentiable=("residual", "delta", "weight", "scale"), oracle=oracle,
        sized=lambda m, n: call(m, n, 24, scale=m.normal(scale=1.0)),
        real=lambda m, rows=8192: call(m, rows, 4096), compulsory=compulsory, double_backward=True,
        nonfinite=("residual", "delta", "weight"), without_gradient=("native",),
    ),
)  # fmt: skip
