"""What a mask excludes has no influence, also where it is NaN or infinity: a law of every function that takes a mask.

Each call is made twice: with the case's finite values, and with NaN or infinity in some keys and values (and in the
queries of rows that see nothing, and in the gradient that they get).  Rows that may not see those keys, and keys that
no row sees which sees those, have the same bits; rows that see them are not finite.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core.target import machine_why_not
from kernel_index.core.testing import Case, Maker, Suite, suites
from kernel_index.kernels.attention.dense_attention.cases import qkv
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.proofs.errors import differentiable, tensors_of
from kernel_index.routing.membership import membership

NAN, INF = float("nan"), float("inf")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A machine with a GPU tries the kernels of the GPU; run there by hand, since CI has none."""

HALF_ONLY = ("fa4", "gluon", "varlen")


class Sees(NamedTuple):
    """Bool [B, T, H, S]: the keys that a query head may see, and those that it attends to whatever its router does."""

    may: Tensor
    must: Tensor


def by_mask(call: dict[str, Any]) -> Tensor:
    (batch, queries, heads, _), keys = call["q"].shape, call["k"].shape[1]
    allowed = (call.get("mask") or MaskContract()).dense(batch, queries, keys, device=call["q"].device)
    return allowed.transpose(1, 2).expand(-1, -1, heads, -1)


def dense(call: dict[str, Any]) -> Sees:
    may = by_mask(call)
    return Sees(may, may)


