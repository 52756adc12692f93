"""Clustered attention: oracle, causality, packing, receipts, reroute."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.force import reload_environment
from kernel_index.proofs.errors import floor, relative_error

CONFIG = ki.ClusteredSparseConfig(block_size=8, topk=3, query_tile_size=16)
ROUTERS = {
    "exhaustive": CONFIG,
    "unfused": ki.ClusteredSparseConfig(block_size=8, topk=3, fused_scoring=False),
    "hierarchical": ki.ClusteredSparseConfig(block_size=8, topk=3, hierarchy=(2, 2)),
}


def tensors(t=90, h=4, k=2, d=8, b=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, t, x, d, generator=g, dtype=torch.float64).to(dtype) for x in (h, k, k)]


def close(a, b):
    return relative_error(a, b.double()) <= 8 * floor(a.dtype)


@pytest.mark.parametrize("router", ROUTERS)
def test_no_future_token_changes_a_pick_an_output_or_a_gradient(router):
    config, cut = ROUTERS[router], 53
    q, k, v = tensors()
    later = [x.clone() for x in (q, k, v)]
    for i, x in enumerate(later):
        x[:, cut:] = 5 * torch.randn(x[:, cut:].shape, generator=torch.Generator().manual_seed(i))
    routes = [ki.clustered_route(*x[:2], config=config).indices[:, :cut] for x in ((q, k), later)]
    assert torch.equal(*routes)
    grads = []
    for inputs in ((q, k, v), later):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = ki.clustered_sparse_attention(*leaves, config=config)[:, :cut]
        grads.append((out, *(g[:, :cut] for g in torch.autograd.grad(out.square().sum(), leaves))))
    for a, b in zip(*grads, strict=True):
        assert close(a, b)


@pytest.mark.parametrize("router", ROUTERS)
def test_picking_every_block_is_dense_attention(router):
    q, k, v = tensors()
    hierarchy = (2, 99) if router == "hierarchical" else None
    config = ki.ClusteredSparseConfig(
        block_size=8, topk=99, hierarchy=hierarchy, fused_scoring=ROUTERS[router].fused_scoring
    )
    for mask in (ki.MaskContract(), ki.MaskContract(window=(20, 0), doc_ids=torch.arange(90) // 37)):
        out, lse = ki.clustered_sparse_attention_with_lse(q, k, v, config=config, mask=mask, softcap=2.0)
        dense = ki.attention_with_lse(q, k, v, mask, softcap=2.0)
        assert close(out, dense.out)
        assert close(lse, dense.lse)
        assert torch.equal(out, ki.clustered_sparse_attention(q, k, v, config=config, mask=mask, softcap=2.0))


def test_routers_agree_where_they_must():
    q, k, _ = tensors(t=300)
    for mask in (ki.MaskContract(), ki.MaskContract(window=(70, 0), doc_ids=torch.arange(300) // 111)):
        plain = ki.clustered_route(q, k, config=CONFIG, mask=mask)
        for config in (
            ROUTERS["unfused"],
            ki.ClusteredSparseConfig(block_size=8, topk=3, hierarchy=(4, 99)),
        ):
            other = ki.clustered_route(q, k, config=config, mask=mask)
            assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_chunks_and_tiles_that_the_plan_skips_change_nothing(monkeypatch):
    """The windowing plan saves scores; what it leaves must be the same as scoring everything at once."""
    from kernel_index.kernels.sparse.clustered_sparse_three_phase import scoring_chunks

    q, k, _ = tensors(t=300)
    mask = ki.MaskContract(window=(70, 0))
    whole = ki.clustered_route(q, k, config=CONFIG, mask=mask)
    monkeypatch.setattr(scoring_chunks, "QUERIES", 37)
    monkeypatch.setattr(scoring_chunks, "TILE_BLOCKS", 2)
    plans = [c.plan for c in scoring_chunks.chunks_of(mask, mask.sizes(2, 300, 300, torch.device("cpu")), 8)]
    assert sum(p.skipped_future_tiles for p in plans) > 0
    assert sum(p.skipped_past_tiles for p in plans) > 0
    chunked = ki.clustered_route(q, k, config=CONFIG, mask=mask, backend="chunked")
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_packed_documents_are_the_documents_alone():
    """Of lengths that are whole blocks, so that both have the same blocks."""
    q, k, v = tensors(t=88, b=1)
    mask = ki.MaskContract(doc_ids=torch.tensor([[0] * 40 + [1] * 48]))
    packed = ki.clustered_sparse_attention(q, k, v, config=CONFIG, mask=mask)
    alone = [
        ki.clustered_sparse_attention(*(x[:, at] for x in (q, k, v)), config=CONFIG)
        for at in (slice(40), slice(40, 88))
    ]
    assert close(packed, torch.cat(alone, 1))


def test_another_document_in_a_shared_block_has_no_say():
    q, k, _ = tensors(t=88, b=1)
    mask = ki.MaskContract(doc_ids=torch.tensor([[0] * 44 + [1] * 44]))
    before = ki.clustered_route(q, k, config=CONFIG, mask=mask).indices[:, 44:]
    k[:, :44] *= -7
    assert torch.equal(before, ki.clustered_route(q, k, config=CONFIG, mask=mask).indices[:, 44:])


def test_receipt_names_every_phase():
    q, k, v = tensors(t=300)
    with ki.receipts() as log:
        ki.clustered_sparse_attention(q, k, v, config=CONFIG, backend="cpu")
        ki.clustered_sparse_attention(q, k, v, config=CONFIG, backend="cpu")
    mine = [r for r in log if r.op == "clustered_sparse_attention"]
    assert [r.ran for r in mine] == ["cpu", "cpu"]
    said = mine[0].details
    assert (said["path"], said["reason"]) == ("clustered", "")
    assert said["phase_order"] == ("scoring", "union", "attention")
    assert said["routing_is_stop_gradient"] is True
    assert said["attention_is_differentiable"] is True
    assert (said["scoring_backend"], said["attention_backend"]) == ("exhaustive, fused", "cpu")
    assert said["density"] == 3 / 38
    assert mine[1].details["mask_cache"] == "hit"
    assert "mean_union_over_picks" not in said, "reading values is for those who ask"


def test_unions_are_reported_and_too_large_ones_go_dense():
    q, k, v = tensors(t=300)
    reported = ki.ClusteredSparseConfig(block_size=8, topk=3, query_tile_size=16, report_unions=True)
    with ki.receipts() as log:
        ki.clustered_sparse_attention(q, k, v, config=reported)
    maps = ki.union_selection(ki.clustered_route(q, k, config=CONFIG).indices, query_tile_size=16, num_blocks=38)
    said = next(r.details for r in log if r.op == "clustered_sparse_attention")
    assert said["mean_union_over_picks"] == maps.telemetry(38).mean_over_picks > 1
    share = maps.telemetry(38).mean_over_blocks
    for above, path in ((share / 2, "reroute_to_dense"), (share * 2, "clustered")):
        config = ki.ClusteredSparseConfig(block_size=8, topk=3, query_tile_size=16, dense_above=above)
        with ki.receipts() as log:
            out = ki.clustered_sparse_attention(q, k, v, config=config, backend="reference")
        (receipt,) = log
        assert (receipt.ran, receipt.details["path"]) == ("reference", path)
        assert receipt.details["attention_backend"] == (
            "dense_attention" if path == "reroute_to_dense" else "reference"
        )
        assert receipt.details["mean_union_over_blocks"] == share
        assert receipt.details["routed_by"] == "reference"
        assert (receipt.details["reason"] == "union_above_dense_above") == (path == "reroute_to_dense")
        assert close(out, ki.attention(q, k, v)) == (path == "reroute_to_dense")


def test_routing_has_no_gradient_and_changes_nothing():
    q, k, v = (x.requires_grad_() for x in tensors(t=40))
    picked = ki.clustered_route(q, k, config=CONFIG)
    assert not any(x.requires_grad for x in picked)
    assert all(x._version == 0 for x in (q, k, v))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"hierarchy": 3}, TypeError, "hierarchy must be a pair"),
        ({"hierarchy": (0, 1)}, ValueError, r"hierarchy\[0\] must be at least 1"),
        ({"union_mode": "hash"}, ValueError, "union_mode must be one of"),
        ({"dense_above": -0.5}, ValueError, "dense_above must be at least 0"),
        ({"fused_scoring": 1}, TypeError, "fused_scoring must be True or False"),
    ],
)
def test_bad_configs_say_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        ki.ClusteredSparseConfig(**options)


def test_bad_calls_say_what_is_wrong():
    q, k, v = tensors(t=16)
    with pytest.raises(TypeError, match="config must be a ClusteredSparseConfig, got dict"):
        ki.clustered_sparse_attention(q, k, v, config={})
    with pytest.raises(ValueError, match="mask must be causal"):
        ki.clustered_sparse_attention(q, k, v, config=CONFIG, mask=ki.MaskContract(causal=False))


def test_what_was_chosen_is_not_chosen_again(monkeypatch):
    """A variable that forces the core's own function must not change what runs behind another function's receipt."""
    monkeypatch.setenv("KERNEL_INDEX_BACKEND_BLOCK_SPARSE_ATTENTION", "reference")
    reload_environment()
    x = torch.randn(1, 32, 2, 8)
    with ki.receipts() as log:
        ki.clustered_sparse_attention(x, x, x, config=ki.ClusteredSparseConfig(block_size=4, topk=2), backend="cpu")
        ki.moba_attention(x, x, x, block_size=4, topk=2, backend="cpu")
    seen = [(r.op, r.ran, r.forced_by) for r in log]
    assert seen == [("clustered_sparse_attention", "cpu", None), ("moba_attention", "cpu", None)]
