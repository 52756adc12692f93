"""Named calls of ``fused_linear_cross_entropy``, with and without the log-sum-exp, and of ``token_log_probs``
and ``token_stats``."""

import math
from typing import Any

import torch
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.api import (
    BACKENDS,
    STATS_BACKENDS,
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_with_lse,
    token_log_probs,
    token_stats,
)


def call(m: Maker, shape: tuple[int, ...], width: int, vocab: int, classes: int | None = None, **options: Any) -> dict:
    """Inputs whose logits have about unit scale times the maker's; one target in four is ignored."""
    targets = m.integers(0, classes or vocab, *shape)
    ignored = m.integers(0, 4, *shape) == 0
    return {
        "hidden": m.normal(*shape, width),
        "weight": m.normal(vocab, width, scale=width**-0.5),
        "targets": torch.where(ignored, options.get("ignore_index", -100), targets),
        **options,
    }


CASES = (
    Case("batch", "a batch of rows, two chunks and a ragged one", lambda m: call(m, (4, 9), 24, 50, chunk_size=15)),
    Case("sum", "the reduction of gradient accumulation", lambda m: call(m, (17,), 16, 33, reduction="sum")),
    Case(
        "per token",
        "policy losses weigh every token on its own",
        lambda m: call(m, (3, 11), 16, 33, reduction="none", chunk_size=7),
    ),
    Case(
        "every option",
        "bias, softcap, scale, smoothing, z-loss and a padded vocabulary at once",
        lambda m: {
            **call(m, (23,), 16, 40, 37, softcap=15.0, logit_scale=0.5, label_smoothing=0.1, z_loss=1e-3),
            "bias": m.normal(40),
            "valid_vocab": 37,
            "chunk_size": 8,
        },
    ),
    Case("one token", "a chunk of one row", lambda m: call(m, (1,), 8, 5, ignore_index=-1)),
    Case("no tokens", "an empty microbatch", lambda m: call(m, (0,), 8, 5)),
    Case(
        "all ignored",
        "a microbatch of padding",
        lambda m: {**call(m, (5,), 8, 6), "targets": torch.full((5,), -100, device=m.device)},
    ),
    Case(
        "transposed",
        "a weight stored the other way round",
        lambda m: {**call(m, (13,), 12, 30), "weight": m.normal(12, 30).t()},
    ),
)


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias)[..., :valid_vocab] * logit_scale
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else (z / softcap).tanh() * softcap


