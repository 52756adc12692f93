"""Metadata, selections and caches: one argument goes wrong, or none does and the result is checked."""

import inspect
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.core.testing import suites
from tests.fuzz.calls import CALLS
from tests.fuzz.mutate import mutated
from tests.fuzz.outcome import Refused, nothing_written, outcome_of

NOT_CALLED = {  # they take no data: blocks of a with statement, a subprocess, a function's own arguments
    "receipts": "a context",
    "strict": "a context",
    "force": "a context",
    "numerics": "a context",
    "explain": "runs the checks of another function, which are fuzzed there",
    "fa4_execute_proof": "starts a process; its request is checked in its own tests",
}


def test_every_public_function_is_fuzzed():
    functions = {n for n in ki.__all__ if inspect.isfunction(getattr(ki, n))}
    covered = {s.op for s in suites()} | set(CALLS) | set(NOT_CALLED)
    assert functions - covered == set()
    assert not {name.partition(".")[0] for name in CALLS} - set(ki.__all__)


@pytest.mark.parametrize("name", CALLS)
@given(seed=st.integers(0, 2**40))
def test_a_call_is_right_or_says_no(name: str, seed: int):
    try_one(name, seed)


def try_one(name: str, seed: int) -> None:
    rng = random.Random(seed)
    call = CALLS[name]
    kwargs, kind = call.build(rng), "legal"
    if rng.random() < 0.8:
        kwargs, kind = mutated(rng, kwargs)
    with nothing_written(kwargs, but=("k_cache", "v_cache")):
        result = outcome_of(name, lambda: call.function(**kwargs))
    if isinstance(result, Refused):
        in_place = "without gradients: they are written in place" in str(result.error)
        assert kind != "legal" or in_place, f"a legal call was refused: {result.error}"
    elif kind == "legal" and call.check is not None:
        call.check(kwargs, result)
