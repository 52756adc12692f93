"""Compiled regions: one variant for each dtype and width, real generated code, and no silent eager run."""

import logging
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from torch._inductor import metrics
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_index as ki
from kernel_index.core import inductor
from kernel_index.core.inductor import Region

SWITCHED_OFF = "torch.compile is switched off"
IN_A_MODE = "inside a TorchDispatchMode or torch.jit.trace, which compiled code does not see"


def scaled_softplus(x, scale):
    return (torch.log1p(torch.exp(x)) * scale).to(x.dtype)


def region() -> Region:
    return Region(scaled_softplus, x=(0,))


def events(call) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return {e.name for e in recorded.events()}


def ran_generated_code(call) -> bool:
    names = events(call)
    return any("CompiledFxGraph" in n for n in names) and not names & {"aten::log1p", "aten::exp", "aten::mul"}


def test_row_counts_share_a_variant_and_dtype_and_width_do_not():
    r = region()
    for rows in (5, 2, 700, 3, 5):
        r(torch.randn(rows, 8), 2.0)
    assert len(r.variants) == 1
    r(torch.randn(5, 9), 2.0)
    assert len(r.variants) == 2
    r(torch.randn(5, 8, dtype=torch.bfloat16), 2.0)
    assert len(r.variants) == 3


