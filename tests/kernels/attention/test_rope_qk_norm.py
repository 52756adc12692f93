"""``fused_rope_qk`` with weights: an RMS norm of each head before its rotation."""

import pytest
import torch
from torch.nn import functional as F

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.fused_rope_qk import torch_op
from kernel_index.proofs.ratios import both_ways

BACKENDS = ("reference", "inductor", "triton")
NAMES = ("q", "k", "q_weight", "k_weight")


def call(b=2, t=6, heads=3, kv_heads=2, d=8, r=8, dtype=torch.float32):
    tables = ki.rope_tables(torch.arange(t), r)
    q, k = torch.randn(b, t, heads, d).to(dtype), torch.randn(b, t, kv_heads, d).to(dtype)
    return {"q": q, "k": k, **tables._asdict(), "q_weight": torch.randn(d), "k_weight": torch.randn(d)}


def gradients(c, backend, of=NAMES, **options):
    leaves = {n: c[n].detach().requires_grad_() for n in of}
    out = ki.fused_rope_qk(**(c | leaves), backend=backend, **options)
    reached = [o.square().sin().sum() for o in out if o.requires_grad]
    return torch.autograd.grad(reached, list(leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_norm_and_then_a_rotation(backend):
    c = call(d=12, r=8)
    options = {"eps": 1e-3, "weight_offset": 1.0}
    normed = [F.rms_norm(c[n].double(), (12,), c[f"{n}_weight"].double() + 1.0, 1e-3) for n in ("q", "k")]
    expected = ki.fused_rope_qk(*normed, c["cos"].double(), c["sin"].double(), backend="reference")
    for found, exact in zip(ki.fused_rope_qk(**c, **options, backend=backend), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "inductor"])  # the interpreter truncates where a GPU rounds
def test_nothing_is_rounded_between_the_two(backend):
    c = call(t=64, d=32, r=32, dtype=torch.bfloat16)
    wide = {n: v.float() for n, v in c.items()}
    found, exact = ki.fused_rope_qk(**c, backend=backend), ki.fused_rope_qk(**wide, backend="reference")
    for x, y in zip(found, exact, strict=True):
        assert ((x.float() - y).abs() <= torch.finfo(torch.bfloat16).eps / 2 * y.abs() + 1e-6).all()


@pytest.mark.thorough_if(when=lambda backend: backend == "triton")
@pytest.mark.parametrize("backend", ["inductor", "triton"])
def test_the_gradients_of_the_weights_are_summed_in_float32_and_in_order(backend):
    """Of many tokens with a bfloat16 weight: one rounding, and the same bits every time."""
    c = call(t=300 if backend == "inductor" else 130, dtype=torch.bfloat16)  # more than one program
    c |= {n: c[n].bfloat16() for n in ("q_weight", "k_weight")}
    of = ("q_weight", "k_weight")
    found, again = gradients(c, backend, of), gradients(c, backend, of)
    exact = gradients({n: v.double() for n, v in c.items()}, "reference", of)
    plain = gradients(c, "reference", of)
    for x, y, truth, p in zip(found, again, exact, plain, strict=True):
        assert torch.equal(x, y)
        erred = (p.double() - truth).abs().max()
        assert (x.double() - truth).abs().max() <= 2 * erred + 2 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


@pytest.mark.parametrize("backend", ["inductor", "triton"])
@pytest.mark.parametrize("of", [("q",), ("k_weight",), ("q", "k_weight"), ("q_weight", "k_weight")], ids=str)
def test_a_part_of_the_gradients(backend, of):
    c = call()
    for x, y in zip(gradients(c, backend, of), gradients(c, "reference", of), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["inductor", "triton"])
@pytest.mark.parametrize("used", ["q", "k"])
def test_only_one_output_is_used(backend, used):
    c = call()
    leaves = {n: c[n].requires_grad_() for n in NAMES}
    getattr(ki.fused_rope_qk(**c, backend=backend), used).square().sin().sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None and leaf.grad.any()) == name.startswith(used)


