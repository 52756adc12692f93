"""What the conformance test cannot know about the stream-mixing functions."""

import functools
import itertools
from collections import Counter

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton.launch import interpreting
from tests.threads import with_threads

BACKENDS = pytest.mark.parametrize("backend", ["triton", "inductor", "reference"])
BF16 = torch.bfloat16


def operands(B=2, T=5, C=16, *, rows=False, dtype=torch.float32, learn=True):
    lead = (B,) if rows else ()
    tensors = {
        "hidden": torch.randn(B, T, 4, C, dtype=dtype),
        "branch_out": torch.randn(B, T, C, dtype=dtype),
        "h_post": torch.randn(*lead, 4),
        "h_res": torch.randn(*lead, 4, 4),
        "h_pre": torch.randn(*lead, 4),
    }
    return {k: v.requires_grad_(learn) for k, v in tensors.items()}


def kept_by(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = call()
    return Counter(tuple(t.shape) for t in kept), out


@BACKENDS
def test_h_res_is_indexed_by_the_written_stream_first(backend):
    """A one-way move from stream 2 to stream 0; the transpose would move it the other way."""
    hidden = torch.arange(4.0).view(1, 1, 4, 1)
    h_res = torch.zeros(4, 4)
    h_res[0, 2] = 1.0
    out = ki.mhc_merge(hidden, torch.zeros(1, 1, 1), torch.ones(4), h_res, backend=backend)
    assert out.flatten().tolist() == [2.0, 0.0, 0.0, 0.0]


@BACKENDS
def test_rows_of_the_batch_keep_their_coefficients_when_batch_equals_time(backend):
    hidden = torch.ones(4, 4, 4, 3)
    h_pre = torch.arange(16.0).view(4, 4)
    out = ki.mhc_branch_input(hidden, h_pre, backend=backend)
    assert torch.equal(out, h_pre.sum(1).view(4, 1, 1).expand(4, 4, 3))


@BACKENDS
def test_fused_equals_the_two_calls(backend):
    given = operands(C=33, learn=False)
    fused = ki.mhc_merge_and_branch_input(**given, backend=backend)
    h_pre = given.pop("h_pre")
    merged = ki.mhc_merge(**given, backend=backend)
    torch.testing.assert_close(fused.hidden, merged)
    torch.testing.assert_close(fused.branch_input, ki.mhc_branch_input(merged, h_pre, backend=backend))


@BACKENDS
def test_the_branch_input_is_rounded_once(backend):
    """Streams of 1 + 1/1024 are 1 in bfloat16; their difference to 1 survives where they are read unrounded."""
    hidden, branch_out = torch.ones(1, 1, 4, 2, dtype=BF16), torch.full((1, 1, 2), 2.0**-10, dtype=BF16)
    h_post, h_pre = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, -1.0, 0.0, 0.0])
    out = ki.mhc_merge_and_branch_input(hidden, branch_out, h_post, torch.eye(4), h_pre, backend=backend)
    assert out.hidden.eq(1).all()
    assert out.branch_input.eq(2.0**-10).all()


@BACKENDS
@pytest.mark.parametrize("tokens", [1, 3, 37, 129])
def test_any_number_of_tokens_has_exact_coefficient_gradients(backend, tokens):
    """Ones throughout: every gradient is a count."""
    hidden = torch.ones(1, tokens, 4, 8)
    branch = torch.ones(1, tokens, 8)
    h_post, h_pre = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    h_res = torch.ones(4, 4, requires_grad=True)
    out = ki.mhc_merge_and_branch_input(hidden, branch, h_post, h_res, h_pre, backend=backend)
    (out.hidden.sum() + out.branch_input.sum()).backward()
    n = 8.0 * tokens
    assert torch.equal(h_post.grad, torch.full((4,), 2 * n))
    assert torch.equal(h_res.grad, torch.full((4, 4), 2 * n))
    assert torch.equal(h_pre.grad, torch.full((4,), 5 * n))


@BACKENDS
@pytest.mark.thorough_if(when=lambda backend: backend == "triton")
def test_coefficient_gradients_are_summed_in_float32(backend):
    """A bfloat16 sum of ones stops at 256."""
    hidden = torch.ones(1, 700, 4, 8, dtype=BF16)
    h_pre = torch.full((4,), 0.25, requires_grad=True)
    ki.mhc_branch_input(hidden, h_pre, backend=backend).sum().backward()
    assert torch.equal(h_pre.grad, torch.full((4,), 5600.0))


@BACKENDS
def test_coefficients_are_not_rounded_to_the_streams_dtype(backend):
    """0.2501 and its neighbours are one number in bfloat16."""
    h_pre = torch.tensor([0.2501, -0.25, 0.0, 0.0])
    hidden = torch.full((1, 1, 4, 2), 1024.0, dtype=BF16)
    out = ki.mhc_branch_input(hidden, h_pre, backend=backend)
    torch.testing.assert_close(out.float(), torch.full((1, 1, 2), 0.1024), rtol=2**-7, atol=0)


