"""One tensor given for two arguments: the results of two clones, and the sum of their gradients.

Latent attention has keys that are its values, a residual may be its own delta.  Autograd adds up by itself; Dynamo
refuses a Function that gets one tensor twice.  Every suite is tried with every pair of arguments whose shapes allow it.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kernel_index as ki
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.proofs.errors import differentiable, tensors_of, upstream_like

ROOT = Path(ki.__file__).parent
SIZE = 8


def alike(a: Any, b: Any) -> bool:
    return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def calls():
    """(suite, backend, kwargs, pair): for each pair the suite's first call in which the two arguments look alike."""
    for suite in suites():
        found: dict[tuple[str, str], dict[str, Any]] = {}
        builds = [lambda m, suite=suite: suite.sized(m, SIZE), *(case.build for case in suite.cases)]
        for build in builds:
            kwargs = build(Maker(torch.float32))
            for pair in itertools.combinations(differentiable(suite, kwargs, "reference"), 2):
                if alike(*(kwargs[n] for n in pair)) and kwargs[pair[0]].numel():
                    found.setdefault(pair, kwargs)
        for pair, kwargs in found.items():
            for backend in suite.backends:
                if backend.name in suite.without_gradient:
                    continue
                if ki.explain(suite.function, **kwargs, backend=backend.name).verdicts[backend.name] is None:
                    yield pytest.param(suite, backend.name, kwargs, pair, id=f"{suite}-{backend.name}-{'-'.join(pair)}")


CALLS = list(calls())


def results(function, suite: Suite, backend: str, kwargs: dict[str, Any], pair: tuple[str, str], *, shared: bool):
    """Outputs, and the gradient with respect to the pair: of one tensor, or the sum over two clones."""
    first = kwargs[pair[0]].detach().requires_grad_()
    second = first if shared else first.detach().clone().requires_grad_()
    kwargs = {**kwargs, pair[0]: first, pair[1]: second}
    outputs = [o for o in tensors_of(function(**kwargs)) if o.requires_grad]
    leaves = [first] if shared else [first, second]
    gradients = torch.autograd.grad(outputs, leaves, upstream_like(tuple(outputs)))
    return [*(o.detach() for o in outputs), sum(gradients)]


@pytest.mark.thorough_if(when=lambda compiled, **_: compiled)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("suite", "backend", "kwargs", "pair"), CALLS)
def test_equals_two_clones(suite, backend, kwargs, pair, compiled):
    def call(**kwargs):
        return suite.function(**kwargs, backend=backend)

    expected = results(call, suite, backend, kwargs, pair, shared=False)
    function = call
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(call, fullgraph=True, backend="aot_eager")
    try:
        actual = results(function, suite, backend, kwargs, pair, shared=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = "torch.compile is tracing"  # the one refusal that only a trace can show; any other error is a failure
        if reason not in str(error):
            raise
        pytest.skip(reason)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_every_function_is_applied_by_the_one_that_takes_a_tensor_twice():
    """A kernel's own Function too whose arguments never look alike in the suites."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("core", "routing", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"\b_?[A-Z]\w*\.apply\(", line)
    ]
    assert found == []


def test_there_are_pairs_of_every_kind():
    pairs = {(str(p.values[0]), p.values[3]) for p in CALLS}
    assert {
        ("attention", ("k", "v")),
        ("exact_token_attention", ("k", "v")),
        ("fused_residual_add_rms_norm", ("residual", "delta")),
        ("gather_rows_pair", ("a", "b")),
    } <= pairs
