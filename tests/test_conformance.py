"""One test for every op × backend × case.  A new kernel gets all of it by having a ``cases.py``."""

import pytest
import torch
from torch._inductor.utils import fresh_inductor_cache
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_index as ki
from kernel_index.core.inductor import Region
from kernel_index.core.target import machine_why_not
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.proofs.errors import (
    assess,
    clone_inputs,
    differentiable,
    floor,
    in_float64,
    relative_error,
    run,
    tensors_of,
    upstream_like,
)
from kernel_index.proofs.numerics import placed

SUITES = suites()
PAIRS = [pytest.param(s, b.name, id=f"{s.op}-{b.name}") for s in SUITES for b in s.backends]
CASES = [
    pytest.param(s, b.name, c, id=f"{s.op}-{b.name}-{c.name}") for s in SUITES for b in s.backends for c in s.cases
]
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float16)]

BY_FAMILY = {s.function.__module__.rsplit(".", 2)[0]: s for s in reversed(SUITES)}
IN_INDUCTOR = [
    pytest.param(s, "triton", id=s.op) for s in BY_FAMILY.values() if any(b.name == "triton" for b in s.backends)
]
"""One op of each family whose call is compiled with Inductor."""

COMPILED = "fused_bias_dropout_add"
"""The op that ``make test`` compiles with Inductor."""

MADE_OF_OTHERS = (
    "attention_with_lse", "clustered_sparse_attention", "clustered_sparse_attention_with_lse", "moba_attention_with_lse"
)  # fmt: skip
"""Their kernels are those of ``attention`` and ``block_sparse_attention``."""

LONG_CALLS = ("block_sparse_attention", "clustered_sparse_attention", "moba_attention")
LONG_TRACES = (
    *LONG_CALLS, "attention_with_lse", "exact_token_attention", "exact_token_attention_with_lse",
    "fa4_kvcache_decode", "hierarchical_block_select", "moba_attention_with_lse",
)  # fmt: skip
"""Ops whose traces take from 4 to 30 seconds; ``attention`` and ``block_router`` are made of the same parts."""


def repeats_a_case(suite, backend, case, dtype) -> bool:
    """``make test`` has every case in float32, which has the smallest budget, and in bfloat16 if that is cheap."""
    first = case == suite.cases[0]
    if backend == "inductor":  # the first case; test_formulas_without_their_compiler has all of them
        return dtype != torch.float32 or suite.op != COMPILED
    if backend == "triton" and not first and suite.op in MADE_OF_OTHERS:
        return True
    if backend == "triton":
        return not (dtype == torch.float32 or (first and dtype == torch.bfloat16))
    return not first and dtype == torch.float16


def repeats_a_scale(suite, backend, scale) -> bool:
    return scale != max(suite.scales)


def repeats_a_graph(suite, backend) -> bool:
    """What ``auto`` takes is traced, which on a CPU is the reference, and of attention what launches Triton."""
    return suite.op in LONG_TRACES or backend != ("triton" if suite.op == "attention" else "auto")


def repeats_in_long_calls(suite, backend) -> bool:
    """Interpreted calls that take seconds, of ops that are made of others."""
    return backend == "triton" and suite.op in LONG_CALLS


NOT_TWICE = r"differentiate twice|once_differentiable|double backward|higher|derivative for .* is not implemented"


def refusal(suite: Suite, backend: str, kwargs) -> str | None:
    return ki.explain(suite.function, **kwargs, backend=backend).verdicts[backend]


def build(suite: Suite, case, dtype, backend, **maker):
    if dtype not in suite.dtypes:
        pytest.skip(f"{suite.op} does not take {dtype}")
    kwargs = case.build(Maker(dtype, **maker))
    reason = refusal(suite, backend, kwargs)
    if reason:
        pytest.skip(reason)
    return kwargs


def assert_within_budget(suite: Suite, backend: str, kwargs) -> None:
    for f in assess(suite, backend, kwargs):
        assert f.passes, f"{f.label}: {f.note or f'error {f.error:.3g} over the budget {f.budget:.3g}'}"