@pytest.mark.parametrize("backend", ["triton", "inductor"])
def test_streams_are_kept_only_for_coefficients_that_learn(backend):
    given = operands()
    kept, _ = kept_by(lambda: ki.mhc_merge_and_branch_input(**given, backend=backend))
    assert kept == Counter([(2, 5, 4, 16), (2, 5, 16), (4,), (4, 4), (4,)])
    frozen = {k: v.detach() if k.startswith("h_") else v for k, v in given.items()}
    kept, _ = kept_by(lambda: ki.mhc_merge_and_branch_input(**frozen, backend=backend))
    assert kept == Counter([(4,), (4, 4), (4,)])


@BACKENDS
@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_changes_no_gradient(backend, used):
    given = operands(rows=True)
    names = [n for n in given if used == 1 or n != "h_pre"]
    out = ki.mhc_merge_and_branch_input(**given, backend=backend)[used]
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, [given[n] for n in names], upstream)
    wide = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    exact = ki.mhc_merge_and_branch_input(**wide, backend="reference")[used]
    expected = torch.autograd.grad(exact, [wide[n] for n in names], upstream.double())
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_gradients_have_their_inputs_dtypes(backend):
    given = operands(dtype=BF16)
    given["hidden"] = given["hidden"].detach().float().requires_grad_()
    out = ki.mhc_merge_and_branch_input(**given, backend=backend)
    assert (out.hidden.dtype, out.branch_input.dtype) == (torch.float32, torch.float32)
    (out.hidden.sum() + out.branch_input.sum()).backward()
    assert all(v.grad.dtype == v.dtype for v in given.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": torch.ones(2, 3, 5, 8), "h_pre": torch.ones(5)}, "needs 4 streams"),
        ({"hidden": torch.ones(3, 4, 8)}, "needs hidden [B, T, streams, C]"),
        ({"h_pre": torch.ones(4, dtype=BF16)}, "needs float32 coefficients"),
    ],
    ids=["streams", "rank", "coefficients"],
)
def test_what_the_fused_backends_leave_to_the_reference(change, reason):
    call = {"hidden": torch.ones(2, 3, 4, 8), "h_pre": torch.ones(4)} | change
    with ki.receipts() as log:
        ki.mhc_branch_input(**call)
    assert log[0].ran == "reference"
    assert dict(log[0].declined)["triton"] == reason


FORMS = "(4,), for each batch row (2, 4), or for each token (2, 3, 4)"
FORMS_OF_RES = "(4, 4), for each batch row (2, 4, 4), or for each token (2, 3, 4, 4)"
REFUSALS = {
    "hidden must be [..., streams, C], got shape (4,)": {"hidden": torch.ones(4)},
    "hidden must be a floating-point tensor, got torch.int64": {"hidden": torch.ones(2, 3, 4, 8).long()},
    "branch_out must be hidden without its streams, (2, 3, 8), got shape (3, 8)": {"branch_out": torch.ones(3, 8)},
    "branch_out must be hidden without its streams, (2, 3, 8), got shape (2, 1, 8)": {
        "branch_out": torch.ones(2, 1, 8)
    },
    f"h_post must be {FORMS}, got shape (1,)": {"h_post": torch.ones(1)},
    f"h_post must be {FORMS}, got shape (1, 4)": {"h_post": torch.ones(1, 4)},
    f"h_post must be {FORMS}, got shape (3, 4)": {"h_post": torch.ones(3, 4)},
    f"h_res must be {FORMS_OF_RES}, got shape (3, 4, 4)": {"h_res": torch.ones(3, 4, 4)},
    f"h_pre must be {FORMS}, got shape (2, 1, 4)": {"h_pre": torch.ones(2, 1, 4)},
    f"h_res must be {FORMS_OF_RES}, got shape (3, 2, 4, 4)": {"h_res": torch.ones(3, 2, 4, 4)},
    "h_pre must be on the device of hidden (cpu), got meta": {"h_pre": torch.ones(4, device="meta")},
    "h_pre must be a torch.Tensor, got list": {"h_pre": [1.0, 1.0, 1.0, 1.0]},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    good = operands(B=2, T=3, C=8, learn=False)
    with pytest.raises((TypeError, ValueError)) as error:
        ki.mhc_merge_and_branch_input(**(good | REFUSALS[message]))
    assert str(error.value) == message


@BACKENDS
def test_a_set_for_each_token_is_that_of_the_token_alone(backend):
    given = operands(B=2, T=3, C=8, learn=False)
    given |= {"h_res": torch.randn(2, 3, 4, 4), "h_pre": torch.randn(2, 3, 4)}
    together = ki.mhc_merge_and_branch_input(**given, backend=backend)
    for b, t in itertools.product(range(2), range(3)):
        streams = {name: given[name][b : b + 1, t : t + 1] for name in ("hidden", "branch_out")}
        own = {name: given[name][b, t] for name in ("h_res", "h_pre")}
        found = ki.mhc_merge_and_branch_input(**given | streams | own, backend=backend)
        for one, every in zip(found, together, strict=True):
            torch.testing.assert_close(one, every[b : b + 1, t : t + 1])


def test_rows_without_a_batch_dimension_could_only_mean_tokens():
    with pytest.raises(ValueError, match="h_pre must be shared by the whole of a hidden without a batch dimension"):
        ki.mhc_branch_input(torch.ones(3, 4, 8), torch.ones(3, 4))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_sinkhorn_is_doubly_stochastic(scale):
    matrix = ki.sinkhorn(scale * torch.randn(64, 4, 4), iters=500)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-2), torch.ones(64, 4))
    torch.testing.assert_close(matrix.sum(-1), torch.ones(64, 4), rtol=0, atol=0.05)


