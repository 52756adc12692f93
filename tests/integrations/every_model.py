"""Stock beside patched, one model in many ways; ``python -m tests.integrations.every_model`` counts over all models.

With ``quick`` as its argument the command leaves out the slow ways, compiled and by ``Trainer``; ``slow`` takes these.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import kernel_index as ki
from kernel_index.proofs.errors import floor
from tests.integrations.tiny_models import CannotBeBuilt, Known, model_of, registry
from tests.integrations.ways import CALLS, EVERY, EXACT, GENERATING, SLOW, Outcome, difference, outcome_of

ROUNDING = 3e-4
"""Two layers with weights three times too large: what float32 rounding grows to, far below any convention's effect."""


class Comparison(NamedTuple):
    """``wrong`` names the ways in which the patched model differs; ``refused`` counts those that stock does not run."""

    compared: int
    refused: int
    wrong: dict[str, Any]
    report: Any


def compare(known: Known, ways: dict[str, Callable[[Any, Known], Outcome]]) -> Comparison:
    stock = model_of(known)
    patched = copy.deepcopy(stock)
    report = ki.transformers.apply(patched)
    compared, wrong = 0, {}
    for name, way in ways.items():
        expected = outcome_of(way, copy.deepcopy(stock), known)
        if isinstance(expected, str):
            continue
        compared += 1
        actual = outcome_of(way, copy.deepcopy(patched), known)
        if isinstance(actual, str):
            wrong[name] = actual
            continue
        error, where = difference(actual, expected)
        if error > ROUNDING and not (name in EXACT and _as_exact(name, actual, expected, stock, known)):
            wrong[name] = (error, where)
    return Comparison(compared, len(ways) - compared, wrong, report)


def _as_exact(name: str, actual: Outcome, expected: Outcome, stock: Any, known: Known) -> bool:
    """Whether a result rounded to bfloat16 is as near to the float32 model's as that of the stock model."""
    if not EXACT[name]:  # only losses are known, which Trainer rounds to four digits
        return difference(actual, expected)[0] <= 16 * floor(torch.bfloat16)
    truth = outcome_of(EVERY[EXACT[name]], copy.deepcopy(stock), known)
    assert not isinstance(truth, str)
    ours, theirs = (_error(found, truth) for found in (actual, expected))
    if ours <= 2 * theirs + floor(torch.bfloat16):
        return True
    # Routers and indexers choose: between two that are nearly equal the last bit decides, in the stock model as well.
    others = (outcome_of(EVERY[name], _shaken(stock, seed), known) for seed in range(48))
    return any(ours <= 2 * _error(o, truth) + floor(torch.bfloat16) for o in others if not isinstance(o, str))


def _error(found: Outcome, truth: Outcome) -> float:
    return difference({n: x.to(truth[n].dtype) for n, x in found.items()}, truth)[0]


def _shaken(model: Any, seed: int) -> Any:
    """The stock model with weights that differ by less than bfloat16 resolves."""
    shaken, make = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in shaken.parameters():
            if p.is_floating_point():
                p.mul_(1 + 2**-9 * (2 * torch.rand(p.shape, generator=make) - 1).to(p.dtype))
    return shaken


def main(which: str) -> None:
    torch.set_num_threads(1)
    ways = {"quick": {**CALLS, **GENERATING}, "slow": SLOW}.get(which, EVERY)
    counts: Counter[str] = Counter()
    for known in registry():
        counts["registered"] += 1
        try:
            found = compare(known, ways)
        except CannotBeBuilt as why:
            print(f"{known}: not built: {why}")
            continue
        counts["built"] += 1
        print(f"{known}: {found.compared} ways", flush=True)
        counts["comparisons"] += found.compared
        counts["refused by stock"] += found.refused
        counts["models that differ"] += bool(found.wrong)
        counts["modules replaced"] += len(found.report.replaced)
        counts["modules left"] += len(found.report.left)
        if found.wrong:
            print(f"{known}: {found.wrong}", flush=True)
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