def selected(call: dict[str, Any]) -> Sees:
    """``exact_token_attention`` and ``block_sparse_attention``."""
    heads, keys = call["q"].shape[2], call["k"].shape[1]
    size = call.get("block_size", 1)
    lists = call.get("selected", call.get("indices"))
    valid = call.get("selected_valid", call.get("indices_valid"))
    lists, valid = (x if x is None or x.ndim == 4 else x[:, :, None] for x in (lists, valid))
    of_groups = membership(lists, valid, -(-keys // size)).repeat_interleave(heads // lists.shape[2], 2)
    both = of_groups.index_select(3, torch.arange(keys, device=of_groups.device) // size) & by_mask(call)
    return Sees(both, both)


def routed(call: dict[str, Any]) -> Sees:
    """What is allowed in the current block is always attended to."""
    may, (queries, keys) = by_mask(call), (call["q"].shape[1], call["k"].shape[1])
    size = call["config"].block_size if "config" in call else call["block_size"]
    row, key = (torch.arange(n, device=may.device) for n in (queries, keys))
    current = (row + keys - queries) // size
    return Sees(may, may & (key // size == current[:, None])[:, None])


LAWS: dict[str, Callable[[dict[str, Any]], Sees]] = {
    "attention": dense,
    "attention_with_lse": dense,
    "exact_token_attention": selected,
    "exact_token_attention_with_lse": selected,
    "block_sparse_attention": selected,
    "moba_attention": routed,
    "moba_attention_with_lse": routed,
    "clustered_sparse_attention": routed,
}
ATTENTION = [s for s in suites() if s.op in LAWS]


def large(op: str, width: int = 16) -> Case:
    """Several tiles of every kernel; a document, and the padding, begin inside one."""

    def build(m: Maker) -> dict[str, Any]:
        ids = torch.tensor([3] * 170 + [8] * 120 + [-1] * 30, device=m.device).expand(2, -1)
        call = {**qkv(m, 2, 320, 320, 4, 2, width), "mask": MaskContract(doc_ids=ids, window=(120, 0))}
        if op.startswith("exact_token_attention"):
            call["indices"] = m.integers(-1, 320, 2, 320, 2, 40)
        if op == "block_sparse_attention":
            call |= {"selected": m.integers(-1, 10, 2, 320, 2, 6), "block_size": 32}
        return call

    return Case("large", "several tiles", build)


def lengths() -> Case:
    """Documents by cumulative lengths, which a package takes as they are; padding after the last."""

    def build(m: Maker) -> dict[str, Any]:
        ends = torch.tensor([0, 130, 130, 280], dtype=torch.int32, device=m.device)
        return {**qkv(m, 1, 320, 320, 4, 2, 64), "mask": MaskContract.from_cu_seqlens(ends)}

    return Case("lengths", "cumulative lengths", build)


FEW = ("packed", "documents", "per_head_documents", "empty_rows", "cross", "large", "sink")
"""Padding, windows, empty rows and a sink, where not every case is tried: Triton's interpreter takes seconds."""

OURS = ("native", "cpu")
"""Backends with tiles of several sizes, and with backward passes that are the project's own."""


def cases(*, few: bool = False, only: tuple[str, ...] = ()) -> list[Any]:
    """Suite × backend that this machine has × case; an interpreted backend has few."""
    found = []
    for suite in ATTENTION:
        for name in (b.name for b in suite.backends if machine_why_not(b.name) is None):
            of_backend = [*suite.cases, *([large(suite.op)] if name in OURS and LAWS[suite.op] is not routed else [])]
            if name in HALF_ONLY:
                of_backend += [large(suite.op, 64), lengths()]
            if few or name == "triton":
                of_backend = [c for c in of_backend if c.name in FEW]
            if not only or name in only:
                found += [pytest.param(suite, name, c, id=f"{suite.op}-{name}-{c.name}") for c in of_backend]
    return found


def poisoned_keys(call: dict[str, Any], sees: Sees) -> dict[str, Tensor]:
    """Sets of keys, bool [B, S], of which some rows may see none."""
    batch, keys = call["k"].shape[:2]
    key = torch.arange(keys, device=call["k"].device).expand(batch, -1)
    found = {"padding": ~sees.may.any(1).any(1), "future": key >= keys // 2}
    docs = (call.get("mask") or MaskContract()).document_rows(keys)
    if docs is not None:
        found["document"] = (docs == docs[:, keys // 2 : keys // 2 + 1]).expand(batch, -1)
    elif sees.may is sees.must:  # not routed: the mean of a block has the keys that a window cuts off
        found["middle"] = (key >= keys // 3) & (key < keys // 2)
    return {name: which for name, which in found.items() if which.any()}


def with_poison(call: dict[str, Any], sees: Sees, which: Tensor, values: dict[str, float]) -> dict[str, Any]:
    made = dict(call)
    for name, value in values.items():
        made[name] = call[name].clone()
        made[name][which] = value
        made[name][
            which & (torch.arange(which.shape[1], device=which.device) % 3 == 1), ..., 1:
        ] = -0.5  # only some of the elements
    made["q"] = call["q"].clone()
    made["q"][~sees.may.any(-1).any(-1)] = NAN
    return made


class Result(NamedTuple):
    out: Tensor
    lse: Tensor | None
    grads: dict[str, Tensor]


def result_of(suite: Suite, backend: str, call: dict[str, Any], silent: Tensor, of_silent: float) -> Result:
    """``silent`` rows [B, T, H] get the gradient ``of_silent`` from above."""
    names = differentiable(suite, call, backend)
    leaves = {name: call[name].detach().clone().requires_grad_() for name in names}
    outputs = tensors_of(suite.function(**(call | leaves), backend=backend))
    rows = silent[..., None], silent.transpose(1, 2)  # of out [B, T, H, D] and lse [B, H, T]
    random = [Maker(o.dtype, seed=3, device=o.device.type).normal(*o.shape) for o in outputs]
    upstream = [g.masked_fill(at, of_silent) for g, at in zip(random, rows[: len(random)], strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    lse = outputs[1].detach() if len(outputs) > 1 else None
    return Result(outputs[0].detach(), lse, dict(zip(names, grads, strict=True)))


def keys_reached(sees: Sees, rows: Tensor, kv_heads: int) -> Tensor:
    """Which keys [B, S, K] one of the rows [B, T, H] may see."""
    return (sees.may & rows[..., None]).any(1).unflatten(1, (kv_heads, -1)).any(2).transpose(1, 2)


def keys_beside(call: dict[str, Any], bad: Tensor) -> Tensor:
    """Keys [B, S, K] that a NaN of these rows reaches in a backward pass that is not ours: all that its kernel takes
    together, which is the document where it is told of documents by their lengths."""
    docs = (call.get("mask") or MaskContract()).document_rows(call["k"].shape[1])
    rows = bad.any(2)  # [B, T]
    apart = docs is not None and call["mask"].cu_seqlens is not None
    near = docs[:, :, None] == docs[:, None] if apart else torch.ones_like(call["k"][:, :, 0, :1], dtype=torch.bool)
    reached = (near & rows[:, :, None]).any(1) if apart else near[..., 0] & rows.any(1, keepdim=True)
    return reached[..., None].expand(-1, -1, call["k"].shape[2])


def assert_law(suite: Suite, backend: str, call: dict[str, Any], values: dict[str, float], of_silent: float) -> None:
    sees = LAWS[suite.op](call)
    empty = ~sees.may.any(-1)  # [B, T, H]
    for name, which in poisoned_keys(call, sees).items():
        bad = (sees.may & which[:, None, None]).any(-1)
        plain = result_of(suite, backend, call, bad | empty, 0.0)
        poisoned = with_poison(call, sees, which, values)
        found = result_of(suite, backend, poisoned, bad | empty, of_silent)
        label = f"{name} {values}"
        assert torch.equal(found.out[~bad], plain.out[~bad]), f"out, {label}"
        assert (found.out[empty] == 0).all(), f"out of empty rows, {label}"
        assert all(x is None or x.is_contiguous() for x in (found.out, found.lse)), label
        if found.lse is not None and plain.lse is not None:
            good = ~bad.transpose(1, 2)
            assert torch.equal(found.lse[good], plain.lse[good]), f"lse, {label}"
        assert torch.equal(found.grads["q"][~bad], plain.grads["q"][~bad]), f"dq, {label}"
        assert (found.grads["q"][empty] == 0).all(), f"dq of empty rows, {label}"
        kept = ~keys_reached(sees, bad, call["k"].shape[2])
        if backend in HALF_ONLY:
            kept = kept & ~keys_beside(call, bad)
        for x in ("k", "v"):
            assert torch.equal(found.grads[x][kept], plain.grads[x][kept]), f"d{x}, {label}"
        if "sink" in found.grads and not bad.any():
            assert torch.equal(found.grads["sink"], plain.grads["sink"]), f"dsink, {label}"
        if backend != "triton":  # without a backward pass too
            without = tensors_of(suite.function(**poisoned, backend=backend))[0]
            torch.testing.assert_close(without, found.out, rtol=0, atol=0, equal_nan=True)
        if all(map(math.isfinite, values.values())):
            continue
        certain = (sees.must & which[:, None, None]).any(-1)
        assert not found.out[certain].isfinite().any(), f"{label}: hidden in out"
        assert not found.grads["q"][certain].isfinite().all(-1).any(), f"{label}: hidden in dq"


def built(suite: Suite, backend: str, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    call = case.build(Maker(torch.bfloat16 if backend in HALF_ONLY else dtype, device=DEVICE))
    call = {name: x.to(DEVICE) if isinstance(x, MaskContract) else x for name, x in call.items()}
    wanted = {name: call[name].detach().requires_grad_() for name in differentiable(suite, call, backend)}
    reason = ki.explain(suite.function, **(call | wanted), backend=backend).verdicts[backend]
    if reason:
        pytest.skip(reason)
    return call


LONG_CALLS = (
    "clustered_sparse_attention", "clustered_sparse_attention_with_lse", "exact_token_attention",
    "exact_token_attention_with_lse",
)  # fmt: skip
"""Interpreted, these take from 5 to 13 seconds; what they are made of has tests of its own."""

BY_VALUE = ({"k": NAN}, {"v": INF}, {"k": INF, "v": NAN})


@pytest.mark.thorough_if(
    when=lambda suite, backend, case: (
        backend == "triton" and (case.name not in ("documents", "empty_rows") or suite.op in LONG_CALLS)
    )
)
@pytest.mark.parametrize(("suite", "backend", "case"), cases())
def test_what_is_excluded_has_no_influence(suite, backend, case):
    call = built(suite, backend, case, torch.float32)
    for values in BY_VALUE[2:] if backend == "triton" else BY_VALUE:
        assert_law(suite, backend, call, values, 0.0)


@pytest.mark.parametrize(("suite", "backend", "case"), [
    p for p in cases(few=True, only=("reference", *OURS))
    if p.values[1] != "cpu" or "sparse" in p.values[0].op
])  # fmt: skip
def test_what_is_excluded_may_overflow(suite, backend, case):
    """Memory that nobody wrote holds large numbers too.  PyTorch's own kernels add −∞ to scores that are +∞."""
    assert_law(suite, backend, built(suite, backend, case, torch.float32), {"k": 3e38, "v": 3e38}, 0.0)


@pytest.mark.parametrize(("suite", "backend", "case"), cases(few=True, only=("reference", "sdpa", *OURS)))
def test_nan_from_above_stays_with_the_rows_that_have_it(suite, backend, case):
    """A loss makes NaN of a row that is NaN, and an average makes it of rows that see nothing."""
    assert_law(suite, backend, built(suite, backend, case, torch.bfloat16), {"k": NAN, "v": INF}, NAN)


@pytest.mark.parametrize(("suite", "backend", "case"), cases(few=True, only=OURS))
def test_a_gradient_from_above_reaches_what_its_row_sees(suite, backend, case):
    """NaN that comes from above to rows whose output is finite."""
    call = built(suite, backend, case, torch.float32)
    sees = LAWS[suite.op](call)
    row = torch.arange(call["q"].shape[1], device=call["q"].device)[:, None].expand(call["q"].shape[:3])
    bad = (row >= row.shape[1] // 2) & sees.may.any(-1)
    plain, found = (result_of(suite, backend, call, bad, value) for value in (0.0, NAN))
    assert torch.equal(found.out, plain.out)
    assert torch.equal(found.grads["q"][~bad], plain.grads["q"][~bad])
    kept = ~keys_reached(sees, bad, call["k"].shape[2])
    for x in ("k", "v"):
        assert torch.equal(found.grads[x][kept], plain.grads[x][kept]), x
        assert not bad.any() or not found.grads[x].isfinite().all(), x
    assert not found.grads["q"][bad].isfinite().any()


def padded(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call of attention with finite padding, and the same with NaN there."""
    mask = MaskContract(doc_ids=torch.tensor([[0] * 9 + [1] * 7 + [-1] * 4]))
    call = {**qkv(Maker(dtype), 1, 20, 20, 4, 2, 8), "mask": mask}
    return call, with_poison(call, dense(call), mask.doc_ids < 0, {"k": NAN, "v": NAN})


def rows_and_gradients(attend: Callable[..., Tensor], call: dict[str, Any]) -> list[Tensor]:
    leaves = [call[x].clone().requires_grad_() for x in ("q", "k", "v")]
    out = attend(*leaves, call["mask"])
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_in_a_compiled_graph(backend):
    """Nothing is read there: the operands are always cleaned."""
    compiled = torch.compile(functools.partial(ki.attention, backend=backend), backend="aot_eager", fullgraph=True)
    for plain, found in zip(*(rows_and_gradients(compiled, call) for call in padded()), strict=True):
        assert torch.equal(plain, found)


def test_in_torch_func():
    plain, found = padded()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ki.attention(q[None], k[None], v[None], plain["mask"], backend="reference").sin().sum()

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))
    for a, b in zip(*(mapped(*(call[x] for x in ("q", "k", "v"))) for call in (plain, found)), strict=True):
        assert torch.equal(a, b)


def test_the_reference_differentiates_twice_beside_padding_that_is_nan():
    plain, found = padded(torch.float64)

    def second(call: dict[str, Any]) -> list[Tensor]:
        q = call["q"].clone().requires_grad_()
        out = ki.attention(q, call["k"], call["v"], call["mask"], backend="reference")
        (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), q)]

    for a, b in zip(second(plain), second(found), strict=True):
        assert torch.equal(a, b)


def test_what_went_wrong_is_not_hidden_from_the_keys_that_did_it():
    for backend in ("reference", "sdpa", "cpu", "native"):
        call = qkv(Maker(torch.float32), 1, 8, 8, 2, 1, 8)
        call["v"][0, 3, 0, 2] = INF
        leaves = [call[x].requires_grad_() for x in ("q", "k", "v")]
        out = ki.attention(*leaves, backend=backend)
        grads = torch.autograd.grad(out[:, 3:].sum() + out[:, :3].sum(), leaves)
        assert not any(g[0, 3].isfinite().any() for g in grads), backend
        assert grads[0][0, :3].isfinite().all(), backend