def test_sinkhorn_survives_logits_whose_exponentials_do_not():
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]], requires_grad=True)
    matrix = ki.sinkhorn(logits, eps=0.0)
    torch.testing.assert_close(matrix, torch.full((2, 2), 0.5))
    assert torch.autograd.grad(matrix[0, 0], logits)[0].isfinite().all()


@pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")
def test_sinkhorn_of_a_column_far_below_eps():
    """exp(−largest) of a column at −500 overflows; its sum is eps alone."""
    logits = torch.tensor([[0.0, -900.0, 1.0], [2.0, -900.0, 0.0], [-900.0, -900.0, -900.0]])
    for eps in (1e-8, 0.0):
        call = {"logits": logits, "iters": 1, "eps": eps}
        found, wanted = (ki.sinkhorn(**call, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-30)  # logarithms near 900: units of 6e-5
        assert found.isfinite().all()


def test_sinkhorn_of_no_streams():
    assert ki.sinkhorn(torch.randn(2, 0, 0)).shape == (2, 0, 0)
    with pytest.raises(ki.Ineligible, match="needs at least one stream"):
        ki.sinkhorn(torch.randn(2, 0, 0), backend="triton")


def test_sinkhorn_temperature_and_precision():
    logits = torch.randn(4, 4)
    torch.testing.assert_close(ki.sinkhorn(logits, temperature=0.5), ki.sinkhorn(2 * logits))
    assert ki.sinkhorn(logits.bfloat16()).dtype == torch.float32
    assert ki.sinkhorn(logits.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iters": 0}, "iters must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"eps": -1e-6}, "eps must be at least 0, got -1e-06"),
        ({"logits": torch.ones(2, 3)}, "logits must be square matrices [..., n, n], got shape (2, 3)"),
    ],
    ids=str,
)
def test_sinkhorn_refusals(options, message):
    with pytest.raises((TypeError, ValueError)) as error:
        ki.sinkhorn(**({"logits": torch.ones(3, 3)} | options))
    assert str(error.value) == message


def _gradients(call, tensors, upstream, needs):
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    outputs = call(*leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    wanted = [x for x in leaves if x.requires_grad]
    return torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], allow_unused=True)


MIXES = {
    "merge and read": (ki.mhc_merge_and_branch_input, "hbpre", ("merged", "read")),
    "merge": (ki.mhc_merge, "hbpr", ("merged",)),
    "read": (ki.mhc_branch_input, "he", ("read",)),
}
MISSING = [
    *((mix, what) for mix in MIXES for what in ("", "coefficients")),
    *(("merge and read", w) for w in ("merged", "read")),
]


@pytest.mark.native
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("mix", "missing"), MISSING)
def test_invariant_gradients_on_a_cpu(mix, missing, dtype, rows):
    """One pass in C++, beside the formula in float64; 37 channels are no whole vectors."""
    function, names, outputs = MIXES[mix]
    torch.manual_seed(0)
    lead = (2,) if rows == 2 else ()
    drawn = {
        "h": torch.randn(2, 9, 4, 37).to(dtype), "b": torch.randn(2, 9, 37).to(dtype), "p": torch.randn(*lead, 4),
        "r": torch.randn(*lead, 4, 4), "e": torch.randn(*lead, 4),
        "merged": torch.randn(2, 9, 4, 37).to(dtype), "read": torch.randn(2, 9, 37).to(dtype),
    }  # fmt: skip
    tensors, upstream = [drawn[name] for name in names], [None if o == missing else drawn[o] for o in outputs]
    needs = [name in "hb" or missing != "coefficients" for name in names]
    with ki.numerics("invariant"):
        found = _gradients(function, tensors, upstream, needs)
        again = with_threads(3, _gradients, function, tensors, upstream, needs)

    def exact(change):
        of_reference = functools.partial(function, backend="reference")
        wide = [None if g is None else change(g.double()) for g in upstream]
        return _gradients(of_reference, [change(t.double()) for t in tensors], wide, needs)

    for one, other, expected, size in zip(found, again, exact(lambda x: x), exact(torch.abs), strict=True):
        if expected is None:  # what reaches no result
            assert one is None or not one.any()
            continue
        assert torch.equal(one, other)
        rounding = 2**-8 if one.dtype == BF16 else 2**-24
        bound = 2 * 9 * 37 * 2**-24 * size + rounding * expected.abs()  # size: of all terms of the sum
        assert ((one.double() - expected).abs() <= bound).all()
