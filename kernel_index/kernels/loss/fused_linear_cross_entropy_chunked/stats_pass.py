"""The formulas of ``token_stats`` over rows of logits: statistics, and their gradient in place.  See the README."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.products import (
    Products,
    all_reduce,
    by_name,
    exact_dtype,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.support import kept, kept_below


class Constants(NamedTuple):
    """What is the same for every row: this process has ``vocab`` classes from ``first_class`` on, others the rest.

    ``width`` is the most classes that a process has; ``top_k`` 0 and ``top_p`` 1 do not truncate.  ``as_loss``: the
    log-probability is computed as the loss computes it, whose bits it then has.
    """

    softcap: float
    temperature: float
    top_k: int
    top_p: float
    vocab: int
    first_class: int
    width: int
    group: str
    passes: str
    as_loss: bool = False

    @property
    def products(self) -> Products:
        return by_name(self.passes)[0]

    @property
    def functions(self) -> Any:
        return by_name(self.passes)[1]

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1

    def reduced(self, value: Tensor, how: str) -> Tensor:
        return all_reduce(value, how, self.group) if self.group else value


FLOATS = 8
"""log_prob, entropy, log_support, row_max, log_sum, 1 − p of the target, dropped / kept mass, smallest logit kept."""
INTS = 2
"""Predicted class, and how many of the classes that have the smallest logit kept are kept here."""


def _capped(z: Tensor, c: Constants) -> tuple[Tensor, Tensor]:
    """Capped logits, −0 as 0, and tanh."""
    x = z.to(exact_dtype(z))
    t = c.functions.tanh(x / c.softcap) if c.softcap else x
    return (c.softcap * t if c.softcap else x) + 0.0, t


def _is(columns: Tensor, which: Tensor) -> Tensor:
    return columns == which[:, None]


def statistics(z: Tensor, targets: Tensor, c: Constants) -> tuple[Tensor, Tensor]:
    """[rows, FLOATS] and [rows, INTS] of rows of logits; ``targets`` count from the first class here."""
    f = c.functions
    x, _ = _capped(z, c)
    columns = torch.arange(x.shape[1], device=x.device)
    row_max, predicted = _argmax(x, c)
    y = (x - row_max[:, None]) / c.temperature
    e = f.exp(y)
    # Sums without the largest and without the target: log1p and 1 − p of a near certain class do not cancel.
    is_target = _is(columns, targets)
    others = f.row_sum(torch.where(_is(columns, predicted - c.first_class), 0.0, e))
    but_target = f.row_sum(torch.where(is_target, 0.0, e))
    target_y = torch.where(is_target, y, 0.0).sum(-1)
    mean_y = f.row_sum(torch.where(e > 0, e * y, 0.0))
    others, but_target, target_y, mean_y = c.reduced(torch.stack((others, but_target, target_y, mean_y)), "sum")
    row_sum, log_sum = 1 + others, f.log1p(others)
    entropy = log_sum - mean_y / row_sum
    log_support, ratio, smallest = (torch.zeros_like(log_sum) for _ in range(3))
    equals = torch.zeros_like(predicted)
    if c.truncates:
        smallest, equals = kept_below(x, y, row_sum, c.top_k, c.top_p, c.group, f)
        inside = kept(x, smallest, equals)
        sums = torch.stack((f.row_sum(torch.where(inside, 0.0, e)), f.row_sum(torch.where(inside, e, 0.0))))
        dropped, held = c.reduced(sums, "sum")
        ratio = dropped / held
        log_support = torch.where(dropped < held, f.log1p(-dropped / row_sum), f.log(held / row_sum))
    floats = (target_y - log_sum, entropy, log_support, row_max, log_sum, but_target / row_sum, ratio, smallest)
    return torch.stack(floats, -1), torch.stack((predicted, equals), -1)


def _argmax(x: Tensor, c: Constants) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and its class, the smallest one among equals."""
    if x.shape[1]:
        best, at = x.max(-1)
    else:
        best, at = x.new_full(x.shape[:1], -torch.inf), torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    if not c.group:
        return best, at
    row_max = c.reduced(best, "max")
    at = torch.where((best == row_max) | best.isnan(), at + c.first_class, 2**31 if x.shape[1] else 2**32)
    return row_max, c.reduced(at, "min")


def gradient(z: Tensor, targets: Tensor, upstream: Tensor, floats: Tensor, ints: Tensor, c: Constants) -> None:
    """z becomes its gradient; ``upstream`` [rows, 3] are those of log_prob, entropy and log_support."""
    _, entropy, _, row_max, log_sum, missing, ratio, smallest = (v[:, None] for v in floats.unbind(-1))
    of_log_prob, of_entropy, of_support = (v[:, None] for v in upstream.unbind(-1))
    x, t = _capped(z, c)
    log_p = (x - row_max) / c.temperature - log_sum
    p = c.functions.exp(log_p)
    is_target = _is(torch.arange(x.shape[1], device=x.device), targets)
    d = of_log_prob * torch.where(is_target, missing, -p)
    d = d - of_entropy * torch.where(p > 0, p * (log_p + entropy), 0.0)
    if c.truncates:
        inside = kept(x, smallest[:, 0], ints[:, 1])
        d = d + of_support * p * torch.where(inside, ratio, -1.0)
    if c.softcap:
        d = d * (1 - t * t)
    unused = (of_log_prob == 0) & (of_entropy == 0) & (of_support == 0)  # such a row may hold NaN
    z.copy_(torch.where(unused, 0.0, d / c.temperature))