@pytest.mark.compiled
@pytest.mark.thorough_if(when=repeats_a_case)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("suite", "backend", "case"),
    [p for p in CASES if p.values[1] != "inductor" or p.values[2] == p.values[0].cases[0]],
)
def test_values_and_gradients(suite, backend, case, dtype):
    kwargs = build(suite, case, dtype, backend)
    poison_freed_memory(kwargs)
    assert_within_budget(suite, backend, kwargs)


def test_every_case_has_a_quick_test():
    for suite, backend, case in (p.values for p in CASES):
        repeated = all(repeats_a_case(suite, backend, case, d) for d in suite.dtypes)
        assert backend == "inductor" or suite.op in MADE_OF_OTHERS or not repeated, case.name


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("suite", "backend", "case"), [p for p in CASES if p.values[1] == "inductor"])
def test_formulas_without_their_compiler(suite, backend, case, dtype, monkeypatch):
    """What Inductor compiles, run as it is written: to compile every case takes minutes."""
    kwargs = build(suite, case, dtype, backend)
    monkeypatch.setattr(Region, "__call__", lambda region, *args: region.function(*args))
    assert_within_budget(suite, backend, kwargs)


@pytest.mark.thorough_if(when=repeats_a_scale)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 16.0, 300.0])
@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_input_scales(suite, backend, scale):
    if scale not in suite.scales:
        pytest.skip("the suite names the scales that are meaningful for this op")
    kwargs = build(suite, suite.cases[0], torch.float32, backend, scale=scale)
    assert_within_budget(suite, backend, kwargs)


@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_runs_at_least_one_case(suite, backend):
    if machine_why_not(backend):
        pytest.skip(machine_why_not(backend))
    assert any(runs_somewhere(suite, backend, case, dtype) for case in suite.cases for dtype in suite.dtypes), (
        f"{backend} claims this machine and refuses every case"
    )


