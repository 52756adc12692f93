"""Named calls of ``fused_rope_qk``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_index.core.testing import Case, Maker, Suite, size_of
from kernel_index.kernels.attention.fused_rope_qk.api import BACKENDS, fused_rope_qk


def _call(m: Maker, b: int, t: int, heads: int, kv_heads: int, d: int, r: int, *, rows: int = 1, **more) -> dict:
    angle = m.uniform(-3.0, 3.0, rows, t, 1, r // 2, dtype=torch.promote_types(m.dtype, torch.float32))
    return {
        "q": m.normal(b, t, heads, d),
        "k": m.normal(b, t, kv_heads, d),
        "cos": angle.cos(),
        "sin": angle.sin(),
        **more,
    }


def _heads_first(m: Maker) -> dict:
    call = _call(m, 2, 7, 4, 2, 16, 16)
    return call | {n: call[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k")}


def _packed(m: Maker) -> dict:
    qkv = m.normal(2, 9, 8, 16)
    return _call(m, 2, 9, 4, 2, 16, 16) | {"q": qkv[:, :, :4], "k": qkv[:, :, 4:6]}


def _expanded(m: Maker) -> dict:
    call = _call(m, 3, 5, 2, 2, 8, 8)
    return call | {"q": m.normal(1, 5, 1, 8).expand(3, 5, 2, 8), "cos": call["cos"].expand(3, 5, 1, 4),
                   "sin": call["sin"].expand(3, 5, 1, 4)}  # fmt: skip


def _low_tables(m: Maker) -> dict:
    call = _call(m, 2, 6, 4, 4, 16, 16)
    low = m.dtype if m.dtype == torch.float64 else torch.bfloat16
    return call | {n: call[n].to(low) for n in ("cos", "sin")}


def _normed(m: Maker, call: dict, names: tuple[str, ...] = ("q_weight", "k_weight"), **more) -> dict:
    """The weights are float32, as a model keeps them, and small around their offset."""
    wide, width = torch.promote_types(m.dtype, torch.float32), call["q"].shape[-1]
    weights = {name: m.uniform(-0.9, 0.9, width, dtype=wide) for name in names}
    return {**call, **weights, "weight_offset": 1.0, **more}


CASES = (
    Case("gqa", "grouped queries, tables shared by the batch", lambda m: _call(m, 2, 12, 8, 2, 32, 32)),
    Case(
        "row-tables",
        "packed documents: each row has its own positions",
        lambda m: _call(m, 3, 10, 4, 2, 16, 16, rows=3),
    ),
    Case("partial", "a part of the channels is rotated", lambda m: _call(m, 2, 9, 3, 1, 20, 12)),
    Case("one-pair", "a table of width 1 rotates one pair and never broadcasts", lambda m: _call(m, 2, 5, 3, 1, 8, 2)),
    Case("interleaved", "pairs of neighbours", lambda m: _call(m, 2, 9, 4, 2, 16, 16, interleaved=True)),
    Case("interleaved-partial", "neighbours, and a rest", lambda m: _call(m, 1, 7, 3, 2, 14, 6, interleaved=True)),
    Case("odd", "an odd head size with a rest of one channel", lambda m: _call(m, 3, 7, 5, 3, 17, 16)),
    Case("decode", "one token in each row, each at its own position", lambda m: _call(m, 4, 1, 8, 2, 16, 16, rows=4)),
    Case("single", "one of everything", lambda m: _call(m, 1, 1, 1, 1, 2, 2)),
    Case("no-tokens", "an empty prefill", lambda m: _call(m, 2, 0, 4, 2, 8, 8)),
    Case("no-rows", "an empty batch with tables of its own", lambda m: _call(m, 0, 3, 4, 2, 8, 8, rows=0)),
    Case("heads-first", "views of [B, H, T, D] storage", _heads_first),
    Case("packed-qkv", "q and k are slices of one projection", _packed),
    Case("expanded", "strides of 0 in q, cos and sin", _expanded),
    Case("bf16-tables", "tables in another dtype than q", _low_tables),
    Case("qk-norm", "a norm of each head first", lambda m: _normed(m, _call(m, 2, 12, 8, 2, 32, 32))),
    Case(
        "qk-norm-partial",
        "the norm is over all channels, the rotation over some, each row at its own positions",
        lambda m: _normed(m, _call(m, 3, 7, 3, 2, 17, 8, rows=3), eps=1e-3),
    ),
    Case(
        "qk-norm-interleaved",
        "neighbours, and a rest",
        lambda m: _normed(m, _call(m, 2, 9, 4, 1, 14, 6, interleaved=True), weight_offset=0.0),
    ),
    Case("q-norm", "one of the two alone", lambda m: _normed(m, _call(m, 2, 5, 4, 2, 16, 16), ("q_weight",))),
    Case("k-norm", "the other alone", lambda m: _normed(m, _call(m, 2, 5, 4, 2, 16, 16), ("k_weight",))),
    Case("qk-norm-packed", "slices of one projection", lambda m: _normed(m, _packed(m))),
    Case("qk-norm-no-tokens", "weights without a row", lambda m: _normed(m, _call(m, 2, 0, 4, 2, 8, 8))),
)


def rotate_half_formula(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0,
):  # fmt: skip
    """The formula that models write: ``x·cos + rotate_half(x)·sin`` over tables of full width, norms before it."""
    if q_weight is not None:
        q = F.rms_norm(q, q.shape[-1:], None, eps) * (q_weight + weight_offset)
    if k_weight is not None:
        k = F.rms_norm(k, k.shape[-1:], None, eps) * (k_weight + weight_offset)
    n = 2 * cos.shape[-1]
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
    else:
        cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))

    def quarter_turned(x: Tensor) -> Tensor:
        if interleaved:
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((-odd, even), -1).reshape(x.shape)
        return torch.cat((-x[..., n // 2 :], x[..., : n // 2]), -1)

    def apply(x: Tensor) -> Tensor:
        head = x[..., :n] * cos + quarter_turned(x[..., :n]) * sin
        return torch.cat((head.to(x.dtype), x[..., n:]), -1)

    return apply(q), apply(k)


SUITES = (
    Suite(
        op="fused_rope_qk", function=fused_rope_qk, backends=BACKENDS, cases=CASES,
        differentiable=("q", "k", "q_weight", "k_weight"),
        oracle=rotate_half_formula, sized=lambda m, n: _call(m, 2, n, 4, 2, 8, 8),
        real=lambda m, rows=8192: _call(m, 1, rows, 32, 8, 128, 128),
        compulsory=lambda call: (2 * size_of(call["q"], call["k"]) + size_of(call["cos"], call["sin"]),) * 2,
        double_backward=True, nonfinite=("q", "k"), without_gradient=("native",),
    ),
)  # fmt: skip
