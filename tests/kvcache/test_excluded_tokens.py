"""Tokens of a cache that a query may not see have no influence on it, also where they are NaN or infinity.

The law of ``tests/test_excluded_keys.py`` for decoding: slots that hold no token, other rows, tokens outside a window
or a selection, and new tokens after the query.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core.testing import Maker, suites
from kernel_index.proofs.errors import differentiable, run

NAN, INF = float("nan"), float("inf")
DECODING = [s for s in suites() if s.op in ("fa4_kvcache_decode", "moba_decode", "selected_decode")]
CASES = [
    pytest.param(s, b.name, c, id=f"{s.op}-{b.name}-{c.name}") for s in DECODING for b in s.backends for c in s.cases
]

INTERPRETED = ("paged_several", "window", "both_sides", "more_queries", "paged", "tokens_paged", "blocks")


def slot(call: dict[str, Any], b: int, s: int) -> tuple[int, int]:
    """Where token s of row b is in ``past``: tokens of a row, or a page and a slot in it."""
    if "past_k" in call or call.get("block_table") is None:
        return b, s
    page = call["k_cache"].shape[1]
    return int(call["block_table"][b, s // page]), s % page


def tokens_used(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Bool, the shape of the cache [·, ·]: slots with a token that some query may see, and those of row 0."""
    past = call["past_k"] if "past_k" in call else call["k_cache"]
    used, first = torch.zeros(past.shape[:2], dtype=torch.bool), torch.zeros(past.shape[:2], dtype=torch.bool)
    left = call.get("window_size", (-1, -1))[0]
    size, queries, new = call.get("block_size", 1), call["q"].shape[1], 0 if call["k"] is None else call["k"].shape[1]
    for b, n in enumerate(call["lengths"] if "past_k" in call else call["cache_seqlens"].tolist()):
        low = 0 if left is None or left < 0 else max(0, n + new - queries - left)
        if "topk" in call:  # the mean of a block has the tokens that the window cuts off
            low = low // size * size
        blocks = set(call["indices"][b].flatten().tolist()) if "indices" in call else None
        for s in range(low, n):
            if blocks is None or s // size in blocks:
                used[slot(call, b, s)] = True
                first[slot(call, b, s)] |= b == 0
    return used, first


def poisoned(call: dict[str, Any], value: float) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """Calls with excluded tokens that are ``value``, and which queries [B, Lq] may see none of them."""
    used, first = tokens_used(call)
    names = ("past_k", "past_v") if "past_k" in call else ("k_cache", "v_cache")
    everybody = torch.ones(call["q"].shape[:2], dtype=torch.bool)
    for label, which in (("no token", ~used), ("first row", first)):
        if which.any():
            made = call | {x: call[x].masked_fill(which[..., None, None], value) for x in names}
            good = everybody.clone()
            good[0] = label == "no token"
            yield label, made, good
    if call.get("causal", True) and call["k"] is not None and min(call["k"].shape[1], call["q"].shape[1]) > 1:
        made = call | {x: call[x].clone() for x in ("k", "v")}
        made["k"][:, -1], made["v"][:, -1] = value, value
        good = everybody.clone()
        good[:, -1] = False
        yield "last token", made, good


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize(("suite", "backend", "case"), CASES)
def test_what_is_excluded_has_no_influence(suite, backend, case, value):
    if backend == "triton" and (value == INF or case.name not in INTERPRETED):
        pytest.skip("the interpreter takes seconds for each")
    call = case.build(Maker(torch.float32))
    reason = ki.explain(suite.function, **call, backend=backend).verdicts[backend]
    if reason:
        pytest.skip(reason)
    names = [x for x in differentiable(suite, call, backend) if call[x] is not None]
    for label, made, good in poisoned(call, value):
        outputs = run(suite.function, call, [], backend=backend)[0]
        upstream = [Maker(torch.float32, seed=5).normal(*o.shape) for o in outputs]
        upstream[0][~good] = 0.0
        plain, found = (run(suite.function, x, names, upstream, backend=backend) for x in (call, made))
        assert torch.equal(found[0][0][good], plain[0][0][good]), label
        if label == "last token" and suite.op != "selected_decode":  # the last query sees it
            assert not found[0][0][:, -1].isfinite().any()
        if "q" in names:
            assert torch.equal(found[1][0][good], plain[1][0][good]), f"dq, {label}"
        if label == "no token":
            for x, a, b in zip(names, plain[1], found[1], strict=True):
                assert torch.equal(a, b), f"d{x}, {label}"
