"""Named calls of ``expert_route``."""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.experts.expert_router.api import BACKENDS, expert_route


def call(m: Maker, tokens: int, width: int, count: int, topk: int, **more: Any) -> dict[str, Any]:
    wide = torch.promote_types(m.dtype, torch.float32)
    found: dict[str, Any] = {
        "x": m.normal(tokens, width),
        "weight": m.normal(count, width, dtype=wide, scale=width**-0.5),
        "bias": m.normal(count, dtype=wide, scale=0.1),
        "topk": topk,
    }
    return found | more


def routed(*, backend: Any = "auto", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The weights, and experts and load as numbers."""
    experts, weights, load = expert_route(**kwargs, backend=backend)
    return weights, torch.cat((experts.flatten(), load)).to(torch.float32)


def oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None, topk: int, *, scores: str = "sigmoid"
) -> tuple[Tensor, Tensor]:
    """Expert by expert: a score is its share of exponentials; its rank is how many are better."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    z = torch.stack([(x.to(dtype) * w.to(dtype)).sum(-1) for w in weight], -1)
    e = torch.exp(z)
    score = e / e.sum(-1, keepdim=True) if scores == "softmax" else e / (1 + e)
    key = score.detach() if bias is None else score.detach() + bias
    index = torch.arange(len(weight))
    better = (key[:, None, :] > key[:, :, None]) | ((key[:, None, :] == key[:, :, None]) & (index < index[:, None]))
    rank = better.sum(-1)
    experts = rank.sort(-1).indices[:, :topk]  # ranks differ
    weights = torch.stack([score[torch.arange(len(x)), experts[:, j]] for j in range(topk)], -1)
    if topk > 1 or len(weight) == 1:
        weights = weights / weights.sum(-1, keepdim=True)
    load = torch.bincount(experts.flatten(), minlength=len(weight))
    return weights.to(torch.promote_types(weights.dtype, torch.float32)), torch.cat((experts.flatten(), load)).float()


CASES = (
    Case("two of five", "sigmoid scores, two tiles of tokens", lambda m: call(m, 70, 40, 5, 2)),
    Case("softmax", "scores that depend on all experts", lambda m: call(m, 19, 24, 20, 3, scores="softmax")),
    Case("switch", "topk 1: the weight is the score itself", lambda m: call(m, 17, 33, 4, 1)),
    Case("all", "every expert, without a bias", lambda m: call(m, 9, 70, 6, 6, bias=None)),
    Case("none", "no token", lambda m: call(m, 0, 16, 4, 2)),
    Case("transposed", "not contiguous, a weight in the dtype of x", lambda m: call(m, 8, 12, 4, 2) | {
        "x": m.normal(12, 8).t(), "weight": m.normal(4, 12)}),
    Case("half", "many channels, a weight in the dtype of x", lambda m: call(m, 130, 320, 16, 2) | {
        "weight": m.normal(16, 320)}),
)  # fmt: skip


def compulsory(kwargs: dict[str, Any]) -> tuple[int, int]:
    x, weight = kwargs["x"], kwargs["weight"]
    routing = 12 * len(x) * kwargs["topk"]
    scores = 4 * len(x) * len(weight)
    return size_of(x, weight) + routing + scores + 8 * len(weight), 2 * size_of(x, weight) + routing + scores


SUITES = (
    Suite(
        op="expert_route", function=routed, backends=BACKENDS, cases=CASES, differentiable=("x", "weight"),
        oracle=oracle, sized=lambda m, n: call(m, n, 24, 4, 2), scales=(1.0,),
        real=lambda m, rows=32768: call(m, rows, 512, 16, 2), compulsory=compulsory,
    ),
)  # fmt: skip
