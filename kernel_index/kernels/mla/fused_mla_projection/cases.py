"""Named calls of ``fused_mla_projection``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.kernels.mla.fused_mla_projection.api import BACKENDS, fused_mla_projection


def call(m: Maker, shape: tuple[int, ...], latent: int, out: int, **options: Any) -> dict[str, Any]:
    """Weights that keep the scale: the case's scale is that of x alone."""
    return {
        "x": m.normal(*shape),
        "w_down": m.normal(latent, shape[-1], scale=shape[-1] ** -0.5),
        "w_up": m.normal(out, latent, scale=latent**-0.5),
        "norm_weight": m.uniform(0.5, 1.5, latent),
        **options,
    }


def strided(m: Maker) -> dict[str, Any]:
    return call(m, (3, 7, 24), 16, 20) | {
        "x": m.normal(24, 7, 3).permute(2, 1, 0),
        "w_down": m.normal(24, 16, scale=0.2).t(),
        "w_up": m.normal(1, 16, scale=0.25).expand(20, 16),
    }


def oracle(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    recompute: str = "latent",
) -> Tensor:
    """PyTorch's own layers."""
    latent = torch.nn.functional.linear(x, w_down)
    weight = None if norm_weight is None else norm_weight.to(latent.dtype)
    return torch.nn.functional.linear(torch.nn.functional.rms_norm(latent, latent.shape[-1:], weight, eps), w_up)


CASES = (
    Case(
        "queries",
        "batch × tokens × channels to a narrow latent and out to the heads",
        lambda m: call(m, (2, 9, 64), 32, 96),
    ),
    Case("keep the latent", "recompute only the norm", lambda m: call(m, (2, 9, 64), 32, 96, recompute="norm")),
    Case("keep all", "recompute nothing", lambda m: call(m, (2, 9, 64), 32, 96, recompute="none")),
    Case("no weight", "a norm without weight", lambda m: call(m, (11, 64), 32, 48, norm_weight=None)),
    Case("odd", "no dimension is a multiple of a vector width", lambda m: call(m, (3, 5, 17), 13, 19, eps=1e-5)),
    Case("one token", "rank 1: a single token in decoding", lambda m: call(m, (33,), 24, 40)),
    # eps of the latent's size: with a small one the gradient of a sign is nothing but what cancellation leaves
    Case("one channel", "every latent becomes nearly its own sign", lambda m: call(m, (6, 8), 1, 5, eps=0.3)),
    Case("no tokens", "a data-parallel rank without work", lambda m: call(m, (2, 0, 16), 8, 12)),
    Case("strided", "permuted, transposed and expanded", strided),
    Case(
        "float32 norm",
        "the norm's weight in float32 beside products in the case's dtype",
        lambda m: call(m, (9, 64), 32, 48, norm_weight=m.uniform(0.5, 1.5, 32, dtype=torch.float32)),
    ),
)

SUITES = (
    Suite(
        op="fused_mla_projection", function=fused_mla_projection, backends=BACKENDS, cases=CASES,
        differentiable=("x", "w_down", "w_up", "norm_weight"), oracle=oracle,
        sized=lambda m, n: call(m, (n, 12), 6, 8),
        double_backward=True, rounding=("triton", "inductor", "eager"),
        real=lambda m, rows=8192: call(m, (rows, 7168), 1536, 24576),
    ),
)  # fmt: skip