@pytest.mark.parametrize("backend", ["inductor", "triton"])
def test_heads_that_fill_no_tile_add_nothing(backend):
    """Three heads in a tile of four, without eps: 1/rms of the fourth would be infinite."""
    c = call(heads=3, d=10, r=8)
    for x, y in zip(gradients(c, backend, eps=0.0), gradients(c, "reference", eps=0.0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["inductor", "triton"])
def test_what_is_saved(backend):
    c = call()
    for name in NAMES:
        c[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ki.fused_rope_qk(**(c | {"k_weight": None}), backend=backend)
    assert set(saved) == {c[n].data_ptr() for n in ("q", "cos", "sin", "q_weight")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend):
    c = call(t=3, d=6, r=4)

    def twice(c, backend):
        leaves = [c[n].detach().requires_grad_() for n in NAMES]
        q, k = ki.fused_rope_qk(**(c | dict(zip(NAMES, leaves, strict=True))), backend=backend)
        grads = torch.autograd.grad(q.sin().sum() + k.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    expected = twice({n: v.double() for n, v in c.items()}, "reference")
    for x, y in zip(twice(c, backend), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
def test_float64():
    c = {n: v.double() for n, v in call(t=2, d=6, r=4).items()}
    leaves = tuple(c[n].requires_grad_() for n in NAMES)

    def inductor(*values):
        return tuple(ki.fused_rope_qk(**(c | dict(zip(NAMES, values, strict=True))), backend="inductor"))

    assert torch.autograd.gradcheck(inductor, leaves)
    assert torch.autograd.gradgradcheck(inductor, leaves)


def test_the_registered_ops():
    c = call(d=10, r=8)
    numbers = (1e-6, 0.0, False)
    tensors = tuple(c[n] for n in ("q", "k", "cos", "sin", "q_weight", "k_weight"))
    torch.library.opcheck(torch_op._norm_op.op, (*tensors, *numbers))
    torch.library.opcheck(torch_op._norm_backward_op.op, (c["q"], None, *tensors, *numbers))
    torch.library.opcheck(
        torch_op._norm_backward_op.op, (c["q"], c["k"], None, *tensors[1:4], None, tensors[5], *numbers)
    )


def test_one_graph():
    torch._dynamo.reset()
    c = call()

    def layer(q, k, w):
        return tuple(ki.fused_rope_qk(q, k, (c["cos"], c["sin"]), q_weight=w, k_weight=w, backend="triton"))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [c[n].requires_grad_() for n in ("q", "k", "q_weight")]
    found, expected = compiled(*leaves), layer(*leaves)
    grads = (torch.autograd.grad(q.sin().sum() + k.square().sum(), leaves) for q, k in (found, expected))
    for x, y in zip((*found, *next(grads)), (*expected, *next(grads)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.skipif(not launch.interpreting(), reason="counts in Triton's interpreter, on a CPU")
@pytest.mark.thorough
def test_the_kernel_moves_what_it_must():
    c = call(b=1, t=132, heads=8, kv_heads=2, d=128, r=128, dtype=torch.bfloat16)
    tensors = 2 * (c["q"].numel() + c["k"].numel())
    forward, backward = both_ways(ki.fused_rope_qk, c, list(NAMES))
    tables = 4 * (c["cos"].numel() + c["sin"].numel())
    assert (forward.launches, forward.others, forward.atomics) == (1, 0, 0)
    assert forward.sectors <= 1.02 * (2 * tensors + tables)
    assert (backward.launches, backward.others, backward.atomics) == (3, 0, 0), "the pass, and one sum for each weight"
    parts = 4 * 2 * 12 * 128 * 2  # written and read: a row of either weight for each of 12 programs
    assert backward.sectors <= 1.02 * (3 * tensors + tables + parts)


def test_autocast_leaves_the_weights():
    c = call()
    by_hand = ki.fused_rope_qk(**(c | {n: c[n].bfloat16() for n in ("q", "k")}))
    with torch.autocast("cpu", torch.bfloat16):
        found = ki.fused_rope_qk(**c)
    assert all(torch.equal(x, y) for x, y in zip(found, by_hand, strict=True))


def test_native_has_no_norm():
    assert ki.explain(ki.fused_rope_qk, **call()).verdicts["native"] == "has no norm: it rotates only"


REFUSED = {
    "q_weight must be [D] with q's D, (8,), got shape (4,)": (ValueError, {"q_weight": torch.ones(4)}),
    "k_weight must be [D] with q's D, (8,), got shape (1, 8)": (ValueError, {"k_weight": torch.ones(1, 8)}),
    "k_weight must be a floating-point tensor, got torch.int64": (TypeError, {"k_weight": torch.ones(8).long()}),
    "eps must be at least 0, got -1.0": (ValueError, {"eps": -1.0}),
    "weight_offset must be a number, got str": (TypeError, {"weight_offset": "1"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    error, wrong = REFUSED[message]
    with pytest.raises(error) as raised:
        ki.fused_rope_qk(**(call() | wrong))
    assert str(raised.value) == message