def runs_somewhere(suite: Suite, backend: str, case, dtype) -> bool:
    """On the CPU, or on a GPU: only there some backends run, whose values ``prove numerics`` compares."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return any(refusal(suite, backend, placed(case.build(Maker(dtype, device=d)), d)) is None for d in devices)


def poison_freed_memory(kwargs) -> None:
    """Leave NaN in the freed blocks that the allocator is about to hand out again."""
    blocks = [
        torch.full_like(t, float("nan"), memory_format=torch.contiguous_format)
        for t in tensors_of(kwargs.values())
        if t.is_floating_point()
        for _ in range(3)
    ]
    del blocks


@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_layouts_agree_and_inputs_survive(suite, backend):
    """Non-contiguous inputs give what contiguous ones give; nothing the caller owns is written."""
    kwargs = build(suite, suite.cases[0], torch.float32, backend)
    names = differentiable(suite, kwargs, backend)
    strided = {
        k: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }
    if reason := refusal(suite, backend, strided):
        pytest.skip(reason)
    before = clone_inputs(strided)
    versions = {k: v._version for k, v in strided.items() if isinstance(v, torch.Tensor)}
    outputs, grads = run(suite.function, strided, names, backend=backend)
    for name, version in versions.items():
        assert strided[name]._version == version, f"{name} was written"
        torch.testing.assert_close(strided[name], before[name], rtol=0, atol=0, equal_nan=True)
    plain, plain_grads = run(suite.function, kwargs, names, backend=backend)
    for actual, expected in zip(outputs + grads, plain + plain_grads, strict=True):
        assert relative_error(actual, expected) <= floor(torch.float32)
    for output in outputs:
        assert output.is_contiguous()


@pytest.mark.thorough_if(when=repeats_in_long_calls)
@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_each_input_alone_may_need_a_gradient(suite, backend):
    kwargs = build(suite, suite.cases[0], torch.float32, backend)
    names = differentiable(suite, kwargs, backend)
    _, together = run(suite.function, kwargs, names, backend=backend)
    for name, expected in zip(names, together, strict=True):
        _, (alone,) = run(suite.function, kwargs, [name], backend=backend)
        assert relative_error(alone, expected) <= floor(torch.float32), name


@pytest.mark.thorough_if(when=repeats_in_long_calls)
@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_same_call_same_bits(suite, backend):
    kwargs = build(suite, suite.cases[0], torch.float32, backend)
    names = differentiable(suite, kwargs, backend)
    first, second = (run(suite.function, kwargs, names, backend=backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.thorough_if(when=repeats_in_long_calls)
@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_default_device_and_dtype_change_nothing(suite, backend):
    """Where the arguments say what is computed, a process's defaults say nothing."""
    kwargs = build(suite, suite.cases[0], torch.float32, backend)
    names = differentiable(suite, kwargs, backend)
    plain = run(suite.function, kwargs, names, backend=backend)

    def under_other_defaults(**call):
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                return suite.function(**call)
        finally:
            torch.set_default_dtype(torch.float32)

    there = run(under_other_defaults, kwargs, names, backend=backend)
    for a, b in zip(plain[0] + plain[1], there[0] + there[1], strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_nonfinite_inputs_come_out_where_the_oracle_has_them(suite, backend, value):
    if not suite.nonfinite:
        pytest.skip("the suite names no argument that may hold inf or NaN")
    for name in suite.nonfinite:
        kwargs = build(suite, suite.cases[0], torch.float32, backend)
        kwargs[name].view(-1)[kwargs[name].numel() // 2] = value
        outputs, _ = run(suite.function, kwargs, [], backend=backend)
        expected, _ = run(suite.oracle, in_float64(kwargs), [])
        for actual, exact in zip(outputs, expected, strict=True):
            assert torch.equal(actual.isnan(), exact.isnan()), name
            assert torch.equal(actual.isinf(), exact.isinf()), name


@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_gradcheck(suite, backend):
    kwargs = suite.sized(Maker(torch.float64), 3)
    reason = refusal(suite, backend, kwargs)
    if reason:
        pytest.skip(reason)
    names = differentiable(suite, kwargs, backend)
    if not names:
        pytest.skip("has no gradient")
    leaves = tuple(kwargs[n].requires_grad_() for n in names)

    def call(*values):
        return tensors_of(suite.function(**(kwargs | dict(zip(names, values, strict=True))), backend=backend))

    assert torch.autograd.gradcheck(call, leaves)
    if suite.double_backward:
        assert torch.autograd.gradgradcheck(call, leaves)
    elif backend != "reference":
        outputs = [o for o in call(*leaves) if o.requires_grad]
        with pytest.raises(RuntimeError, match=NOT_TWICE):  # noqa: PT012
            grads = torch.autograd.grad([o.sum() for o in outputs], leaves, create_graph=True)
            torch.autograd.grad(sum(g.sum() for g in grads), leaves)


TRACED = [pytest.param(s, "auto", id=f"{s.op}-auto") for s in SUITES]
TRACED += [p for p in PAIRS if p.values[1] != "reference"]  # which is what ``auto`` takes in a trace on a CPU


class Compiled:
    """A call compiled into one graph of any size, compared with the reference, and which backend each trace took."""

    def __init__(self, suite, backend, compiler):
        self.suite, self.traced = suite, []
        reason = None if backend == "auto" else refusal(suite, backend, suite.sized(Maker(torch.float32), 9))
        if reason:
            pytest.skip(reason)
        self.names = differentiable(suite, suite.sized(Maker(torch.float32), 9), backend)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.call = torch.compile(
            lambda kwargs: suite.function(**kwargs, backend=backend), fullgraph=True, dynamic=True, backend=compiler
        )

    def trial(self, size):
        kwargs = self.suite.sized(Maker(torch.float32), size)
        with ki.receipts() as log:
            actual = run(lambda **kw: self.call(kw), kwargs, self.names)
        self.traced.extend(r.ran for r in log if r.op == self.suite.op)
        expected = run(self.suite.function, kwargs, self.names, backend="reference")
        for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
            assert relative_error(a, e) <= 8 * floor(torch.float32)

    def first_trial(self):
        try:
            self.trial(9)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = "torch.compile is tracing"  # the one refusal that only a trace can show; others are failures
            if reason not in str(error):
                raise
            pytest.skip(reason)


@pytest.mark.thorough_if(when=repeats_a_graph)
@pytest.mark.parametrize(("suite", "backend"), TRACED)
def test_one_graph_over_several_sizes(suite, backend):
    """fullgraph, dynamic, one graph, one receipt for each trace."""
    compiled = Compiled(suite, backend, "aot_eager")
    compiled.first_trial()
    for size in (13, 21, 9):
        compiled.trial(size)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(compiled.traced) == 1, "one receipt for one trace"


@pytest.mark.thorough
@pytest.mark.parametrize(("suite", "backend"), IN_INDUCTOR)
def test_inductor_from_an_empty_cache(suite, backend):
    """Values and gradients are those of the reference, where a graph holds operators of ours."""
    with fresh_inductor_cache():
        Compiled(suite, backend, "inductor").trial(9)


class Launches(TorchDispatchMode):
    """Every call of a registered op of ours, with detached arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "kernel_index":
            self.calls.append((op, [a.detach() if isinstance(a, torch.Tensor) else a for a in args], kwargs or {}))
        return op(*args, **(kwargs or {}))


@pytest.mark.thorough_if(when=repeats_in_long_calls)
@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_registered_ops_keep_their_schema_and_their_fakes(suite, backend):
    """``opcheck`` on the very calls that forward and backward make; a Triton backend launches nothing unregistered."""
    kwargs = build(suite, suite.cases[0], torch.float32, backend)
    names = differentiable(suite, kwargs, backend)
    try:
        with Launches() as launches:
            run(suite.function, kwargs, names, backend=backend)
    except ki.Ineligible:
        pytest.skip("refuses a TorchDispatchMode")
    assert launches.calls or backend != "triton", "a Triton kernel is launched by a registered op"
    for op, args, extra in launches.calls:
        torch.library.opcheck(op, tuple(args), extra, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("suite", "backend"), PAIRS)
def test_double_backward_in_float32(suite, backend):
    """For backends that take no float64, where ``gradgradcheck`` is out of reach: equal to the reference's."""
    kwargs = build(suite, suite.cases[0], torch.float32, backend)
    names = differentiable(suite, kwargs, backend)
    if not suite.double_backward or not names or refusal(suite, backend, suite.sized(Maker(torch.float64), 3)) is None:
        pytest.skip("no double backward promised, or gradgradcheck covers it")

    def twice(which):
        leaves = {n: kwargs[n].detach().requires_grad_() for n in names}
        outputs = [o for o in tensors_of(suite.function(**(kwargs | leaves), backend=which)) if o.requires_grad]
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream_like(tuple(outputs)), create_graph=True)
        live = [g for g in grads if g.requires_grad]
        if not live:  # the op is linear
            return []
        again = torch.autograd.grad(live, list(leaves.values()), upstream_like(tuple(live), seed=8), allow_unused=True)
        return [g for g in again if g is not None]

    for actual, expected in zip(twice(backend), twice("reference"), strict=True):
        assert relative_error(actual, expected) <= 8 * floor(torch.float32)


@pytest.mark.parametrize("suite", [pytest.param(s, id=s.op) for s in SUITES])
def test_receipts_are_the_expected_ones(suite):
    """A named backend is requested and run; the reference is last and always eligible."""
    kwargs = suite.cases[0].build(Maker(torch.float32))
    assert suite.backends[-1].name == "reference"
    for backend in suite.backends:
        if refusal(suite, backend.name, kwargs):
            with pytest.raises(ki.Ineligible, match=backend.name):
                suite.function(**kwargs, backend=backend.name)
            continue
        with ki.receipts() as log:
            suite.function(**kwargs, backend=backend.name)
        mine = [r for r in log if r.op == suite.op]
        assert [(r.requested, r.ran, r.declined, r.error) for r in mine] == [(backend.name, backend.name, (), None)]


@pytest.mark.parametrize("suite", [pytest.param(s, id=s.op) for s in SUITES])
def test_unknown_backend_is_named(suite):
    with pytest.raises(ki.Ineligible, match="expected auto or one of"):
        suite.function(**suite.cases[0].build(Maker(torch.float32)), backend="cuda-magic")
