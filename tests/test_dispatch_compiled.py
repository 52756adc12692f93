"""What dispatch promises inside ``torch.compile(fullgraph=True, dynamic=True)``."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core import dispatch, target
from kernel_index.core.force import reload_environment
from kernel_index.core.target import Target
from tests import toy_op
from tests.toy_op import toy

SIZES = (9, 13, 21, 9)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(function):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def test_one_graph_and_one_receipt_for_several_sizes():
    call = compiled(lambda x: toy(x) + 1)
    with ki.receipts() as log:
        for n in SIZES:
            assert torch.equal(call(torch.ones(n, 8)), torch.full((n, 8), 11.0))
    assert graphs() == 1
    assert [(r.op, r.requested, r.ran, r.declined, r.error) for r in log] == [("toy", "auto", "even", (), None)]


def test_the_chosen_backend_is_the_one_traced():
    """Widths of either parity are two decisions, hence two graphs, and each has its receipt."""
    call = compiled(toy)
    with ki.receipts() as log:
        assert call(torch.ones(5, 8))[0, 0] == 10
        assert call(torch.ones(5, 7))[0, 0] == 20
        assert call(torch.ones(5, 9))[0, 0] == 20
        assert call(torch.ones(5, 12))[0, 0] == 10
    assert graphs() == 2
    assert [(r.ran, r.declined) for r in log] == [("even", ()), ("large", (("even", "needs an even width"),))]


@pytest.mark.parametrize(("backend", "factor"), [("large", 20), ("reference", 30)])
def test_a_named_backend(backend, factor):
    call = compiled(lambda x: toy(x, backend=backend))
    with ki.receipts() as log:
        for n in SIZES:
            assert call(torch.ones(n, 8))[0, 0] == factor
    assert graphs() == 1
    assert [(r.requested, r.ran) for r in log] == [(backend, backend)]


def test_opening_and_closing_a_log_compiles_nothing():
    call = compiled(toy)
    call(torch.ones(9, 8))
    with ki.receipts() as log:
        call(torch.ones(9, 8))
        with ki.receipts():
            call(torch.ones(13, 8))
    call(torch.ones(9, 8))
    assert graphs() == 1
    assert log == [], "a receipt is written when a call is traced, and these were traced before"


def test_every_call_in_a_graph_has_its_receipt():
    call = compiled(lambda x: toy(toy(x), backend="reference") + toy(x, backend="large"))
    with ki.receipts() as log:
        assert call(torch.ones(9, 8))[0, 0] == 320
    assert [r.ran for r in log] == ["even", "reference", "large"]
    assert graphs() == 1


def test_gradients_flow_through_the_choice():
    call = compiled(toy)
    x = torch.ones(9, 8, requires_grad=True)
    call(x).sum().backward()
    assert torch.equal(x.grad, torch.full((9, 8), 10.0))


def test_details_are_on_the_receipt():
    call = compiled(toy_op.detailed_statically)
    with ki.receipts() as log:
        for n in SIZES:
            call(torch.ones(n, 8))
    assert graphs() == 1
    assert [dict(r.details) for r in log] == [{"path": "even"}]


def raised_by(call, *args) -> str:
    """The text of what a compiled call raises; Dynamo wraps an exception of the traced code in one of its own."""
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as error:
        call(*args)
    return str(error.value)


def test_a_refused_call_says_why():
    call = compiled(lambda x: toy(x, backend="even"))
    assert "toy: backend='even' cannot run this call (even: needs an even width)" in raised_by(call, torch.ones(4, 7))


def test_an_unknown_backend_says_so():
    assert "expected auto or one of: even, large, reference" in raised_by(
        compiled(lambda x: toy(x, backend="cuda-magic")), torch.ones(4, 8)
    )


@pytest.mark.parametrize("call", [toy_op.bad_rule, toy_op.bad_advice, toy_op.bad_details])
def test_a_predicate_that_raises_surfaces(call):
    with ki.receipts() as log:
        assert "a bug in a rule" in raised_by(compiled(call), torch.ones(2, 2))
    assert log == []


def test_a_launch_that_fails_raises():
    error = toy_op.LaunchError("out of shared memory")
    with ki.receipts() as log:
        assert "out of shared memory" in raised_by(compiled(lambda x: toy_op.failing(x, error)), torch.ones(2, 2))
    assert [r.ran for r in log if r.ran] == [], "what failed to be traced is not on record as having run"


def test_strict_is_seen_by_code_compiled_before(monkeypatch):
    monkeypatch.setattr(dispatch, "target_of", constant(lambda device: Target("cuda", 90)))
    call = compiled(toy)
    x = torch.ones(1, 7)
    assert call(x)[0, 0] == 30
    with ki.strict():
        assert "strict mode: a fallback to the reference on an accelerator is an error" in raised_by(call, x)
    assert call(x)[0, 0] == 30


def constant(function):
    function._dynamo_marked_constant = True
    return function


def test_the_environment_is_seen_by_code_compiled_before(monkeypatch):
    call = compiled(toy)
    assert call(torch.ones(9, 8))[0, 0] == 10
    monkeypatch.setenv("KERNEL_INDEX_BACKEND_TOY", "reference")
    reload_environment()
    with ki.receipts() as log:
        for n in SIZES:
            assert call(torch.ones(n, 8))[0, 0] == 30
    assert [(r.requested, r.ran, r.forced_by) for r in log] == [("auto", "reference", "KERNEL_INDEX_BACKEND_TOY")]
    assert graphs() == 2


def test_a_real_op_is_plain_pytorch_in_the_callers_graph():
    """The compiled region steps aside, so that Inductor fuses the formula with its neighbours."""
    call = compiled(lambda x: ki.fused_relu_squared(x) + 1)
    x = torch.ones(512, 256)
    assert ki.explain("fused_relu_squared", x).would_run == "inductor"
    with ki.receipts() as log:
        call(x)
    reason = "torch.compile is tracing: the plain formula is traced into the caller's graph"
    assert [(r.ran, dict(r.declined)["inductor"]) for r in log] == [("reference", reason)]
    assert graphs() == 1


def test_what_the_machine_can_do_is_asked_while_a_trace_is_made():
    """Some of what PyTorch asks the processor may not be traced; the answers are constants of the graph."""
    questions = (target.has_cxx_compiler, target.has_vectors, target.has_bfloat16_products)
    asked = compiled(lambda x: x + sum(1 if question() else 0 for question in questions))
    assert asked(torch.zeros(())) == sum(question() for question in questions)


def test_versions_are_asked_without_a_warning(recwarn):
    """PyTorch warns once of each ``functools.cache`` that it traces through, and tells of silent errors."""
    pytest.importorskip("triton")
    asked = compiled(lambda x: x + target.triton_version()[0])
    assert asked(torch.zeros(())) == target.triton_version()[0]
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]
