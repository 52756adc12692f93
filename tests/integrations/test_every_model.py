"""Every model of the installed Transformers that can be built small: patched it equals stock, or is left with a reason.

The list is the library's registry.  CI takes a drawn share; ``--hypothesis-profile nightly`` takes all models, and the
slow ways as well.  ``docs/reliability.md`` has the counts of a whole run.
"""

import copy
import random
import zlib

import pytest

pytest.importorskip("transformers")

import kernel_index as ki
from tests.integrations.every_model import ROUNDING, compare
from tests.integrations.tiny_models import CannotBeBuilt, model_of, registry
from tests.integrations.ways import CALLS, EVERY, GENERATING, difference, outcome_of

SHARE = 24
"""Models of a CI run, a different one of each kind of convention as the draw has it; the seed is fixed."""

KNOWN = registry()


def pytest_generate_tests(metafunc):
    if "known" in metafunc.fixturenames:
        nightly = metafunc.config.getoption("--hypothesis-profile") == "nightly"
        chosen = KNOWN if nightly else sorted(random.Random(18).sample(KNOWN, SHARE))
        quick = [] if nightly else chosen[::3]
        marks = [() if known in quick else pytest.mark.thorough for known in chosen]
        metafunc.parametrize("known", [pytest.param(k, marks=m) for k, m in zip(chosen, marks, strict=True)], ids=str)


def ways_of(known, nightly):
    if nightly:
        return EVERY
    drawn = random.Random(zlib.crc32(str(known).encode()))
    return {n: w for n, w in (CALLS | GENERATING).items() if n in drawn.sample([*CALLS, *GENERATING], 16)}


def test_patched_equals_stock(known, request):
    nightly = request.config.getoption("--hypothesis-profile") == "nightly"
    try:
        found = compare(known, ways_of(known, nightly))
    except CannotBeBuilt as why:
        pytest.skip(f"cannot be built small: {why}")
    assert all(c.by or c.why for c in found.report.changes)
    assert found.wrong == {}


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
