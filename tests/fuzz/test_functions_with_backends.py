"""Every function with backends: one argument at a time goes wrong, on whichever backend is asked for."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kernel_index as ki
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.proofs.errors import in_float64, run, tensors_of, upstream_like
from tests.fuzz.mutate import mutated
from tests.fuzz.outcome import Refused, nothing_written, outcome_of
from tests.fuzz.shapes import misfit

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor", "ignore:Converting a tensor with requires_grad"
)

SUITES = suites()
LARGEST = 30_000  # elements of a case: what is wrong shows in a small call
COMPILED = ("inductor",)  # compiles anew for each width: the conformance test is where it is tried
WRITTEN = ("k_cache", "v_cache", "past_k", "past_v")
FACTOR = 8  # the conformance test holds the derived budgets; here a wrong formula is looked for, on any values


def elements(kwargs: dict[str, Any]) -> int:
    return sum(t.numel() for t in kwargs.values() if isinstance(t, Tensor))


SMALL = {s.op: [c for c in s.cases if elements(c.build(Maker(torch.float32))) <= LARGEST] for s in SUITES}


def test_every_suite_has_small_cases():
    assert all(SMALL.values())


@pytest.mark.thorough_if(when=lambda op, part: part > 0)
@pytest.mark.parametrize("op", SMALL)
@pytest.mark.parametrize("part", range(4))
@given(seed=st.integers(0, 2**40))
def test_a_call_matches_the_formula_or_says_no(op: str, part: int, seed: int):
    try_one(next(s for s in SUITES if s.op == op), seed + (part << 40))


def try_one(suite: Suite, seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float32, *suite.dtypes])
    kwargs = rng.choice(SMALL[suite.op]).build(Maker(dtype, seed=seed))
    kind = "legal"
    if rng.random() < 0.85:
        # A suite may wrap its function, to give it a cache of its own: junk is then for test_other_functions.py.
        kwargs, kind = mutated(rng, kwargs, junk=getattr(ki, suite.op, suite.function) is suite.function)
    names = [b.name for b in suite.backends if b.name not in COMPILED and (b.name != "triton" or rng.random() < 0.2)]
    backend = rng.choice(["auto", "auto", "auto", *names, "no such backend"])
    with nothing_written(kwargs, but=WRITTEN):
        result = outcome_of(suite.op, lambda: suite.function(**kwargs, backend=backend))
    if isinstance(result, Refused):
        assert kind != "legal" or isinstance(result.error, ki.Ineligible), f"a legal call was refused: {result.error}"
        assert kind != "legal" or backend != "auto", f"auto refused a legal call: {result.error}"
        return
    assert misfit(suite.op, kwargs) is None
    outputs = tensors_of(result)
    if any(isinstance(v, Tensor) and v.is_meta for v in kwargs.values()):
        assert all(o.is_meta for o in outputs), "an output of values that do not exist"
        return
    assert_right(suite, kwargs, backend, outputs, kind)


def assert_right(suite: Suite, kwargs: dict[str, Any], backend: str, outputs: tuple[Tensor, ...], kind: str) -> None:
    """Forward and gradients against the oracle in float64; the plain formula in the call's dtype is the yardstick."""
    plain_kwargs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    if plain_kwargs.get("seed", 0) is None:  # has run, with a seed of its own that no oracle knows
        plain_kwargs["seed"] = 7
    names = [n for n in suite.differentiable if isinstance(kwargs.get(n), Tensor) and kwargs[n].is_floating_point()]
    if kind == "not finite" or backend in suite.without_gradient:
        names = []
    actual, grads = run(suite.function, plain_kwargs, names, backend=backend)
    upstream = upstream_like(tuple(actual))
    try:
        truth, true_grads = run(suite.oracle, in_float64(with_long_integers(plain_kwargs)), names, upstream)
    except IndexError:  # an oracle that counts on the sizes of its cases, as T = S
        assert kind == "anything"
        assert not any(a.isnan().any() for a in actual)
        return
    eager, eager_grads = run(suite.function, plain_kwargs, names, upstream, backend="reference")
    plain = plain_formula(suite, plain_kwargs, names, upstream, eager + eager_grads)
    overflows = any(t is not None and _overflows(t, a) for a, t in zip(actual, truth, strict=True))
    largest = max((v.abs().max().item() for v in plain_kwargs.values() if _has_values(v)), default=0.0)
    for a, t, e, p in zip(actual + grads, truth + true_grads, eager + eager_grads, plain, strict=True):
        if t is None or a is None:
            assert not any(x is not None and x.any() for x in (a, t))
            continue
        assert a.shape == t.shape, f"shape {tuple(a.shape)}, not {tuple(t.shape)}"
        if kind == "not finite":
            continue
        if overflows:  # an inf that the dtype forces may go on as a NaN
            continue
        assert not a.isnan().any() or t.isnan().any(), "NaN from finite values"
        within = a.dtype if suite.rounding and backend in ("auto", *suite.rounding) else torch.float32
        assert_close(a, t, (e, p), largest, torch.promote_types(a.dtype, within))
    assert len(outputs) >= len(actual)


def with_long_integers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's own functions, of which oracles are made, ask for int64."""
    return {k: v.long() if isinstance(v, Tensor) and v.dtype == torch.int32 else v for k, v in kwargs.items()}


def plain_formula(suite: Suite, kwargs: dict[str, Any], names: list[str], upstream: Any, reference: list) -> list:
    """The oracle in the call's own dtype: the yardstick for products that round to it; float32 needs no second one."""
    low = any(isinstance(v, Tensor) and v.dtype in (torch.float16, torch.bfloat16) for v in kwargs.values())
    if not low:
        return reference
    outputs, grads = run(suite.oracle, with_long_integers(kwargs), names, upstream)
    return outputs + grads


def _overflows(truth: Tensor, actual: Tensor) -> bool:
    return bool((truth.abs() > torch.finfo(actual.dtype).max).any())


def _has_values(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def assert_close(
    actual: Tensor, truth: Tensor, yardsticks: tuple[Any, ...], largest: float, within: torch.dtype
) -> None:
    """Within 8 × the yardsticks' error, 32 units of the element and its tensor, and of what may have cancelled.

    Where a backend rounds products to ``within``, that is the unit of what cancels: with one key to attend to, the
    gradient of a score is the difference of two equal products, nothing in the plain formula but not there.
    """
    inside = truth.isfinite()
    assert torch.equal(actual[truth.isinf()].double(), truth[truth.isinf()])
    a, t = (x[inside].double() for x in (actual, truth))
    if not t.numel():
        return
    erred = max((y[inside].double() - t).abs().nan_to_num(0.0, posinf=0.0).max() for y in yardsticks if y is not None)
    unit = torch.finfo(actual.dtype).eps
    cancelled = torch.finfo(within).eps * (1 + largest) ** 2
    allowed = FACTOR * erred + 32 * (unit * (t.abs() + t.square().mean().sqrt()) + cancelled)
    worst = ((a - t).abs() - allowed).max()
    assert worst <= 0, f"off by {(a - t).abs().max().item():.3g} where the plain formula errs {erred:.3g}"
