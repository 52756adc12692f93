"""Attention whose rows do not depend on the other rows, on a GPU: the registered ops of ``core/triton/documents.py``.

Query t sees the keys ``start[t] ≤ s < end[t]`` of a document that begins at key ``origin[t]``, as in
``core/document_attention.py``.  One kernel serves training and decoding, which reads pages where they lie, and
attention to selected blocks or tokens: a query's selection is a bit for each block of its document.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernel_index.core import ops, rules
from kernel_index.core.attention_function import Backward, Forward, Gradients, Passes, attend, sink_gradient
from kernel_index.core.document_attention import Bounds
from kernel_index.core.numerics import Recipe
from kernel_index.core.target import target_of, triton_version
from kernel_index.core.triton import launch

ATTENTION = Recipe(
    "attention on a GPU 1: segments of keys from the document's start in rising order, of a size that the head and the "
    "dtype decide; online softmax in float32 with exponentials of base 2, weights rounded to the dtype of v before the "
    "second product, one accumulator, one rounding"
)


class Scoring(NamedTuple):
    """``scale`` is above 0.  ``block``: keys of a block, where blocks of keys are selected; else 0."""

    scale: float
    softcap: float
    block: int = 0


class Cache(NamedTuple):
    """``table`` int32 [B, pages] of pages of ``page`` tokens."""

    table: Tensor
    page: int


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *others: Tensor | None) -> str | None:
    if max(q.shape[3], v.shape[3]) > rules.WIDEST_HEAD:
        return rules.NEEDS_NARROW_HEADS
    if scale is not None and scale <= 0:
        return "its invariant form needs a positive scale"
    return rules.triton_why_not(q, k, v, *others)


def mask_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, sizes: Any, scale: float | None, sink: Tensor | None = None
) -> str | None:
    """For ``attend_to_mask``."""
    if rules.wants_gradient(q, k, v, sink) and not mask.is_tree and not _ends_with_queries(q, k, mask, sizes):
        return "the gradient of its invariant form needs the queries of the last keys, and of all keys of documents"
    return why_not(q, k, v, scale, sink)


def _ends_with_queries(q: Tensor, k: Tensor, mask: Any, sizes: Any) -> bool:
    """Whether the queries are those of the last keys; documents need one for every key."""
    if sizes.offset is None or sizes.offset < 0 or q.shape[1] + sizes.offset != k.shape[1]:
        return False
    return sizes.offset == 0 or mask.document_rows(sizes.keys) is None


def _config(kernel: str, q: Tensor, v: Tensor, rows: int) -> launch.Config:
    """``step``, which the bits depend on, comes from the head sizes and the dtype; ``tile`` may follow the rows."""
    width = max(q.shape[3], v.shape[3])
    if launch.interpreting():
        return launch.INTERPRETED_CONFIG
    if q.dtype == torch.float32:
        return launch.Config(32, 16, 4, 1)
    if width > 128:
        return launch.Config(64, 32, 4, 2 if kernel == "forward" else 1)
    if kernel == "keys":
        return launch.Config(64, 32, 4, 2) if width <= 64 else launch.Config(128, 32, 8, 1)
    few = rows <= 64
    return launch.Config(64 if few else 128, 64, 4 if few else 8, 3 if width <= 64 or kernel == "forward" else 2)


def _launch_of(kernel: str, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, **constants: Any) -> Any:
    group = q.shape[2] // k.shape[2]
    config = _config(kernel, q, v, q.shape[1] * group)
    tile, step = ("BN", "BM") if kernel == "keys" else ("BM", "BN")
    sizes = {tile: config.tile, step: config.step, "G": group, "SELECT": scoring.block}
    return launch.attention_launch(config, q, v, scoring.scale, scoring.softcap, **sizes, **constants)


def _launch_bits(selected: Tensor, words: int) -> Tensor:
    from kernel_index.core.triton.selection_bits import set_bits

    return set_bits(selected.contiguous(), _allocate_bits(selected, words).zero_())


def _allocate_bits(selected: Tensor, words: int) -> Tensor:
    return selected.new_empty((*selected.shape[:3], words), dtype=torch.int32)


_bits_op = ops.register("selection_bits(Tensor selected, SymInt words) -> Tensor", _launch_bits, _allocate_bits)
"""A bit for each block, int32 [B, T, G, words], of the selected ones [B, T, G, n], −1 for none."""


def _of_bits(bits: Tensor | None) -> tuple[int, int]:
    """Groups and words."""
    return (1, 1) if bits is None else (bits.shape[2], bits.shape[3])


def _bounds(*bounds: Tensor) -> tuple[Tensor, ...]:
    """int32 and dense, with as many rows as the one that has the most."""
    rows = max(x.shape[0] for x in bounds)
    return tuple(x.to(torch.int32).expand(rows, -1).contiguous() for x in bounds)


def _launch(q, k, v, sink, start, end, origin, table, bits, page, scale, softcap, block):
    from kernel_index.core.triton.documents import documents_kernel

    out, lse = _allocate(q, k, v)
    (batch, queries, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    if out.numel() == 0:
        return out, lse
    bounds, scoring = _bounds(start, end, origin), Scoring(scale, softcap, block)
    again = table is None and bits is None and sink is None and queries > FEW and _has_roles(q, v, softcap)
    (q, sink), (k, v) = launch.dense((q, sink)), map(launch.dense_heads, (k, v))
    page = 0 if table is None else page
    made = _launch_of("forward", q, k, v, scoring, HAS_SINK=sink is not None, PAGE=page, AGAIN=again)
    if again:
        from kernel_index.core.triton import hopper_outputs

        hopper_outputs.forward(q, k, v, bounds, made.config.step, scale, (out, lse))
    grid = (launch.ceil_div(queries * group, made.config.tile), batch * heads // group)
    with launch.on_device(q):
        documents_kernel[grid](
            q, k, v, sink, *bounds, table, bits, out, lse, *launch.strides(k, v), launch.row_stride(bounds[0]),
            lse.stride(2), *((0, 0) if table is None else table.stride()), *_of_bits(bits), queries, heads // group,
            made.inner, made.outer, **made.constants,
        )  # fmt: skip
    return out, lse


def _allocate(q, k, v, *_):
    """``lse`` is of base 2."""
    return q.new_empty((*q.shape[:3], v.shape[3])), _numbers(q)


FEW = 64
"""Queries that Triton's kernel takes: its tiles hold all heads of a group, so it reads keys of a cache once."""

