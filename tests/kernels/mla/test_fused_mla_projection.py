"""What the conformance test cannot know about ``fused_mla_projection``."""

from collections import Counter

import pytest
import torch

import kernel_index as ki
from kernel_index.kernels.mla.fused_mla_projection import norm, torch_op

FUSED = pytest.mark.parametrize("backend", ["triton", "inductor", "eager"])
BACKENDS = pytest.mark.parametrize("backend", ["triton", "inductor", "eager", "reference"])
POLICIES = pytest.mark.parametrize("recompute", ["latent", "norm", "none"])
BF16 = torch.bfloat16
N, DIN, L, DOUT = 10, 32, 16, 24


def operands(dtype=torch.float32, learn=("x", "w_down", "w_up", "norm_weight")):
    tensors = {
        "x": torch.randn(2, N // 2, DIN, dtype=dtype),
        "w_down": torch.randn(L, DIN, dtype=dtype) / DIN**0.5,
        "w_up": torch.randn(DOUT, L, dtype=dtype) / L**0.5,
        "norm_weight": torch.rand(L, dtype=dtype) + 0.5,
    }
    return {k: v.requires_grad_(k in learn) for k, v in tensors.items()}


def kept_by(given, **options):
    """The tensors kept for backward, those that the caller holds anyway left out, and the result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ki.fused_mla_projection(**given, **options)
    own = {t.untyped_storage().data_ptr() for t in given.values()}
    return [t for t in kept if t.untyped_storage().data_ptr() not in own], out


@FUSED
@POLICIES
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_each_policy_keeps_what_it_says_and_the_receipt_counts_it(backend, recompute, dtype):
    given = operands(dtype)
    with ki.receipts() as log:
        kept, out = kept_by(given, recompute=recompute, backend=backend)
    copies = {"latent": 0, "norm": 1, "none": 2}[recompute]
    expected = Counter([(torch.float32, (N,))] + [(dtype, (N, L))] * copies)
    assert Counter((t.dtype, tuple(t.shape)) for t in kept) == expected
    bytes_kept = sum(t.numel() * t.element_size() for t in kept)
    details = log[0].details
    assert (details["recompute"], details["kept_bytes"]) == (recompute, bytes_kept)
    assert details["kept_bytes_by_policy"][recompute] == bytes_kept
    assert ki.explain("fused_mla_projection", **given, recompute=recompute, backend=backend).details == details
    out.sum().backward()


def test_a_small_call_on_the_cpu_keeps_its_policy_too():
    """Too small to compile, it still runs the function that recomputes."""
    given = operands()
    with ki.receipts() as log:
        kept, _ = kept_by(given)
    assert log[0].ran == "eager"
    assert [tuple(t.shape) for t in kept] == [(N,)]


@POLICIES
def test_without_gradients_nothing_is_kept(recompute):
    with torch.no_grad():
        kept, out = kept_by(operands(), recompute=recompute)
    assert kept == []
    assert not out.requires_grad


@FUSED
def test_every_policy_gives_the_same_bits(backend):
    given = operands()
    upstream = torch.randn(2, N // 2, DOUT)

    def run(recompute):
        out = ki.fused_mla_projection(**given, recompute=recompute, backend=backend)
        return out, *torch.autograd.grad(out, list(given.values()), upstream)

    first = run("latent")
    for recompute in ("norm", "none"):
        assert all(torch.equal(a, b) for a, b in zip(first, run(recompute), strict=True))


@BACKENDS
@POLICIES
def test_gradients_of_float32_agree_with_float64(backend, recompute):
    given = operands()
    exact = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    upstream = torch.randn(2, N // 2, DOUT)
    out = ki.fused_mla_projection(**given, recompute=recompute, backend=backend)
    grads = torch.autograd.grad(out, list(given.values()), upstream)
    c = exact["x"] @ exact["w_down"].T
    normed = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * exact["norm_weight"]
    truth = normed @ exact["w_up"].T
    expected = torch.autograd.grad(truth, list(exact.values()), upstream.double())
    for name, actual, wanted in zip(("out", *given), (out, *grads), (truth, *expected), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5, msg=name)


@BACKENDS
def test_the_mean_term_is_there(backend):
    """The norm does not see the length of the latent, so the gradient has no part along it (but for eps)."""
    given = operands()
    latent = given["x"].detach().double() @ given["w_down"].detach().double().T
    out = ki.fused_mla_projection(given["x"], given["w_down"].detach(), given["w_up"].detach(), backend=backend)
    (dx,) = torch.autograd.grad(out, given["x"], torch.randn_like(out))
    d_latent = torch.linalg.lstsq(given["w_down"].detach().double().T, dx.double().reshape(N, DIN).T).solution.T
    along = (d_latent * latent.reshape(N, L)).sum(-1)
    assert along.abs().max() < 1e-4 * d_latent.norm(dim=-1).max() * latent.norm(dim=-1).max()


@FUSED
@pytest.mark.parametrize(
    "learn", [("x",), ("w_down",), ("w_up",), ("norm_weight",), ("x", "norm_weight"), ("w_down", "w_up")], ids=str
)
def test_frozen_arguments_cost_no_product(backend, learn, monkeypatch):
    given = operands(learn=learn)
    every = operands()
    with torch.no_grad():
        for k, v in every.items():
            v.copy_(given[k])
    upstream = torch.randn(2, N // 2, DOUT)
    ki.fused_mla_projection(**every).backward(upstream)
    out = ki.fused_mla_projection(**given, backend=backend)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(tuple(a[0].shape)) or mm(*a, **k))
    out.backward(upstream)
    monkeypatch.undo()
    through = bool({"x", "w_down", "norm_weight"} & set(learn))
    assert len(products) == 1 + through + len({"x", "w_down", "w_up"} & set(learn))  # the first is the latent again
    for name, tensor in given.items():
        if name in learn:
            torch.testing.assert_close(tensor.grad, every[name].grad)
        else:
            assert tensor.grad is None


@BACKENDS
@POLICIES
def test_autocast(backend, recompute):
    """Products in bfloat16 from float32 parameters; their gradients are float32 and were never rounded to bfloat16."""
    given = operands()
    with torch.autocast("cpu", dtype=BF16):
        kept, out = kept_by(given, recompute=recompute, backend=backend)
    assert out.dtype == BF16
    if backend != "reference":
        assert all(t.dtype == (torch.float32 if t.ndim == 1 else BF16) for t in kept)
    out.float().square().sum().backward()
    plain = {k: v.detach().clone().requires_grad_() for k, v in given.items()}
    ki.fused_mla_projection(**plain, backend="reference").square().sum().backward()
    for name in given:
        actual, expected = given[name].grad, plain[name].grad
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()), msg=name)
    for name in ("w_down", "w_up", "norm_weight"):
        assert (given[name].grad.bfloat16().float() != given[name].grad).double().mean() > 0.5, name


@BACKENDS
def test_autocast_leaves_float64_alone(backend):
    if backend == "triton":
        pytest.skip("computes in float32: float64 is the reference's")
    given = {k: v.detach().double() for k, v in operands().items()}
    with torch.autocast("cpu", dtype=BF16):
        out = ki.fused_mla_projection(**given, backend=backend)
    assert torch.equal(out, ki.fused_mla_projection(**given, backend=backend))


@BACKENDS
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_weight_gradients_are_summed_in_float32(backend, dtype):
    """4999 ones: a sum in bfloat16 stops at 256, in float16 at 2048."""
    x, w_down = torch.ones(4999, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    w_up = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    norm_weight = torch.ones(1, requires_grad=True)
    ki.fused_mla_projection(x, w_down, w_up, norm_weight, eps=0.0, backend=backend).sum().backward()
    torch.testing.assert_close(w_up.grad.float(), torch.full((1, 1), 4999.0), rtol=2**-8, atol=0)
    torch.testing.assert_close(norm_weight.grad, torch.full((1,), 4999.0))


@BACKENDS
def test_a_row_of_zeros(backend):
    given = operands()
    with torch.no_grad():
        given["x"][0, 0] = 0
    out = ki.fused_mla_projection(**given, backend=backend)
    out.sum().backward()
    assert out[0, 0].eq(0).all()
    assert all(v.grad.isfinite().all() for v in given.values())


def test_a_changed_x_is_noticed():
    given = operands()
    out = ki.fused_mla_projection(**given)
    with torch.no_grad():
        given["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.thorough_if(when=lambda recompute: recompute == "none")
@pytest.mark.parametrize("recompute", ["latent", "none"])
def test_a_compiled_model_keeps_the_policy(recompute):
    given = operands()
    compiled = torch.compile(
        lambda *a: ki.fused_mla_projection(*a, recompute=recompute), fullgraph=True, backend="aot_eager"
    )
    with ki.receipts() as log:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = compiled(*given.values())
    assert [(r.ran, r.details["recompute"]) for r in log] == [("eager", recompute)]
    assert sum(tuple(t.shape) == (N, L) for t in kept) == {"latent": 0, "none": 2}[recompute]
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(given.values()), upstream)
    expected = torch.autograd.grad(ki.fused_mla_projection(**given), list(given.values()), upstream)
    torch.testing.assert_close(grads, expected)


def test_ops_keep_their_schemas():
    given = operands()
    flat = given["x"].detach().reshape(N, DIN)
    weights = [given[k].detach() for k in ("w_down", "w_up", "norm_weight")]
    torch.library.opcheck(torch_op._forward_op.op, (flat, *weights, 1e-6, torch.float32, 2, "eager"))
    _, rstd, latent, normed = torch_op._forward_op(flat, *weights, 1e-6, torch.float32, 2, "eager")
    g = torch.randn(N, DOUT)
    for wanted in ([True] * 4, [False, True, False, False]):
        call = (g, flat, *weights, rstd, latent, normed, wanted, "eager")
        torch.library.opcheck(torch_op._backward_op.op, call)


def test_one_variant_whatever_the_rows():
    for region in (norm.normalise_region, norm.gradients_region):
        region.variants.clear()
    for rows in (5, 16, 300):
        x = torch.randn(rows, DIN, requires_grad=True)
        given = {**operands(), "x": x}
        ki.fused_mla_projection(**given, backend="inductor").sum().backward()
    assert len(norm.normalise_region.variants) == len(norm.gradients_region.variants) == 1


def test_functional_transforms_take_the_reference():
    given = operands(learn=())

    def loss(x):
        return ki.fused_mla_projection(**{**given, "x": x}).square().sum()

    with ki.receipts() as log:
        grad = torch.func.grad(loss)(given["x"])
    assert log[0].ran == "reference"
    x = given["x"].clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(loss(x), x)[0])


REFUSALS = {
    "x must be a torch.Tensor, got int": {"x": 3},
    "x must be [..., Din], got a tensor of rank 0": {"x": torch.tensor(1.0)},
    "w_down must be a matrix [out, in] as of torch.nn.Linear, got shape (32,)": {"w_down": torch.ones(32)},
    "w_down must be [L, Din] = (32, 32), got shape (32, 16)": {"w_down": torch.ones(32, 16)},
    "w_down must be torch.float32 like x outside of autocast, got torch.bfloat16": {
        "w_down": torch.ones(16, 32, dtype=BF16)
    },
    "w_up must be [Dout, L] = (16, 16), got shape (16, 24)": {"w_up": torch.ones(16, 24)},
    "w_up must be on the device of x (cpu), got meta": {"w_up": torch.ones(24, 16, device="meta")},
    "norm_weight must be [L] = (16,), got shape (1,)": {"norm_weight": torch.ones(1)},
    "norm_weight must be a floating-point tensor, got torch.int64": {"norm_weight": torch.ones(16).long()},
    "eps must be at least 0, got -1.0": {"eps": -1.0},
    "recompute must be one of 'latent', 'norm', 'none', got 'all'": {"recompute": "all"},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ki.fused_mla_projection(**(operands() | REFUSALS[message]))
    assert str(error.value) == message
