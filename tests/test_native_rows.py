"""When few rows go to C++, what turns them away, and that what they read and write is theirs alone."""

import pytest
import torch
from torch.autograd import forward_ad

import kernel_index as ki


def rope(dtype=torch.float32, tokens=3):
    q, k = torch.randn(2, tokens, 3, 8).to(dtype), torch.randn(2, tokens, 1, 8).to(dtype)
    return ki.fused_rope_qk, {"q": q, "k": k, **ki.rope_tables(torch.arange(tokens), 6)._asdict()}


def norm(dtype=torch.float32, tokens=3):
    residual, delta = torch.randn(2, 2, tokens, 37).to(dtype)
    return ki.fused_residual_add_rms_norm, {"residual": residual, "delta": delta, "weight": torch.randn(37)}


def streams(dtype=torch.float32, tokens=3):
    call = {"hidden": torch.randn(2, tokens, 4, 37).to(dtype), "branch_out": torch.randn(2, tokens, 37).to(dtype)}
    call |= {"h_post": torch.randn(4), "h_res": torch.randn(2, 4, 4), "h_pre": torch.randn(4)}
    return ki.mhc_merge_and_branch_input, call


OPS = [rope, norm, streams]


def ran(function, call, **options):
    with ki.receipts() as log:
        function(**call, **options)
    return log[0].ran, dict(log[0].declined)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.native
@pytest.mark.parametrize("op", OPS)
def test_few_rows_of_an_inference_step_go_to_it(op):
    function, call = op()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert ran(function, call)[0] == "native"
    assert ran(function, call)[1]["native"].startswith("gradients are on")
    with torch.no_grad():
        backend, declined = ran(*op(tokens=6000))
    assert backend == "inductor"
    assert declined["native"] == "large enough for a compiled region to pay"


@pytest.mark.parametrize("op", OPS)
def test_a_result_that_needs_a_graph_is_not_its(op):
    function, call = op()
    for name in call:
        wanted = call | {name: call[name].clone().requires_grad_()}
        with pytest.raises(ki.Ineligible, match="native: has no backward"):
            function(**wanted, backend="native")
        with torch.no_grad():
            assert ran(function, wanted, backend="native")[0] == "native"


@pytest.mark.parametrize("op", OPS)
def test_tangents_are_not_lost(op):
    function, call = op()
    first = next(iter(call))
    with torch.no_grad(), forward_ad.dual_level():
        dual = call | {first: forward_ad.make_dual(call[first], torch.ones_like(call[first]))}
        with ki.receipts() as log:
            out = function(**dual)
        assert log[0].ran == "reference"
        assert forward_ad.unpack_dual(out[0]).tangent.any()


@pytest.mark.parametrize("op", OPS)
def test_transforms_and_traces_are_not_its(op):
    function, call = op()
    first = next(iter(call))
    with torch.no_grad():
        mapped = torch.vmap(lambda x: function(**{**call, first: x})[0])(torch.stack([call[first], call[first]]))
        torch.testing.assert_close(mapped[1], function(**call, backend="reference")[0])
        with pytest.raises(ki.Ineligible, match="native: needs CPU tensors"):
            function(**{n: t.to("meta") for n, t in call.items()}, backend="native")
        with pytest.raises(ki.Ineligible, match="native: needs float32 or bfloat16"):
            function(**op(torch.float16)[1], backend="native")


@pytest.mark.parametrize("backend", ["native", "inductor", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_a_view_whose_sign_is_not_in_memory_is_not_theirs(op, backend):
    function, call = op()
    first = next(iter(call))
    negative = call | {first: torch._neg_view(call[first])}
    with torch.no_grad():
        with pytest.raises(ki.Ineligible, match=f"{backend}: needs tensors without the negative bit"):
            function(**negative, backend=backend)
        for actual, expected in zip(function(**negative), function(**call | {first: -call[first]}), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_nothing_of_the_callers_is_written_and_the_bits_do_not_depend_on_threads(op, dtype):
    function, call = op(dtype, tokens=6000)  # several threads
    before = {n: t.clone() for n, t in call.items()}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(function(**call, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(call[n], t) for n, t in before.items())
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
        assert not any(one.data_ptr() == t.data_ptr() for t in call.values())


def test_a_norm_is_of_the_stream_as_it_is_stored():
    function, call = norm(torch.bfloat16)
    stored, normed = function(**call, backend="native")
    assert stored.dtype == normed.dtype == torch.bfloat16
    again = function(stored, torch.zeros_like(stored), call["weight"], backend="native")
    assert torch.equal(again.normed, normed)