ROUND = 64
"""Numbers of a head begin at multiples of it: the copy engine of Hopper reads them where they lie."""


def _numbers(q: Tensor) -> Tensor:
    """A float32 for each query and head: [B, T, H], of which T is the dense dimension."""
    batch, queries, heads, _ = q.shape
    room = launch.ceil_div(queries, ROUND) * ROUND
    return q.new_empty(batch, heads, room, dtype=torch.float32)[..., :queries].transpose(1, 2)


def _as_numbers(x: Tensor, q: Tensor) -> Tensor:
    """x as it lies in ``_numbers``: a hook on saved tensors may have laid it otherwise."""
    room = launch.ceil_div(q.shape[1], ROUND) * ROUND
    if x.stride() == (room * q.shape[2], 1, room) and x.data_ptr() % launch.ALIGNED == 0:
        return x
    return _numbers(q).copy_(x)


def _launch_queries(d_out, d_lse, q, k, v, out, lse, start, end, origin, bits, scale, softcap, block):
    from kernel_index.core.triton.documents_backward import queries_kernel

    d_q, delta = _allocate_queries(d_out, d_lse, q)
    (batch, queries, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    if d_q.numel() == 0:
        return d_q, delta
    d_out, d_lse, q, k, v = launch.dense((d_out, d_lse, q, k, v))
    lse = _as_numbers(lse, q)
    bounds = _bounds(start, end, origin)
    again = bits is None and _has_roles(q, v, softcap)
    if again:
        from kernel_index.core.triton import hopper_queries

        given = d_out, d_lse, q, k, v, out, lse, bounds, scale
        hopper_queries.backward_queries(*given, (d_q, delta))
    made = _launch_of(
        "queries", q, k, v, Scoring(scale, softcap, block), HAS_D_LSE=d_lse is not None, AGAIN=again
    )  # fmt: skip
    grid = (launch.ceil_div(queries * group, made.config.tile), batch * heads // group)
    with launch.on_device(q):
        queries_kernel[grid](
            d_out, d_lse, q, k, v, out, lse, *bounds, bits, d_q, delta, *launch.strides(k, v),
            launch.row_stride(bounds[0]), lse.stride(2), *_of_bits(bits), queries, heads // group, made.scale,
            made.inner, made.outer, **made.constants,
        )  # fmt: skip
    return d_q, delta


def _allocate_queries(d_out, d_lse, q, *_):
    return q.new_empty(q.shape), _numbers(q)


def _launch_keys(d_out, q, k, v, lse, delta, start, end, origin, bits, scale, softcap, block):
    from kernel_index.core.triton.documents_backward import keys_kernel

    d_k, d_v = _allocate_keys(d_out, q, k, v)
    (batch, tokens, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    if d_k.numel() == 0 and d_v.numel() == 0:
        return d_k, d_v
    d_out, q, k, v = launch.dense((d_out, q, k, v))
    lse, delta = _as_numbers(lse, q), _as_numbers(delta, q)
    bounds = _bounds(start, end, origin)
    again = bits is None and _has_roles(q, v, softcap)
    if again:
        from kernel_index.core.triton import hopper_keys

        hopper_keys.backward_keys(d_out, q, k, v, lse, delta, bounds, scale, (d_k, d_v))
    made = _launch_of("keys", q, k, v, Scoring(scale, softcap, block), H=heads, AGAIN=again)
    grid = (launch.ceil_div(tokens, made.config.tile), batch * heads // group)
    with launch.on_device(q):
        keys_kernel[grid](
            d_out, q, k, v, lse, delta, *bounds, bits, d_k, d_v, *launch.strides(k, v), launch.row_stride(bounds[0]),
            lse.stride(2), *_of_bits(bits), tokens, heads // group, made.scale, made.inner, made.outer,
            **made.constants,
        )  # fmt: skip
    return d_k, d_v


def _has_roles(q: Tensor, v: Tensor, softcap: float) -> bool:
    """Whether kernels whose warps have roles take these heads: on Hopper, where they give the bits of the others.

    What has run there: bfloat16, heads of 64 and 128.  A softcap is another sum of instructions in them.
    """
    if softcap > 0 or q.dtype != torch.bfloat16 or not q.shape[3] == v.shape[3] in (64, 128):
        return False
    target = target_of(q.device)
    return target.kind == "cuda" and target.arch == 90 and triton_version() >= (3, 6)


def _allocate_keys(d_out, q, k, v, *_):
    return k.new_empty(k.shape), v.new_empty(v.shape)


_forward_op = ops.register(
    "device_documents(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor start, Tensor end, Tensor origin, "
    "Tensor? table, Tensor? bits, int page, float scale, float softcap, int block) -> (Tensor, Tensor)",
    _launch,
    _allocate,
)
_queries_op = ops.register(
    "device_documents_backward_queries(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor start, Tensor end, Tensor origin, Tensor? bits, float scale, float softcap, int block) "
    "-> (Tensor, Tensor)",
    _launch_queries,
    _allocate_queries,
)
_keys_op = ops.register(
    "device_documents_backward_keys(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, "
    "Tensor start, Tensor end, Tensor origin, Tensor? bits, float scale, float softcap, int block) "
    "-> (Tensor, Tensor)",
    _launch_keys,
    _allocate_keys,
)


def _forward(scoring: Scoring, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *sight: Tensor) -> Forward:
    """``sight``: bounds of the queries; the bits, where blocks are selected; and the bounds of keys, for a gradient."""
    bits = sight[3] if scoring.block else None
    out, lse = _forward_op(q, k, v, sink, *sight[:3], None, bits, 0, *scoring)
    return Forward(out, (lse * math.log(2)).transpose(1, 2).contiguous(), (lse, *sight))


def _backward(scoring: Scoring, given: Backward) -> Gradients:
    d_out, d_lse, q, k, v, sink, out = given[:7]
    lse, start, end, origin, *rest = given.saved
    bits, of_keys = (rest[0], rest[1:]) if scoring.block else (None, rest)
    d_lse = None if d_lse is None else d_lse.transpose(1, 2).to(torch.float32)
    d_q, delta = _queries_op(d_out, d_lse, q, k, v, out, lse, start, end, origin, bits, *scoring)
    d_k = d_v = d_sink = None
    if given.needs[1] or given.needs[2]:
        d_k, d_v = _keys_op(d_out, q, k, v, lse, delta, *of_keys, origin, bits, *scoring)
    if sink is not None and given.needs[3]:
        weight = torch.exp2(sink.to(torch.float32) / math.log(2) - lse).masked_fill(lse.isneginf(), 0.0)
        d_sink = sink_gradient(given, *(x.transpose(1, 2) for x in (weight, delta)))
    return Gradients(d_q, d_k, d_v, d_sink)


PASSES = Passes("the invariant form of attention on a GPU", _forward, _backward)


def attend_to_documents(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bounds: Bounds, of_keys: tuple[Tensor, ...], scoring: Scoring,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` with their gradients.

    ``of_keys``: which queries see each key, int32 [rows, S], where a gradient is wanted; there is then a query for each
    key, from the first on.  ``selected`` [B, T, G, n]: as of ``document_attention.attend_to_documents``.
    """
    if selected is None:
        return attend(PASSES, scoring, q, k, v, sink, *bounds, *of_keys)
    words = launch.ceil_div(launch.ceil_div(k.shape[1], scoring.block), 32)
    with torch.no_grad():
        bits = _bits_op(selected.to(torch.int32), max(1, words))
    return attend(PASSES, scoring, q, k, v, sink, *bounds, bits, *of_keys)


def attend_to_mask(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, mask: Any, sizes: Any, scoring: Scoring,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the bounds of a mask contract; selected blocks count from the start of each document.

    For a gradient the keys before the first query get queries, too, which see nothing.
    """
    start, end = mask.row_intervals(sizes)
    bounds = Bounds(start, end, mask.row_origins(sizes))
    if not rules.wants_gradient(q, k, v, sink):
        return attend_to_documents(q, k, v, sink, bounds, (), scoring, selected)
    before, of_keys = k.shape[1] - q.shape[1], mask.row_kernel_intervals(sizes)[2:]
    if before:
        q, of_keys = pad(q, (0, 0, 0, 0, before, 0)), [x + before for x in of_keys]
        start, end, origin = (pad(x, (before, 0)) for x in bounds)
        bounds = Bounds(start, end, origin)  # of one document, which begins at key 0
        selected = None if selected is None else pad(selected, (0, 0, 0, 0, before, 0), value=-1)
    out, lse = attend_to_documents(q, k, v, sink, bounds, tuple(of_keys), scoring, selected)
    return out[:, before:], lse[:, :, before:]


def attend_to_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, sink: Tensor | None, bounds: Bounds, scoring: Scoring,
    table: Tensor | None,
) -> Tensor:  # fmt: skip
    """``out`` of queries over a cache, by pages where there is a table; without gradients."""
    page = 0 if table is None else k_cache.shape[1]
    return _forward_op(q, k_cache, v_cache, sink, *bounds, table, None, page, *scoring)[0]