def test_row_counts_do_not_compile_again_behind_our_back():
    r = region()
    r(torch.randn(5, 8), 2.0)
    torch._dynamo.utils.counters.clear()
    for rows in (2, 700, 3):
        r(torch.randn(rows, 8), 2.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.fixture
def traced_shapes(monkeypatch):
    """The shape of the input of every graph that a region hands to its compiler; symbols as text."""
    shapes, compile_for_real = [], torch.compile

    def record(graph, _):
        (x,) = (n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder" and "x" in n.name)
        shapes.append(tuple(n if isinstance(n, int) else "dynamic" for n in x.shape))
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_for_real(f, backend=record, **options))
    return shapes


def test_rows_are_dynamic_and_widths_static_from_the_first_to_the_last(traced_shapes):
    """Dynamo remembers by file and line which sizes have varied, and would make the second width dynamic."""
    r = region()
    for rows, width in ((5, 8), (6, 8), (5, 9), (700, 10), (1, 8), (1, 9), (2, 8)):
        r(torch.randn(rows, width), 2.0)
    assert traced_shapes == [("dynamic", 8), ("dynamic", 9), ("dynamic", 10), (1, 8), (1, 9)]


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row_are_variants_of_their_own(rows):
    """Inductor specialises these sizes, so sharing a variant would make a result depend on what came first."""
    r = region()
    for n in (rows, 4, rows):
        x = torch.randn(n, 8)
        torch.testing.assert_close(r(x, 2.0), scaled_softplus(x, 2.0))
    assert len(r.variants) == 2


def test_equal_constants_of_different_type_are_different_variants():
    r = region()
    for constant in (1, 1.0, True):
        r(torch.randn(4, 8), constant)
    assert len(r.variants) == 3


def test_two_dynamic_sizes_that_happen_to_agree_may_differ_later():
    r = Region(lambda x, y: x.sum(0) + y.sum(0), x=(0,), y=(0,))
    for n, m in ((6, 6), (6, 5), (3, 9)):
        x, y = torch.randn(n, 4), torch.randn(m, 4)
        torch.testing.assert_close(r(x, y), x.sum(0) + y.sum(0))
    assert len(r.variants) == 1


@pytest.mark.thorough
def test_results_do_not_depend_on_what_was_compiled_before():
    wanted = [torch.randn(n, w) for n, w in ((7, 24), (1, 24), (33, 24), (7, 100))]
    fresh = [region()(x, 3.0) for x in wanted]
    used = region()
    for n, w in ((1, 24), (5, 100), (2, 24), (64, 7), (9, 3)):
        used(torch.randn(n, w), 3.0)
    for x, expected in zip(reversed(wanted), reversed(fresh), strict=True):
        assert torch.equal(used(x, 3.0), expected)


@pytest.mark.thorough
def test_more_widths_than_dynamo_would_recompile():
    """Dynamo gives a code object eight variants and then, with fullgraph, an error; ours have one each."""
    r = region()
    for width in range(2, 14):
        x = torch.randn(3, width)
        torch.testing.assert_close(r(x, 2.0), scaled_softplus(x, 2.0))
    assert len(r.variants) == 12
    assert all(ran_generated_code(lambda w=w: r(torch.randn(3, w), 2.0)) for w in (2, 13))


def test_generated_code_ran():
    metrics.reset()
    r = region()
    x = torch.randn(64, 48)
    with torch._inductor.config.patch(force_disable_caches=True):
        r(x, 5.0)
    assert metrics.generated_kernel_count == 1, "one loop for the whole formula"
    assert ran_generated_code(lambda: r(x, 5.0))
    assert not ran_generated_code(lambda: scaled_softplus(x, 5.0)), "the check must be able to fail"


def test_generated_code_ran_for_an_op_and_its_backward():
    x = torch.randn(64, 48, requires_grad=True)

    def step(backend):
        ki.fused_relu_squared(x, backend=backend).backward(torch.ones_like(x))

    step("inductor")
    compiled, plain = events(lambda: step("inductor")), events(lambda: step("reference"))
    assert sum("CompiledFxGraph" in n for n in compiled) == 2
    assert not any("CompiledFxGraph" in n for n in plain)
    assert "aten::mul" in plain
    assert "aten::mul" not in compiled


def test_the_caller_keeps_his_tensors():
    r = region()
    x = torch.randn(6, 8, requires_grad=True)
    before = dict(x.__dict__)
    out = r(x, 2.0)
    assert x.__dict__ == before, "the dynamic mark is on a view"
    assert not out.requires_grad
    y = torch.randn(8, 6).t()
    torch.testing.assert_close(r(y, 2.0), scaled_softplus(y, 2.0))


def test_the_number_of_threads_is_part_of_the_variant():
    """Inductor bakes it into the loops."""
    r, threads = region(), torch.get_num_threads()
    x = torch.randn(64, 8)
    first = r(x, 2.0)
    try:
        torch.set_num_threads(threads + 1)
        torch.testing.assert_close(r(x, 2.0), first)
    finally:
        torch.set_num_threads(threads)
    assert len(r.variants) == 2


def test_threads_may_share_a_region_and_compile_it_once(caplog):
    r = region()
    inputs, outputs = [torch.randn(n, 8) for n in range(2, 6)], {}
    threads = [threading.Thread(target=lambda i=i: outputs.update({i: r(inputs[i], 2.0)})) for i in range(4)]
    with caplog.at_level(logging.INFO, "kernel_index"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(r.variants) == 1
    assert sum("compiled scaled_softplus in" in m.getMessage() for m in caplog.records) == 1, "the others waited"
    for i, x in enumerate(inputs):
        torch.testing.assert_close(outputs[i], scaled_softplus(x, 2.0))


def test_an_interrupted_compilation_is_started_afresh(monkeypatch):
    r = region()
    x = torch.randn(6, 8)
    with monkeypatch.context() as patch:
        patch.setattr(inductor, "_marked", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            r(x, 2.0)
    assert r.variants == {}
    r(x, 2.0)
    assert ran_generated_code(lambda: r(x, 2.0))


# The notice


@pytest.mark.parametrize(
    ("patience", "rank", "warned"), [(0.0, "0", 1), (0.0, "3", 0), (600.0, "0", 0)], ids=["long", "rank 3", "short"]
)
def test_a_long_wait_is_explained_once(monkeypatch, caplog, patience, rank, warned):
    """By the first process; what is found in the cache quickly is no news."""
    monkeypatch.setattr(inductor, "_explained", False)
    monkeypatch.setattr(inductor, "PATIENCE", patience)
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, "kernel_index"):
        r = region()
        for width in (8, 9, 8):
            r(torch.randn(3, width), 2.0)
    warnings = [m.getMessage() for m in caplog.records if m.levelno == logging.WARNING]
    assert len(warnings) == warned
    assert all("compiling scaled_softplus and its like for this CPU" in w for w in warnings)
    assert all(os.environ["TORCHINDUCTOR_CACHE_DIR"] in w for w in warnings)
    assert sum("compiled scaled_softplus in" in m.getMessage() for m in caplog.records) == 2


# Where it must not run, because it would run eagerly under a false name, or fail


def refusal(**change) -> str | None:
    return ki.explain("fused_relu_squared", **({"x": torch.randn(512, 256)} | change)).verdicts["inductor"]


def assert_declined(reason: str) -> None:
    x = torch.randn(512, 256)
    with pytest.raises(ki.Ineligible, match=re.escape(reason)):
        ki.fused_relu_squared(x, backend="inductor")
    with ki.receipts() as log:
        ki.fused_relu_squared(x)
    assert [(r.ran, dict(r.declined)["inductor"]) for r in log] == [("reference", reason)]


def test_the_rules_are_open_here():
    assert refusal() is None


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "fail_on_recompile"])
def test_a_stance(stance):
    with torch.compiler.set_stance(stance):
        assert_declined(SWITCHED_OFF)
    assert refusal() is None


