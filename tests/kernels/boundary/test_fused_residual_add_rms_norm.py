"""What the conformance test cannot know about ``fused_residual_add_rms_norm``."""

from collections import Counter

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.kernels.boundary.fused_residual_add_rms_norm import inductor, torch_op, triton, triton_few_rows

BACKENDS = pytest.mark.parametrize("backend", ["triton", "inductor", "reference"])
BF16 = torch.bfloat16


def operands(rows=6, channels=40, dtype=torch.float32, **options):
    residual, delta = (torch.randn(rows, channels, dtype=dtype, **options) for _ in range(2))
    return residual, delta, torch.randn(channels, dtype=dtype, **options)


def saved_tensors(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = call()
    return kept, out


def count_backward_passes(monkeypatch):
    calls, passes = [], torch_op._PASSES["inductor"]
    counting = passes._replace(backward=lambda *a: calls.append(a) or passes.backward(*a))
    monkeypatch.setitem(torch_op._PASSES, "inductor", counting)
    return calls


@BACKENDS
def test_by_hand(backend):
    out = ki.fused_residual_add_rms_norm(
        torch.tensor([[1.0, 5.0]]), torch.tensor([[4.0, -2.0]]), torch.tensor([2.0, 0.0]),
        scale=0.5, eps=0.0, weight_offset=1.0, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out.new_residual, torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(out.normed, torch.tensor([[9.0, 4.0]]) / 12.5**0.5)
    assert out._fields == ("new_residual", "normed")


@BACKENDS
@pytest.mark.parametrize("stream", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("branch", [torch.float32, BF16])
@pytest.mark.parametrize("norm", [torch.float32, BF16])
def test_dtypes_of_the_outputs(backend, stream, branch, norm):
    """normed has delta's dtype; the stream keeps its own, or is float32 from the first block on."""
    residual, delta, weight = torch.randn(3, 8).to(stream), torch.randn(3, 8).to(branch), torch.randn(8).to(norm)
    plain = ki.fused_residual_add_rms_norm(residual, delta, weight, backend=backend)
    wide = ki.fused_residual_add_rms_norm(residual, delta, weight, fp32_residual=True, backend=backend)
    assert (plain.new_residual.dtype, plain.normed.dtype) == (stream, branch)
    assert (wide.new_residual.dtype, wide.normed.dtype) == (torch.float32, branch)


@BACKENDS
def test_gradients_have_their_inputs_dtypes(backend):
    residual = torch.randn(3, 8, dtype=BF16, requires_grad=True)
    delta = torch.randn(3, 8, dtype=torch.float16, requires_grad=True)
    other = torch.float16 if backend == "triton" else torch.float64  # which Triton leaves to the reference
    weight, scale = torch.randn(8, requires_grad=True), torch.ones(1, dtype=other, requires_grad=True)
    out = ki.fused_residual_add_rms_norm(residual, delta, weight, scale=scale, fp32_residual=True, backend=backend)
    (out.new_residual.sum() + out.normed.sum()).backward()
    for leaf in (residual, delta, weight, scale):
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape


@BACKENDS
def test_fp32_stream_keeps_what_bf16_would_lose(backend):
    """256 + 0.25 is 256 in bfloat16, however often it is added."""
    delta, weight = torch.full((2, 8), 0.25, dtype=BF16), torch.ones(8, dtype=BF16)
    lossy = kept = torch.full((2, 8), 256.0, dtype=BF16)
    for _ in range(8):
        lossy = ki.fused_residual_add_rms_norm(lossy, delta, weight, backend=backend).new_residual
        kept = ki.fused_residual_add_rms_norm(kept, delta, weight, fp32_residual=True, backend=backend).new_residual
    assert lossy.eq(256).all()
    assert kept.eq(258).all()


@BACKENDS
def test_what_is_normalised_is_what_is_stored(backend):
    """Norm of the rounded stream: nearly every bit equal.  Norm of the sum before rounding differs in many elements."""
    # Triton's interpreter truncates to bfloat16, where a GPU rounds; to float16 it rounds.
    low = torch.float16 if backend == "triton" and launch.interpreting() else BF16
    residual, delta, weight = operands(64, 512, low)
    new_residual, normed = ki.fused_residual_add_rms_norm(residual, delta, weight, backend=backend)

    def norm(x):
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8) * weight.double()).to(low)

    assert (normed != norm(new_residual.double())).double().mean() < 1e-3
    assert (normed != norm(residual.double() + delta.double())).double().mean() > 0.1


@BACKENDS
def test_a_row_of_zeros(backend):
    residual, delta, weight = (t.requires_grad_() for t in (torch.zeros(2, 8), torch.zeros(2, 8), torch.ones(8)))
    out = ki.fused_residual_add_rms_norm(residual, delta, weight, backend=backend)
    out.normed.sum().backward()
    assert out.normed.eq(0).all()
    torch.testing.assert_close(residual.grad, torch.full((2, 8), 1e4))  # 1/√eps, with the default eps


@BACKENDS
def test_no_channels(backend):
    residual, delta, weight = (t.requires_grad_() for t in (torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(0)))
    out = ki.fused_residual_add_rms_norm(residual, delta, weight, backend=backend)
    (out.new_residual.sum() + out.normed.sum()).backward()
    assert out.normed.shape == delta.grad.shape == (3, 0)


def test_saved_for_backward():
    """new_residual and 1/rms beside the weight; delta only for a scale that learns."""
    residual, delta, weight = operands(rows=6, channels=40, dtype=BF16, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)

    def kept(scale):
        tensors, out = saved_tensors(
            lambda: ki.fused_residual_add_rms_norm(
                residual, delta, weight, scale=scale, fp32_residual=True, backend="inductor"
            )
        )
        assert any(t.data_ptr() == out.new_residual.data_ptr() for t in tensors), "the output itself is kept, no copy"
        return Counter((t.dtype, t.numel()) for t in tensors if t.numel() > 1 and t is not weight)

    stream, rstd, whole_delta = (torch.float32, 240), (torch.float32, 6), (BF16, 240)
    assert kept(1.0) == kept(0.25) == kept(scale.detach()) == Counter([stream, rstd])
    assert kept(scale) == Counter([stream, rstd, whole_delta])


def test_an_unused_norm_costs_nothing(monkeypatch):
    calls = count_backward_passes(monkeypatch)
    residual, delta, weight = operands(requires_grad=True)
    out = ki.fused_residual_add_rms_norm(residual, delta, weight, backend="inductor")
    upstream = torch.randn_like(residual)
    grads = torch.autograd.grad(out.new_residual, (residual, delta), upstream)
    assert not calls
    assert all(torch.equal(g, upstream) for g in grads)
    out = ki.fused_residual_add_rms_norm(residual, delta, weight, backend="inductor")
    assert torch.autograd.grad(out.new_residual, (residual, weight), upstream, allow_unused=True)[1] is None


def test_an_unused_stream_is_not_read(monkeypatch):
    calls = count_backward_passes(monkeypatch)
    residual, delta, weight = operands(requires_grad=True)
    ki.fused_residual_add_rms_norm(residual, delta, weight, backend="inductor").normed.sum().backward()
    assert calls[0][0] is None


@BACKENDS
@pytest.mark.parametrize("used", ["both", "stream", "norm"])
def test_leaf_gradients_own_their_memory(backend, used):
    """residual and delta have the same gradient: accumulating into one must not change the other."""
    residual, delta, weight = operands(requires_grad=True)
    before = None
    for times in (1, 2):
        out = ki.fused_residual_add_rms_norm(residual, delta, weight, backend=backend)
        chosen = {"both": out, "stream": out[:1], "norm": out[1:]}[used]
        torch.autograd.backward(chosen, [torch.ones_like(o) for o in chosen])
        before = residual.grad.clone() if times == 1 else before
        assert residual.grad.data_ptr() != delta.grad.data_ptr()
        torch.testing.assert_close(residual.grad, times * before)
        torch.testing.assert_close(delta.grad, times * before)
    residual.grad.zero_()
    torch.testing.assert_close(delta.grad, 2 * before)


@BACKENDS
def test_residual_and_delta_may_be_one_tensor(backend):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    out = ki.fused_residual_add_rms_norm(x, x, weight, backend=backend)
    out.new_residual.sum().backward()
    torch.testing.assert_close(out.new_residual, 2 * x)
    torch.testing.assert_close(x.grad, torch.full((4, 8), 2.0))


@BACKENDS
def test_weight_gradient_is_summed_in_float32(backend):
    """600 ones: a sum in bfloat16 stops at 256."""
    residual, delta = torch.ones(600, 4, dtype=BF16), torch.zeros(600, 4, dtype=BF16)
    weight = torch.ones(4, requires_grad=True)
    ki.fused_residual_add_rms_norm(residual, delta, weight, backend=backend).normed.sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((4,), 600.0))


