"""The router of a GPU, interpreted: the picks of ``top_blocks`` to the last index."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.proofs.traffic import counted
from kernel_index.routing.block_router import triton
from kernel_index.routing.block_router.api import BACKENDS, block_router
from kernel_index.routing.block_router.native import native_top_blocks
from kernel_index.routing.block_router.scores import block_scores
from kernel_index.routing.block_router.torch_op import triton_top_blocks
from kernel_index.routing.legal_blocks import LegalBlocks, block_means, legal_blocks, num_blocks, top_blocks

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")

CALLS = {  # (B, T, S, H, G, K, D, block, topk), mask
    "picks of a key head": ((2, 50, 50, 4, 2, 2, 8, 2, 3), ki.MaskContract()),
    "picks of each head, T < S, as many as are kept": ((1, 30, 70, 4, 4, 2, 7, 2, 8), ki.MaskContract()),
    "queries in front of the keys": ((1, 40, 24, 6, 2, 1, 8, 2, 5), ki.MaskContract()),
    "documents in a window": (
        (2, 64, 64, 2, 1, 1, 16, 1, 6),
        ki.MaskContract(window=(13, 0), doc_ids=torch.arange(64) // 23),
    ),
    "one block each": ((1, 20, 20, 2, 1, 1, 8, 4, 1), ki.MaskContract()),
    "rows of two parts": ((1, 3, 410, 2, 2, 1, 8, 2, 12), ki.MaskContract()),
    "rows of four parts in a window": ((1, 3, 900, 2, 2, 1, 8, 2, 9), ki.MaskContract(window=(611, 0))),
    "rows of eight parts": ((1, 5, 1900, 2, 2, 1, 8, 2, 16), ki.MaskContract()),
}


def draw(sizes, mask, dtype=torch.float32):
    b, t, s, h, _, k, d, block, _ = sizes
    generator = torch.Generator().manual_seed(0)
    q, key = (torch.randn(b, n, heads, d, generator=generator).to(dtype) for n, heads in ((t, h), (s, k)))
    return q, block_means(key, block, mask), legal_blocks(mask, mask.sizes(b, t, s, q.device), block)


SPECIAL = (0.0, float("nan"), float("inf"), -float("inf"))


@interpreted
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("special", [None, *SPECIAL])
def test_picks_are_those_of_top_blocks(name, special):
    sizes, mask = CALLS[name]
    q, means, legal = draw(sizes, mask)
    if special is not None:
        q[:, ::3], means[:, ::4, :, 0] = -0.0, special
    groups, topk = sizes[4], sizes[8]
    expected = top_blocks(block_scores(q, means, groups), legal, topk)
    actual = triton_top_blocks(q, means, legal, topk, groups)
    assert torch.equal(actual.indices, expected.indices)
    assert torch.equal(actual.valid, expected.valid)
    assert expected.valid.any()


@interpreted
@pytest.mark.parametrize("count", [2, 3, 4, 16])
def test_picks_where_many_of_the_best_are_of_one_column(count):
    """Blocks 128 apart are of one column of a row of 1024, and the best two of a column are looked at first."""
    means = torch.randn(1, 1000, 1, 8, generator=torch.Generator().manual_seed(0))
    means[:, 77::128, :, 0] += 50.0
    means[:, 77 + 128 * count :, :, 0] -= 50.0
    q = torch.zeros(1, 2, 2, 8)
    q[..., 0] = 1.0
    legal = LegalBlocks(torch.zeros(1, 2, dtype=torch.int32), torch.full((1, 2), 999, dtype=torch.int32))
    expected = top_blocks(block_scores(q, means, 2), legal, 16)
    assert torch.equal(triton_top_blocks(q, means, legal, 16, 2).indices, expected.indices)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("special", SPECIAL)
def test_native_picks_are_those_of_top_blocks(name, special):
    """Also where scores are equal or not numbers: of 0 only the sign differs between some of them."""
    sizes, mask = CALLS[name]
    q, means, legal = draw(sizes, mask)
    q[:, ::3], means[:, ::4, :, 0] = -0.0, special
    groups, topk = sizes[4], sizes[8]
    expected = top_blocks(block_scores(q, means, groups), legal, topk)
    for got, want in zip(native_top_blocks(q, means, legal, topk, groups), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["clustered", "moba", "moba by key head"])
def test_a_future_token_changes_no_pick_output_or_gradient_of_the_native_kernels(kind):
    """Long enough for the native router and core to be what ``auto`` takes."""

    def attend(q, k, v):
        if kind == "clustered":
            return ki.clustered_sparse_attention(q, k, v, config=ki.ClusteredSparseConfig(block_size=8, topk=4))
        per = "kv_group" if kind.endswith("key head") else "query_head"
        return ki.moba_attention(q, k, v, block_size=8, topk=4, route_per=per)

    g, cut = torch.Generator().manual_seed(0), 700
    before = [torch.randn(1, 1024, heads, 16, generator=g) for heads in (4, 2, 2)]
    after = [torch.cat([x[:, :cut], 100 * torch.randn(1, 1024 - cut, *x.shape[2:], generator=g)], 1) for x in before]
    results = []
    for tensors in (before, after):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with ki.receipts() as log:
            out = attend(*leaves)
        assert log[0].ran == "native"
        results.append([out[:, :cut], *(x[:, :cut] for x in torch.autograd.grad(out[:, :cut].square().sum(), leaves))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_native_picks_over_several_steps_of_blocks():
    sizes, mask = (2, 200, 1400, 4, 4, 2, 16, 4, 9), ki.MaskContract(window=(1100, 0))
    q, means, legal = draw(sizes, mask)
    assert torch.equal(
        native_top_blocks(q, means, legal, 9, 4).indices, top_blocks(block_scores(q, means, 4), legal, 9).indices
    )


@interpreted
def test_among_equal_scores_the_smallest_index_wins():
    """Queries of zeros tie everywhere, also with −0.0; steps of 16 blocks are joined in this order, too."""
    sizes, mask = (1, 40, 40, 2, 2, 1, 8, 1, 4), ki.MaskContract()
    q, means, legal = draw(sizes, mask)
    q[:, :, 0] = 0.0
    q[:, 20:, 0] = -0.0
    q[:, ::2, 1] = 0.0
    actual = triton_top_blocks(q, means, legal, 4, 2)
    assert torch.equal(actual.indices, top_blocks(block_scores(q, means, 2), legal, 4).indices)
    assert actual.indices[0, 30, 0].tolist() == [0, 1, 2, 30]


@interpreted
def test_a_chunk_of_scores_is_stored_once_and_read_once(monkeypatch):
    sizes, mask = (1, 64, 64, 2, 1, 1, 16, 1, 4), ki.MaskContract()
    q, means, legal = draw(sizes, mask, torch.bfloat16)
    monkeypatch.setattr(triton, "SCORES_BYTES", 32 * (64 + 15) * 4)
    with counted() as traffic:
        picks = triton_top_blocks(q, means, legal, 4, 1, (0, 1))
    launches = [c for c in traffic.counts if c.is_launch]
    assert [c.name for c in launches] == ["_scores_kernel", "_select_kernel"] * 2
    for scored, selected, blocks in zip(launches[::2], launches[1::2], (32, 64), strict=True):
        stored = 32 * blocks * 4
        operands = (q.numel() // 2, 3 * blocks * 16)
        assert scored.lanes <= stored + 2 * sum(operands) * 2 + 2 * 32 * 4
        assert selected.lanes <= stored + 32 * (4 + 2) * 4
        assert scored.atomics == selected.atomics == 0
    assert torch.equal(picks.indices, top_blocks(block_scores(q, means, 1), legal, 4).indices)


@interpreted
@pytest.mark.parametrize("topk", [1, 2, 33])
def test_long_rows_and_few_or_many_blocks(topk):
    """Rows whose parts bound the best ones, and equal scores on both sides of what is kept."""
    sizes, mask = (1, 40, 600, 2, 2, 1, 8, 2, topk), ki.MaskContract()
    q, means, legal = draw(sizes, mask)
    means = means.round()
    q = q.round()
    actual = triton_top_blocks(q, means, legal, topk, 2, (560, 2))
    assert torch.equal(actual.indices, top_blocks(block_scores(q, means, 2), legal, topk).indices)


def test_rows_of_any_length_fit_the_registers_of_a_multiprocessor():
    config = triton.Config(64, 64, 4, 2, triton.MANY_PROGRAMS)
    for width in (2**n for n in range(4, 21)):
        options = triton.select_options(width, config)
        assert options.get("maxnreg", 64) * 32 * options["num_warps"] <= 65_536, width
    assert triton.select_options(1024, config) == {"num_warps": 1, "maxnreg": 96}


@interpreted
def test_the_parts_of_a_mean_are_its_float32():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).view(1, 4, 1, 16) * 1e3
    parts = triton.parts_of(x)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.float().sum(3), x)
    assert not torch.equal(parts[..., :2, :].float().sum(3), x)


def test_rules_of_the_triton_kernel():
    def verdict(width, topk, keys=400):
        q, k = torch.zeros(1, 4, 2, width), torch.zeros(1, keys, 1, width)
        return ki.explain(block_router, q, k, block_size=4, topk=topk, groups=1).verdicts["triton"]

    assert verdict(8, 65) == "keeps at most 64 blocks of a query"
    assert verdict(129, 4) == "needs head sizes of at most 128"
    assert verdict(8, 65, keys=40) == verdict(8, 4), "there are no more blocks to keep than there are"
    assert verdict(8, 4) is not None, "on a CPU auto takes PyTorch or C++, which are faster there"


@pytest.mark.parametrize("name", CALLS)
def test_backends_agree(name):
    (b, t, s, h, groups, kv_heads, d, block, topk), mask = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(b, n, heads, d, generator=generator) for n, heads in ((t, h), (s, kv_heads)))
    call = {"block_size": block, "topk": topk, "groups": groups, "mask": mask}
    expected = block_router(q, k, **call, backend="reference")
    verdicts = ki.explain(block_router, q, k, **call).verdicts
    for backend in BACKENDS[:-1]:
        if verdicts[backend.name] not in (None, TOO_FEW, INTERPRETED):
            continue
        actual = block_router(q, k, **call, backend=backend.name)
        assert torch.equal(actual.indices, expected.indices), backend.name
        assert torch.equal(actual.valid, expected.valid), backend.name


TOO_FEW = "too few scores for it to pay"
INTERPRETED = "interpreted on a CPU: only when asked for by name"


@interpreted
def test_attention_routes_by_what_is_named():
    """The same selection for clustered and MoBA routing by the kernel of a GPU as by PyTorch."""
    q, k = torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8)
    config = ki.ClusteredSparseConfig(block_size=4, topk=3)
    assert num_blocks(40, 4) > config.topk
    for route in (
        lambda backend: ki.clustered_route(q, k, config=config, backend=backend),
        lambda backend: ki.moba_route(q, k, block_size=4, topk=3, backend=backend),
    ):
        with ki.receipts() as log:
            expected, actual = route("chunked"), route("triton")
        assert [r.ran for r in log] == ["chunked", "triton"]
        assert torch.equal(actual.indices, expected.indices)
        assert torch.equal(actual.valid, expected.valid)
