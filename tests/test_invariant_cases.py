"""Every case of every function under ``numerics("invariant")``: refused by a rule, or right within rounding."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.testing import Maker, suites
from kernel_index.proofs.errors import in_float64, relative_error, run

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.machine_why_not() is not None, reason="native kernels do not run here"),
]

BY_DOCUMENT = {("block_sparse_attention", "per_head_documents"), ("block_router", "documents")}
"""Their blocks count from the start of each document in this mode, which is not what the oracle computes."""

CASES = [
    pytest.param(s, c, id=f"{s.op}-{c.name}")
    for s in suites()
    for c in s.cases
    if any(b.invariant for b in s.backends) and (s.op, c.name) not in BY_DOCUMENT
]

ROUNDINGS = 128
"""Units of rounding between this order of a sum and the oracle's, over at most a few hundred terms; times the largest
value, by which the error is measured."""


@pytest.mark.parametrize(("suite", "case"), CASES)
def test_it_is_right_or_refused(suite, case):
    kwargs = case.build(Maker(torch.float32))
    names = [n for n in suite.differentiable if isinstance(kwargs.get(n), torch.Tensor)]
    if "native" in suite.without_gradient:
        names = []
    with ki.numerics("invariant"):
        if ki.explain(suite.function, **kwargs).would_run is None:
            with pytest.raises(ki.Ineligible, match="has no invariant form"):
                suite.function(**kwargs)
            return
        found, gradients = run(suite.function, kwargs, names)
    exact, exact_gradients = run(suite.oracle, in_float64(kwargs), names)
    for one, other in zip(found + gradients, exact + exact_gradients, strict=True):
        assert relative_error(one, other) <= ROUNDINGS * torch.finfo(torch.float32).eps


def test_some_of_each_function_run():
    ran = set()
    for suite, case in (p.values for p in CASES):
        with ki.numerics("invariant"), torch.no_grad():
            explanation = ki.explain(suite.function, **case.build(Maker(torch.float32)))
        ran |= {suite.op} if explanation.would_run else set()
    on_a_gpu_alone = {s.op for s in suites() if {b.name for b in s.backends if b.invariant} == {"triton"}}
    assert {suite.op for suite, _ in (p.values for p in CASES)} - on_a_gpu_alone == ran