def test_a_changed_output_is_noticed():
    residual, delta, weight = operands(requires_grad=True)
    out = ki.fused_residual_add_rms_norm(residual, delta, weight, backend="inductor")
    with torch.no_grad():
        out.new_residual.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.normed.sum().backward()


def test_one_variant_whatever_the_rows_and_the_scale():
    """Neither the number of tokens nor a layer's own scale compiles anything anew."""
    for region in (inductor.forward, inductor.backward):
        region.variants.clear()
    for rows, scale in ((5, 0.5), (16, 0.25), (17, 0.125), (300, 2.0)):
        residual, delta, weight = operands(rows, 56, requires_grad=True)
        ki.fused_residual_add_rms_norm(residual, delta, weight, scale=scale, backend="inductor").normed.sum().backward()
    assert len(inductor.forward.variants) == len(inductor.backward.variants) == 1


def test_inside_torch_compile_the_formulas_are_traced():
    """One receipt, no full-size tensor kept beside the stream, gradients as in eager mode."""
    residual, delta, weight = operands(32, 64, requires_grad=True)
    compiled = torch.compile(lambda *a: ki.fused_residual_add_rms_norm(*a), fullgraph=True)
    with ki.receipts() as log:
        out = compiled(residual, delta, weight)
    assert [(r.requested, r.ran) for r in log] == [("auto", "inductor")]
    assert sum(t.numel() == residual.numel() for t in out.normed.grad_fn.saved_tensors) <= 1
    upstream = [torch.randn_like(o) for o in out]
    grads = torch.autograd.grad(out, (residual, delta, weight), upstream)
    plain = ki.fused_residual_add_rms_norm(residual, delta, weight, backend="reference")
    expected = torch.autograd.grad(plain, (residual, delta, weight), upstream)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_functional_transforms_trace_the_reference(dynamic):
    residual, delta, weight = operands()

    def loss(delta):
        return ki.fused_residual_add_rms_norm(residual, delta, weight).normed.square().sum()

    expected = torch.func.grad(loss)(delta)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(delta), expected)