def oracle(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    """PyTorch's own cross-entropy on full logits, the z-loss beside it."""
    z = full_logits(hidden, weight, bias, softcap, logit_scale, valid_vocab).flatten(0, -2)
    kept = targets.flatten() != ignore_index
    flat = torch.nn.functional.cross_entropy(
        z, targets.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    flat = flat + kept * z_loss * torch.logsumexp(z, -1) ** 2
    if reduction == "none":
        return flat.reshape(targets.shape)
    return flat.sum() if reduction == "sum" else flat.sum() / max(1, int(kept.sum()))


def oracle_with_lse(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float = 0.0, reduction: str = "mean", **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss beside the log-sum-exp of full logits; the z-loss is a square of the latter."""
    loss = oracle(hidden, weight, targets, **options, z_loss=z_loss, reduction=reduction)
    named = {n: options[n] for n in ("bias", "softcap", "logit_scale", "valid_vocab") if n in options}
    kept = targets != options.get("ignore_index", -100)
    lse = torch.logsumexp(full_logits(hidden, weight, **named), -1) * kept
    squares = z_loss * lse**2
    if reduction != "none":
        squares = squares.sum() / (1 if reduction == "sum" else max(1, int(kept.sum())))
    return loss, lse, squares


def oracle_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return -oracle(hidden, weight, targets, **options, reduction="none")


def sampled(m: Maker, tokens: int, vocab: int, equal: int = 1, **options: Any) -> dict[str, Any]:
    """Logits that every dtype holds exactly, a quarter apart: no rounding changes which classes are kept.

    ``equal`` classes have each logit.
    """
    order = torch.stack([torch.randperm(vocab, generator=m.generator) for _ in range(tokens)], -1)
    return {
        "hidden": torch.eye(tokens, dtype=m.dtype, device=m.device) * m.scale,
        "weight": (order // equal).to(device=m.device, dtype=m.dtype) / 4,
        "targets": torch.where(m.integers(0, 4, tokens) == 0, -100, m.integers(0, vocab, tokens)),
        **options,
    }


STATS_CASES = (
    Case("sampled", "a rollout", lambda m: sampled(m, 9, 32, temperature=0.7, top_k=20, top_p=0.7)),
    Case("plain", "entropy and log-probability alone", lambda m: call(m, (3, 11), 16, 40)),
    Case(
        "capped",
        "a capped head with bias and padded classes",
        lambda m: {
            **call(m, (11,), 16, 40, 37, softcap=10.0, temperature=1.5),
            "bias": m.normal(40),
            "valid_vocab": 37,
        },
    ),
    Case("nucleus", "top_p alone has no sorted logits", lambda m: sampled(m, 9, 32, top_p=0.9, softcap=30.0)),
    Case("ties", "the last class kept has equals", lambda m: sampled(m, 7, 30, equal=3, top_k=7)),
    Case("ties of a nucleus", "as before, by mass", lambda m: sampled(m, 7, 30, equal=3, top_p=0.7)),
    Case("no tokens", "an empty microbatch", lambda m: call(m, (0,), 8, 5, top_k=2, top_p=0.5)),
)


def sampled_classes(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[int]:
    """One at a time, as a sampler might: by falling logit, then by index, until the mass is reached."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))[:top_k]
    weights = [math.exp(min(0.0, (logits[v] - logits[order[0]]) / temperature)) for v in order]
    kept, before = [], 0.0
    for v, weight in zip(order, weights, strict=True):
        if kept and before >= top_p * sum(weights):
            break
        kept.append(v)
        before += weight
    return kept


def oracle_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    top_k: int | None = None,
    top_p: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = full_logits(hidden, weight, **options)
    rows = [sampled_classes(row, temperature, top_k, top_p or 1.0) for row in logits.flatten(0, -2).tolist()]
    outside = torch.ones_like(logits, dtype=torch.bool).flatten(0, -2)
    for kept, row in zip(outside, rows, strict=True):
        kept[row] = False
    x = logits / temperature
    log_p = x - torch.logsumexp(x, -1, keepdim=True)
    there = targets != ignore_index
    chosen = log_p.gather(-1, torch.where(there, targets, 0)[..., None])[..., 0]
    entropy = torch.distributions.Categorical(logits=x, validate_args=False).entropy()
    support = torch.logsumexp(log_p.masked_fill(outside.view(log_p.shape), -torch.inf), -1)
    if top_k is None and top_p is None:
        support = support.detach() * 0.0
    return chosen * there, entropy * there, support * there, logits.argmax(-1)


SUITES = (
    Suite(
        op="fused_linear_cross_entropy", function=fused_linear_cross_entropy, backends=BACKENDS, cases=CASES,
        differentiable=("hidden", "weight", "bias"), oracle=oracle,
        sized=lambda m, n: {**call(m, (n,), 16, 20), "chunk_size": 4},
        real=lambda m: call(m, (8192,), 4096, 128256), rounding=("triton", "inductor", "chunked"),
        scales=(1e-3, 1.0, 16.0),  # at 300 every softmax is one-hot and only overflow would be left to see
    ),
    Suite(
        op="fused_linear_cross_entropy_with_lse", function=fused_linear_cross_entropy_with_lse, backends=BACKENDS,
        cases=(
            Case("mean", "a z-loss of its own weight", lambda m: call(m, (2, 13), 8, 20, chunk_size=9, z_loss=1e-2)),
            *(c for c in CASES if c.name in ("per token", "every option", "no tokens", "all ignored")),
        ),
        differentiable=("hidden", "weight", "bias"), oracle=oracle_with_lse,
        sized=lambda m, n: {**call(m, (n,), 16, 20), "chunk_size": 4, "z_loss": 1e-2},
        rounding=("triton", "inductor", "chunked"), scales=(1e-3, 1.0),
        # At 16, logits are near 50 and ``triton`` forms them twice, by products that add in different orders: what it
        # recomputes of p is wrong by more units than a plain formula's p, whose errors cancel in the softmax.
    ),
    Suite(
        op="token_log_probs",
        function=token_log_probs,
        backends=BACKENDS,
        cases=(
            Case("rollout", "log-probabilities of sampled tokens", lambda m: call(m, (2, 13), 16, 40, chunk_size=9)),
            Case(
                "capped",
                "a capped, scaled head with padded classes",
                lambda m: {
                    **call(m, (11,), 16, 40, 37, softcap=10.0, logit_scale=1.5),
                    "bias": m.normal(40),
                    "valid_vocab": 37,
                },
            ),
        ),
        differentiable=("hidden", "weight", "bias"),
        oracle=oracle_log_probs,
        sized=lambda m, n: {**call(m, (n,), 16, 20), "chunk_size": 4},
        rounding=("triton", "inductor", "chunked"),
        scales=(1e-3, 1.0, 16.0),
    ),
    Suite(
        op="token_stats", function=token_stats, backends=STATS_BACKENDS, cases=STATS_CASES,
        differentiable=("hidden", "weight", "bias"), oracle=oracle_stats,
        sized=lambda m, n: {**call(m, (n,), 16, 20), "top_k": 12, "top_p": 0.8},
        rounding=("triton", "chunked"), scales=(1e-3, 1.0, 16.0),
    ),
)  # fmt: skip
