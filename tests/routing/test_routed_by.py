"""Attention that routes: one receipt, which names the router's backend, and who decides about the router."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.force import reload_environment

CONFIG = ki.ClusteredSparseConfig(block_size=8, topk=4)
SEARCHED = ki.ClusteredSparseConfig(block_size=8, topk=4, hierarchy=(4, 4))
CALLS = {
    "moba_attention": lambda q, k, v, **b: ki.moba_attention(q, k, v, block_size=8, topk=4, **b),
    "clustered_sparse_attention": lambda q, k, v, **b: ki.clustered_sparse_attention(q, k, v, config=CONFIG, **b),
    "hierarchy": lambda q, k, v, **b: ki.clustered_sparse_attention(q, k, v, config=SEARCHED, **b),
}
ROUTERS = {
    "moba_attention": "moba_route",
    "clustered_sparse_attention": "clustered_route",
    "hierarchy": "clustered_route",
}


def qkv(length=1024):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, heads, 16, generator=g) for heads in (4, 2, 2)]


def receipt_of(name, length=1024, **backend):
    with ki.receipts() as log:
        out = CALLS[name](*qkv(length), **backend)
    (receipt,) = log
    return receipt, out


@pytest.mark.parametrize("name", CALLS)
def test_one_receipt_names_the_router(name):
    by_auto = "chunked" if native.why_not(*qkv(8)) else "native"
    for backend, routed_by in (("auto", by_auto), ("cpu", by_auto), ("reference", "reference")):
        receipt, _ = receipt_of(name, backend=backend)
        assert receipt.routed_by == receipt.details["routed_by"] == routed_by
        assert backend in ("auto", receipt.ran)


@pytest.mark.parametrize("name", CALLS)
def test_a_router_may_be_forced_by_its_name(name, monkeypatch):
    expected, out = receipt_of(name)
    with ki.force("chunked", ROUTERS[name]):
        forced, same = receipt_of(name)
    assert (forced.ran, forced.routed_by, forced.forced_by) == (expected.ran, "chunked", None)
    assert torch.equal(out, same)
    monkeypatch.setenv(f"KERNEL_INDEX_BACKEND_{ROUTERS[name].upper()}", "reference")
    reload_environment()
    forced, _ = receipt_of(name)
    assert (forced.ran, forced.routed_by) == (expected.ran, "reference")


@pytest.mark.parametrize("name", CALLS)
def test_what_forces_every_op_speaks_of_the_attention(name):
    """And of its router only where it asks for the reference: not every router has a backend of that name."""
    with ki.force("cpu"):
        forced, _ = receipt_of(name)
    assert (forced.ran, forced.forced_by) == ("cpu", "ki.force")
    assert forced.routed_by in ("native", "chunked")
    with ki.force("reference"), ki.force("cpu", forced.op):
        assert receipt_of(name)[0].routed_by == "reference"
    with ki.force("reference"), ki.force("cpu"):
        assert receipt_of(name)[0].routed_by == forced.routed_by


@pytest.mark.parametrize("name", CALLS)
def test_a_router_that_fails_is_the_failure_of_the_call(name, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    if native.why_not(*qkv(8)):
        pytest.skip(native.why_not(*qkv(8)))
    monkeypatch.setattr(native, "call", fail)
    with ki.receipts() as log, pytest.raises(RuntimeError, match="no memory"):
        CALLS[name](*qkv(), backend="cpu")
    (receipt,) = log
    assert (receipt.ran, receipt.tried, receipt.error) == ("", "cpu", "RuntimeError: no memory")


def test_a_router_that_cannot_run_is_refused_by_name():
    with ki.receipts() as log, ki.force("chunked", "moba_attention"), pytest.raises(ki.Ineligible, match="chunked"):
        receipt_of("moba_attention", 16)
    with ki.force("sdpa", "moba_route"), pytest.raises(ki.Ineligible, match=r"moba_route: backend='sdpa'"):
        receipt_of("moba_attention", 16)
    assert log == []


@pytest.mark.parametrize("name", CALLS)
def test_explain_explains_the_attention_and_runs_nothing(name, monkeypatch):
    monkeypatch.setattr(torch, "topk", None)
    explained = ki.explain(CALLS[name], *qkv(64))
    assert explained.op in ("moba_attention", "clustered_sparse_attention")
    assert explained.would_run == "reference"
    router = ki.explain(getattr(ki, ROUTERS[name]), *qkv(64)[:2], **ROUTE[name])
    assert router.op == ROUTERS[name]


ROUTE = {
    "moba_attention": {"block_size": 8, "topk": 4},
    "clustered_sparse_attention": {"config": CONFIG},
    "hierarchy": {"config": SEARCHED},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_routers_own_functions_write_receipts(name):
    q, k, _ = qkv()
    selections = []
    with ki.receipts() as log:
        for backend in ("auto", "chunked", "reference"):
            selections.append(getattr(ki, ROUTERS[name])(q, k, **ROUTE[name], backend=backend))
    assert [(r.op, r.requested) for r in log] == [(ROUTERS[name], b) for b in ("auto", "chunked", "reference")]
    assert [r.ran for r in log[1:]] == ["chunked", "reference"]
    assert log[0].details["blocks"] == 128
    for other in selections[1:]:
        same = (other.indices == selections[0].indices).all(-1).float().mean()
        assert same > 0.999  # rounding decides between scores that are almost equal
