"""Attention whose rows do not depend on the other rows: the C++ kernel of ``attention`` and of decoding alike.

Query t sees the keys ``start[t] ≤ s < end[t]`` of a document that begins at key ``origin[t]``.  Keys are taken in
segments of 128 counted from there, by an online softmax; within a segment and from one to the next in rising order.
So a row has the same bits packed or alone, in any batch, with any number of new queries, and over a cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import native, ops, rules
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend, sink_gradient
from kernel_index.core.excluded import Sight, guarded_backward, sight_of_blocks, sight_of_intervals
from kernel_index.core.numerics import Recipe

SOURCE = Path(native.__file__).with_name("documents.cpp")

ATTENTION = Recipe(
    "attention 1: segments of 128 keys from the document's start in rising order, online softmax in float32, "
    "weights rounded to the dtype of v before the second product, products by brgemm, one rounding"
)
NEEDS_EVEN_HEADS = "needs even head sizes: bfloat16 is multiplied in pairs"


class Bounds(NamedTuple):
    """int32 [rows, T], one row where all rows are alike."""

    start: Tensor
    end: Tensor
    origin: Tensor


class Scoring(NamedTuple):
    """``block``: keys of a block, where blocks of keys are selected."""

    scale: float
    softcap: float
    block: int = 1


def why_not(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> str | None:
    if q.shape[3] % 2 or v.shape[3] % 2 or v.shape[3] == 0:
        return NEEDS_EVEN_HEADS
    return native.op_why_not(q, k, v, *others)


def _launch(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """``rest``: start, end, origin and selected, then the fields of ``Scoring``."""
    q, (k, v) = q.contiguous(), _rows_of_tokens(k, v)
    none = q.new_full((q.shape[2],), -torch.inf, dtype=torch.float32)
    logits = none if sink is None else native.floats(sink)
    made = _allocate(q, k, v)
    _call("forward", (q, k, v), rest[:4], Scoring(*rest[4:]), q, k, v, logits, *made)
    return made


def _allocate(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries, heads = q.shape[:3]
    lse, row_max, inv_row_sum = (q.new_empty(batch, heads, queries, dtype=torch.float32) for _ in range(3))
    return q.new_empty(batch, queries, heads, v.shape[3]), lse, row_max, inv_row_sum


def _launch_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """``rest``: row_max and inv_row_sum, then as that of the forward."""
    row_max, inv_row_sum, *sight = rest
    d_out, q, k, v, out = (x.contiguous() for x in (d_out, q, k, v, out))
    delta = torch.zeros_like(row_max) if d_lse is None else d_lse.to(torch.float32, copy=True).contiguous()
    gradients = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tensors = (d_out, q, k, v, out, row_max, inv_row_sum, delta, *gradients)
    _call("backward", (q, k, v), tuple(sight[:4]), Scoring(*sight[4:]), *tensors)
    return *gradients, delta


def _allocate_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_max: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), row_max.new_empty(row_max.shape)


def _rows_of_tokens(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values whose tokens are dense; the rows of both may be equally many tokens apart, as in a cache."""
    apart = k.stride(0) // max(1, k.shape[2] * k.shape[3])
    dense = all(x[0].is_contiguous() and x.stride(0) == apart * x.shape[2] * x.shape[3] for x in (k, v) if len(x))
    return (k, v) if dense else (k.contiguous(), v.contiguous())


def _call(
    which: str, qkv: tuple[Tensor, ...], sight: tuple[Tensor | None, ...], scoring: Scoring, *tensors: Tensor
) -> None:
    q, k, v = qkv
    if q.numel() == 0:
        return
    given = (q.new_empty(0, 0, 0, 0) if x is None else x for x in sight)
    *bounds, selected = (x.to(torch.int32).contiguous() for x in given)
    apart = k.stride(0) // (k.shape[2] * k.shape[3])
    sizes = (*q.shape[:2], k.shape[1], apart, q.shape[2], *k.shape[2:], v.shape[3], bounds[0].shape[0])
    sizes = (*sizes, native.threads_for(q.numel() * k.shape[1]), *selected.shape[2:], scoring.block)
    function = f"{which}_{native.suffix(q.dtype)}"
    native.call(SOURCE, function, sizes, scoring[:2], *bounds, selected, *tensors)


document_attention = ops.NativeOp(
    "document_attention(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor start, Tensor end, Tensor origin, "
    "Tensor? selected, float scale, float softcap, int block) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _allocate,
)
"""``out`` [B, T, H, Dv], ``lse``, ``row_max`` and ``1 / row_sum`` [B, H, T]."""

_backward_op = ops.NativeOp(
    "document_attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor row_max, Tensor inv_row_sum, Tensor start, Tensor end, Tensor origin, Tensor? selected, "
    "float scale, float softcap, int block) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _allocate_backward,
)


def _forward(scoring: Scoring, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *sight: Tensor) -> Forward:
    out, lse, row_max, inv_row_sum = document_attention(q, k, v, sink, *_with_selection(sight), *scoring)
    return Forward(out, lse, (row_max, inv_row_sum, *sight))


def _with_selection(sight: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Bounds, and the selection or None."""
    return (*sight, None) if len(sight) == 3 else tuple(sight)


def _backward(scoring: Scoring, given: Backward) -> Gradients:
    start, end, origin, selected = _with_selection(given.saved[2:])
    assert start is not None
    assert end is not None

    def sight() -> Sight:
        if selected is None:
            return sight_of_intervals(start, end)
        return sight_of_blocks(selected, None, scoring.block, start, end, origin)

    def run(given: Backward) -> Gradients:
        row_max, inv_row_sum, *seen = given.saved
        d_q, d_k, d_v, delta = _backward_op(
            given.d_out,
            given.d_lse,
            given.q,
            given.k,
            given.v,
            given.out,
            row_max,
            inv_row_sum,
            *_with_selection(seen),
            *scoring,
        )
        d_sink = None
        if given.sink is not None and given.needs[3]:
            weight = torch.exp(given.sink.to(torch.float32)[:, None] - row_max) * inv_row_sum
            d_sink = sink_gradient(given, weight, delta)
        return Gradients(d_q, d_k, d_v, d_sink)

    if rules.host_readable(given.d_out):
        return guarded_backward(run, sight, given)
    return run(given)


PASSES = Passes("the invariant form of attention", _forward, _backward)


def attend_to_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    bounds: Bounds,
    scoring: Scoring,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` with their gradients.

    ``selected`` [B, T, G, n]: the blocks of ``scoring.block`` keys, counted from the document's start, that a query
    sees of its interval; −1 for none.  G is a multiple of the KV heads and a divisor of the query heads.
    """
    seen = bounds if selected is None else (*bounds, selected)
    return attend(PASSES, scoring, q, k, v, sink, *seen)