REFUSALS = {
    "residual must be a torch.Tensor, got int": {"residual": 3},
    "residual must be a floating-point tensor, got torch.int64": {"residual": torch.ones(2, 4, dtype=torch.int64)},
    "residual must be [..., C], got a tensor of rank 0": {"residual": torch.tensor(1.0)},
    "delta must be of residual's shape (2, 4), got shape (1, 4)": {"delta": torch.ones(1, 4)},
    "delta must be of residual's shape (2, 4), got shape (4,)": {"delta": torch.ones(4)},
    "delta must be a floating-point tensor, got torch.bool": {"delta": torch.ones(2, 4).bool()},
    "delta must be on the device of residual (cpu), got meta": {"delta": torch.ones(2, 4, device="meta")},
    "weight must be of shape (4,), got shape (1,)": {"weight": torch.ones(1)},
    "weight must be of shape (4,), got shape (2, 4)": {"weight": torch.ones(2, 4)},
    "scale must be a number, got str": {"scale": "1"},
    "scale must be a number, got bool": {"scale": True},
    "scale must be finite, got nan": {"scale": float("nan")},
    "scale must be a number or a tensor of 1 or 4 elements, got shape (2,)": {"scale": torch.ones(2)},
    "scale must be a number or a tensor of 1 or 4 elements, got shape (2, 4)": {"scale": torch.ones(2, 4)},
    "scale must be a floating-point tensor, got torch.int64": {"scale": torch.ones(1, dtype=torch.int64)},
    "eps must be at least 0, got -1.0": {"eps": -1.0},
    "eps must be a number, got Tensor": {"eps": torch.tensor(1e-6)},
    "fp32_residual must be True or False, got int": {"fp32_residual": 1},
    "weight_offset must be a number, got NoneType": {"weight_offset": None},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    good = {"residual": torch.ones(2, 4), "delta": torch.ones(2, 4), "weight": torch.ones(4)}
    with pytest.raises((TypeError, ValueError)) as error:
        ki.fused_residual_add_rms_norm(**(good | REFUSALS[message]))
    assert str(error.value) == message


@pytest.mark.skipif(not launch.interpreting(), reason="runs Triton's interpreter")
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("asked", ["both outputs", "the norm alone", "without a residual"])
def test_few_wide_rows_have_the_gradients_of_the_definition(monkeypatch, rows, dtype, asked):
    """By columns, in blocks of which the last one is short; a row's mean is of two parts."""
    monkeypatch.setattr(triton_few_rows, "WIDE", 16)
    monkeypatch.setattr(triton_few_rows, "BLOCK", 64)
    given = [t.requires_grad_() for t in operands(rows, 100, dtype)]
    exact = [t.detach().double().requires_grad_() for t in given]
    given[0].requires_grad_(asked != "without a residual")
    leaves = [t for t in given if t.requires_grad]
    found = []
    for tensors, backend in ((given, "triton"), (exact, "reference")):
        out = ki.fused_residual_add_rms_norm(*tensors, weight_offset=0.5, backend=backend)
        used = out[1:] if asked == "the norm alone" else out
        g = torch.Generator().manual_seed(0)
        upstream = [torch.randn(rows, 100, generator=g).to(dtype).to(t.dtype) for t in used]
        found.append(torch.autograd.grad(used, tensors[-len(leaves) :], upstream))
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


@pytest.mark.skipif(not launch.interpreting(), reason="runs Triton's interpreter")
def test_few_wide_rows_take_their_own_way(monkeypatch):
    """Not under invariant numerics, where a row's gradient may not depend on how many there are."""
    seen = []
    monkeypatch.setattr(triton_few_rows, "backward", lambda *a: seen.append(a))
    for rows, width in ((2, 4096), (129, 4096), (2, 4095)):
        leaves = [t.requires_grad_() for t in operands(rows, width)]
        torch.autograd.grad(ki.fused_residual_add_rms_norm(*leaves, backend="triton").normed.sum(), leaves)
    assert len(seen) == 1
    with ki.numerics("invariant"):
        leaves = [t.requires_grad_() for t in operands(2, 4096)]
        torch.autograd.grad(ki.fused_residual_add_rms_norm(*leaves, backend="triton").normed.sum(), leaves)
    assert len(seen) == 1


def test_the_geometry_of_a_rows_gradient_follows_from_its_width_under_invariant_numerics():
    """Another one may sum the row in another order."""
    rows = (1, 100, 10**4, 10**6)
    geometry = lambda n, width: triton.pick_backward_config(width, triton.rows_for_each(n, 132), width <= 16384)  # noqa: E731
    for width in (512, 1024, 2048, 4096, 16384):
        with ki.numerics("invariant"):
            assert len({tuple(geometry(n, width).items()) for n in rows}) == 1
    assert len({tuple(geometry(n, 2048).items()) for n in rows}) > 1, "few rows have steps of their own elsewhere"
