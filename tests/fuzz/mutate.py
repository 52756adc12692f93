"""Ways in which an argument goes wrong, or looks strange and is not."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from tests.fuzz.contracts import tree_fields, valid

DTYPES = (torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64, torch.uint8)
SCALARS = (
    *(None, -1, 0, 1, 2, 7, 10**5, -(10**30), 0.5, -0.5, 1e-30, float("nan"), float("inf")),
    *(True, "auto", (), [1, 2], 1j),
)


def _cut_to_one(t: Tensor, rng: random.Random) -> Tensor:
    return t.narrow(rng.randrange(t.ndim), 0, 1) if t.numel() and t.ndim else t


def _doubled(t: Tensor, rng: random.Random) -> Tensor:
    return torch.cat([t, t], rng.randrange(t.ndim)) if t.ndim else t.expand(2)


def _swapped(t: Tensor, rng: random.Random) -> Tensor:
    return t.transpose(rng.randrange(t.ndim), rng.randrange(t.ndim)) if t.ndim else t


def _emptied(t: Tensor, rng: random.Random) -> Tensor:
    return t.narrow(rng.randrange(t.ndim), 0, 0) if t.ndim else t


SHAPES: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "a leading dimension more": lambda t, rng: t[None],
    "a trailing dimension more": lambda t, rng: t[..., None],
    "a dimension less": lambda t, rng: t[0] if t.ndim and t.shape[0] else t.reshape(-1),
    "flat": lambda t, rng: t.reshape(-1),
    "a dimension of one": _cut_to_one,
    "a dimension doubled": _doubled,
    "dimensions swapped": _swapped,
    "a dimension of zero": _emptied,
}

TYPES: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "another dtype": lambda t, rng: t.to(rng.choice(DTYPES)),
    "on the meta device": lambda t, rng: t.to("meta"),
    "a list": lambda t, rng: t.tolist(),
    "a scalar": lambda t, rng: rng.choice(SCALARS),
    "sparse": lambda t, rng: t.to_sparse() if t.ndim else t,
    "quantised": lambda t, rng: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
}

ODD_BUT_LEGAL: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "strided": lambda t, rng: torch.stack([t, t], -1)[..., 0],
    "back to front in memory": lambda t, rng: t.flip(0).contiguous().flip(0) if t.ndim else t,
    "a view into the middle": lambda t, rng: torch.cat([t.reshape(-1)[:0], t.reshape(-1)]).view(t.shape),
    "needs a gradient": lambda t, rng: t.clone().requires_grad_() if t.is_floating_point() else t,
    "a parameter": lambda t, rng: torch.nn.Parameter(t.clone(), requires_grad=t.is_floating_point()),
    "large": lambda t, rng: t * 30 if t.is_floating_point() else t,
    "small": lambda t, rng: t * 1e-4 if t.is_floating_point() else t,
    "zeros": lambda t, rng: torch.zeros_like(t) if t.is_floating_point() else t,
}

NOT_FINITE: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "an inf": lambda t, rng: _with(t, rng, float("inf")),
    "a NaN": lambda t, rng: _with(t, rng, float("nan")),
}


def _with(t: Tensor, rng: random.Random, value: float) -> Tensor:
    if not t.is_floating_point() or not t.numel():
        return t
    other = t.clone().reshape(-1)
    other[rng.randrange(t.numel())] = value
    return other.view(t.shape)


def some_mask(rng: random.Random, batch: int, keys: int) -> Any:
    """A contract that may or may not fit a call of these sizes, or no contract at all."""
    docs = torch.tensor([[rng.randrange(-1, 3) for _ in range(keys)] for _ in range(batch)], dtype=torch.int64)
    counts = [rng.randrange(keys + 2) for _ in range(batch)]
    return rng.choice(
        [
            lambda: ki.MaskContract(rng.random() < 0.5, (rng.choice([None, -1, 0, 3]), rng.choice([None, 0, 2]))),
            lambda: ki.MaskContract(doc_ids=docs.sort(-1).values),
            lambda: ki.MaskContract(doc_ids=docs),
            lambda: ki.MaskContract(validity=ki.attention_validity(valid_token_counts=torch.tensor(counts))),
            lambda: ki.MaskContract(q_offset=rng.randrange(-3, 4)),
            lambda: _some_tree(rng, batch, keys, docs),
            lambda: _some_tree(rng, batch, keys, docs),
            lambda: ki.MaskContract(prefix=rng.choice([2, torch.tensor(counts)])),
            lambda: ki.MaskContract(rng.random() < 0.5, key_validity=valid(rng, batch, keys)),
            lambda: ki.MaskContract.from_cu_seqlens(
                torch.tensor([0, keys // 3, keys]), window=(rng.choice([None, 2]), 0)
            ),
            lambda: ki.MaskContract(doc_ids=docs[:, :-1]),
            lambda: docs,
            lambda: None,
        ]
    )()


def _some_tree(rng: random.Random, batch: int, keys: int, docs: Tensor) -> ki.MaskContract:
    """A tree, often with a window along its paths, documents and valid prefixes."""
    more = rng.choice([{}, {"doc_ids": docs.sort(-1).values}, {"doc_ids": docs}, {"validity": valid(rng, batch, keys)}])
    return ki.MaskContract(window=(rng.choice([None, 0, 3]), 0), **tree_fields(rng, batch, keys), **more)


def mutated(rng: random.Random, kwargs: dict[str, Any], junk: bool = True) -> tuple[dict[str, Any], str]:
    """The call with one argument changed, and the kind of change: legal, not finite, or anything."""
    name = rng.choice(sorted(kwargs))
    value = kwargs[name]
    if not junk and not isinstance(value, Tensor):
        return kwargs, "legal"
    if isinstance(value, ki.MaskContract):
        leading = next((v for v in kwargs.values() if isinstance(v, Tensor)), torch.empty(2, 6))
        batch, keys = (leading.shape[0], leading.shape[1]) if leading.ndim > 1 else (1, 4)
        return {**kwargs, name: some_mask(rng, batch, keys)}, "anything"
    if isinstance(value, dict) and rng.random() < 0.7:  # a key that is wrong, or one that nobody knows
        return {**kwargs, name: {**value, rng.choice([*sorted(value), "factor", "x"]): rng.choice(SCALARS)}}, "anything"
    if not isinstance(value, Tensor):
        return {**kwargs, name: rng.choice(SCALARS)}, "anything"
    kind, table = rng.choice([
        ("anything", SHAPES), ("anything", SHAPES), ("anything", TYPES), ("legal", ODD_BUT_LEGAL),
        ("not finite", NOT_FINITE),
    ] if junk else [("legal", ODD_BUT_LEGAL), ("not finite", NOT_FINITE)])  # fmt: skip
    return {**kwargs, name: table[rng.choice(sorted(table))](value, rng)}, kind
