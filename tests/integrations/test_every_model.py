"""Every model of the installed Transformers that can be built small: patched it equals stock, or is left with a reason.

The list is the library's registry.  CI takes a drawn share; ``--hypothesis-profile nightly`` takes all models, and the
slow ways as well.  ``docs/reliability.md`` has the counts of a whole run.
"""

import copy
import random
import zlib

import pytest
import torch

pytest.importorskip("transformers")

import kernel_index as ki
from kernel_index.proofs.errors import floor
from tests.integrations.tiny_models import CannotBeBuilt, model_of, registry
from tests.integrations.ways import CALLS, EVERY, EXACT, GENERATING, difference, outcome_of

SHARE = 24
"""Models of a CI run, a different one of each kind of convention as the draw has it; the seed is fixed."""

ROUNDING = 3e-4
"""Two layers with weights three times too large: what float32 rounding grows to, far below any convention's effect."""

KNOWN = registry()


def pytest_generate_tests(metafunc):
    if "known" in metafunc.fixturenames:
        nightly = metafunc.config.getoption("--hypothesis-profile") == "nightly"
        chosen = KNOWN if nightly else sorted(random.Random(18).sample(KNOWN, SHARE))
        metafunc.parametrize("known", chosen, ids=str)


def ways_of(known, nightly):
    if nightly:
        return EVERY
    drawn = random.Random(zlib.crc32(str(known).encode()))
    return {n: w for n, w in (CALLS | GENERATING).items() if n in drawn.sample([*CALLS, *GENERATING], 16)}


def test_patched_equals_stock(known, request):
    try:
        stock = model_of(known)
    except CannotBeBuilt as why:
        pytest.skip(f"cannot be built small: {why}")
    patched = copy.deepcopy(stock)
    report = ki.transformers.apply(patched)
    assert all(c.by or c.why for c in report.changes)
    nightly = request.config.getoption("--hypothesis-profile") == "nightly"
    wrong = {}
    for name, way in ways_of(known, nightly).items():
        expected = outcome_of(way, copy.deepcopy(stock), known)
        if isinstance(expected, str):
            continue  # the stock model does not run this way
        actual = outcome_of(way, copy.deepcopy(patched), known)
        if isinstance(actual, str):
            wrong[name] = actual
            continue
        error, where = difference(actual, expected)
        if error > ROUNDING and not (name in EXACT and _as_exact(name, actual, expected, stock, known)):
            wrong[name] = (error, where)
    assert wrong == {}


def _as_exact(name, actual, expected, stock, known):
    """Whether a result rounded to bfloat16 is as near to the float32 model's as that of the stock model."""
    if not EXACT[name]:  # only losses are known, which Trainer rounds to four digits
        return difference(actual, expected)[0] <= 16 * floor(torch.bfloat16)
    truth = outcome_of(EVERY[EXACT[name]], copy.deepcopy(stock), known)
    as_truth = [{n: x.to(truth[n].dtype) for n, x in found.items()} for found in (actual, expected)]
    ours, theirs = (difference(found, truth)[0] for found in as_truth)
    return ours <= 2 * theirs + floor(torch.bfloat16)


def test_the_registry_is_not_empty_and_most_of_it_can_be_built():
    kinds = [known.kind for known in KNOWN]
    assert len(KNOWN) > 200
    assert {"decoder", "encoder", "encoder-decoder"} == set(kinds)


def test_a_patched_model_that_computes_something_else_is_found(monkeypatch):
    """The comparison can fail: a rotation by another angle is seen in every way of calling."""
    from kernel_index.integrations.hugging_face import rope

    known = next(k for k in KNOWN if str(k) == "decoder:llama")
    stock = model_of(known)
    patched = copy.deepcopy(stock)
    right = rope._rotate
    ki.transformers.apply(patched, norms=False, loss=False, experts=False, attention=False)
    monkeypatch.setattr(rope, "_rotate", lambda q, k, cos, sin, *rest: right(q, k, cos, 1.2 * sin, *rest))
    for name in ("plain", "trained", "greedy"):
        found = [outcome_of(EVERY[name], copy.deepcopy(m), known) for m in (patched, stock)]
        assert difference(*found)[0] > 2 * ROUNDING