def test_the_configuration_of_dynamo():
    with torch._dynamo.config.patch(disable=True):
        assert_declined(SWITCHED_OFF)
    assert refusal() is None


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
@pytest.mark.parametrize("loaded", [False, True], ids=["dynamo-not-imported", "dynamo-imported"])
@pytest.mark.thorough_if(when=lambda variable, loaded: variable != "TORCHDYNAMO_DISABLE" or loaded)
def test_the_environment(variable, loaded):
    code = (
        f"import torch{', torch._dynamo' if loaded else ''}, kernel_index as ki\n"
        "print(ki.explain('fused_relu_squared', torch.ones(512, 256)).verdicts['inductor'])"
    )
    env = {k: v for k, v in os.environ.items() if not k.endswith("_DISABLE")}
    for value, expected in (("1", SWITCHED_OFF), ("0", "None")):
        result = subprocess.run(
            [sys.executable, "-c", code], env=env | {variable: value}, capture_output=True, text=True
        )
        assert result.stdout.strip() == expected, result.stderr


def test_a_switch_that_the_rules_missed_raises(monkeypatch):
    """The receipt would say inductor, so an eager run is not an option."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(RuntimeError, match="it left scaled_softplus uncompiled"):
        region()(torch.randn(3, 8), 2.0)


class Silent(TorchDispatchMode):
    """A mode that changes nothing, as a FLOP counter or a selective checkpoint is one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode():
    """Dynamo compiles nothing inside one; with fullgraph it raises, then and on every later call."""
    with Silent():
        assert_declined(IN_A_MODE)
    x = torch.randn(512, 256)
    assert ran_generated_code(lambda: ki.fused_relu_squared(x, backend="inductor"))


def test_a_backward_pass_inside_a_mode_that_its_forward_did_not_see():
    x = torch.randn(40, 24, requires_grad=True)
    y = ki.fused_relu_squared(x, backend="inductor")
    with Silent():
        y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, 2 * x.detach().relu())


def test_the_tracer_of_jit():
    with pytest.warns(DeprecationWarning, match="jit"):
        traced = torch.jit.trace(ki.fused_relu_squared, torch.randn(512, 256))
    x = torch.randn(512, 256)
    torch.testing.assert_close(traced(x), x.relu().square())


def test_a_function_transform():
    x = torch.randn(512, 256)
    with ki.receipts() as log:
        gradient = torch.func.grad(lambda x: ki.fused_relu_squared(x).sum())(x)
    assert dict(log[0].declined)["inductor"] == "inside a torch.func transform"
    torch.testing.assert_close(gradient, 2 * x.relu())


def test_other_tensors():
    class Tagged(torch.Tensor):
        pass

    assert refusal(x=torch.randn(512, 256).as_subclass(Tagged)) == "needs plain tensors, not a tensor subclass"
    assert refusal(x=torch.nn.Parameter(torch.randn(512, 256))) is None
    assert refusal(x=torch.randn(512, 256, device="meta")) == "needs CPU tensors"


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(inductor, "has_inductor_compiler", lambda: False)
    assert_declined(inductor.NO_GXX)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_pytorch_that_change_nothing(context):
    x = torch.randn(40, 24)
    expected = ki.fused_relu_squared(x, backend="inductor")
    with context():
        assert torch.equal(ki.fused_relu_squared(x, backend="inductor"), expected)
        assert ran_generated_code(lambda: ki.fused_relu_squared(x, backend="inductor"))
    assert torch.equal(ki.fused_relu_squared(x, backend="inductor"), expected)


def test_sizes_and_auto():
    small, large = torch.ones(inductor.MIN_ELEMENTS - 1), torch.ones(inductor.MIN_ELEMENTS)
    assert ki.explain("fused_relu_squared", small).verdicts["inductor"] == "too small for a compiled region to pay"
    assert ki.explain("fused_relu_squared", small).would_run == "reference"
    assert ki.explain("fused_relu_squared", large).would_run == "inductor"
    assert ki.explain("fused_relu_squared", small, backend="inductor").would_run == "inductor"
