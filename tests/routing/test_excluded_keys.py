"""A key that a query may not see does not change its selection, also where it is NaN or infinity.

The law of ``tests/test_excluded_keys.py`` for routers.  A block is scored by its mean key.  Only queries of the
document of its last key may select it, so its mean has the keys of that document alone; a key that a window cuts off is
in it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core.testing import Maker, suites
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.proofs.errors import differentiable, run

NAN, INF = float("nan"), float("inf")
KEYS = {
    "block_router": "k",
    "hierarchical_block_select": "block_keys",
    "importance_route": "block_keys",
    "lightning_indexer": "k_idx",
}
QUERIES = {"lightning_indexer": "q_idx"}
ROUTERS = [s for s in suites() if s.op in KEYS]
CASES = [
    pytest.param(s, b.name, c, id=f"{s.op}-{b.name}-{c.name}") for s in ROUTERS for b in s.backends for c in s.cases
]


def seen_by(suite, call: dict[str, Any]) -> Tensor:
    """Bool [B, T, n]: the keys, or the blocks of keys, that a query may see."""
    (batch, queries), n = call[QUERIES.get(suite.op, "q")].shape[:2], call[KEYS[suite.op]].shape[1]
    keys, mask = call.get("kv_len", n), call.get("mask") or MaskContract()
    allowed = mask.dense(batch, queries, keys)[:, 0]
    if KEYS[suite.op] != "block_keys":
        return allowed
    padded = torch.nn.functional.pad(allowed, (0, n * call["block_size"] - keys))  # a block that still grows has no key
    return padded.unflatten(2, (n, call["block_size"])).any(3)


def poisoned_keys(call: dict[str, Any], seen: Tensor) -> dict[str, Tensor]:
    batch, n = seen.shape[0], seen.shape[2]
    found = {"unseen": ~seen.any(1), "future": (torch.arange(n) >= n // 2).expand(batch, -1)}
    docs = (call.get("mask") or MaskContract()).document_rows(n)
    if docs is not None and docs.shape[1] == n:
        found["document"] = (docs == docs[:, n // 2 : n // 2 + 1]).expand(batch, -1)
        found["first"] = (docs == docs[:, :1]).expand(batch, -1)
    return {name: which for name, which in found.items() if which.any()}


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(("suite", "backend", "case"), CASES)
def test_what_is_excluded_does_not_change_a_selection(suite, backend, case, value):
    call = case.build(Maker(torch.float32))
    reason = ki.explain(suite.function, **call, backend=backend).verdicts[backend]
    if reason:
        pytest.skip(reason)
    seen, names = seen_by(suite, call), differentiable(suite, call, backend)
    name, query = KEYS[suite.op], QUERIES.get(suite.op, "q")
    for label, which in poisoned_keys(call, seen).items():
        bad = (seen & which[:, None]).any(-1)  # [B, T]
        silent = bad | ~seen.any(-1)
        made = call | {name: call[name].clone(), query: call[query].clone()}
        made[name][which] = value
        made[query][~seen.any(-1)] = value

        outputs = run(suite.function, call, [], backend=backend)[0]
        upstream = [Maker(torch.float32, seed=5).normal(*o.shape) for o in outputs]
        upstream = [g.masked_fill(silent.view(*silent.shape, *[1] * (g.ndim - 2)), 0.0) for g in upstream]
        plain, found = (run(suite.function, x, names, upstream, backend=backend) for x in (call, made))
        for a, b in zip(plain[0], found[0], strict=True):
            assert torch.equal(a[~bad], b[~bad]), label
        of_keys = ~(seen & bad[..., None]).any(1)
        for at, a, b in zip(names, plain[1], found[1], strict=True):
            kept = of_keys if at == name else ~bad
            assert torch.equal(a[kept], b[kept]), f"gradient of {at}, {label}"
